"""Real processes: how the service starts, refuses to start, meets slow and huge input, and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.__main__ import main

from .conftest import Running, environment

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
JSON = {"content-type": "application/json"}


def talk(running: Running, data: bytes, seconds: float = 10) -> bytes:
    """Send raw bytes and return everything that comes back until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return received


def test_it_listens_where_it_is_told_and_logs_json_only(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    running = serve()
    answer = httpx.post(running.url + "/v1/predict", json=example)
    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert httpx.get(running.url + "/ready").status_code == 200
    assert running.stop() == 0
    events = [line["event"] for line in running.lines()]
    assert events.count("request") == 3
    assert "model_loaded" in events


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PORT": "eighty"}, ["PORT"]),
        ({"PORT": "0"}, ["PORT"]),
        ({"APP_ENV": "production"}, ["APP_ENV"]),
        ({"APP_ENV": "prod"}, ["GIT_SHA", "MODEL_URI", "MODEL_DIGEST", "API_KEY"]),
        ({"APP_ENV": "staging", "API_KEY": "changeme-changeme"}, ["GIT_SHA", "MODEL_URI", "MODEL_DIGEST", "API_KEY"]),
        ({"API_KEY": "tiny7"}, ["API_KEY"]),
        ({"THRESHOLD": "1.5", "LOG_LEVEL": "loud"}, ["LOG_LEVEL", "THRESHOLD"]),
        ({"MODEL_DIGEST": "latest"}, ["MODEL_DIGEST"]),
    ],
)
def test_a_wrong_configuration_is_told_in_one_line_for_each_variable(
    variables: dict[str, str], named: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    assert main() == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()[1:]
    assert printed.out == ""
    assert sorted(line.split(":")[0] for line in lines) == sorted(named)
    assert all(f"({line.split(':')[0]} is the " in line for line in lines)
    told = [value for value in variables.values() if value not in ("prod", "staging") and value in printed.err]
    assert told == []


def test_a_wrong_configuration_ends_the_process_with_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env=environment(APP_ENV="prod", API_KEY="changeme-changeme"),
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"API_KEY: is a placeholder" in done.stderr
    assert b"changeme" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["PORT", "HOST"])
def test_an_address_that_cannot_be_used_is_told_by_its_variable(wrong: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        variables = {"PORT": port} if wrong == "PORT" else {"HOST": "203.0.113.7", "API_KEY": KEY, "PORT": port}
        command = [sys.executable, "-m", "service"]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"{wrong}: ".encode() in done.stderr
    assert b"Traceback" not in done.stderr + done.stdout


def test_a_missing_model_leaves_it_alive_and_not_ready(serve: Callable[..., Running], tmp_path: Path) -> None:
    running = serve(MODEL_URI=str(tmp_path / "nothing"))
    answer = httpx.get(running.url + "/ready")
    assert answer.status_code == 503
    assert "cannot read" in answer.json()["detail"]
    assert "manifest.json" in answer.json()["detail"]
    assert str(tmp_path) not in answer.text
    assert running.stop() == 0


def test_production_needs_the_key(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    running = serve(APP_ENV="prod", API_KEY=KEY)
    assert httpx.post(running.url + "/v1/predict", json=example).status_code == 401
    assert httpx.post(running.url + "/v1/predict", json=example, headers={"X-API-Key": KEY}).status_code == 200
    running.stop()
    assert KEY not in running.log.read_text()


def test_what_is_not_http_gets_a_problem(shared: Running) -> None:
    head, _, body = talk(shared, b"hello\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["type"].endswith("not-http")


def test_slow_headers_and_slow_bodies_do_not_hold_a_connection(serve: Callable[..., Running]) -> None:
    running = serve(HEADER_TIMEOUT_S="0.3", BODY_TIMEOUT_S="0.3")
    start = time.monotonic()
    assert talk(running, b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n") == b""
    assert talk(running, b"") == b""
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    assert talk(running, head).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
def test_a_body_of_50_mb_is_refused_and_not_kept(shared: Running) -> None:
    running = shared

    def chunks() -> Any:
        for _ in range(50):
            yield b"x" * 1_000_000

    httpx.post(running.url + "/v1/predict", content=b"x", headers=JSON)
    before = running.memory_kib()
    declared = httpx.post(running.url + "/v1/predict", content=b"x" * 50_000_000, headers=JSON)
    chunked = httpx.post(running.url + "/v1/predict/batch", content=chunks(), headers=JSON)
    assert (declared.status_code, chunked.status_code) == (413, 413)
    assert running.memory_kib() - before < 16_384


def send_for_ever(connection: socket.socket) -> None:
    """Send one byte after the other until the other side has closed."""
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def test_a_body_that_never_ends_is_cut_off(shared: Running) -> None:
    running = shared
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(ConnectionError):
            send_for_ever(connection)
    assert time.monotonic() - start < 10


def test_sigterm_turns_readiness_off_first_and_loses_nothing(
    serve: Callable[..., Running], example: dict[str, Any]
) -> None:
    running = serve(DRAIN_S="0.8")
    outcomes: list[int] = []
    unexpected: list[str] = []

    def client() -> None:
        with httpx.Client(base_url=running.url, timeout=10) as session:
            while True:
                try:
                    outcomes.append(session.post("/v1/predict", json=example).status_code)
                except httpx.ConnectError:
                    return  # the door is closed: this request was never accepted
                except httpx.TransportError as error:
                    unexpected.append(repr(error))
                    return

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    time.sleep(0.3)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    ready = httpx.get(running.url + "/ready")
    for one in clients:
        one.join(20)
    assert (ready.status_code, ready.headers["connection"]) == (503, "close")
    assert running.process.wait(10) == 0
    assert set(outcomes) == {200}
    assert unexpected == []
    logged = [line for line in running.lines() if line.get("route") == "/v1/predict"]
    assert len(logged) == len(outcomes)


def test_a_request_in_flight_is_finished_after_sigterm(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    running = serve()
    body = json.dumps(example).encode()
    head = (
        f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head.encode() + body[:10])
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        connection.sendall(body[10:])
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    assert running.process.wait(10) == 0


def test_a_killed_service_is_ready_again_soon(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    first = serve()
    first.process.kill()
    first.process.wait(10)
    assert httpx.post(serve().url + "/v1/predict", json=example).status_code == 200


def test_the_model_runtime_keeps_no_record_of_its_use(serve: Callable[..., Running], tmp_path: Path) -> None:
    """ONNX Runtime would write a database below the home folder and send it to its maker."""
    home = tmp_path / "home"
    home.mkdir()
    running = serve(HOME=str(home))
    assert httpx.get(running.url + "/ready").status_code == 200
    assert running.stop() == 0
    assert [file.name for file in home.rglob("*") if file.suffix == ".db"] == []
