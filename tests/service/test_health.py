"""The container's health check: right about the service, and cheap enough to run every few seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .conftest import Running, environment
from .test_imports import modules_after


def check(port: int) -> subprocess.CompletedProcess[bytes]:
    """Run the health check as the container does."""
    command = [sys.executable, "-m", "service.health"]
    return subprocess.run(command, env=environment(PORT=str(port)), capture_output=True, check=False)


def test_a_ready_service_is_healthy(shared: Running) -> None:
    done = check(shared.port)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_service_without_a_model_is_not(serve: Callable[..., Running], tmp_path: Path) -> None:
    assert check(serve(MODEL_URI=str(tmp_path / "nothing")).port).returncode == 1


def test_nobody_there_is_not_healthy_and_no_traceback(unused_port: Callable[[], int]) -> None:
    done = check(unused_port())
    assert (done.returncode, done.stderr) == (1, b"")


def test_it_imports_no_web_framework_no_http_client_and_no_model() -> None:
    assert (
        modules_after("import service.health") & {"fastapi", "onnxruntime", "numpy", "pydantic", "http", "ssl"} == set()
    )
