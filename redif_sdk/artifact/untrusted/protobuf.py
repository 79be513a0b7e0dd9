"""Reads ONNX's messages in place from protobuf's wire format, from bytes that may be hostile.

`fields` reads the wire: a message is described by a table of the fields that its reader knows, the others are skipped
unread, nothing is copied and nothing recurses. `Reader` reads the messages that hold no graphs: tensors, attributes and
declared values, each checked by itself. `onnx.py` checks graphs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "BITS",
    "LITERALS",
    "Attribute",
    "Message",
    "Reader",
    "RefusalError",
    "Tensor",
    "Value",
    "WireError",
    "extend",
    "fields",
    "quote",
    "table",
]

#: A field's name and rule, by its tag (number and wire type): every wire type of a known number is here.
Message = Mapping[int, tuple[str, int]]

_VARINT, _FIXED64, _SPAN, _FIXED32 = 0, 1, 2, 5
_WIRES = {"varint": _VARINT, "fixed64": _FIXED64, "span": _SPAN, "fixed32": _FIXED32}
_MANY, _WRONG, _REFUSED = 0, -1, -2  # a rule above 0 is the bit of a field that may come once
_LONGEST = 10  # bytes of a varint
_TOO_LONG = re.compile(rb"[\x80-\xff]{10}")
_DECIMAL = re.compile(r"[0-9]{1,18}")
_CONTINUED = bytes(range(128, 256))
_CHUNK = 1 << 16
_SHORT, _MOST_KEPT = 64, 4_096  # bytes of an attribute that is kept, and how many are

MOST_TENSORS = 50_000
MOST_NUMBERS = 65_536  # in an attribute, or in a literal that is not stored raw
MOST_DIMS = 16
LONGEST_NAME = 1_000  # bytes
LARGEST_DIM = (1 << 31) - 1
LARGEST_SHAPE = 1 << 40  # elements of a declared shape

IGNORE = "do not use this student"
AGAIN = "export it again"


class RefusalError(Exception):
    """What is wrong, and what to do. The caller adds the file's name."""

    def __init__(self, what: str, remedy: str = IGNORE) -> None:
        super().__init__(f"{what}; {remedy}")


class WireError(RefusalError):
    """Bytes that are not the message they should be."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it is no ONNX model that this release reads: {what}")


def quote(name: str) -> str:
    """A name for a message: quoted, escaped and cut."""
    return repr(name[:100])


def table(description: str) -> Message:
    """The table of a message, from ``name number wire, ...``.

    A name may begin with ``*``: the field may be repeated, and packed if it is of numbers; or ``!``: it is refused.
    """
    rules: dict[int, tuple[str, int]] = {}
    for entry in description.split(","):
        name, number, kind = entry.split()
        many = name.startswith("*")
        for wire in range(8):
            fits = wire == _WIRES[kind] or (many and wire == _SPAN)
            rule = (_MANY if many else 1 << int(number)) if fits else _WRONG
            rules[int(number) << 3 | wire] = (name.strip("*!"), _REFUSED if name.startswith("!") else rule)
    return rules


def fields(data: bytes, start: int, end: int, message: Message) -> Iterator[tuple[str, int, int]]:
    """Yield the known fields of the message in ``data[start:end]``, in order: (name, value, stop).

    A varint is (name, value, -1), anything else (name, start, stop) of its bytes. Raises WireError, with the offset,
    for what is no protobuf, for a wire type that is not the field's, a field twice that may come once, and one that is
    refused.
    """
    seen = 0
    known = message.get
    while start < end:
        at = start
        tag = data[start]
        start += 1
        if tag > 127:
            tag, start = _varint(data, at, end)
        wire = tag & 7
        if wire == _SPAN:
            if start >= end:
                raise WireError(f"the field at byte {at} is cut off")
            size = data[start]
            start += 1
            if size > 127:
                size, start = _varint(data, start - 1, end)
            value = start
            start = stop = start + size
        elif wire == _VARINT:
            if start >= end:
                raise WireError(f"the field at byte {at} is cut off")
            value = data[start]
            start += 1
            if value > 127:
                value, start = _varint(data, start - 1, end)
            stop = -1
        elif wire in (_FIXED32, _FIXED64):
            value = start
            start = stop = start + (4 if wire == _FIXED32 else 8)
        else:
            raise WireError(f"the field at byte {at} is of wire type {wire}, which ONNX does not use")
        if start > end:
            raise WireError(f"the field at byte {at} goes on beyond its message")
        entry = known(tag)
        if entry is None:
            if tag < 8 or tag >> 32:
                raise WireError(f"the field at byte {at} has no number that protobuf allows")
            continue
        name, rule = entry
        if rule > 0:
            if seen & rule:
                raise WireError(f"the field {name} at byte {at} comes twice")
            seen |= rule
        elif rule == _WRONG:
            raise WireError(f"the field {name} at byte {at} is of wire type {wire}")
        elif rule == _REFUSED:
            raise WireError(f"the field {name} at byte {at} is not one that this release takes")
        yield name, value, stop


def _varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `start`."""
    value = shift = 0
    for byte in data[start : min(start + _LONGEST, end)]:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if value >> 64:
                break
            return value, start + shift // 7
    raise WireError(f"the number at byte {start} is cut off or too long")


def _varints(data: bytes, start: int, end: int) -> Iterator[int]:
    """The numbers of a packed field."""
    while start < end:
        value, start = _varint(data, start, end)
        yield value


def _count_varints(data: bytes, start: int, end: int) -> int:
    """How many numbers a packed field has, at the speed of C. WireError unless all are whole."""
    if start == end:
        return 0
    if data[end - 1] > 127 or _TOO_LONG.search(data, start, end):
        raise WireError(f"a number after byte {start} is cut off or too long")
    return sum(
        len(data[at : min(at + _CHUNK, end)].translate(None, delete=_CONTINUED)) for at in range(start, end, _CHUNK)
    )


def _signed(value: int) -> int:
    """A varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


# Numbers of fields: onnx.proto, IR version 14.
_ATTRIBUTE = table(
    "name 1 span, f 2 fixed32, i 3 varint, s 4 span, t 5 span, g 6 span, *floats 7 fixed32, *ints 8 varint,"
    "*strings 9 span, !tensors 10 span, !graphs 11 span, !tp 14 span, !type_protos 15 span, type 20 varint,"
    "ref_attr_name 21 span, !sparse_tensor 22 span, !sparse_tensors 23 span"
)
_ATTRIBUTE_TYPES = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings"}
_TENSOR = table(
    "*dims 1 varint, data_type 2 varint, !segment 3 span, *float_data 4 fixed32, *int32_data 5 varint,"
    "!string_data 6 span, *int64_data 7 varint, name 8 span, raw_data 9 span, *double_data 10 fixed64,"
    "*uint64_data 11 varint, *external_data 13 span, data_location 14 varint"
)
_ENTRY = table("key 1 span, value 2 span")
_VALUE = table("name 1 span, type 2 span")
_TYPE = table(
    "tensor_type 1 span, !sequence_type 4 span, !map_type 5 span, !opaque_type 7 span, !sparse_tensor_type 8 span,"
    "!optional_type 9 span"
)
_TENSOR_TYPE = table("elem_type 1 varint, shape 2 span")
_SHAPE = table("*dim 1 span")
_DIM = table("dim_value 1 varint, dim_param 2 span")

#: Bits of an element, by ONNX's number of its type. No strings, no complex numbers.
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 17: 8, 18: 8}
BITS |= {19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_HELD_IN = dict.fromkeys(BITS, "int32_data") | {1: "float_data", 7: "int64_data", 11: "double_data"}
_HELD_IN |= dict.fromkeys((12, 13), "uint64_data")
_FIXED = {"float_data": 4, "double_data": 8}

#: The types that shapes, scales and ranges are given in.
LITERALS = {1: "<f4", 6: "<i4", 7: "<i8", 11: "<f8"}


class Tensor(NamedTuple):
    """A tensor: the `span` of its message, or the `numbers` of an attribute that stands for it."""

    kind: int
    elements: int
    external: bool = False
    span: tuple[int, int] = (0, 0)
    numbers: tuple[float, ...] = ()


class Attribute(NamedTuple):
    """A node's attribute: its kind, its numbers, and the bytes of its tensor or graph."""

    name: str
    kind: str
    numbers: list[float]
    span: tuple[int, int]


class Value(NamedTuple):
    """What a graph says of an input or output; None where it says nothing."""

    name: str
    elem_type: int | None
    shape: list[int | str | None] | None


class Reader:
    """A model's bytes, and what was read of them so far. Its methods raise RefusalError.

    `data_sizes`: bytes of the files that may hold tensors' values, by name; `used`: those that do.
    """

    def __init__(self, data: bytes, data_sizes: Mapping[str, int]) -> None:
        self.data = data
        self.data_sizes = data_sizes
        self.used: set[str] = set()
        self.tensors = 0
        self._attributes: dict[bytes, Attribute] = {}  # many are equal

    def text(self, start: int, stop: int) -> str:
        """A name: UTF-8, not too long."""
        if stop - start > LONGEST_NAME:
            raise WireError(f"the text at byte {start} has more than {LONGEST_NAME} bytes")
        try:
            return self.data[start:stop].decode()
        except UnicodeDecodeError:
            raise WireError(f"the text at byte {start} is not UTF-8") from None

    def attribute(self, start: int, stop: int) -> Attribute:
        """An attribute that is of one kind, the one that it says. Equal short ones are read once."""
        key = self.data[start:stop] if stop - start <= _SHORT else b""
        known = self._attributes.get(key)
        if known is None:
            known = self._attribute(start, stop)
            if key and known.kind not in "tg" and len(self._attributes) < _MOST_KEPT:
                self._attributes[key] = known
        return known

    def _attribute(self, start: int, stop: int) -> Attribute:
        name, kind, held = "", 0, ""
        numbers: list[float] = []
        span = (0, 0)
        for field, value, end in fields(self.data, start, stop, _ATTRIBUTE):
            if field == "name":
                name = self.text(value, end)
                continue
            if field == "type":
                kind = value
                continue
            if field == "ref_attr_name":
                if end > value:
                    raise RefusalError(f"the attribute {quote(name)} refers to a function's")
                continue
            if held not in ("", field):
                raise RefusalError(f"the attribute {quote(name)} has two kinds of value, {held} and {field}")
            held = field
            if end < 0:
                numbers.append(_signed(value))
            elif field == "ints":
                extend(numbers, (_signed(number) for number in _varints(self.data, value, end)))
            elif field in ("f", "floats"):
                extend(numbers, _fixed(self.data, value, end, "<f4"))
            else:
                span = (value, end)
            if len(numbers) > MOST_NUMBERS:
                raise RefusalError(f"the attribute {quote(name)} has more than {MOST_NUMBERS} numbers")
        says = _ATTRIBUTE_TYPES.get(kind, "")
        if not name or not says or held not in (says, "") or (says in "tg" and not held):
            raise RefusalError(f"the attribute {quote(name)} is of type {kind} and holds {held or 'nothing'}")
        return Attribute(name, says, numbers, span)

    def tensor(self, start: int, stop: int, who: str, external: bool) -> tuple[str, Tensor]:
        """Check a tensor, and return its name and what it is. `external`: whether a data file may hold its values."""
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise RefusalError(f"it has more than {MOST_TENSORS} tensors")
        name, kind, raw, location = "", 0, -1, 0
        dims: list[int] = []
        held: dict[str, int] = {}
        entries: list[tuple[int, int]] = []
        for field, value, end in fields(self.data, start, stop, _TENSOR):
            if field == "dims":
                extend(dims, (value,) if end < 0 else _varints(self.data, value, end), MOST_DIMS)
            elif field == "data_type":
                kind = value
            elif field == "name":
                name = self.text(value, end)
            elif field == "raw_data":
                raw = end - value
            elif field == "data_location":
                location = value
            elif field == "external_data":
                extend(entries, [(value, end)], 4)
            elif field in _FIXED:
                if (end - value) % _FIXED[field]:
                    raise WireError(f"the numbers at byte {value} are cut off")
                held[field] = held.get(field, 0) + (end - value) // _FIXED[field]
            else:
                held[field] = held.get(field, 0) + (1 if end < 0 else _count_varints(self.data, value, end))
        elements = math.prod(dims)
        size = (elements * BITS.get(kind, 0) + 7) // 8
        fault = None
        if kind not in BITS:
            fault = f"is of element type {kind}, which this release does not take"
        elif any(dim > LARGEST_DIM for dim in dims):
            fault = f"has a negative dimension or one above {LARGEST_DIM}"
        elif (raw >= 0) + len(held) + (location != 0) > 1 or location not in (0, 1) or (entries and not location):
            fault = "has its values in more than one place, or in none that ONNX knows"
        elif location:
            fault = self.external(entries, size) if external else "is in a data file and no weight of the main graph"
        elif held and held != {_HELD_IN[kind]: -(-elements * min(BITS[kind], 8) // 8)}:
            fault = f"has {elements} elements of type {kind} and holds {held}"
        elif not held and max(raw, 0) != size:
            fault = f"should have {size} bytes and has {max(raw, 0)}"
        if fault is not None:
            raise RefusalError(f"{who or f'the tensor {quote(name)}'} {fault}")
        return name, Tensor(kind, elements, external=bool(location), span=(start, stop))

    def external(self, entries: list[tuple[int, int]], size: int) -> str | None:
        """What is wrong with where a tensor's `size` bytes lie, in a file of the manifest's, or None."""
        said: dict[str, str] = {}
        for start, stop in entries:
            entry = {field: self.text(value, end) for field, value, end in fields(self.data, start, stop, _ENTRY)}
            key = entry.get("key", "")
            if key not in ("location", "offset", "length", "checksum") or key in said:
                return f"says {quote(key)} of its data, twice or without meaning"
            said[key] = entry.get("value", "")
        file, offset, length = said.get("location", ""), said.get("offset", "0"), said.get("length", "")
        if file not in self.data_sizes:
            return f"is in {quote(file)}, which the manifest does not list as its data"
        if not (_DECIMAL.fullmatch(offset) and _DECIMAL.fullmatch(length)):
            return f"has the place {quote(offset)} and length {quote(length)}, which are no numbers"
        if int(length) != size or int(offset) + size > self.data_sizes[file]:
            return (
                f"has {size} bytes; {length} at {offset} of {quote(file)} ({self.data_sizes[file]} bytes) are not those"
            )
        self.used.add(file)
        return None

    def value(self, start: int, stop: int) -> Value:
        """Check what a graph declares of a value: a tensor of a sane size, or nothing."""
        name, kind, shape = "", None, None
        for field, value, end in fields(self.data, start, stop, _VALUE):
            if field == "name":
                name = self.text(value, end)
                continue
            for _, type_start, type_stop in fields(self.data, value, end, _TYPE):
                for part, inner, inner_stop in fields(self.data, type_start, type_stop, _TENSOR_TYPE):
                    if part == "elem_type":
                        kind = inner
                    else:
                        shape = self.dims(inner, inner_stop)
        if kind is not None and kind not in BITS:
            raise RefusalError(f"the value {quote(name)} is of element type {kind}, which this release does not take")
        numbers = [dim for dim in shape or () if isinstance(dim, int)]
        if any(dim > LARGEST_DIM for dim in numbers) or math.prod(numbers) >= LARGEST_SHAPE:
            raise RefusalError(
                f"the value {quote(name)} is declared of shape {str(shape)[:100]}, more than this release takes"
            )
        return Value(name, kind, shape)

    def dims(self, start: int, stop: int) -> list[int | str | None]:
        """A declared shape: numbers, names, and None for an axis that has neither."""
        shape: list[int | str | None] = []
        for _, value, end in fields(self.data, start, stop, _SHAPE):
            said: list[int | str | None] = [
                part if part_stop < 0 else self.text(part, part_stop)
                for _, part, part_stop in fields(self.data, value, end, _DIM)
            ]
            if len(said) > 1:
                raise RefusalError("a dimension has both a number and a name")
            extend(shape, said or [None], MOST_DIMS)
        return shape

    def numbers(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """A literal's values, in place where they are stored raw."""
        if tensor.numbers:
            return np.array(tensor.numbers)
        dtype = np.dtype(LITERALS[tensor.kind])
        found: list[float] = []
        for field, value, end in fields(self.data, *tensor.span, _TENSOR):
            if field == "raw_data":
                return np.frombuffer(self.data, dtype, tensor.elements, value)
            if field in _FIXED:
                extend(found, _fixed(self.data, value, end, dtype.str))
            elif field in ("int32_data", "int64_data"):
                numbers = (value,) if end < 0 else _varints(self.data, value, end)
                extend(found, (_signed(number) for number in numbers))
        return np.array(found, np.int64 if dtype.kind == "i" else dtype).astype(dtype)  # int32s wrap, as in protobuf


def extend(found: list[Any], more: Iterable[Any], limit: int = MOST_NUMBERS) -> None:
    """Append to a list that a hostile file must not make long."""
    for item in more:
        if len(found) >= limit:
            raise RefusalError(f"a list that may have {limit} entries has more")
        found.append(item)


def _fixed(data: bytes, start: int, stop: int, dtype: str) -> list[float]:
    """The numbers of a fixed-width field, packed or not."""
    size = np.dtype(dtype).itemsize
    if (stop - start) % size or stop - start > MOST_NUMBERS * size:
        raise WireError(f"the numbers at byte {start} are cut off or too many")
    values: list[float] = np.frombuffer(data, dtype, (stop - start) // size, start).tolist()
    return values
