"""An ASGI application that answers the same bytes to everything: what HTTP itself costs with this server."""

from typing import Any

BODY = b"x" * 170  # as long as an answer of the service


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer one request, or follow the server's start and stop."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})
