"""Untrusted configurations of networks and tokenizers: nothing in them may keep a loader busy or run code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from redif_sdk.errors import IntegrityError

__all__ = ["check_config", "check_index", "check_tokenizer"]

#: Of a network's configuration: layers one after another, any number, and numbers in one setting.
DEEPEST = 256
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.safetensors")
LARGEST_SETTING = 1 << 24
LONGEST_LIST = 10_000

#: Of a tokenizer: parts that rewrite the text, and the longest text that one of them may put in or search for.
MOST_REWRITERS = 64
LONGEST_REWRITE = 64
LONGEST_PATTERN = 1000
MOST_ADDED_TOKENS = 10_000


def check_config(document: dict[str, Any], where: str) -> None:
    """Raise IntegrityError for a network's ``config.json`` with sizes that exhaust a loader, or with a quantiser."""
    if "quantization_config" in document:
        raise IntegrityError(f"{where} names a quantiser, which is not supported; do not use it")
    for part in _parts(document):
        for key, value in part.items():
            most = DEEPEST if re.search("layers|depth|blocks", key) else LARGEST_SETTING
            numbers = [number for number in _flat(value) if isinstance(number, int | float)]
            if len(numbers) > LONGEST_LIST or any(most < abs(number) < math.inf for number in numbers):
                raise IntegrityError(f"{where}: {key!r:.100} is {value!r:.100}; do not use it")


def check_index(document: dict[str, Any], where: str) -> None:
    """Raise IntegrityError for an index of shards that names anything but safetensors files beside it."""
    shards = document.get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and _SHARD.fullmatch(shard) for shard in shards.values()
    ):
        raise IntegrityError(f"{where} names shards that are not safetensors files beside it; do not use it")


def _flat(value: Any) -> Iterator[Any]:
    """A value, or what a list and the lists in it hold."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        else:
            yield one


def check_tokenizer(document: dict[str, Any], where: str) -> None:
    """Raise IntegrityError for a ``tokenizer.json`` that could blow up a text, or search for long."""
    rewriters = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(document.get(key))]
    if len(rewriters) > MOST_REWRITERS:
        raise IntegrityError(f"{where} rewrites text in more than {MOST_REWRITERS} ways; do not use it")
    for part in rewriters:
        for key, value in part.items():
            pattern = value.get("Regex") or value.get("String") if isinstance(value, dict) else None
            if isinstance(pattern, str) and len(pattern) > LONGEST_PATTERN:
                raise IntegrityError(f"{where} searches for a pattern of {len(pattern)} characters; do not use it")
            if key in ("content", "prepend", "replacement") and isinstance(value, str) and len(value) > LONGEST_REWRITE:
                raise IntegrityError(f"{where} puts {len(value)} characters in place of one; do not use it")
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED_TOKENS:
        raise IntegrityError(f"{where} adds more than {MOST_ADDED_TOKENS} tokens; do not use it")


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer and all parts inside it. The JSON parser has bounded how deep they lie."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
