"""The service starts in an environment that was built from its own lock file and holds nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from .conftest import JSON, Running, environment, wait_until_alive


@pytest.fixture(scope="module")
def bare_python(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment: service/requirements.lock, by hash, and not even pip."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    python = home / "bin" / "python"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(home)], cwd=home.parent, check=True)
    lock = str(root / "service" / "requirements.lock")
    install = [*uv, "pip", "sync", "--python", str(python), "--require-hashes", lock]
    subprocess.run(install, cwd=home.parent, check=True)
    return python


@pytest.fixture
def shipped(root: Path, release: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a folder with what ships and no more: the service, the two modules it imports, one artifact."""
    shutil.copytree(root / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mlops_course").mkdir()
    for name in ("__init__.py", "blueprint.py", "serving.py", "monitoring.py"):
        shutil.copy(root / "mlops_course" / name, tmp_path / "mlops_course" / name)
    shutil.copytree(release[0], tmp_path / "model")
    return tmp_path


def test_the_service_answers_from_its_own_lock_alone(bare_python: Path, shipped: Path, release, example, unused_port):
    port = unused_port()
    lean = environment(
        APP_ENV="prod",
        GIT_SHA="test",
        MODEL_URI=str(shipped / "model"),
        MODEL_DIGEST=release[1],
        API_KEY="k7Qz9-mR2vXw8-Lp4tNb6",
        PORT=str(port),
        DRAIN_S="0",
    )
    del lean["PYTHONPATH"]
    log = shipped / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(bare_python), "-m", "service"], cwd=shipped, env=lean, stdout=output, stderr=output
        )
    running = Running(process, port, log)
    try:
        wait_until_alive(running)
        key = {"X-API-Key": lean["API_KEY"]}
        answer = httpx.post(running.url + "/v1/predict", content=json.dumps(example), headers=JSON | key)
        assert (answer.status_code, answer.json()["model_version"]) == (200, "1.0.0")
        assert running.stop() == 0
    finally:
        process.kill()


def test_the_environment_has_nothing_to_train_with(bare_python: Path):
    done = subprocess.run(
        [str(bare_python), "-c", "import pandas"], env={}, capture_output=True, text=True, check=False
    )
    assert "No module named 'pandas'" in done.stderr
