"""What is inside a student's files, looked at before anything else reads them: safetensors, npz, JSON, tokenizers.

A file whose hash is right may still be hostile, since whoever wrote it wrote the hash too. Everything here takes bytes
of any content, uses memory in proportion to them, and answers with IntegrityError or ManifestError. ONNX graphs have a
module of their own, `artifact/untrusted/onnx.py`.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.errors import IntegrityError

__all__ = [
    "LIMITS",
    "check",
    "check_tokenizer",
    "limit_of",
    "npz_arrays",
    "safetensors_header",
    "safetensors_header_size",
]

_MIB = 1 << 20
#: Most bytes of a file of a kind that is read at one go; the others are hashed piece by piece.
LIMITS = {".json": 32 * _MIB, ".npz": 256 * _MIB, ".onnx": 2048 * _MIB, ".txt": 32 * _MIB, ".model": 32 * _MIB}

#: Bits of an element, by safetensors' names.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}
LARGEST_HEADER = 16 * _MIB
_LARGEST = 1 << 63

#: Of an npz: most arrays, and most bytes of them all unpacked.
MOST_ARRAYS = 32
LARGEST_ARRAYS = 256 * _MIB
_ENTRY = b"PK\x01\x02"  # begins an entry of a zip's directory
_ARRAY = re.compile(r"[a-z][a-z0-9_]{0,40}(\.[A-Za-z0-9_]{1,60})?\.npy")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf][1248]|<U\d{1,5})', 'fortran_order': False, 'shape': \(((?:\d{1,12},? ?){0,8})\), \} *\n"
)

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


def limit_of(path: str) -> int | None:
    """Most bytes of a file of that kind, or None where it is never held in memory whole."""
    return LIMITS.get(PurePosixPath(path).suffix.lower())


def check(path: str, data: bytes, where: str) -> None:
    """Look into the bytes of a file by its kind. Raises IntegrityError or ManifestError, naming `where`."""
    name = PurePosixPath(path)
    if name.suffix == ".safetensors":
        size = safetensors_header_size(data[:8], len(data), where)
        safetensors_header(data[8 : 8 + size], len(data) - 8 - size, where)
    elif name.suffix == ".npz":
        npz_arrays(data, where)
    elif name.suffix == ".json":
        document = strict_json.parse(data, where, finite=False)
        if name.name == "tokenizer.json":
            check_tokenizer(document, where)
        elif name.name in ("config.json", "scheduler_config.json"):
            check_config(document, where)
        elif name.name.endswith(".index.json"):
            check_index(document, where)


# ---------------------------------------------------------------------- safetensors


def safetensors_header_size(first: bytes, total: int, where: str) -> int:
    """The bytes of the header of a safetensors file, from its first eight and its size. Raises IntegrityError."""
    if len(first) < 8 or total < 10:
        raise IntegrityError(f"{where} is no safetensors file: it has {total} bytes; do not use it")
    (size,) = struct.unpack("<Q", first[:8])
    if not 2 <= size <= min(LARGEST_HEADER, total - 8):
        raise IntegrityError(
            f"{where} is no safetensors file that we read: it says that its header has {size} bytes, of {total} in the "
            f"file and at most {LARGEST_HEADER}; do not use it"
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
        raise IntegrityError(f"{where}: its metadata are no strings; do not use it")
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


# ---------------------------------------------------------------------- npz


def npz_arrays(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz``, which hold at most `LARGEST_ARRAYS` bytes unpacked: numbers and text, no objects.

    Raises IntegrityError for anything else.
    """
    try:
        if data.count(_ENTRY) > 2 * MOST_ARRAYS:
            raise ValueError("it has too many members")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MOST_ARRAYS or len({member.filename for member in members}) != len(members):
                raise ValueError("it has too many members, or one twice")
            if sum(member.file_size for member in members) > LARGEST_ARRAYS:
                raise ValueError(f"it unpacks to more than {LARGEST_ARRAYS} bytes")
            return dict(_array(archive, member) for member in members)
    except (ValueError, EOFError, OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"{where} holds no arrays that we read: {error!s:.200}; do not use it") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, NDArray[Any]]:
    if _ARRAY.fullmatch(member.filename) is None or member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError(f"the member {member.filename!r:.100} is no array of numpy's")
    with archive.open(member) as file:
        raw = file.read(member.file_size + 1)  # bounded: what it says of its size may be a lie
    if len(raw) != member.file_size:
        raise ValueError(f"{member.filename} has not the size that it says")
    # magic, version 1.0, length of the header, header: numpy.lib.format. numpy's own reader evaluates the header.
    start = 10 + int.from_bytes(raw[8:10], "little")
    header = _NPY_HEADER.fullmatch(raw[10:start]) if raw[:8] == b"\x93NUMPY\x01\x00" else None
    if header is None:
        raise ValueError(f"{member.filename} is no plain array of numbers or text")
    dtype, shape = (
        np.dtype(header[1].decode()),
        tuple(int(extent) for extent in header[2].split(b",") if extent.strip()),
    )
    if len(raw) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} has {len(raw) - start} bytes, which are not of its shape {shape!s:.100}")
    if dtype.kind == "U":
        codes = np.frombuffer(raw, "<u4", offset=start)
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError(f"{member.filename} holds text that is none")
    return member.filename.removesuffix(".npy"), np.frombuffer(raw, dtype, offset=start).reshape(shape)


# ---------------------------------------------------------------------- configurations of networks


def check_config(document: dict[str, Any], where: str) -> None:
    """Raise IntegrityError for a network's ``config.json`` that would keep its class busy before any weight is read.

    And for one that chooses code to load the weights with.
    """
    if "quantization_config" in document:
        raise IntegrityError(f"{where} names a quantiser of its own, which this release does not take; do not use it")
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
        raise IntegrityError(f"{where} names shards that are no safetensors files beside it; do not use it")


def _flat(value: Any) -> Iterator[Any]:
    """A value, or what a list and the lists in it hold."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        else:
            yield one


# ---------------------------------------------------------------------- tokenizers


def check_tokenizer(document: dict[str, Any], where: str) -> None:
    """Raise IntegrityError for a ``tokenizer.json`` that could make much text of little, or search for long."""
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
