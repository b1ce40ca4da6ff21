"""More than the service can carry: what is accepted is answered soon, the rest is refused at once, and it passes."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httptools
import httpx
import pytest

from .conftest import Running, one_request

WAITING = 20  # MAX_WAITING of the tested service
CROWD = 200  # connections that ask again as soon as they are answered: ten times as many as may wait


@dataclass
class Crowd:
    """Clients that neither wait between requests nor heed Retry-After."""

    request: bytes
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    over: bool = False


class Client(asyncio.Protocol):
    """One of them."""

    def __init__(self, crowd: Crowd) -> None:
        """Nothing is sent yet."""
        self.crowd = crowd
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self.transport: Any = transport
        self.parser = httptools.HttpResponseParser(self)
        self.ask()

    def ask(self) -> None:
        """Send the request."""
        self.headers, self.body = {}, b""
        self.transport.write(self.crowd.request)

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        self.body += body

    def on_message_complete(self) -> None:
        """Judge the answer, and ask again."""
        crowd, status = self.crowd, self.parser.get_status_code()
        crowd.statuses[status] += 1
        if status == 503 and not self.headers.get(b"retry-after", b"").isdigit():
            crowd.faults["no Retry-After"] += 1
        if status == 503 and not json.loads(self.body)["type"].endswith(":overloaded"):
            crowd.faults["another problem"] += 1
        if crowd.over:
            self.transport.close()
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol
        """Nobody should be thrown out."""
        if not self.crowd.over:
            self.crowd.faults["connection lost"] += 1


async def press(port: int, request: bytes, clients: int, seconds: float) -> Crowd:
    """Let a crowd press for some seconds."""
    crowd, loop = Crowd(request), asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(crowd), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.sleep(seconds)
    crowd.over = True
    await asyncio.sleep(0.5)
    for transport, _ in made:
        transport.close()
    return crowd


def pressed(port: int, request: bytes, clients: int, seconds: float) -> Crowd:
    """Do the same; for a process of its own, so that the crowd does not slow the test down."""
    return asyncio.run(press(port, request, clients, seconds))


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
def test_a_crowd_is_answered_soon_or_refused_and_leaves_no_trace(
    serve: Callable[..., Running], example: dict[str, Any]
) -> None:
    running = serve(MAX_WAITING=str(WAITING), LOG_LEVEL="warning")
    request = one_request(example)
    assert pressed(running.port, request, 1, 0.3).statuses.keys() == {200}
    before = running.memory_kib()
    looks = []
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool, httpx.Client(base_url=running.url) as probe:
        pressing = pool.submit(pressed, running.port, request, CROWD, 3)
        while not pressing.done():
            looks.append(probe.get("/health", timeout=20).status_code)
            time.sleep(0.1)
        crowd = pressing.result()

    assert crowd.faults == Counter()
    assert crowd.statuses.keys() == {200, 503}
    assert set(looks) == {200}
    assert running.memory_kib() - before < 32_768
    after = pressed(running.port, request, 1, 0.3)
    assert after.statuses.keys() == {200}
    assert after.faults == Counter()


PAUSABLE = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows has no SIGSTOP, which pauses a process")


def pause(running: Running) -> None:
    """Stop the process where it is, and return when it has stopped."""
    running.process.send_signal(signal.SIGSTOP)
    os.waitpid(running.process.pid, os.WUNTRACED)


@PAUSABLE
def test_new_clients_are_let_in_together(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    """While the service is paused 200 clients come. Let in one by one, each would be answered before the next."""
    running = serve(MAX_WAITING=str(WAITING))
    with ExitStack() as stack:
        pause(running)
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20)) for _ in range(200)
        ]
        for one in connections:
            one.sendall(one_request(example))
        running.process.send_signal(signal.SIGCONT)
        found = Counter(one.recv(65_536)[9:12] for one in connections)
    assert found.keys() == {b"200", b"503"}
    assert found[b"503"] > 100


@PAUSABLE
def test_nobody_waits_for_more_than_the_limit(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    """While the service is paused 100 requests arrive. It takes as many as may wait, so the last one waits for 19."""
    running = serve(MAX_WAITING=str(WAITING))
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20)) for _ in range(100)
        ]
        for one in connections:  # once, so that each connection is accepted
            one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert one.recv(65_536).startswith(b"HTTP/1.1 200 ")
        pause(running)
        for one in connections:
            one.sendall(one_request(example))
        running.process.send_signal(signal.SIGCONT)
        found = Counter(one.recv(65_536)[9:12] for one in connections)
    assert found == {b"200": WAITING, b"503": 100 - WAITING}


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can change the limits of a running process")
def test_without_file_descriptors_it_waits_and_goes_on(serve: Callable[..., Running], example: dict[str, Any]) -> None:
    running = serve()
    resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (60, 60))
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20))
        time.sleep(1.5)
        refusals = [line for line in running.lines() if "Cannot accept" in line.get("message", "")]
    assert 1 <= len(refusals) <= 4  # about one a second: it does not spin
    assert httpx.post(running.url + "/v1/predict", json=example, timeout=10).status_code == 200
    assert running.stop() == 0
