"""Untrusted JSON: one object, every key once, finite numbers, and a bounded number of brackets."""

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
    """Parse a JSON object.

    Args:
        data: UTF-8.
        where: Names the document in errors.
        finite: Whether to refuse NaN and infinities, which diffusers writes into configurations.

    Raises:
        ManifestError: It is not a JSON object, has a key twice or a number that is refused, or more than
            `MOST_CONTAINERS` brackets or `MOST_COMMAS` commas.
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
        raise ManifestError(f"{where} is not valid JSON: {error!s:.200}") from error
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
