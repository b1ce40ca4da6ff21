"""What the tests of containers share: an engine, and one image of the code as it is now."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from mlops_course.blueprint import MODEL_NAME, resolve_channel
from ops.docker import missing
from ops.image import Plan, build, build_checks, plan
from tests.ops.live import Prometheus, watch

if TYPE_CHECKING:
    import pandas as pd


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip where no Docker engine answers."""
    if why := missing():
        pytest.skip(f"needs Docker: {why}")


@pytest.fixture(scope="session")
def image_plan(engine: None, artifacts_root: Path) -> Plan:
    """Return what the tests build: the code as it is, and the model in channel prod."""
    return plan(artifacts_root, None)


@pytest.fixture(scope="session")
def built_image(image_plan: Plan) -> Generator[str]:
    """Return an image of the code as it is now, under a name that no other run uses."""
    name = f"flight-disruption:test-{os.getpid()}"
    build(image_plan, name)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=True)


@pytest.fixture(scope="session")
def checks_image(built_image: str) -> Generator[str]:
    """Return the image of the checks that belongs to it."""
    name = build_checks(built_image)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=True)


def docker(*arguments: str) -> str:
    """Run docker and return what it printed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def image_registry(engine: None) -> Generator[str]:
    """Return the address of an image registry that runs for these tests."""
    present = subprocess.run(["docker", "image", "inspect", "registry:2"], capture_output=True, check=False)
    if present.returncode and subprocess.run(["docker", "pull", "--quiet", "registry:2"], check=False).returncode:
        pytest.skip("needs the image registry:2, which is not here and cannot be pulled")
    name = docker("run", "--detach", "--rm", "--publish", "127.0.0.1::5000", "registry:2")
    host = docker("port", name, "5000/tcp").splitlines()[0]
    end = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"http://{host}/v2/").status_code == 200:
                break
        except httpx.TransportError:
            assert time.monotonic() < end
        time.sleep(0.1)
    yield host
    docker("rm", "--force", "--volumes", name)


@pytest.fixture(scope="session")
def prometheus_tools() -> None:
    """Skip where Prometheus is not installed."""
    if missing_tools := [name for name in ("prometheus", "promtool") if not shutil.which(name)]:
        pytest.skip(f"needs {' and '.join(missing_tools)} on the PATH, of version 3")


@pytest.fixture(scope="session")
def watched(
    prometheus_tools: None,
    running_service: Callable[..., AbstractContextManager[str]],
    unused_port: Callable[[], int],
    splits: dict[str, pd.DataFrame],
    artifacts_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[Prometheus]:
    """Return a Prometheus that watches a service behind its door, while real flights of September are sent."""
    folder, digest = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    with (
        running_service(MODEL_URI=str(folder), MODEL_DIGEST=digest, GIT_SHA="0123456789") as url,
        watch(url, unused_port, splits["production"], artifacts_root, tmp_path_factory.mktemp("watched")) as prometheus,
    ):
        yield prometheus
