"""The server: uvicorn, with an order of stopping that loses no request, and limits that uvicorn does not have.

Why uvicorn is extended, and which of its parts are touched, stands in docs/decisions/0007.
"""

import asyncio
import errno
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mlops_course.monitoring import JsonLine
from mlops_course.serving import (
    Answer,
    Call,
    ConfigError,
    HeadersTooLarge,
    NotHttp,
    Runtime,
    Service,
    ServiceError,
    Settings,
    finish,
    turned_away,
)
from mlops_course.serving import describe as refused
from service.logs import server_log_config

LINGER_S = 2.0  # how long the rest of a refused request is read and thrown away, so that the client sees the answer
GRACE_S = 0.3  # at the end, how long a connection that has sent nothing yet may still speak
AT_ONCE = 512  # connections accepted in one turn of the event loop
ACCEPT_AGAIN_S = 1.0  # when no connection could be accepted
PHRASES = {
    400: b"HTTP/1.1 400 Bad Request",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    503: b"HTTP/1.1 503 Service Unavailable",
}
HOP = frozenset((b"connection", b"upgrade", b"http2-settings"))  # headers of an offer to speak another protocol


class HeadTooLarge(Exception):
    """Ends the parsing of a request whose headers are complete and above the limit."""


class Door:
    """What a request sees of its connection: an answer leaves in one piece, and closing waits for the rest of the body.

    uvicorn writes head and body apart. Together they cost one call of the system and one packet instead of two.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        """Everything but writing and closing is the transport's."""
        self._write, self.is_closing, self._close = transport.write, transport.is_closing, close
        self._head = b""

    def write(self, data: bytes) -> None:
        """Keep the head of an answer until the body follows; send everything else at once."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
            return
        self._write(data)

    def flush(self) -> None:
        """Send the head of an answer without a body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close after what was kept has left."""
        self.flush()
        self._close()


class Protocol(HttpToolsProtocol):
    """HTTP for one connection, with limits for headers and an error in our shape for what is not HTTP."""

    runtime: Runtime  # set by `run`
    _timer: asyncio.TimerHandle | None = None
    _lingering = False  # whether the rest of a request that was answered is being thrown away
    _last = False  # whether the connection is closed after that
    _deaf = False  # whether nothing that comes is looked at any more
    _held = 0  # bytes since the last progress: a request begun, its headers complete, a part of its body
    _answering: RequestResponseCycle | None = None  # of several requests in the pipeline the one in work

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the first headers must come in time."""
        super().connection_made(transport)
        self._door: Any = Door(transport, self._close_gently)
        self._start_timer(self.runtime.settings.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Parse, with a limit for what is no body; run the clock while headers are incomplete."""
        if self._deaf:
            return  # a client that floods is not even parsed
        self._unset_keepalive_if_required()
        self._held += len(data)
        self._feed(data)
        if self._held > self.runtime.settings.max_header_bytes and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(f"The headers may have at most {self._most} bytes."))
        self._watch_headers()

    def on_message_begin(self) -> None:
        """Count anew for each request."""
        super().on_message_begin()
        self._held = 0

    def on_headers_complete(self) -> None:
        """Refuse headers above the limit, and read an offer to change the protocol as what it is: plain HTTP."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._most:
            raise HeadTooLarge
        if self.parser.should_upgrade():
            return  # `_feed` reads it again
        super().on_headers_complete()
        self._unset_keepalive_if_required()
        self.cycle.transport = self._door
        self._held = 0

    def on_body(self, body: bytes) -> None:
        """Count anew after each part of a body, so that only trailers and chunk headers are limited."""
        super().on_body(body)
        self._held = 0

    def on_message_complete(self) -> None:
        """The whole body is here. If it was answered before, the connection is free again, or closed."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._held = 0
        if self._lingering:
            self._stop_timer()
            self._lingering = False
            if self._last:
                self.transport.close()
            else:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def on_response_complete(self) -> None:
        """After an early answer read the rest of the body, so that the client sees the answer, but not for ever."""
        answered = self._answering
        self._door.flush()
        super().on_response_complete()
        if answered is not None and answered.more_body and not self.transport.is_closing():
            self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close, but let a connection that was just opened still say what it wants."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None:
            self.loop.call_later(GRACE_S, super().shutdown)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors."""
        self._refuse(NotHttp(msg))

    @property
    def _most(self) -> int:
        return self.runtime.settings.max_header_bytes

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Let a request wait for its turn, or refuse it at once: before a task is made, that costs a third."""
        self._answering = cycle
        scope: Any = cycle.scope
        # A client that sends requests without waiting for answers has one of them waiting at a time.
        refusal = None if self.pipeline else turned_away(self.runtime, scope)
        if refusal is None:
            self.runtime.waiting += 1  # until `counted` is called
            super()._start_asgi_task(cycle, app)
            return
        call, answer = refusal
        stays = cycle.keep_alive and not self.runtime.draining
        cycle.response_started = cycle.response_complete = True
        self._write(call, answer, close=not stays)
        if not stays:
            self._close_gently()
        self.on_response_complete()

    def _write(self, call: Call, answer: Answer, close: bool) -> None:
        """Send an answer that no application made, and tell the observer."""
        lines = [PHRASES[answer.status], b"content-length: %d" % len(answer.body)]
        lines += [name + b": " + value for name, value in answer.headers]
        lines += [b"x-request-id: " + call.request_id.encode(), *((b"connection: close",) if close else ())]
        finish(self.runtime, call, answer.status)
        self.transport.write(b"\r\n".join([*lines, b"", answer.body]))

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._feed_again(data[offer.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, HeadTooLarge):
                self._refuse(HeadersTooLarge(f"The headers may have at most {self._most} bytes."))
            else:
                self.send_400_response("The request cannot be read.")
        except httptools.HttpParserError:
            self.send_400_response("The bytes are not a request of HTTP/1.1.")

    def _feed_again(self, rest: bytes) -> None:
        """Read a request once more, without its offer to change the protocol: the parser skipped its body."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This is no proxy.")
            return
        close = any(name == b"connection" and b"close" in value.lower() for name, value in self.headers)
        kept = [(name, value) for name, value in self.headers if name not in HOP]
        kept += [(b"connection", b"close")] if close else []
        head = [method + b" " + self.url + b" HTTP/1.1", *(name + b": " + value for name, value in kept), b"", b""]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(head) + rest)

    def _watch_headers(self) -> None:
        if self._deaf or self._lingering or self.transport.is_closing():
            return
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.scope is not self.scope or cycle.response_complete:
            if self._timer is None and self.timeout_keep_alive_task is None:
                self._start_timer(self.runtime.settings.header_timeout_s)
        else:
            self._stop_timer()

    def _close_gently(self) -> None:
        """Close after an answer; if the request is not complete, after the client had time to read the answer."""
        if self._answering is not None and self._answering.more_body and not self.transport.is_closing():
            self._last = True
            self.transport.write_eof()
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        self._lingering = True
        self._start_timer(LINGER_S)

    def _refuse(self, error: ServiceError) -> None:
        """Answer what never became a request, log it, and hear nothing more on this connection."""
        if self._deaf:
            return
        self._deaf = True
        call = Call("OTHER", "unmatched", time.perf_counter())
        answer = refused(call, error)
        work = self._answering
        if work is not None and work is self.cycle and not work.response_started:  # its body is broken: give it up
            work.disconnected = True
            work.message_event.set()
            work = None
        if work is None or work.response_complete:
            self._write(call, answer, close=True)
            self.transport.write_eof()
            self._linger()
        else:  # an earlier request is still in work, and this answer would be taken for its
            finish(self.runtime, call, answer.status)
            self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """On SIGTERM: first 'not ready', then wait for the router to notice, then finish what is in flight, then stop."""

    def __init__(self, config: uvicorn.Config, app: Service) -> None:
        """Remember the application, whose readiness is turned off first."""
        super().__init__(config)
        self._app = app
        self._stop_at: float | None = None
        self._greetings: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. All connections that wait are accepted at once.

        uvloop accepts one in each turn of its loop. When the service is busy a turn takes some hundredths of a second,
        and a thousand new clients would stand at the door for half a minute.
        """
        await super().startup(sockets=[])
        # What the start has made stays until the end. Unless it is set apart, the garbage collector looks through it
        # again and again: that cost a third of the time of a batch.
        gc.collect()
        gc.freeze()
        for door in sockets or ():
            door.setblocking(False)
            door.listen(self.config.backlog)
            self._open(door)

    def _open(self, door: socket.socket) -> None:
        if door.fileno() >= 0:  # not closed meanwhile
            asyncio.get_running_loop().add_reader(door, self._welcome, door)

    def _welcome(self, door: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            arrived = waiting_at(door)
        except OSError as error:  # no file descriptor is left: wait until connections were closed
            logging.getLogger("uvicorn.error").error("Cannot accept connections: %s.", error.strerror)
            loop.remove_reader(door)
            loop.call_later(ACCEPT_AGAIN_S, self._open, door)
            return
        for connection in arrived:
            greeting = loop.create_task(loop.connect_accepted_socket(self._new_connection, connection))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's interface
        """SIGTERM drains; SIGINT (a person at the keyboard) or a second signal skips the waiting."""
        runtime = self._app.runtime
        if runtime.draining or sig == signal.SIGINT:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        runtime.draining = True
        if self._stop_at is None:
            self._stop_at = time.monotonic() + runtime.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Stop when the drain is over."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Close the door behind the last connection that the system has already accepted for us.

        Closing a listening socket resets the connections that wait in its queue. So the queue is made as short
        as it can be, the event loop takes what is in it, and what came at the last moment is taken by hand.
        """
        for door in sockets or ():
            door.listen(0)
        await asyncio.sleep(GRACE_S)
        loop = asyncio.get_running_loop()
        for door in sockets or ():
            loop.remove_reader(door)
        last = [connection for door in sockets or () for connection in waiting_at(door)]
        for connection in last:
            await loop.connect_accepted_socket(self._new_connection, connection)
        await super().shutdown(list(sockets or ()))

    def _new_connection(self) -> asyncio.Protocol:
        make = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]


def waiting_at(door: socket.socket) -> list[socket.socket]:
    """Return the connections that wait to be accepted, up to `AT_ONCE`. Never blocks; `OSError` if none can be had."""
    found: list[socket.socket] = []
    while len(found) < AT_ONCE:
        try:
            found.append(door.accept()[0])
        except BlockingIOError:
            break
        except OSError:
            if not found:
                raise
            break
    return found


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Raises `ConfigError` that names the variable to change."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as error:
        known = {errno.EADDRINUSE: "PORT: is in use by another program", errno.EACCES: "PORT: is not allowed here"}
        text = known.get(error.errno or 0, "HOST: is not an address of this machine")
        raise ConfigError(f"{text} (HOST and PORT are the address to listen on)") from error
    return door


def counted(app: Service) -> ASGIApp:
    """Return the application as the server calls it: a request whose turn has come waits no more."""
    runtime = app.runtime

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            runtime.waiting -= 1
        await app(scope, receive, send)

    return called


def run(app: Service) -> None:
    """Serve an application, configured by its settings, until a signal ends it."""
    settings: Settings = app.runtime.settings
    line: JsonLine = getattr(app.runtime.observer, "line", None) or JsonLine()
    config = uvicorn.Config(
        counted(app),
        host=settings.host,
        port=settings.port,
        http=type("Protocol", (Protocol,), {"runtime": app.runtime}),
        ws="none",
        lifespan="on",
        log_config=server_log_config(settings.log_level, line),
        access_log=False,
        proxy_headers=False,  # nothing here looks at the client's address
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.stop_s,
    )
    door = listen(settings.host, settings.port)
    logging.getLogger("uvicorn.error").info("Listening on port %d.", settings.port)
    Server(config, app).run(sockets=[door])
