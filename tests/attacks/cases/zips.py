"""Arrays and archives byte by byte: npz files that numpy would not write."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from .student import MIB


def npy(array: np.ndarray[Any, Any]) -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array(data, array, (1, 0), allow_pickle=False)
    return data.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo cuts it at a NUL, and turns backslashes round on Windows
            info.compress_type = compression
            archive.writestr(info, content)
    return data.getvalue()


def one_member(name: str, packed: bytes, size: int, *, method: int = 8, flags: int = 0, copies: int = 1) -> bytes:
    """A zip of one member, or of some that share their bytes, which says what it likes of its size."""
    about = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, 0, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + about + name.encode() + packed
    entries = bytearray()
    for index in range(copies):
        own = name if index == 0 else f"{name[:-4]}{index}.npy"
        about = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, 0, len(packed), size, len(own), 0)
        entries += b"PK\x01\x02" + struct.pack("<H", 20) + about + struct.pack("<HHHII", 0, 0, 0, 0, 0) + own.encode()
    end = struct.pack("<HHHHIIH", 0, 0, min(copies, 65535), min(copies, 65535), len(entries), len(local), 0)
    return local + bytes(entries) + b"PK\x05\x06" + end


def deflated(mebibytes: int, head: bytes = b"") -> bytes:
    """A deflate stream of `head` and that many MiB of zeros; a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + piece * mebibytes + packer.flush(zlib.Z_FINISH)


def declared_npy(shape: str, dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
