"""Where the time of one request goes inside the service. Run with the interpreter of the service's environment.

Usage: python anatomy.py BODY_FILE. Prints one line of JSON, in microseconds, of many requests through the complete
application, without a network: the best round with metrics and log line, the best without, and the medians of the
stages.
"""

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from mlops_course.monitoring import STAGES
from mlops_course.serving import Call, NullObserver, Observer, Service, build_app, load_settings
from service.observer import ServiceObserver

REQUESTS, ROUNDS = 2_000, 7


class Watched(ServiceObserver):
    """The service's own observer, which also keeps the stages of each request."""

    def __init__(self, *arguments: Any) -> None:
        """Nothing is kept yet."""
        super().__init__(*arguments)
        self.stages: list[tuple[float, ...]] = []

    def answered(self, call: Call) -> None:
        """Keep and log."""
        if call.stages:
            self.stages.append(call.stages)
        super().answered(call)


async def one_round(app: Service, body: bytes) -> float:
    """Return the mean time of one request, in microseconds."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pass

    key = app.runtime.settings.api_key
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(b"x-api-key", key.get_secret_value().encode())] if key else []
    start = time.perf_counter()
    for _ in range(REQUESTS):
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
    return (time.perf_counter() - start) / REQUESTS * 1e6


async def measure(app: Service, body: bytes) -> list[float]:
    """Return the mean times of several rounds."""
    async with app.router.lifespan_context(app):
        return [await one_round(app, body) for _ in range(ROUNDS)]


def main() -> None:
    """Measure the application with metrics and log, and without."""
    settings, body = load_settings(), Path(sys.argv[1]).read_bytes().splitlines()[0]
    with Path("/dev/null").open("wb", buffering=0) as nowhere:
        watched = Watched(settings, nowhere)
        observers: dict[str, Observer] = {"logged": watched, "silent": NullObserver()}
        found = {name: min(asyncio.run(measure(build_app(settings, o), body))) for name, o in observers.items()}
    stages = [statistics.median(values) * 1e6 for values in zip(*watched.stages, strict=True)]
    found |= dict(zip(STAGES, stages, strict=True))
    sys.stdout.write(json.dumps({name: round(value, 1) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main()
