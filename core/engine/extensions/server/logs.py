"""Log lines, as text or as JSON, with the id of the request that they belong to."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Literal

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that runs."""


def configure(form: Literal["text", "json"], level: str) -> None:
    """Send all log lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSON() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel("WARNING")  # its start and end are told by us
    logging.getLogger("asyncio").setLevel("WARNING")


class _Text(logging.Formatter):
    """``time level message [request id] key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        words = [when, record.levelname.lower(), record.getMessage()]
        words += [f"{name}={value}" for name, value in _facts(record).items()]
        text = " ".join(words)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JSON(logging.Formatter):
    """An object a line: ``time``, ``level``, ``logger``, ``message``, and what the line is about."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given as ``extra={"facts": {...}}``, and the request's id."""
    facts: dict[str, object] = getattr(record, "facts", {})
    current = request_id.get()
    return facts if current is None else {"request_id": current, **facts}
