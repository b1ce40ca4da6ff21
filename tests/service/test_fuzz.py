"""The fuzzer: requests made from the OpenAPI document, sent to a real server, every answer compared with the document.

Schemathesis runs as its own command. The same requests come in every run, and nothing is kept between runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from .conftest import API_KEY, Running, environment, wait_until_alive

DOCUMENTED = {
    *(("POST", "/v1/predict"), ("POST", "/v1/predict/batch")),
    *(("GET", "/v1/model"), ("GET", "/health"), ("GET", "/ready")),
}


def start_fuzzer(running: Running, folder: Path, mode: str, cases: int, *options: str) -> subprocess.Popen[bytes]:
    """Start schemathesis with every check it has. It writes report.json and its files into the folder."""
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", running.url + "/openapi.json"),
        *("--header", f"X-API-Key: {API_KEY}", "--checks", "all", "--mode", mode, "--max-examples", str(cases)),
        *("--generation-deterministic", "--no-color", "--report", "json", "--report-json-path", "report.json"),
        *options,
    ]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=output)


def result(process: subprocess.Popen[bytes], folder: Path) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the report and what was printed, when the fuzzer is done."""
    try:
        code = process.wait(300)
    finally:
        process.kill()
    printed = (folder / "output.txt").read_text()
    assert (folder / "report.json").exists(), printed
    return code, json.loads((folder / "report.json").read_bytes()), printed


def test_two_thousand_requests_made_from_the_document_find_nothing(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    running = serve(API_KEY=API_KEY)  # with a key, so that a door left open would be found too
    modes = {"positive": 660, "negative": 190}  # examples for each operation; those of "negative" take longer to make
    fuzzers = {mode: start_fuzzer(running, tmp_path / mode, mode, cases) for mode, cases in modes.items()}
    try:
        results = {mode: result(process, tmp_path / mode) for mode, process in fuzzers.items()}
    finally:
        for process in fuzzers.values():
            process.kill()
    generated = 0
    for code, report, printed in results.values():
        assert (code, report["failures"], report["errors"]) == (0, [], []), printed
        assert (report["complete"], report["operations"]["tested"]) == (True, len(DOCUMENTED)), printed
        generated += report["test_cases"]["generated"]
    assert generated >= 2_000

    # The server's own log is the evidence that they were sent, and of what was answered.
    requests = [line for line in running.lines() if line["event"] == "request"]
    statuses = Counter(line["status"] for line in requests if (line["method"], line["route"]) in DOCUMENTED)
    assert statuses.total() >= 2_000
    assert statuses[200] >= 1_000
    assert statuses[422] >= 400
    assert min(statuses[401], statuses[415]) > 0
    assert {(line["method"], line["route"]) for line in requests if line["status"] == 200} >= DOCUMENTED
    assert max(statuses) < 500


# The service with one mistake for each check that can find something in a document like this one.
BROKEN = """
from mlops_course import serving
from service.app import create_app
from service.server import run

parse = serving.parse


def misread(schema, body):
    "A valid flight is a fault of the service, another is refused, and a wrong batch is answered."
    try:
        request = parse(schema, body)
    except serving.InvalidInput:
        if schema is serving.PredictRequest:
            raise
        return schema.model_validate({"flights": [serving.EXAMPLE]})
    if schema is serving.PredictRequest and request.pressure_mb is None:
        raise RuntimeError
    if schema is serving.PredictRequest and request.humidity_pct is None:
        raise serving.InvalidInput("no")
    return request


class Broken:
    "Changes what the application answers."

    def __init__(self, app):
        self.app, self.runtime = app, app.runtime

    async def __call__(self, scope, receive, send):
        asked = scope.get("method"), scope.get("path")

        async def altered(message):
            if asked == ("GET", "/ready") and "status" in message:
                message["status"] = 203
            if asked == ("PUT", "/health") and "status" in message:
                message["status"] = 200
            if asked == ("GET", "/v1/model") and "headers" in message:
                message["headers"] = [(b"content-type", b"text/plain")]
            if asked == ("GET", "/health") and "body" in message:
                message["body"] = message["body"].replace(b"alive", b"fine!")
            await send(message)

        await self.app(scope, receive, send if scope["type"] == "lifespan" else altered)


serving.parse, serving.check_key = misread, lambda settings, head: None
run(Broken(create_app()))
"""


@pytest.fixture
def broken(release: tuple[Path, str], tmp_path: Path, unused_port: Callable[[], int]) -> Generator[Running]:
    """Return the broken service, running."""
    port, log = unused_port(), tmp_path / "broken.log"
    own = {"MODEL_URI": str(release[0]), "MODEL_DIGEST": release[1], "API_KEY": API_KEY, "PORT": str(port)}
    with log.open("wb") as output:
        command = [sys.executable, "-c", BROKEN]
        process = subprocess.Popen(command, env=environment(**own), stdout=output, stderr=output)
    running = Running(process, port, log)
    try:
        wait_until_alive(running)
        yield running
    finally:
        process.kill()
        process.wait(10)


FOUND = {
    "API accepts requests without authentication": {"GET /v1/model", "POST /v1/predict", "POST /v1/predict/batch"},
    "Missing required header accepted": {"GET /v1/model", "POST /v1/predict", "POST /v1/predict/batch"},
    "Response violates schema": {"GET /health"},
    "Schema-valid request rejected": {"POST /v1/predict"},
    "Schema-violating request accepted": {"POST /v1/predict/batch"},
    "Server error": {"POST /v1/predict"},
    "Undocumented Content-Type": {"GET /v1/model"},
    "Undocumented status code": {"GET /ready"},
    "Wrong response to undeclared method": {"PUT /health"},
}


def test_the_same_checks_find_every_mistake_of_a_broken_service(broken: Running, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    code, report, printed = result(
        start_fuzzer(broken, folder, "all", 2, "--continue-on-failure", "--no-shrink"), folder
    )
    assert code == 1, printed
    assert {failure["title"]: set(failure["operations"]) for failure in report["failures"]} == FOUND
