"""`python -m ops synthetic`: one JSON line a round, an exit code for one round, and a schedule that can be stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from mlops_course.blueprint import MODEL_NAME
from ops import smoke
from ops.__main__ import cli


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    """The environment and the containers of whoever runs the tests must not decide."""
    for name in ("API_KEY", "PORT", "DOOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(smoke, "KEY_FILE", tmp_path / "API_KEY")


@pytest.fixture(scope="module")
def url(artifacts_root: Path, running_service) -> Generator[str]:
    """Return where a real service answers."""
    folder = str(artifacts_root / MODEL_NAME / "1.0.0")
    with running_service(MODEL_URI=folder) as address:
        yield address


def synthetic(*arguments: str) -> Result:
    """Run the command."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(cli, ["synthetic", *arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_round_is_one_line(url):
    result = synthetic("--url", url)
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    seen = json.loads(line)
    assert (seen["url"], seen["ok"], seen["failed"], seen["checks"]) == (url, True, {}, 4)
    assert seen["latency_ms"]["answers"] == 46 + 1 + 46 + 1


def test_checks_are_no_traffic_of_the_model(url):
    """On a quiet night they would look like drift: golden flights are unusual."""

    def counted(prefix: str) -> list[str]:
        return [line for line in httpx.get(url + "/metrics").text.splitlines() if line.startswith(prefix)]

    before, checks = counted("model_predictions_total"), counted("http_synthetic_requests_total")
    assert synthetic("--url", url).exit_code == 0
    assert CliRunner().invoke(cli, ["smoke", "--url", url]).exit_code == 0
    assert (len(before), counted("model_predictions_total")) == (6, before)
    assert counted("http_synthetic_requests_total") != checks


def test_a_failed_round_says_what_and_ends_with_1(unused_port):
    result = synthetic("--url", f"http://127.0.0.1:{unused_port()}")
    assert result.exit_code == 1
    line, error = result.output.splitlines()
    assert json.loads(line)["failed"] == {"probabilities": "no answer (ConnectError)"}
    assert error == "Error: probabilities: no answer (ConnectError)"


def test_the_schedule_goes_on_through_failures_until_it_is_stopped(unused_port):
    command = [sys.executable, "-m", "ops", "synthetic", "--every", "1", "--url", f"http://127.0.0.1:{unused_port()}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    assert [line["ok"] for line in lines] == [False] * 3
    assert len({line["at"] for line in lines}) == 3
