"""Golden arrays: npz files that unpack to more than they say, or hold no arrays."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable

import numpy as np

from .student import GOLDEN, MIB, WHOLE, Student, case, each
from .zips import declared_npy, deflated, npy, one_member, zipped

NPZ: dict[str, Callable[[], bytes]] = {
    "unpacks_to_3_gb": lambda: one_member("x.npy", deflated(3072), 3072 * MIB),
    "unpacks_to_10_gb": lambda: one_member("x.npy", deflated(2048), 2048 * MIB, copies=5),
    "says_little_unpacks_to_2_gb": lambda: one_member("x.npy", deflated(1900, declared_npy("1,") + bytes(4)), 100),
    "declares_10_12_elements": lambda: zipped({"x.npy": declared_npy("1000000, 1000000")}),
    "declares_10_30_elements": lambda: zipped({"x.npy": declared_npy("1000000000, 1000000000, 1000000000, 1000")}),
    "negative_shape": lambda: zipped({"x.npy": declared_npy("-1,")}),
    "many_members": lambda: zipped({f"x{index}.npy": b"" for index in range(20_000)}),
    "many_entries": lambda: one_member("x.npy", b"", 0, copies=100_000),
    "a_member_twice": lambda: one_member("x.npy", b"", 0, copies=1)[:-22] + one_member("x.npy", b"", 0),
    "encrypted": lambda: one_member("x.npy", deflated(0, npy(np.zeros(1))), 136, flags=1),
    "lzma": lambda: zipped({"x.npy": npy(np.zeros(1))}, zipfile.ZIP_LZMA),
    "objects": lambda: zipped({"x.npy": declared_npy("1,", "|O") + bytes(8)}),
    "records": lambda: zipped({"x.npy": declared_npy("1,", "[('a', '<f4')]") + bytes(4)}),
    "long_header": lambda: zipped({"x.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b" " * 100}),
    "no_zip": lambda: b"PK\x03\x04" + bytes(1000),
    "empty": lambda: b"",
    "directory_beyond": lambda: b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 1 << 31, 1 << 31, 0),
    "text": lambda: b"x" * 1000,
}


@each("npz", WHOLE, "cannot be read as npz", NPZ)
def npz(student: Student, make: Callable[[], bytes]) -> None:
    student.put(GOLDEN, make())


@case("npz", WHOLE, r"golden.*at most")
def npz_of_1_gb(student: Student) -> None:
    student.sparse(GOLDEN, 1 << 30)
