"""Logs as one JSON object per line. Prompts and keys are not logged."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

__all__ = ["JsonLines", "keep_prompts_out", "log_to_stderr"]


class JsonLines(JsonFormatter):
    """Formats a record as {"time", "level", "logger", "event", its `extra` fields, and "exception" if there is one}."""

    def __init__(self) -> None:
        reserved = [*RESERVED_ATTRS, "color_message"]  # uvicorn's, a copy of the message for terminals
        super().__init__([], rename_fields={"exc_info": "exception"}, reserved_attrs=reserved)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data |= {"level": record.levelname.lower(), "logger": record.name, "event": record.getMessage()}
        super().add_fields(log_data, record, message_dict)


def keep_prompts_out() -> None:
    """Silence the warning that quotes the part of a prompt that was cut off."""
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
