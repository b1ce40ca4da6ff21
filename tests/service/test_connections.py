"""Real connections: refusals that keep the connection, pipelines, huge headers, and offers of other protocols."""

from __future__ import annotations

import json
import random
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlops_course.serving import EXAMPLE

from .conftest import Running, one_request

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
MARK = "hunter2"  # stands for something that must never be repeated
JSON_HEAD = b"host: x\r\ncontent-type: application/json\r\n"


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
    refused = one_request(example).replace(b"application/json", b"text/plain")
    connection.sendall(refused[:-20])
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 415 ")
    connection.sendall(refused[-20:] + one_request(example))
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 200 ")


def test_a_refused_request_that_is_never_finished_is_closed(connection: socket.socket, example: dict[str, Any]) -> None:
    connection.sendall(one_request(example).replace(b"application/json", b"text/plain")[:-20])
    assert read_answers(connection, 1).startswith(b"HTTP/1.1 415 ")
    assert connection.recv(1) == b""


def test_the_end_of_a_pipelined_request_may_come_later(connection: socket.socket, example: dict[str, Any]) -> None:
    two = one_request(example) * 2
    connection.sendall(two[:-20])
    time.sleep(0.2)
    connection.sendall(two[-20:])
    assert read_answers(connection, 2).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("pause", [0.0, 3.0])
def test_a_request_after_an_early_answer_in_a_pipeline(
    connection: socket.socket, example: dict[str, Any], pause: float
) -> None:
    refused = one_request(example).replace(b"application/json", b"text/plain")
    connection.sendall(refused + one_request(example)[:-20])
    time.sleep(pause)
    connection.sendall(one_request(example)[-20:])
    answers = read_answers(connection, 2)
    assert [answers.count(b"HTTP/1.1 %d " % status) for status in (415, 200)] == [1, 1]


def test_300_pipelined_requests_get_300_answers(connection: socket.socket, example: dict[str, Any]) -> None:
    connection.sendall(one_request(example) * 300)
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
    before = shared.memory_kib()
    assert not flood(shared, start, part, 100).startswith(b"HTTP/1.1 2")
    assert shared.memory_kib() - before < 20_000
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
    whole = one_request(example, offer)
    connection.sendall(whole[:-20])
    time.sleep(pause)
    connection.sendall(whole[-20:] + one_request(example))
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
    refused = one_request(example, b"connection: close\r\n").replace(b"application/json", b"text/plain")
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


# Bad input, through the real server


def post(path: str, body: bytes | object, *headers: str, method: str = "POST") -> bytes:
    """Return any request as bytes; what is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(content)}"]
    if not any(header.lower().startswith("content-type") for header in headers):
        own.append("content-type: application/json")
    return "\r\n".join([*own, *headers, "", ""]).encode() + content


class Reader:
    """Reads answers one by one from a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def answer(self) -> tuple[int, bytes, bytes]:
        """Return status, head and body. The status is 0 if the server has closed."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self._file.readline()
            if not line:
                return 0, head, b""
            head += line
        length = next((line for line in head.lower().splitlines() if line.startswith(b"content-length:")), b":0")
        return int(head[9:12]), head, self._file.read(int(length.partition(b":")[2]))


def without(name: str) -> dict[str, Any]:
    """Return the example without one field."""
    return {key: value for key, value in EXAMPLE.items() if key != name}


ONE, MANY = "/v1/predict", "/v1/predict/batch"
BAD: dict[str, tuple[bytes, int, str]] = {
    "missing": (post(ONE, without("dest")), 422, "dest"),
    "extra": (post(ONE, {**EXAMPLE, MARK: MARK}), 422, "(unknown)"),
    "text for a number": (post(ONE, {**EXAMPLE, "humidity_pct": MARK}), 422, "humidity_pct"),
    "true for a number": (post(ONE, {**EXAMPLE, "humidity_pct": True}), 422, "humidity_pct"),
    "out of range": (post(ONE, {**EXAMPLE, "humidity_pct": 100.5}), 422, "humidity_pct"),
    "NaN": (post(ONE, {**EXAMPLE, "humidity_pct": float("nan")}), 422, "humidity_pct"),
    "Infinity": (post(ONE, {**EXAMPLE, "humidity_pct": float("inf")}), 422, "humidity_pct"),
    "1e999": (
        post(ONE, json.dumps({**EXAMPLE, "humidity_pct": 77}).replace("77", "1e999").encode()),
        422,
        "humidity_pct",
    ),
    "nested NaN": (post(ONE, {**EXAMPLE, "humidity_pct": [[float("nan")]]}), 422, "humidity_pct"),
    "an offset": (post(ONE, {**EXAMPLE, "scheduled_departure": "2013-09-12T17:29-04:00"}), 422, "scheduled_departure"),
    "an absurd date": (post(ONE, {**EXAMPLE, "scheduled_departure": "9999-99-99T99:99"}), 422, "scheduled_departure"),
    "nothing": (post(ONE, b""), 422, "body"),
    "broken JSON": (post(ONE, b'{"carrier": "hunter2'), 422, "body"),
    "invalid UTF-8": (post(ONE, b'{"carrier": "hunter2\xff"}'), 422, "body"),
    "deep nesting": (post(ONE, b"[" * 10_000), 422, "body"),
    "deep nesting in a batch": (post(MANY, b'{"flights":' * 50_000), 422, "body"),
    "an empty batch": (post(MANY, {"flights": []}), 422, "flights"),
    "a huge batch": (post(MANY, {"flights": [EXAMPLE] * 1_500}), 422, "flights"),
    "a wrong flight in a batch": (
        post(MANY, {"flights": [EXAMPLE, {**EXAMPLE, "dest": MARK}]}),
        422,
        "flights[1].dest",
    ),
    "another content type": (post(ONE, EXAMPLE, "content-type: text/plain"), 415, ""),
    "another method": (post(ONE, b"", method="DELETE"), 405, ""),
    "another path": (post("/hunter2", EXAMPLE), 404, ""),
    "a large body": (post(ONE, b"{" + b" " * 20_000), 413, ""),
}


@pytest.mark.parametrize(("content", "status", "field"), BAD.values(), ids=BAD)
def test_bad_input_is_a_problem_that_names_the_field(
    connection: socket.socket, example: dict[str, Any], content: bytes, status: int, field: str
) -> None:
    connection.sendall(content + one_request(example))
    with Reader(connection) as reader:
        found, head, body = reader.answer()
        assert reader.answer()[0] == 200  # the connection, and the service, go on
    problem = json.loads(body)
    assert (found, problem["status"]) == (status, status)
    assert b"content-type: application/problem+json" in head
    assert problem["request_id"].encode() in head
    assert [error["field"] for error in problem["errors"]] == ([field] if field else [])
    assert MARK.encode() not in head + body


# Every place of a request that can carry text

FLIGHT_TEXTS: dict[str, bytes] = {
    f"{kind} {name}": post(ONE, {**EXAMPLE, name: value})
    for name in (*EXAMPLE, "request_id", MARK)
    for kind, value in {"text in": MARK, "a list in": [MARK], "an object in": {MARK: MARK}}.items()
}
TEXTS: dict[str, bytes] = {
    **FLIGHT_TEXTS,
    "the whole body": post(ONE, MARK),
    "half a body": post(ONE, b'{"carrier": "UA", "hunter2'),
    "broken bytes": post(ONE, b'{"carrier": "hunter2\xff"}'),
    "a key twice": post(ONE, b'{"carrier": "hunter2", "carrier": "hunter2"}'),
    "a field almost right": post(ONE, {**EXAMPLE, "humidity_pct_hunter2": 1}),
    "many unknown fields": post(ONE, {f"{MARK}{number}": MARK for number in range(100)}),
    "a flight of a batch": post(MANY, {"flights": [EXAMPLE, MARK]}),
    "a field of a batch": post(MANY, {"flights": [EXAMPLE], MARK: MARK}),
    "the flights of a batch": post(MANY, {"flights": MARK}),
    "the id of a flight": post(MANY, {"flights": [{**EXAMPLE, "request_id": MARK}]}),
    "a path": post("/hunter2", b"", method="GET"),
    "a path of v1": post("/v1/hunter2", b"", method="GET"),
    "a path in percent": post("/%68unter2/hunter2%00%ff", b"", method="GET"),
    "a path with its host": post("http://hunter2/health", b"", method="GET"),
    "a query": post("/health?hunter2=hunter2", b"", method="GET"),
    "a query of a prediction": post(ONE + "?hunter2", EXAMPLE),
    "a path with a dot": post("/docs/../hunter2", b"", method="GET"),
    "a method": post(ONE, b"", method="HUNTER2"),
    "a small method": post(ONE, b"", method="hunter2"),
    "the version of HTTP": b"GET /health HTTP/hunter2\r\n\r\n",
    "no HTTP": b"hunter2\r\n\r\n",
    "the name of a header": post("/nothing", EXAMPLE, f"{MARK}: {MARK}"),
    "the name of a broken header": post(ONE, EXAMPLE, f"{MARK} {MARK}"),
    "a length": b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: hunter2\r\n\r\n",
    "the length of a chunk": START + b"transfer-encoding: chunked\r\n\r\nhunter2\r\n",
    "the extension of a chunk": START + b"transfer-encoding: chunked\r\n\r\n1;hunter2=hunter2\r\n{\r\n0\r\n\r\n",
    "a trailer": START + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nhunter2: hunter2\r\n\r\n",
    "another coding": START + b"transfer-encoding: hunter2\r\n\r\n",
}
HEADERS = [
    *("accept", "authorization", "content-encoding", "content-type", "cookie", "expect", "forwarded", "from", "host"),
    *("if-match", "origin", "range", "referer", "te", "upgrade", "user-agent", "x-api-key", "x-forwarded-for"),
    *("x-forwarded-host", "x-http-method-override", "x-request-id"),
]
TEXTS |= {f"the header {name}": post(ONE, EXAMPLE, f"{name}: {MARK}") for name in HEADERS}
TEXTS |= {f"the header {name} of a refusal": post(ONE, b"{", f"{name}: {MARK}") for name in HEADERS}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_what_was_sent_is_in_no_answer_and_in_no_line_of_the_log(
    shared: Running, connection: socket.socket, content: bytes
) -> None:
    assert MARK.encode() in content.lower()
    known = len(shared.log.read_bytes())
    connection.sendall(content)
    with Reader(connection) as reader:
        status, head, body = reader.answer()
    assert 200 <= status < 500
    assert MARK.encode() not in (head + body).lower()
    name = head.lower().partition(b"x-request-id: ")[2][:32]
    assert wait_for(lambda: name in shared.log.read_bytes()[known:])  # a line may be written after its answer
    assert MARK.encode() not in shared.log.read_bytes()[known:].lower()


def test_valid_values_are_not_repeated_either(shared: Running) -> None:
    odd = {**EXAMPLE, "carrier": "Q9", "dest": "QXZ", "distance_miles": 4321.1234}
    answers = [httpx.post(shared.url + ONE, json=odd), httpx.post(shared.url + MANY, json={"flights": [odd]})]
    assert [answer.status_code for answer in answers] == [200, 200]
    texts = [*(answer.text + str(answer.headers) for answer in answers), shared.log.read_text()]
    assert not [text for text in texts for sent in ("Q9", "QXZ", "4321.1") if sent in text]


def bad_requests(count: int, seed: int) -> Iterator[bytes]:
    """Yield requests that are all refused, each in its own way. The same seed gives the same requests."""
    dice = random.Random(seed)  # noqa: S311 - not a secret
    values: list[Callable[[], object]] = [
        lambda: dice.choice([True, None, float("nan"), [], {}, -1e300]),
        lambda: "x" * dice.randrange(2_000),
        lambda: dice.random() * 1e9 + 1e7,
        lambda: {str(dice.random()): [dice.random()] * dice.randrange(50)},
        lambda: chr(dice.randrange(0x20, 0xD000)) * 5,
    ]
    for _ in range(count):
        name = dice.choice(["carrier", "origin", "dest", "scheduled_departure", "distance_miles", str(dice.random())])
        wrong = {**EXAMPLE, name: dice.choice(values)(), "request_id": f"{dice.getrandbits(128):032x}"}
        kind = dice.randrange(10)
        if kind < 4:
            yield post(ONE, wrong, f"x-request-id: {dice.getrandbits(128):032x}")
        elif kind < 6:
            yield post(MANY, {"flights": [EXAMPLE] * dice.randrange(5) + [wrong]})
        elif kind == 6:
            yield post(dice.choice([ONE, MANY]), dice.randbytes(dice.randrange(1_000)))
        elif kind == 7:
            yield post(ONE, EXAMPLE, f"content-type: {dice.random()}", f"x-{dice.random()}: {dice.random()}")
        elif kind == 8:
            yield post(f"/{dice.random()}?{dice.random()}", b"", method=dice.choice(["GET", "POST", "PUT"]))
        else:
            depth = dice.randrange(1, 3_000)
            yield post(ONE, json.dumps(EXAMPLE).encode()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}")


def send_all(running: Running, requests: Iterator[bytes]) -> Counter[int]:
    """Send requests in groups over one connection that stays open; count the statuses."""
    statuses = Counter[int]()
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection, Reader(connection) as reader:
        while group := [content for _, content in zip(range(20), requests, strict=False)]:
            connection.sendall(b"".join(group))
            for _ in group:
                statuses[reader.answer()[0]] += 1
    return statuses


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
def test_twenty_thousand_bad_requests_leave_nothing_in_memory(serve: Callable[..., Running]) -> None:
    running = serve()
    send_all(running, bad_requests(2_000, seed=1))
    before = running.memory_kib()
    statuses = send_all(running, bad_requests(20_000, seed=2))
    assert statuses.total() == 20_000
    assert set(statuses) == {404, 415, 422}
    assert running.memory_kib() - before < 4_000
    assert httpx.post(running.url + ONE, json=EXAMPLE).status_code == 200
    assert not [line for line in running.lines() if line["event"] == "failed"]


# Many connections, and broken ones


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Generator[None]:
    """Allow enough open connections on both sides; a service that is started here inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2_048, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def connect() -> Generator[Callable[[Running, int], list[socket.socket]]]:
    """Open many connections; they are closed when the test ends."""
    opened: list[socket.socket] = []

    def some(running: Running, count: int) -> list[socket.socket]:
        opened.extend(socket.create_connection(("127.0.0.1", running.port), timeout=15) for _ in range(count))
        return opened[-count:]

    yield some
    for one in opened:
        one.close()


def wait_for(what: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait until something is true. Return whether it is."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


def open_files(running: Running) -> int:
    """Return how many files and connections a process has open (Linux)."""
    return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))


def assert_it_answers(running: Running) -> None:
    """Ask the probes and for a prediction."""
    assert [httpx.get(running.url + path).status_code for path in ("/health", "/ready")] == [200, 200]
    assert httpx.post(running.url + ONE, json=EXAMPLE).status_code == 200


def test_500_idle_connections_do_not_stop_an_answer(
    shared: Running, connect: Callable[[Running, int], list[socket.socket]]
) -> None:
    silent, used = connect(shared, 250), connect(shared, 250)
    for one in used:
        one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert all(one.recv(65_536).startswith(b"HTTP/1.1 200 ") for one in used)
    assert_it_answers(shared)
    for one in (silent[0], silent[-1], used[0], used[-1]):
        one.sendall(one_request(EXAMPLE))
        assert read_answers(one, 1).startswith(b"HTTP/1.1 200 ")


def test_headers_that_come_byte_by_byte_are_cut_off(
    serve: Callable[..., Running], connect: Callable[[Running, int], list[socket.socket]]
) -> None:
    """Slowloris: each byte comes in time, the headers as a whole do not. Before the first request and after one."""
    running = serve(HEADER_TIMEOUT_S="0.5")
    slow = connect(running, 200)
    for one in slow[100:]:
        one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert one.recv(65_536).startswith(b"HTTP/1.1 200 ")
    for one in slow:
        one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ")
    assert_it_answers(running)
    left = list(slow)

    def all_are_closed() -> bool:
        for one in list(left):
            try:
                one.sendall(b"y")
            except OSError:
                left.remove(one)
        return not left

    assert wait_for(all_are_closed)
    assert_it_answers(running)


@pytest.mark.parametrize("sent", [1, 30, 150, len(one_request(EXAMPLE)) - 1])
def test_half_a_request_of_a_half_closed_connection_is_dropped(connection: socket.socket, sent: int) -> None:
    connection.sendall(one_request(EXAMPLE)[:sent])
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(65_536) == b""


def test_a_half_closed_connection_is_closed_and_hinders_nobody(
    shared: Running, connect: Callable[[Running, int], list[socket.socket]]
) -> None:
    many = connect(shared, 100)
    for one in many:
        one.sendall(one_request(EXAMPLE) * 2)
        one.shutdown(socket.SHUT_WR)
    for one in many:
        with Reader(one) as reader:
            statuses = [reader.answer()[0] for _ in range(3)]
        assert statuses[-1] == 0  # it was closed
        assert set(statuses) <= {200, 0}
    assert_it_answers(shared)


@pytest.mark.skipif(not Path("/proc").exists(), reason="open files are counted in /proc, which only Linux has")
def test_connections_that_are_reset_leave_nothing(
    serve: Callable[..., Running], connect: Callable[[Running, int], list[socket.socket]]
) -> None:
    running = serve()
    assert_it_answers(running)
    before = open_files(running)
    parts = [one_request(EXAMPLE)[:sent] for sent in (0, 30, 150, -20)] + [one_request(EXAMPLE)]
    parts.append(post(MANY, {"flights": [EXAMPLE] * 500}))
    for number, one in enumerate(connect(running, 300)):
        one.sendall(parts[number % len(parts)])
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing now resets
        one.close()
    assert wait_for(lambda: open_files(running) <= before)
    assert_it_answers(running)
    assert httpx.post(running.url + MANY, json={"flights": [EXAMPLE]}).status_code == 200
    events = Counter(line["event"] for line in running.lines())
    assert events["failed"] == 0
    assert not [line for line in running.lines() if line.get("level") == "error"]
    assert running.stop() == 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
def test_many_large_bodies_that_come_slowly_are_not_all_kept(
    serve: Callable[..., Running], connect: Callable[[Running, int], list[socket.socket]]
) -> None:
    running = serve()
    assert httpx.post(running.url + MANY, json={"flights": [EXAMPLE] * 1_000}).status_code == 200
    before = running.memory_kib()
    body = b" " * (1_048_576 - 70_000)  # the last part never comes
    for one in connect(running, 300):
        try:
            one.sendall(START.replace(b"predict", b"predict/batch") + b"content-length: 1048576\r\n\r\n" + body)
        except OSError:  # refused before it was sent; that is what should happen to most
            continue
    assert_it_answers(running)
    assert running.memory_kib() - before < 128_000
