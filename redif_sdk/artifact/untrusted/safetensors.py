"""Headers of untrusted safetensors files, checked before a tensor is read."""

from __future__ import annotations

import math
import struct
from typing import Any

from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.errors import IntegrityError

__all__ = ["safetensors_header", "safetensors_header_size"]

#: Bits of an element, by safetensors' names.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}
LARGEST_HEADER = 16 << 20  # bytes
_LARGEST = 1 << 63


def safetensors_header_size(first: bytes, total: int, where: str) -> int:
    """The length of a safetensors file's header, from its first 8 bytes and its size. Raises IntegrityError."""
    if len(first) < 8 or total < 10:
        raise IntegrityError(f"{where} is not a safetensors file: it has {total} bytes; do not use it")
    (size,) = struct.unpack("<Q", first[:8])
    if not 2 <= size <= min(LARGEST_HEADER, total - 8):
        raise IntegrityError(
            f"{where} is not a valid safetensors file: its header has {size} bytes, of {total} in the file and at most "
            f"{LARGEST_HEADER}; do not use it"
        )
    return int(size)


def safetensors_header(header: bytes, buffer: int, where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor by name, of a header whose tensors fill `buffer` bytes, each byte once.

    Raises IntegrityError for an unknown dtype, a shape that does not fit its bytes, tensors that overlap, leave gaps,
    or reach beyond the file; ManifestError for a header that is no JSON object with every key once.
    """
    document = strict_json.parse(header, f"the header of {where}")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise IntegrityError(f"{where}: its metadata are not strings; do not use it")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: list[tuple[int, int, str]] = []
    for name, tensor in document.items():
        dtype, shape, start, end = _tensor(name, tensor, where)
        bits = math.prod(shape) * _BITS[dtype]
        if end - start != bits // 8:
            raise IntegrityError(
                f"{where}: tensor {name!r:.100} of shape {list(shape)!s:.100} in {dtype} has {bits // 8} bytes, and "
                f"its offsets give it {end - start}; do not use it"
            )
        tensors[name] = dtype, shape
        places.append((start, end, name))
    reached = 0
    for start, end, name in sorted(places):
        if start != reached:
            what = "overlaps another" if start < reached else "leaves a gap before it"
            raise IntegrityError(f"{where}: tensor {name!r:.100} {what}; do not use it")
        reached = end
    if reached != buffer:
        raise IntegrityError(f"{where}: its tensors have {reached} bytes, and the file has {buffer}; do not use it")
    return tensors


def _tensor(name: str, tensor: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of one entry of a header."""
    if isinstance(tensor, dict) and set(tensor) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        whole = isinstance(shape, list) and isinstance(offsets, list) and all(map(_is_size, [*shape, *offsets]))
        if isinstance(dtype, str) and dtype in _BITS and whole and len(shape) <= 16 and len(offsets) == 2:
            return dtype, tuple(shape), offsets[0], offsets[1]
    raise IntegrityError(f"{where}: the entry of tensor {name!r:.100} is {tensor!r:.150}; do not use it")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
