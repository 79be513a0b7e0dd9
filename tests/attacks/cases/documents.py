"""JSON, and what the manifest says with it: texts, numbers, step tables."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from .student import ALL, CONFIG, GOLDEN, MIB, WHOLE, Student, case, each
from .zips import npy, zipped

JSON: dict[str, Callable[[], bytes]] = {
    "deep_lists": lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep_objects": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "million_lists": lambda: b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "million_zeros": lambda: b'{"a":[' + b"0," * 2_100_000 + b"0]}",
    "huge_integer": lambda: b'{"a":' + b"9" * MIB + b"}",
    "keys_twice": lambda: b'{"a":1,"a":2}',
    "no_utf8": lambda: b'{"a":"\xff\xfe"}',
    "byte_order_mark": lambda: b"\xef\xbb\xbf{}",
    "utf16": lambda: "{}".encode("utf-16"),
    "a_list": lambda: b"[]",
    "a_number": lambda: b"1",
    "empty": lambda: b"",
    "two_values": lambda: b"{}{}",
    "nul": lambda: b'{"a":"\0"}',
    "unclosed": lambda: b'{"a":"' + b"x" * MIB,
}
ONLY_MANIFEST: dict[str, Callable[[], bytes]] = {
    "8_mb_string": lambda: b'{"a":"' + b"x" * (8 * MIB) + b'"}',
    "million_rows": lambda: b'{"step_tables":[{"rows":[' + b"[0,0,0,0,0,0]," * 1_000_000 + b"[]]}]}",
    "nan": lambda: b'{"format_version":"1.1","a":NaN}',
    "infinity": lambda: b'{"format_version":"1.1","a":-Infinity}',
    "1e999": lambda: b'{"format_version":"1.1","a":1e999}',
    "no_version": lambda: b"{}",
    "version_list": lambda: b'{"format_version":["1.1"]}',
    "other_version": lambda: b'{"format_version":"2.0"}',
    "version_escape": lambda: b'{"format_version":"2\\u001b[31m\\n.0"}',
}


@each("json", (*ALL, "network"), r"redif\.json", JSON | ONLY_MANIFEST)
def manifest_json(student: Student, make: Callable[[], bytes]) -> None:
    (student.folder / "redif.json").write_bytes(make())


@each("json", (*WHOLE, "student", "network"), CONFIG, JSON)
def config_json(student: Student, make: Callable[[], bytes]) -> None:
    student.put(CONFIG, make())


@case("json", ALL, r"redif\.json.*more than")
def manifest_of_1_gb(student: Student) -> None:
    student.sparse("redif.json", 1 << 30, listed=False)


@case("json", WHOLE, r"config\.json.*at most")
def config_of_1_gb(student: Student) -> None:
    student.sparse(CONFIG, 1 << 30)


@each(
    "json",
    ALL,
    r"redif\.json",
    {
        "surrogate": "\ud800",
        "escape": "\x1b]0;owned\x07",
        "c1": "\x9b31m",
        "newline": "a\nb",
        "bidi": "\u202egnp.exe",
        "isolate": "\u2066x",
        "arabic_mark": "a\u061cb",
        "zero_width": "a\u200bb",
        "tags": "a\U000e0041",
        "long": "x" * 2000,
    },
)
def name(student: Student, text: str) -> None:
    student.set("name", text)


@each("json", ALL, r"redif\.json", {"escape": "\x1b[2J", "bidi": "\u202ex", "newline": "x\ny"})
def class_names(student: Student, text: str) -> None:
    student.set("condition.class_names", [text, *"bcdefghij"])


NUMBERS: dict[str, tuple[str, Any]] = {
    "latents": ("latents", {"channels": 65536, "height": 65536, "width": 65536, "dynamic": [], "multiple": 1}),
    "latents_more": ("latents.height", 1 << 60),
    "latents_negative": ("latents.height", -1),
    "latents_boolean": ("latents.height", True),
    "latents_float": ("latents.height", 14.0),
    "golden_batch": ("golden.0.batch", 1 << 60),
    "golden_batch_beyond": ("golden.0.batch", 10**100),
    "golden_size": ("golden.0.height", 1 << 31),
    "golden_steps": ("golden.0.num_inference_steps", 0),
    "pixel_shuffle": ("postprocess.pixel_shuffle", 1 << 31),
    "num_classes": ("condition.num_classes", 10**18),
    "opset": ("graphs.0.opset", 1 << 63),
    "file_bytes": ("files.0.bytes", 1 << 64),
    "file_bytes_negative": ("files.0.bytes", -1),
    "file_hash": ("files.0.sha256", "x" * 64),
    "value_range": ("postprocess.value_range", [1, -1]),
    "unknown_field": ("surprise", 1),
    "task": ("task", "evil"),
    "network_list": ("network", []),
    "guidance": ("network.guidance", {"scale": -1.0, "null_class": 0}),
    "tables_none": ("step_tables", []),
    "graph_shape": ("graphs.0.inputs", [{"name": "noise", "dtype": "float32", "shape": [1] * 17}]),
    "graph_inputs": ("graphs.0.inputs", [{"name": "x", "dtype": "float32", "shape": []}] * 65),
}


@each("numbers", (*ALL, "student"), r"redif\.json", NUMBERS)
def number(student: Student, change: tuple[str, Any]) -> None:
    student.set(*change)


@case("numbers", ("load", "verify"), "noise|latents|values")
def noise_bomb(student: Student) -> None:
    """Latents that are just small enough, times the noise of a table of 1000 rows."""
    document = student.document()
    document["latents"] |= {"channels": 4, "height": 4096, "width": 4096}
    document["golden"] = []
    rows = [[1.0, 0.5, 0.5, 0.5, 0.5, 0.5]] * 1000
    document["step_tables"] = [document["step_tables"][0] | {"rows": rows}]
    student.sign(document)


@case("numbers", ("verify",), "golden|values|twice")
def golden_many_of_one_file(student: Student) -> None:
    """One file of little more than 200 KB, which a hundred entries name: each would be unpacked."""
    batch, shape = 16384, (4, 14, 14)
    arrays = {
        "seeds": np.zeros((batch, 2), np.uint64),
        "class_labels": np.zeros(batch, np.int64),
        "rows": np.zeros(1, np.int64),
        "x": np.zeros((1, batch, *shape), np.float32),
        "f": np.zeros((1, batch, *shape), np.float32),
        "images": np.zeros((batch, 28, 28, 1), np.uint8),
    }
    student.put(GOLDEN, zipped({f"{name}.npy": npy(value) for name, value in arrays.items()}, zipfile.ZIP_DEFLATED))
    document = student.document()
    entry = {"file": GOLDEN, "num_inference_steps": 2, "batch": batch, "height": None, "width": None}
    document["golden"] = [entry] * 100
    student.sign(document)


# ---------------------------------------------------------------- step tables

_ROW = [999.0, 0.1, -1.0, 0.7, 0.7, 0.0]
TABLES: dict[str, Any] = {
    "nan": {"rows": [[float("nan")] * 6]},
    "infinity": {"rows": [[float("inf")] * 6]},
    "beyond_float32": {"rows": [[1e39, *_ROW[1:]]]},
    "huge_integer": {"rows": [[10**300, *_ROW[1:]]]},
    "no_rows": {"rows": []},
    "3000_rows": {"rows": [[0] * 6] * 3000},
    "1001_rows": {"rows": [_ROW] * 1001},
    "short_row": {"rows": [_ROW[:5]]},
    "booleans": {"rows": [[True] * 6]},
    "strings": {"rows": [["1"] * 6]},
    "nested": {"rows": [[[1]] * 6]},
    "rows_number": {"rows": 10**9},
    "rows_text": {"rows": "x" * 1000},
    "columns": {"columns": ["t", "p", "q", "r", "s", "evil"]},
    "scale_nan": {"init_scale": float("nan")},
    "scale_text": {"init_scale": "1"},
    "scale_huge": {"init_scale": 10**300},
    "prediction": {"prediction_type": "os.system"},
    "sampler_number": {"sampler": 1},
    "sampler_long": {"sampler": "x" * 100_000},
    "sampler_escape": {"sampler": "\x1b[31m\n"},
    "more": {"exec": "import os"},
}


@each("step tables", (*ALL, "student"), r"step table|redif\.json", TABLES)
def table(student: Student, change: dict[str, Any]) -> None:
    document = student.document()
    document["step_tables"] = [document["step_tables"][0] | change]
    student.sign(document)


@case("step tables", ALL, r"redif\.json")
def tables_65(student: Student) -> None:
    document = student.document()
    first = document["step_tables"][0]
    document["step_tables"] = [first | {"rows": [_ROW] * steps} for steps in range(1, 66)]
    student.sign(document)


@case("step tables", ALL, "same number of steps")
def tables_twice(student: Student) -> None:
    document = student.document()
    document["step_tables"] *= 2
    student.sign(document)
