"""The server: uvicorn, with an order of stopping that loses no request, and limits that uvicorn does not have."""

import asyncio
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlops_course.serving import NotHttp, Service, Settings, new_id, problem
from service.logs import server_log_config

LINGER_S = 2.0  # how long the rest of a refused body is read and thrown away, so that the client sees the answer
GRACE_S = 0.3  # at the end, how long a connection that has sent nothing yet may still speak


class Protocol(HttpToolsProtocol):
    """HTTP for one connection, with a time limit for headers and an error in our shape for what is not HTTP."""

    header_timeout_s = 10.0  # set from the settings by `make_server`
    _timer: asyncio.TimerHandle | None = None
    _lingering = False  # whether the rest of a refused body is being thrown away

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the first headers must come in time."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_timeout_s, self._close)

    def data_received(self, data: bytes) -> None:
        """Run the clock while headers are incomplete; once they are, the application watches its own."""
        super().data_received(data)
        if getattr(self.cycle, "scope", None) is not self.scope:
            if self._timer is None:
                self._timer = self.loop.call_later(self.header_timeout_s, self._close)
        elif self._timer is not None and not self._lingering:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """After an early answer read the rest of the body, so that the client sees the answer, but not for ever."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._lingering = True
            self._timer = self.loop.call_later(LINGER_S, self._close)

    def on_message_complete(self) -> None:
        """The whole body is here; after an early answer that ends the connection."""
        super().on_message_complete()
        if self._lingering:
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close, but let a connection that was just opened still say what it wants."""
        if getattr(self.cycle, "scope", None) is None:
            self.loop.call_later(GRACE_S, super().shutdown)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors."""
        request_id = new_id()
        answer = problem(NotHttp(msg), request_id)
        head = [
            b"HTTP/1.1 400 Bad Request",
            b"content-type: application/problem+json",
            b"content-length: %d" % len(answer.body),
            b"x-request-id: " + request_id.encode(),
            b"connection: close",
        ]
        self.transport.write(b"\r\n".join([*head, b"", answer.body]))
        self.transport.close()

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
        last = [connection for door in sockets or () for connection in waiting_at(door)]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in last:
            await loop.connect_accepted_socket(self._new_connection, connection)
        await super().shutdown(list(sockets or ()))

    def _new_connection(self) -> asyncio.Protocol:
        make = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]


def waiting_at(door: socket.socket) -> list[socket.socket]:
    """Return the connections that wait to be accepted. Never blocks."""
    found = []
    door.setblocking(False)
    while True:
        try:
            found.append(door.accept()[0])
        except BlockingIOError:
            return found


def run(app: Service) -> None:
    """Serve an application, configured by its settings, until a signal ends it."""
    settings: Settings = app.runtime.settings
    limits: dict[str, Any] = {"header_timeout_s": settings.header_timeout_s}
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=type("Protocol", (Protocol,), limits),
        ws="none",
        lifespan="on",
        log_config=server_log_config(settings.log_level),
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.stop_s,
    )
    Server(config, app).run(sockets=[config.bind_socket()])
