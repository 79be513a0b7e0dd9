"""Decoding in tiles: a decoder's memory grows with the image, and a large image is decoded piece by piece.

Tiles overlap, and each is faded in over its overlap with the one before. A decoder that normalises over the whole image
(GroupNorm) sees other statistics in a tile, so the result is close to the whole image's, not equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_TILE", "OVERLAP", "decode_in_tiles", "starts"]

Decode = Callable[[NDArray[np.float32]], NDArray[np.float32]]

LEAST_TILE = 4  # latents on a side
OVERLAP = 0.25  # of a tile's side


def starts(extent: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin: as few as there can be, spread evenly, overlapping by at least `overlap`."""
    if extent <= tile:
        return [0]
    count = 1 + -(-(extent - tile) // (tile - overlap))
    return [round(index * (extent - tile) / (count - 1)) for index in range(count)]


def decode_in_tiles(decode: Decode, latents: NDArray[np.float32], tile: int) -> NDArray[np.float32]:
    """The decoded image, tile by tile.

    Args:
        decode: Latents (B, C, h, w) to images (B, C', h scale, w scale), for h and w up to `tile`.
        latents: float32 (B, C, H, W).
        tile: The side of a tile in latents, at least 4.

    Returns:
        float32 (B, C', H scale, W scale). Images of at most one tile are decoded whole.
    """
    height, width = latents.shape[2:]
    overlap = max(1, int(tile * OVERLAP))
    rows, columns = (starts(extent, tile, overlap) for extent in (height, width))
    if len(rows) == len(columns) == 1:
        return decode(latents)
    made: NDArray[np.float32] | None = None
    for top in rows:
        strip: NDArray[np.float32] | None = None
        for left in columns:
            piece = decode(np.ascontiguousarray(latents[:, :, top : top + tile, left : left + tile]))
            scale = piece.shape[2] // min(tile, height)
            if strip is None:
                strip = np.empty((*piece.shape[:3], width * scale), np.float32)
                filled = 0
            _fade(strip, piece, left * scale, filled, axis=3)
            filled = left * scale + piece.shape[3]
        assert strip is not None
        if made is None:
            made = np.empty((*strip.shape[:2], height * scale, strip.shape[3]), np.float32)
            done = 0
        _fade(made, strip, top * scale, done, axis=2)
        done = top * scale + strip.shape[2]
    assert made is not None
    return made


def _fade(target: NDArray[np.float32], piece: NDArray[np.float32], start: int, filled: int, *, axis: int) -> None:
    """Write `piece` into `target` from `start` on, faded in where `target` is `filled` already."""
    shared = max(0, filled - start)
    place, first, rest = ([slice(None)] * 4 for _ in range(3))
    place[axis] = slice(start, start + shared)
    first[axis], rest[axis] = slice(0, shared), slice(shared, None)
    if shared:
        shape = [1, 1, 1, 1]
        shape[axis] = shared
        share = ((np.arange(shared, dtype=np.float32) + 0.5) / shared).reshape(shape)
        target[tuple(place)] += (piece[tuple(first)] - target[tuple(place)]) * share
    place[axis] = slice(start + shared, start + piece.shape[axis])
    target[tuple(place)] = piece[tuple(rest)]
