"""The observer that ships now: one JSON line per request, and one when a model is loaded or refused."""

import sys
from collections.abc import Sequence
from typing import BinaryIO

import structlog

import mlops_course
from mlops_course.serving import Call, Model, Row, Score, Settings, config_fingerprint
from service.logs import LEVELS, JsonLine, describe, event_logger

STAGES = ("validate", "features", "model", "respond")


class LogObserver:
    """Writes what happened, never what was sent. Every line names the build, the model and the configuration."""

    def __init__(self, settings: Settings, stream: BinaryIO | None = None) -> None:
        """Prepare the logger; nothing is written yet."""
        self.line = JsonLine()
        self._out = structlog.BytesLogger(stream or sys.stdout.buffer)
        self._log = event_logger(self.line, self._out, settings.log_level)
        self._quiet = LEVELS[settings.log_level] > LEVELS["info"]
        self._source = settings.model_uri or "channel prod"
        self._release: dict[str, str] = {
            "service": mlops_course.__version__,
            "git_sha": settings.git_sha,
            "config": config_fingerprint(settings),
            "model": "none",
            "digest": "none",
        }
        self.line.add_to_all(self._release)

    def loaded(self, model: Model) -> None:
        """Log that a model is served, and how long each step of loading took."""
        self._release |= {"model": model.manifest.version, "digest": model.digest}
        self.line.add_to_all(self._release)
        steps = {name: round(seconds * 1000, 1) for name, seconds in model.seconds.items()}
        self._log.info("model_loaded", ms=steps, threshold=model.threshold)

    def load_failed(self, reason: str) -> None:
        """Log why a model was refused, and where it was looked for: the reason itself names no folder."""
        self._log.error("model_refused", reason=reason, source=self._source)

    def scored(self, call: Call, ids: Sequence[str], rows: Sequence[Row], scores: Sequence[Score]) -> None:
        """Nothing: scores are counted from chapter 5 on."""

    def answered(self, call: Call) -> None:
        """Log one request. Without structlog's call chain, which costs more than validating a request."""
        if self._quiet:
            return
        line: dict[str, object] = {
            "event": "request",
            "request_id": call.request_id,
            "method": call.method,
            "route": call.route,
            "status": call.status,
            "ms": round(call.seconds * 1000, 3),
        }
        if call.problem:
            line |= {"problem": call.problem, "fields": call.fields}
        elif call.stages:
            line |= {"rows": call.rows, "stages_us": [int(seconds * 1e6) for seconds in call.stages]}
        self._out.msg(self.line(None, "info", line))

    def failed(self, call: Call, error: Exception) -> None:
        """Log a mistake of the service: type and place of the exception, not its text."""
        self._log.error("failed", request_id=call.request_id, route=call.route, **describe(error))

    def lag(self, seconds: float) -> None:
        """Nothing: the lag is measured from chapter 5 on."""

    def exposition(self) -> tuple[bytes, str] | None:
        """Nothing to expose yet."""
        return None
