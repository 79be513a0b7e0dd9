"""Weights: what the header of a safetensors file can say that is not so."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from .student import MIB, WEIGHTS, WHOLE, Student, case, each


def _tensors(header: Any, buffer: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + buffer


def _tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


_SIZED = bytes(64)
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "header_10_gb": lambda: _tensors({}, size=10 << 30),
    "header_largest": lambda: _tensors({}, size=(1 << 64) - 1),
    "header_longer_than_file": lambda: _tensors({"a": _tensor(0, 64)}, size=4096),
    "no_json": lambda: _tensors(b"\xff" * 64, _SIZED),
    "a_list": lambda: _tensors(b"[1, 2]", _SIZED),
    "names_twice": lambda: _tensors(b'{"a": %s, "a": %s}' % ((json.dumps(_tensor(0, 64)).encode(),) * 2), _SIZED),
    "overlap": lambda: _tensors({"a": _tensor(0, 64), "b": _tensor(32, 64)}, _SIZED),
    "all_overlap": lambda: _tensors({f"a{i}": _tensor(0, 64) for i in range(1000)}, _SIZED),
    "gap": lambda: _tensors({"a": _tensor(0, 16), "b": _tensor(32, 64)}, _SIZED),
    "beyond": lambda: _tensors({"a": _tensor(0, 128)}, _SIZED),
    "rest": lambda: _tensors({"a": _tensor(0, 32)}, _SIZED),
    "negative": lambda: _tensors({"a": _tensor(-64, 0, [16])}, _SIZED),
    "backwards": lambda: _tensors({"a": _tensor(64, 0, [16])}, _SIZED),
    "huge_shape": lambda: _tensors({"a": _tensor(0, 64, [1 << 40])}, _SIZED),
    "shape_that_overflows": lambda: _tensors({"a": _tensor(0, 64, [1 << 62, 4, 16])}, _SIZED),
    "negative_shape": lambda: _tensors({"a": _tensor(0, 64, [-4, -4])}, _SIZED),
    "shape_of_floats": lambda: _tensors({"a": {"dtype": "F32", "shape": [16.0], "data_offsets": [0, 64]}}, _SIZED),
    "shape_of_booleans": lambda: _tensors({"a": _tensor(0, 4, [True])}, bytes(4)),
    "many_dimensions": lambda: _tensors({"a": _tensor(0, 4, [1] * 100_000)}, bytes(4)),
    "unknown_dtype": lambda: _tensors({"a": _tensor(0, 64, dtype="O")}, _SIZED),
    "dtype_list": lambda: _tensors({"a": _tensor(0, 64) | {"dtype": []}}, _SIZED),
    "huge_integers": lambda: _tensors(
        b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 64]}}' % (b"1" * MIB)
    ),
    "deep_metadata": lambda: _tensors(b'{"__metadata__": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "metadata_objects": lambda: _tensors({"__metadata__": {"a": {"b": "c"}}, "a": _tensor(0, 64)}, _SIZED),
    "million_tensors": lambda: _tensors(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(250_000)) + b"}"
    ),
    "more_fields": lambda: _tensors({"a": _tensor(0, 64) | {"file": "/etc/passwd"}}, _SIZED),
}


@each("safetensors", (*WHOLE, "student", "network"), WEIGHTS, SAFETENSORS)
def weights(student: Student, make: Callable[[], bytes]) -> None:
    student.put(WEIGHTS, make())


@case("safetensors", ("verify", "copy", "student", "network"), "header has")
def weights_sparse_header(student: Student) -> None:
    student.sparse(WEIGHTS, 20 << 30, head=struct.pack("<Q", 10 << 30))
