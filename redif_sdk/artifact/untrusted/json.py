"""JSON that may come from anybody: one value, every key once, finite numbers, and a bounded number of brackets.

What the document means is its reader's business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from redif_sdk.errors import ManifestError

__all__ = ["parse"]

#: Objects and lists in one document: each takes some hundred bytes of memory for two or three in the file.
MOST_CONTAINERS = 300_000
#: Strings and numbers beside each other.
MOST_COMMAS = 2_000_000


def parse(data: bytes, where: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8; `where` names it in errors.

    Raises ManifestError for anything else, for a key that comes twice, for NaN and infinities (unless not `finite`:
    diffusers writes them into configurations), and for more than `MOST_CONTAINERS` brackets or `MOST_COMMAS` commas.
    """
    if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS or data.count(b",") > MOST_COMMAS:
        raise ManifestError(f"{where} holds more objects and values than any file of a student; do not use it")
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse if finite else float,
            parse_float=_finite if finite else float,
        )
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is no JSON that we read: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{where} is not a JSON object")
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r:.100} comes twice")
        result[key] = value
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is beyond what a number can hold")
    return value
