"""Logs as one JSON object a line, for programs. What a request said is not logged, nor any key."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["JsonLines", "keep_prompts_out", "log_to_stderr"]

FIELDS = "fields"  # of a record: {"name": value} besides its message


class JsonLines(logging.Formatter):
    """A record as {"time", "level", "logger", "event", and what its `fields` hold}."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def keep_prompts_out() -> None:
    """Silence what quotes prompts: the warning that one was cut off."""
    logging.getLogger("redif_sdk.tokenizer").setLevel(logging.ERROR)


def log_to_stderr(level: str) -> None:
    """Let this package and uvicorn log JSON lines to standard error, from `level` on."""
    keep_prompts_out()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("redif_sdk", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
