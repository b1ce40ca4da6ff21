"""Where alerts go as long as nobody has named another place: one JSON line for each alert that Alertmanager sends."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import click

MAX_BYTES = 1 << 20  # of one message


def alerts_of(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return what is worth reading of each alert in a message of Alertmanager's webhook."""
    for alert in message["alerts"]:
        labels, notes = alert["labels"], alert["annotations"]
        yield {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "alert",
            "receiver": message["receiver"],
            "status": alert["status"],
            "alert": labels["alertname"],
            **{name: labels.get(name, "") for name in ("severity", "owner", "cause")},
            **{name: notes.get(name, "") for name in ("summary", "action", "runbook")},
            "since": alert["startsAt"],
        }


class Inbox(BaseHTTPRequestHandler):
    """Answers Alertmanager, which tries again until it gets a 2xx."""

    timeout = 10  # seconds of silence before a connection is closed

    def do_POST(self) -> None:
        """Take one message."""
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= MAX_BYTES:
                raise ValueError(length)
            lines = [json.dumps(alert) for alert in alerts_of(json.loads(self.rfile.read(length)))]
        except (KeyError, TypeError, ValueError):
            self.send_error(400)
            return
        sys.stdout.write("".join(line + "\n" for line in lines))
        sys.stdout.flush()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: what counts is what arrived."""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True)
def inbox(host: str, port: int) -> None:
    """Write down each alert that Alertmanager posts here, one JSON line each, until it is stopped."""
    server = ThreadingHTTPServer((host, port), Inbox)
    # As process 1 of a container Python would not hear SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()


if __name__ == "__main__":
    # In the image of the checks, which has no other command.
    inbox(prog_name="python -m ops.inbox")
