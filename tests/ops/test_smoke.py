"""The smoke test against a small server that answers like the service, or wrongly in one way."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ops
from ops import smoke as command
from ops.__main__ import cli

DIGEST = "sha256:" + "a" * 64
THRESHOLD = 0.34
MODEL = {
    "name": "flight-disruption",
    "digest": DIGEST,
    "threshold": THRESHOLD,
    "git_sha": "a" * 40,
    "trained_at": "2026-11-22T14:41:37+00:00",
    "label": "late",
    "inputs": ["carrier"],
    "service_version": "0.0.1",
    "service_git_sha": "b" * 40,
    "config": "0123456789ab",
}
PROBLEM = {
    "type": "urn:flight-disruption:problem:invalid-input",
    "title": "The request is not valid",
    "status": 422,
    "detail": "Fields are missing.",
    "request_id": "00000000-0000-4000-8000-000000000000",
    "errors": [],
}


class Service:
    """Answers like the service: the recorded probabilities, rounded to four decimals. A test may change its parts."""

    def __init__(self, golden: dict[str, Any]) -> None:
        self.known = {json.dumps(case["request"], sort_keys=True): case["probability"] for case in golden["cases"]}
        self.version = "1.0.0"
        self.ready = 200
        self.change: Callable[[dict[str, Any]], None] = lambda _: None
        self.raw: dict[str, bytes] = {}  # path -> what is answered instead
        self.status: dict[str, int] = {}  # path -> status
        self.asked: list[str] = []
        self.keys: list[str | None] = []

    def predict(self, body: bytes) -> dict[str, Any]:
        request = json.dumps(json.loads(body), sort_keys=True)
        if request not in self.known:
            return {**PROBLEM}
        probability = round(self.known[request], 4)
        answer = {
            "request_id": "00000000-0000-4000-8000-000000000000",
            "prediction": "disrupted" if probability >= THRESHOLD else "on_time",
            "probability": probability,
            "threshold": THRESHOLD,
            "model_version": self.version,
        }
        self.change(answer)
        return answer

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path in self.raw:
            return self.status.get(path, 200), self.raw[path]
        content: dict[str, Any] = {"status": "alive"}
        if path == "/ready":
            ready = {"status": "ready"} if self.ready == 200 else {"detail": "the model is not loaded"}
            return self.ready, json.dumps(ready).encode()
        if path == "/v1/model":
            content = {**MODEL, "version": self.version}
        if path == "/v1/predict":
            content = self.predict(body)
        return self.status.get(path, content.get("status", 200) if path == "/v1/predict" else 200), json.dumps(
            content
        ).encode()


def handler_for(service: Service) -> type[BaseHTTPRequestHandler]:
    """Return the class that connects a service with Python's own HTTP server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            service.asked.append(f"{self.command} {self.path}")
            service.keys.append(self.headers.get("X-API-Key"))
            status, content = service.answer(self.path, body)
            self.send_response(status)
            kind = "application/json" if status == 200 else "application/problem+json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - the same

        def log_message(self, *_: Any) -> None:
            """Say nothing: the test tells what went wrong."""

    return Handler


@pytest.fixture
def service(root: Path) -> Service:
    """Return a service that gives the recorded answers of the approved release."""
    return Service(json.loads((root / "ops" / "releases" / "1.0.0" / "golden.json").read_text()))


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """Return where the service listens, on a port that the system chose."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_for(service)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    """The environment and the containers of whoever runs the tests must not decide."""
    for name in ("API_KEY", "PORT", "DOOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "KEY_FILE", tmp_path / "API_KEY")


def smoke(url: str) -> Result:
    """Run the command against a running service."""
    return CliRunner().invoke(cli, ["smoke", "--url", url])


def assert_refused(result: Result, text: str) -> None:
    """Exit code 1 and a message; never a traceback."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert text in result.output.partition("Error: ")[2]


def test_a_good_service_passes_and_is_asked_everything(service, url):
    result = smoke(url)
    assert result.exit_code == 0, result.output
    *steps, times, last = result.output.splitlines()
    assert [line.split("  ")[1:3] for line in steps] == [
        ["pass", name] for name in ("alive", "ready", "release", "golden predictions", "refuses bad input")
    ]
    assert re.fullmatch(r"  10 answers, median [0-9.]+ ms, slowest [0-9.]+ ms", times)
    assert last == f"ok: {url} serves 1.0.0 ({DIGEST[:19]}), 5 predictions checked"
    expected = ["GET /v1/model", "GET /health", "GET /ready", "GET /v1/model", *["POST /v1/predict"] * 6]
    assert service.asked == expected
    assert set(service.keys) == {None}


def test_the_port_comes_from_the_environment_like_the_services_own(service, url, monkeypatch):
    monkeypatch.setenv("PORT", url.rpartition(":")[2])
    result = CliRunner().invoke(cli, ["smoke"])
    assert result.exit_code == 0, result.output


def test_without_a_service_of_its_own_the_door_is_asked(service, url, monkeypatch, unused_port):
    monkeypatch.setenv("PORT", str(unused_port()))
    monkeypatch.setenv("DOOR_PORT", url.rpartition(":")[2])
    result = CliRunner().invoke(cli, ["smoke"])
    assert result.exit_code == 0, result.output
    assert f"ok: {url} serves" in result.output


def test_the_doors_port_may_stand_in_the_file_that_compose_reads(service, url, monkeypatch, unused_port, tmp_path):
    (tmp_path / ".env").write_text(f"DOOR_PORT={url.rpartition(':')[2]}\nAPP_ENV=staging\n")
    monkeypatch.setattr(ops, "ROOT", tmp_path)
    monkeypatch.setenv("PORT", str(unused_port()))
    assert f"ok: {url} serves" in CliRunner().invoke(cli, ["smoke"]).output
    monkeypatch.delenv("APP_ENV", raising=False)
    assert (ops.setting("APP_ENV", "prod"), ops.setting("CHECKS_EVERY_S", "none")) == ("staging", "none")
    monkeypatch.setenv("APP_ENV", "dev")
    assert ops.setting("APP_ENV") == "dev"


@pytest.mark.parametrize("path", ["/v1/model", "/v1/predict"])
def test_a_missing_or_wrong_key_is_told_with_the_two_places_for_it(service, url, path):
    service.status[path] = 401
    assert_refused(
        smoke(url), "the key is missing or wrong; set API_KEY, or, for a service on this machine, put the key"
    )


@pytest.mark.parametrize("address", ["", "127.0.0.1:8000", "ftp://x"])
def test_what_is_no_address_is_told(address):
    assert_refused(smoke(address), f"'{address}' is not an address; write for example http://127.0.0.1:8000")


def test_the_key_of_the_containers_is_used_on_this_machine_only(service, url, tmp_path):
    (tmp_path / "API_KEY").write_text("key of the containers\n")
    assert smoke(url).exit_code == 0
    assert set(service.keys) == {"key of the containers"}
    assert command.key_for("https://example.org") is None


def test_the_key_is_read_from_the_environment_and_never_shown(service, url, monkeypatch):
    monkeypatch.setenv("API_KEY", "very secret")
    assert smoke(url).exit_code == 0
    assert set(service.keys) == {"very secret"}
    service.ready = 503
    assert "very secret" not in smoke(url).output


def test_a_service_that_does_not_run_is_named_with_the_fix():
    # Port 1 is reserved and nothing listens there.
    assert_refused(
        smoke("http://127.0.0.1:1"), "http://127.0.0.1:1: alive: no answer (ConnectError); start it with `make run`"
    )


def test_a_service_that_is_not_ready_is_refused_with_its_own_words(service, url):
    service.ready = 503
    assert_refused(smoke(url), "ready: answered 503, not 200: the model is not loaded")
    assert service.asked == ["GET /v1/model", "GET /health", "GET /ready"]


@pytest.mark.parametrize("path", ["/health", "/v1/model", "/v1/predict"])
def test_any_answer_but_200_is_refused(service, url, path):
    service.status[path] = 401
    assert_refused(smoke(url), "answered 401, not 200")


def test_a_probability_of_another_model_is_refused(service, url):
    service.change = lambda answer: answer.update(probability=round(answer["probability"] + 0.0002, 4))
    assert_refused(smoke(url), "another model?")


def test_the_rounding_of_the_answer_is_no_difference(service, url):
    service.change = lambda answer: answer.update(probability=answer["probability"] + 1e-5)
    assert smoke(url).exit_code == 0


@pytest.mark.parametrize("field", ["request_id", "prediction", "probability", "threshold", "model_version"])
def test_a_missing_field_is_named(service, url, field):
    service.change = lambda answer: answer.pop(field) and None
    assert_refused(smoke(url), f"golden predictions: {field}: Field required\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"probability": 1.2}, "probability: Input should be less than or equal to 1"),
        ({"probability": -0.1}, "probability: Input should be greater than or equal to 0"),
        ({"probability": float("nan")}, "probability: Input should be"),
        ({"probability": None}, "probability: Input should be a valid number"),
        ({"probability": "0.4"}, "probability: Input should be a valid number"),
        ({"model_version": 1}, "model_version: Input should be a valid string"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_an_answer_that_breaks_the_contract_is_refused(service, url, change, problem):
    service.change = lambda answer: answer.update(change)
    assert_refused(smoke(url), f"golden predictions: {problem}")


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--version", "1.1.0", "release: version is 1.0.0, expected 1.1.0"),
        ("--digest", "sha256:" + "b" * 64, f"release: digest is {DIGEST}, expected sha256:bbb"),
    ],
)
def test_another_model_than_the_expected_one_is_refused(service, url, option, value, problem):
    assert CliRunner().invoke(cli, ["smoke", "--url", url, "--version", "1.0.0", "--digest", DIGEST]).exit_code == 0
    assert_refused(CliRunner().invoke(cli, ["smoke", "--url", url, option, value]), problem)


def test_a_service_that_takes_anything_is_refused(service, url):
    service.known["{}"] = 0.2
    assert_refused(smoke(url), "refuses bad input: answered 200, not 422")


def test_a_decision_that_contradicts_probability_and_threshold_is_refused(service, url):
    other = {"disrupted": "on_time", "on_time": "disrupted"}
    service.change = lambda answer: answer.update(prediction=other[answer["prediction"]])
    assert_refused(smoke(url), "the prediction contradicts probability and threshold")


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/model", "/v1/predict"])
def test_an_answer_that_is_no_json_is_refused(service, url, path):
    """Something else may listen there and answer every path with a page."""
    service.raw[path] = b"<html>welcome</html>"
    assert_refused(smoke(url), "body: Input should be a valid dictionary")


@pytest.mark.parametrize("content", [b"{}", b'{"version": "1.0.0"}', b"[]"])
def test_a_model_that_does_not_say_what_it_is_is_refused(service, url, content):
    service.raw["/v1/model"] = content
    assert_refused(smoke(url), "release: /v1/model: ")


def test_a_version_without_a_record_is_asked_but_its_probabilities_are_not_compared(service, url):
    service.version = "7.0.0-rc.1"
    service.change = lambda answer: answer.update(probability=0.9, prediction="disrupted")
    result = smoke(url)
    assert result.exit_code == 0, result.output
    assert "serves 7.0.0-rc.1" in result.output


def test_without_any_approved_release_there_is_nothing_to_send(service, url, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert_refused(smoke(url), "no approved release in ops/releases: there are no golden cases to send")


def test_the_cases_of_an_approval_that_died_are_not_used(service, url, monkeypatch, tmp_path, root):
    releases = tmp_path / "ops" / "releases"
    for name in ("1.0.0", ".1.1.0.writing"):
        (releases / name).mkdir(parents=True)
        (releases / name / "golden.json").write_bytes((root / "ops/releases/1.0.0/golden.json").read_bytes())
        (releases / name / "approval.json").write_text("{}")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    service.version = "7.0.0-rc.1"
    result = smoke(url)
    assert result.exit_code == 0, repr(result.exception)
