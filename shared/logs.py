"""The log of both services: one line a record on standard error, as text or as JSON."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Literal

from shared.request_ids import current_request_id

LogFormat = Literal["text", "json"]
OWN_LOGGERS = ("cortex", "neuron", "shared", "__main__")
"""Only these log below INFO: libraries would log each statement that they send to the database, with its values."""


def configure_logging(level: str = "INFO", log_format: LogFormat = "text") -> None:
    """Sets up the root logger. Call once, from a command's `main`.

    Raises:
        ValueError: `level` is not the name of a level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(add_request_id)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if root.level < logging.INFO:
        for name in OWN_LOGGERS:
            logging.getLogger(name).setLevel(root.level)
        root.setLevel(logging.INFO)


def add_request_id(record: logging.LogRecord) -> bool:
    """A logging filter: sets `request_id` to the id of the current request, or None."""
    record.request_id = current_request_id()
    return True


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and ` id=` with the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        own = getattr(record, "request_id", None)
        return text if own is None else f"{text} id={own}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, request_id, exception (a traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        fields: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps(fields)
