"""The log of the server itself: what uvicorn and libraries say becomes one line of JSON on stdout, like all others."""

import logging
from typing import Any

import structlog

from mlops_course.monitoring import JsonLine, describe_error

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


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
            event |= describe_error(record.exc_info[1])
        return self._line(None, record.levelname.lower(), event).decode()


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
