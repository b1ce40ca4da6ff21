"""What the tests of the service share: the released model, settings, an application, and real server processes.

`artifacts_root`, from tests/conftest.py, is a folder that holds flight-disruption/registry.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from mlops_course.blueprint import MODEL_NAME, project_root, resolve_channel
from mlops_course.serving import EXAMPLE, Service, Settings, build_app

API_KEY = "k7Qz9-mR2vXw8-Lp4tNb6"  # only here; not a secret
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="session")
def release(artifacts_root: Path) -> tuple[Path, str]:
    """Folder and digest of the model in the prod channel."""
    return resolve_channel(artifacts_root / MODEL_NAME, "prod")


@pytest.fixture
def example() -> dict[str, Any]:
    """One flight that is answered with 200."""
    return dict(EXAMPLE)


@pytest.fixture
def settings(release: tuple[Path, str]) -> Settings:
    """Settings of a dev service with the released model."""
    folder, digest = release
    return Settings.model_construct(model_uri=str(folder), model_digest=digest)


@pytest.fixture
def app(settings: Settings) -> Service:
    """Return an application that is not started."""
    return build_app(settings)


@pytest.fixture
def client(app: Service) -> Generator[TestClient]:
    """Talk to a started application, in this process."""
    with TestClient(app, raise_server_exceptions=False) as started:
        yield started


def one_request(example: dict[str, Any], extra: bytes = b"") -> bytes:
    """Return one good request as bytes, with more headers if they are given."""
    body = json.dumps(example).encode()
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + extra + b"content-length: %d\r\n\r\n" % len(body) + body


@dataclass
class Running:
    """A real `python -m service`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """Return the log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def memory_kib(self) -> int:
        """Return its resident memory (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def stop(self) -> int:
        """End it politely and return its exit code."""
        self.process.terminate()
        return self.process.wait(20)


def environment(**variables: str) -> dict[str, str]:
    """Return a small environment: nothing of this shell's configuration reaches the service."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    return {**keep, "PYTHONPATH": str(project_root()), **variables}


def wait_until_alive(running: Running, seconds: float = 30) -> None:
    """Wait until /health answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert running.process.poll() is None, running.log.read_text()
        try:
            assert httpx.get(running.url + "/health", timeout=1).status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"not alive after {seconds} s: {running.log.read_text()}")


def launch(release: tuple[Path, str], folder: Path, port: int, **variables: str) -> Running:
    """Start a real service on a free port, and wait until it is alive."""
    log = folder / f"service-{port}.log"
    own = {
        "GIT_SHA": "test",
        "MODEL_URI": str(release[0]),
        "MODEL_DIGEST": release[1],
        "DRAIN_S": "0",
        "PORT": str(port),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], env=environment(**own | variables), stdout=output, stderr=output
        )
    running = Running(process, port, log)
    try:
        wait_until_alive(running)
    except BaseException:
        process.kill()
        raise
    return running


@pytest.fixture
def serve(
    release: tuple[Path, str], tmp_path: Path, unused_port: Callable[[], int]
) -> Generator[Callable[..., Running]]:
    """Start real services: `serve(DRAIN_S='0')`. They are stopped when the test ends."""
    started: list[Running] = []

    def start(**variables: str) -> Running:
        started.append(launch(release, tmp_path, unused_port(), **variables))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait(10)


@pytest.fixture(scope="module")
def shared(
    release: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory, unused_port: Callable[[], int]
) -> Generator[Running]:
    """One real service for the tests that leave it as it was."""
    running = launch(release, tmp_path_factory.mktemp("service"), unused_port())
    yield running
    running.process.kill()
    running.process.wait(10)
