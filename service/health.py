"""`python -m service.health`: ask the service in this container whether it is ready; exit code 0 if it is.

For the container's HEALTHCHECK, which runs it every few seconds. So it imports as little as possible: no HTTP
client, nothing of the service.
"""

import os
import socket
import sys

TIMEOUT_S = 1.5


def ready(port: int) -> bool:
    """Whether /ready answers 200."""
    request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
            connection.sendall(request)
            return connection.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(0 if ready(int(os.environ.get("PORT", "8000"))) else 1)
