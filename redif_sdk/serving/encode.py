"""Pictures as bytes, and those that were asked for as a URL, kept for a while."""

from __future__ import annotations

import io
import secrets
from collections import OrderedDict
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.images import to_pil

__all__ = ["MEDIA_TYPES", "KeptFiles", "encode"]

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def encode(pixels: NDArray[np.uint8], output_format: str = "png", compression: int | None = None) -> bytes:
    """A picture uint8 (H, W, C) as a file. `compression`: the quality of webp and jpeg, 0 to 100; webp at 100 is
    lossless."""
    options: dict[str, Any] = {}
    if output_format != "png" and compression is not None:
        options["quality"] = compression
    if output_format == "webp":
        options["lossless"] = compression in (None, 100)
    buffer = io.BytesIO()
    to_pil(pixels[None])[0].save(buffer, format=output_format.upper(), **options)
    return buffer.getvalue()


class KeptFiles:
    """Files by a name that cannot be guessed, the oldest dropped when there are too many bytes or after a time."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._files: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, output_format: str) -> str:
        """The name of the file that `data` is kept as."""
        name = f"{secrets.token_urlsafe(18)}.{output_format}"
        self._files[name] = monotonic() + self._seconds, data, MEDIA_TYPES[output_format]
        self._bytes += len(data)
        self._drop()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, media type), or None where there is no such file any more."""
        self._drop()
        found = self._files.get(name)
        return None if found is None else found[1:]

    def _drop(self) -> None:
        while self._files:
            name, (until, data, _) = next(iter(self._files.items()))
            if self._bytes <= self._limit and until > monotonic():
                return
            del self._files[name]
            self._bytes -= len(data)
