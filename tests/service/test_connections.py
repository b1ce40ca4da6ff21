"""Real connections: refusals that keep the connection, pipelines, huge headers, and offers of other protocols."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Running

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
JSON_HEAD = b"host: x\r\ncontent-type: application/json\r\n"


def request(example: dict[str, Any], extra: bytes = b"") -> bytes:
    """Return one good request as bytes."""
    body = json.dumps(example).encode()
    head = b"POST /v1/predict HTTP/1.1\r\n" + JSON_HEAD + extra + b"content-length: %d\r\n\r\n" % len(body)
    return head + body


@pytest.fixture
def connection(shared: Running) -> Generator[socket.socket]:
    """A connection to the shared service."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as opened:
        yield opened


def read_answers(connection: socket.socket, count: int) -> bytes:
    """Read until that many status lines and a complete last body are there, or the server closes."""
    received = b""
    while received.count(b"HTTP/1.1 ") < count or not received.endswith(b"}"):
        part = connection.recv(65_536)
        if not part:
            break
        received += part
    return received


def memory_kib(running: Running) -> int:
    """Return the resident memory of a process (Linux)."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.mark.parametrize(
    ("headers", "status"), [({"X-API-Key": "wrong"}, 401), ({"X-API-Key": KEY, "content-type": "text/plain"}, 415)]
)
def test_every_refused_request_of_one_connection_is_answered(
    serve: Callable[..., Running], example: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    running = serve(API_KEY=KEY)
    content = json.dumps(example).encode()
    with httpx.Client(base_url=running.url, headers={"content-type": "application/json", **headers}) as client:
        found = [client.post("/v1/predict", content=content).status_code for _ in range(300)]
    assert found == [status] * 300


def test_a_refused_request_leaves_the_connection_usable(connection: socket.socket, example: dict[str, Any]) -> None:
    refused = request(example).replace(b"application/json", b"text/plain")
    connection.sendall(refused[:-20])
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 415 ")
    connection.sendall(refused[-20:] + request(example))
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 200 ")


def test_a_refused_request_that_is_never_finished_is_closed(connection: socket.socket, example: dict[str, Any]) -> None:
    connection.sendall(request(example).replace(b"application/json", b"text/plain")[:-20])
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 415 ")
    assert connection.recv(1) == b""


def test_the_end_of_a_pipelined_request_may_come_later(connection: socket.socket, example: dict[str, Any]) -> None:
    two = request(example) * 2
    connection.sendall(two[:-20])
    time.sleep(0.2)
    connection.sendall(two[-20:])
    assert read_answers(connection, 2).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("pause", [0.0, 3.0])
def test_a_request_after_an_early_answer_in_a_pipeline(
    connection: socket.socket, example: dict[str, Any], pause: float
) -> None:
    refused = request(example).replace(b"application/json", b"text/plain")
    connection.sendall(refused + request(example)[:-20])
    time.sleep(pause)
    connection.sendall(request(example)[-20:])
    answers = read_answers(connection, 2)
    assert [answers.count(b"HTTP/1.1 %d " % status) for status in (415, 200)] == [1, 1]


def test_300_pipelined_requests_get_300_answers(connection: socket.socket, example: dict[str, Any]) -> None:
    connection.sendall(request(example) * 300)
    assert read_answers(connection, 300).count(b"HTTP/1.1 200 ") == 300


def flood(running: Running, start: bytes, part: bytes, megabytes: int) -> bytes:
    """Send a start and then the same part again and again, until the server closes; return what it answered."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        try:
            connection.sendall(start)
            for _ in range(megabytes * 1_000_000 // len(part)):
                connection.sendall(part)
        except OSError:
            return b""
        try:
            return connection.recv(65_536)
        except OSError:
            return b""


START = b"POST /v1/predict HTTP/1.1\r\n" + JSON_HEAD
FLOODS = {
    "many headers": (START, b"".join(b"x-%d: %s\r\n" % (n, b"y" * 990) for n in range(100))),
    "one header without an end": (START + b"x: ", b"y" * 100_000),
    "a path without an end": (b"GET /", b"y" * 100_000),
    "many trailers": (START + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"x: " + b"y" * 9_990 + b"\r\n"),
    "a chunk's extension": (START + b"transfer-encoding: chunked\r\n\r\n1;", b"y" * 100_000),
}


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
@pytest.mark.parametrize(("start", "part"), FLOODS.values(), ids=FLOODS)
def test_a_flood_of_headers_is_not_kept(shared: Running, start: bytes, part: bytes) -> None:
    before = memory_kib(shared)
    assert not flood(shared, start, part, 100).startswith(b"HTTP/1.1 2")
    assert memory_kib(shared) - before < 20_000
    assert httpx.get(shared.url + "/health").status_code == 200


def test_large_headers_are_answered_with_431_and_logged(shared: Running) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 200_000 + b"\r\n\r\n")
        head, _, body = read_answers(connection, 1).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    found = json.loads(body)
    assert found["type"].endswith("headers-too-large")
    logged = [line for line in shared.lines() if line.get("request_id") == found["request_id"]]
    assert [(line["status"], line["problem"]) for line in logged] == [(431, "headers-too-large")]


def test_headers_below_the_limit_are_fine(shared: Running) -> None:
    assert httpx.get(shared.url + "/health", headers={"x": "y" * 60_000}).status_code == 200


def test_bytes_that_are_not_http_are_logged_with_their_id(shared: Running) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as connection:
        connection.sendall(b"hello\r\n\r\n")
        found = json.loads(read_answers(connection, 1).partition(b"\r\n\r\n")[2])
    logged = [line for line in shared.lines() if line.get("request_id") == found["request_id"]]
    assert [(line["status"], line["problem"]) for line in logged] == [(400, "not-http")]


@pytest.mark.parametrize(
    "offer",
    [
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
    ],
)
@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_an_offer_of_another_protocol_is_ignored(
    connection: socket.socket, example: dict[str, Any], offer: bytes, pause: float
) -> None:
    whole = request(example, offer)
    connection.sendall(whole[:-20])
    time.sleep(pause)
    connection.sendall(whole[-20:] + request(example))
    assert read_answers(connection, 2).count(b"HTTP/1.1 200 ") == 2


def test_this_is_no_proxy(connection: socket.socket) -> None:
    connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 400 ")


def test_every_line_of_the_server_names_the_release(serve: Callable[..., Running]) -> None:
    running = serve()
    running.stop()
    server = [line for line in running.lines() if line["event"] == "server"]
    assert server
    assert all({"service", "git_sha", "config", "model", "digest"} <= line.keys() for line in server)


def test_a_refused_request_that_asks_for_the_end_can_read_its_answer(
    connection: socket.socket, example: dict[str, Any]
) -> None:
    refused = request(example, b"connection: close\r\n").replace(b"application/json", b"text/plain")
    connection.sendall(refused[:-20])
    time.sleep(0.2)
    connection.sendall(refused[-20:])  # a connection that was closed too early answers this with a reset
    time.sleep(0.2)
    received = b""
    while part := connection.recv(65_536):
        received += part
    assert received.startswith(b"HTTP/1.1 415 ")
    assert b"connection: close" in received


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_broken_chunk_is_answered_once(connection: socket.socket, pause: float) -> None:
    connection.sendall(START + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
    time.sleep(pause)
    connection.sendall(b"zz\r\n")
    received = b""
    while part := connection.recv(65_536):
        received += part
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
