"""Arrays of untrusted ``.npz`` files: numbers and text, no objects, of a bounded size."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import IntegrityError

__all__ = ["LARGEST_ARRAYS", "MOST_ARRAYS", "npz_arrays"]

#: Most arrays of a file, and most bytes of them all unpacked.
MOST_ARRAYS = 32
LARGEST_ARRAYS = 256 << 20
_ENTRY = b"PK\x01\x02"  # begins an entry of a zip's directory
_ARRAY = re.compile(r"[a-z][a-z0-9_]{0,40}(\.[A-Za-z0-9_]{1,60})?\.npy")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf][1248]|<U\d{1,5})', 'fortran_order': False, 'shape': \(((?:\d{1,12},? ?){0,8})\), \} *\n"
)


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
        raise IntegrityError(f"{where} cannot be read as npz: {error!s:.200}; do not use it") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, NDArray[Any]]:
    if _ARRAY.fullmatch(member.filename) is None or member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError(f"the member {member.filename!r:.100} is not a numpy array")
    with archive.open(member) as file:
        raw = file.read(member.file_size + 1)  # bounded: what it says of its size may be a lie
    if len(raw) != member.file_size:
        raise ValueError(f"{member.filename} has another size than it says")
    # magic, version 1.0, length of the header, header: numpy.lib.format. numpy's own reader evaluates the header.
    start = 10 + int.from_bytes(raw[8:10], "little")
    header = _NPY_HEADER.fullmatch(raw[10:start]) if raw[:8] == b"\x93NUMPY\x01\x00" else None
    if header is None:
        raise ValueError(f"{member.filename} is not an array of numbers or text")
    dtype, shape = (
        np.dtype(header[1].decode()),
        tuple(int(extent) for extent in header[2].split(b",") if extent.strip()),
    )
    if len(raw) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} has {len(raw) - start} bytes, which are not of its shape {shape!s:.100}")
    if dtype.kind == "U":
        codes = np.frombuffer(raw, "<u4", offset=start)
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError(f"{member.filename} holds invalid Unicode")
    return member.filename.removesuffix(".npy"), np.frombuffer(raw, dtype, offset=start).reshape(shape)
