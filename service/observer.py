"""The observer that ships: it tells the metrics and the log of chapter 5 what the routes of chapter 3 do."""

import sys
from collections.abc import Sequence
from typing import BinaryIO

import structlog

import mlops_course
from mlops_course.monitoring import JsonLine, Load, Metrics, Release, describe_error, is_sampled
from mlops_course.serving import Call, Model, Row, Runtime, Score, Settings, config_fingerprint
from service.logs import LEVELS, event_logger

PAGE_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServiceObserver:
    """Counts and writes what happened, never what was sent. Every number and line names the release."""

    def __init__(self, settings: Settings, stream: BinaryIO | None = None) -> None:
        """Prepare metrics and logger; nothing is written yet."""
        release = Release(mlops_course.__version__, settings.git_sha, config=config_fingerprint(settings))
        self.metrics, self.line = Metrics(release), JsonLine()
        self.line.add_to_all(release._asdict())
        self._out = structlog.BytesLogger(stream or sys.stdout.buffer)
        self._log = event_logger(self.line, self._out, settings.log_level)
        self._quiet = LEVELS[settings.log_level] > LEVELS["info"]
        self._source, self._share = settings.model_uri or "channel prod", settings.event_share

    def watch(self, runtime: Runtime) -> None:
        """Let the metrics ask the running application how full it is."""
        limits = runtime.settings
        self.metrics.service.watch(
            Load(
                waiting=lambda: runtime.waiting,
                waiting_limit=limits.max_waiting,
                batches=lambda: runtime.batches,
                batches_limit=limits.max_batches_waiting,
            )
        )

    def loaded(self, model: Model) -> None:
        """Count from zero for this model; log that it is served, and how long each step of loading took."""
        release = self.metrics.release._replace(model=model.manifest.version, digest=model.digest)
        self.metrics.begin(release, model.reference, model.threshold, model.seconds)
        self.line.add_to_all(release._asdict())
        steps = {name: round(seconds * 1000, 1) for name, seconds in model.seconds.items()}
        self._log.info("model_loaded", ms=steps, threshold=model.threshold)

    def load_failed(self, reason: str) -> None:
        """Log why a model was refused, and where it was looked for: the reason itself names no folder."""
        self.metrics.service.load_failed()
        self._log.error("model_refused", reason=reason, source=self._source)

    def scored(self, call: Call, ids: Sequence[str], rows: Sequence[Row], scores: Sequence[Score]) -> None:
        """Count what came and what was answered; write a share of the predictions one by one, if that is wanted."""
        if call.synthetic:
            return  # the same few flights again and again: on a quiet day they would look like drift
        probabilities, disrupted = zip(*scores, strict=True)
        call.missing, call.unknown = self.metrics.model.add(rows, probabilities, disrupted)
        if self._share:
            for name, row, score in zip(ids, rows, scores, strict=True):
                if is_sampled(name, self._share):
                    self._write_prediction(name, row[0][1], score)

    def _write_prediction(self, request_id: str, origin: str, score: Score) -> None:
        event = {"event": "prediction", "request_id": request_id, "origin": origin}
        line = {**event, "probability": score.probability, "disrupted": int(score.disrupted)}
        self._out.msg(self.line(None, "info", line))

    def answered(self, call: Call) -> None:
        """Count and log one request. Without structlog's call chain, which costs more than validating a request."""
        self.metrics.requests.add(
            call.route, call.method, call.status, call.seconds, call.stages, call.mistakes, call.synthetic
        )
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
        if call.trace:
            line["trace"] = call.trace
        if call.synthetic:
            line["synthetic"] = True
        if call.problem:
            line |= {"problem": call.problem, "mistakes": call.mistakes}
        elif call.stages:
            checks = {"rows": call.rows, "disrupted": call.disrupted, "missing": call.missing, "unknown": call.unknown}
            line |= {**checks, "stages_us": [int(seconds * 1e6) for seconds in call.stages]}
        self._out.msg(self.line(None, "info", line))

    def failed(self, call: Call, error: Exception) -> None:
        """Log a mistake of the service: type and place of the exception, not its text."""
        self._log.error("failed", request_id=call.request_id, route=call.route, **describe_error(error))

    def lag(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self.metrics.service.lag(seconds)

    def exposition(self) -> tuple[bytes, str]:
        """Return the page for Prometheus."""
        return self.metrics.page(), PAGE_TYPE
