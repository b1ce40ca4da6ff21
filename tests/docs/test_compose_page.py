"""The page about containers: its commands are run, in order, from a clean clone, and it explains every setting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import yaml

from ops.docker import missing

from .test_golden_path import MARK, clean_environment, copy_files, difference, steps


@pytest.fixture
def clone(root: Path, artifacts_root: Path, tmp_path: Path) -> Generator[Path]:
    """Every file that git knows or would add, committed once, with the environment and the models."""
    if why := missing():
        pytest.skip(f"needs Docker: {why}")
    folder = copy_files(root, tmp_path / "project")
    for line in ("init -q", "config user.email a@example.org", "config user.name a", "add -A", "commit -q -m one"):
        subprocess.run(["git", *line.split()], cwd=folder, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    (folder / ".venv").symlink_to(root / ".venv")
    (folder / ".git" / "info" / "exclude").write_text(".venv\n")  # a link, while .gitignore names a folder
    shutil.copytree(artifacts_root, folder / "artifacts")
    yield folder
    images = [f"{name}:sha-{commit.stdout.strip()}" for name in ("flight-disruption", "flight-disruption-checks")]
    subprocess.run(["docker", "image", "rm", "--force", *images], capture_output=True, check=False)


def test_every_command_prints_what_the_page_says(root: Path, clone: Path, unused_port: Callable[[], int]) -> None:
    page = steps((root / "docs" / "compose.md").read_text())
    assert [command for command, _ in page if command.startswith("make ")] == [
        *("make image", "make up", "make smoke"),
        "make down",
    ]
    project = f"flights-page-{os.getpid()}"
    named = {"DOOR_PORT": 8080, "PROMETHEUS_PORT": 9090, "ALERTMANAGER_PORT": 9093, "GRAFANA_PORT": 3000}
    ports = {name: str(unused_port()) for name in (*named, "PORT")}
    environment = clean_environment() | ports | {"COMPOSE_PROJECT_NAME": project, "PYTHONPATH": str(clone)}

    def moved(text: str, back: bool = False) -> str:
        """Return a text with the ports of this test in place of those on the page, or the other way round."""
        for name, number in named.items():
            here, there = f"127.0.0.1:{number}", f"127.0.0.1:{ports[name]}"
            text = text.replace(there, here) if back else text.replace(here, there)
        return text

    lines = [f"{moved(command)}\nprintf '{MARK}'" for command, _ in page]
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)],
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    finally:
        end = ["docker", "compose", "down", "--volumes"]
        subprocess.run(end, cwd=clone, env=environment, capture_output=True, check=False)
    outputs = done.stdout.split(MARK)
    assert len(outputs) == len(page) + 1, done.stderr
    for (command, expected), printed in zip(page, outputs, strict=False):
        told = moved(printed, back=True)
        wrong = difference(expected, told)
        assert wrong is None, f"$ {command}\n{wrong}\n{done.stderr[-3000:]}"


def test_every_setting_is_explained(root: Path) -> None:
    text = (root / "docs" / "compose.md").read_text()
    services = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]
    settings = {name for service in services.values() for name in service} - {"image"}
    assert sorted(name for name in settings if f"`{name}`" not in text) == []
    config = (root / "ops" / "envoy" / "envoy.yaml").read_text() + (root / "ops" / "envoy" / "routes.yaml").read_text()
    words = {line.split(":")[0].strip(" -{") for line in config.splitlines() if ":" in line and "#" not in line}
    limits = {word for word in words if re.match(r"max_|.*_timeout$|.*_with_.*_action$", word)}
    assert len(limits) > 8
    assert sorted(name for name in limits if f"`{name}`" not in text) == []
