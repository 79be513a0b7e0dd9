"""Images as files, and the store of those that were requested as a URL."""

from __future__ import annotations

import io
import secrets
from time import monotonic
from typing import Any

import numpy as np
from cachetools import TTLCache
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.images import to_pil
from redif_sdk.marks.xmp import Mark, options_of

__all__ = ["MEDIA_TYPES", "KeptFiles", "encode"]

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def encode(
    pixels: NDArray[np.uint8], output_format: str = "png", compression: int | None = None, mark: Mark | None = None
) -> bytes:
    """Encode an image uint8 (H, W, C). `compression`: quality of webp and jpeg, 0 to 100; webp at 100 is lossless."""
    options: dict[str, Any] = {} if mark is None else options_of([mark], output_format.upper())
    if output_format != "png" and compression is not None:
        options["quality"] = compression
    if output_format == "webp":
        options["lossless"] = compression in (None, 100)
    buffer = io.BytesIO()
    to_pil(pixels[None])[0].save(buffer, format=output_format.upper(), **options)
    return buffer.getvalue()


class KeptFiles:
    """Files under random names, kept for `seconds`; with more than `limit` bytes, the least recently used one goes."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._files: TTLCache[str, tuple[bytes, str]] = TTLCache(
            limit, seconds, timer=monotonic, getsizeof=lambda file: len(file[0])
        )

    def keep(self, data: bytes, output_format: str) -> str:
        """Keep `data` and return its name. Raises InvalidRequest for more bytes than are kept at all."""
        name = f"{secrets.token_urlsafe(18)}.{output_format}"
        try:
            self._files[name] = data, MEDIA_TYPES[output_format]
        except ValueError:
            raise InvalidRequest(
                f"the image has {len(data)} bytes, and at most {self._files.maxsize:.0f} are kept for URLs; "
                f"use response_format b64_json"
            ) from None
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, media type), or None if there is no such file, or no longer."""
        return self._files.get(name)
