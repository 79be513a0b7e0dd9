"""Canonical JSON: the bytes of ``redif.json``, and the digest that seals it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from redif_sdk.errors import ManifestError

__all__ = ["digest_of", "encode"]


def encode(document: dict[str, Any]) -> bytes:
    """The document as it stands on disk: JSON, indented by one blank, with a line break at the end.

    Raises ManifestError for what JSON cannot hold, such as infinity.
    """
    try:
        return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (ValueError, RecursionError) as error:  # 1e999 parses as infinity; a lone surrogate cannot be encoded
        raise ManifestError(f"redif.json cannot be written as JSON: {error}") from error


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of `document` without its digest.

    Canonical: sorted keys, no blanks, UTF-8. Raises ManifestError for what JSON cannot hold.
    """
    content = {key: value for key, value in document.items() if key != "digest"}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"redif.json cannot be written as JSON: {error}") from error
