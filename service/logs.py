"""Logs as one JSON object per line on stdout: requests through structlog, the server's own through logging."""

import json
import logging
import time
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Clock:
    """Writes the time: ISO 8601, UTC, milliseconds. The text of the second is made once a second, not for each line."""

    def __init__(self) -> None:
        """No second is known yet."""
        self._second, self._text = -1, ""

    def __call__(self) -> str:
        """Return the time now."""
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{nanoseconds // 1_000_000:03}Z"


stamp = Clock()


class JsonLine:
    """The last processor: turns an event into the bytes of one line, with what is common to all lines at its end."""

    def __init__(self) -> None:
        """Nothing is common yet."""
        self._encode = json.JSONEncoder(separators=(",", ":"), default=str).encode
        self._common = "}"

    def add_to_all(self, common: Mapping[str, str]) -> None:
        """Set what every line from now on carries. It is encoded once, not for each line."""
        self._common = "," + self._encode(common)[1:]

    def __call__(self, _: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
        """Return the line."""
        return f'{{"time":"{stamp()}","level":"{method}",{self._encode(event)[1:-1]}{self._common}'.encode()


def event_logger(
    line: JsonLine,  # makes the line
    output: structlog.BytesLogger,  # writes it
    level: str,  # debug, info, warning or error
) -> structlog.typing.FilteringBoundLogger:
    """Return a logger for rare events, with the same lines in the same place."""
    wrapper = structlog.make_filtering_bound_logger(LEVELS[level])
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(output, [line], wrapper).bind()
    return logger


class JsonFormatter(logging.Formatter):
    """Formats the server's log records. Of an exception it gives type and place: the text may hold input."""

    def __init__(self, line: JsonLine | None = None) -> None:
        """Share the writer of lines with the observer, so that these lines name the release too."""
        super().__init__()
        self._line = line or JsonLine()

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        event: dict[str, Any] = {"event": "server", "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            event |= describe(record.exc_info[1])
        return self._line(None, record.levelname.lower(), event).decode()


def describe(error: BaseException) -> dict[str, Any]:
    """Return type and place of an exception, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "exception": type(error).__name__,
        "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def server_log_config(
    level: str,  # debug, info, warning or error
    line: JsonLine,  # makes the lines
) -> dict[str, Any]:
    """Return the configuration of logging for uvicorn: JSON lines on stdout, no access log (requests are ours)."""
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter, "line": line}},
        "handlers": {"stdout": handler},
        "root": {"handlers": ["stdout"], "level": level.upper()},
    }
