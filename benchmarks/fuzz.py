"""Fuzz every reader of untrusted bytes: anything but a RedifError or a normal return is a finding.

    python benchmarks/fuzz.py --seconds 300 [--seed 0] [--engine atheris|plain] [--target NAME]... [--json FILE]

The engine "atheris" is guided by coverage (``python -m venv build/fuzz-venv && build/fuzz-venv/bin/pip install -c
constraints.txt -e . atheris onnx``; run this file with that Python). "plain" mutates known inputs by their structure
and needs nothing installed. Findings, and inputs that take longer than 2 seconds, are written to build/fuzz/ with what
reproduces them: ``python benchmarks/fuzz.py --reproduce FILE``. Exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Graph, Latents, Network, Postprocess
from redif_sdk.artifact.untrusted import contents
from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.artifact.untrusted.npz import LARGEST_ARRAYS, npz_arrays
from redif_sdk.artifact.untrusted.onnx import check_graph
from redif_sdk.artifact.untrusted.safetensors import safetensors_header, safetensors_header_size
from redif_sdk.card import sections as card_sections
from redif_sdk.errors import RedifError
from redif_sdk.results import document, write_json
from redif_sdk.sampling.table import StepTable

__all__ = ["TARGETS", "Fuzzed", "fuzz", "run_one"]

FOUND = Path("build/fuzz")
SLOWEST = 2.0  # seconds for one input
LONGEST = 1 << 16  # bytes of an input

# ---------------------------------------------------------------- what is fuzzed


@dataclass(frozen=True)
class Target:
    """A reader of bytes, with seed inputs and a dictionary of its format."""

    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()


def _signed(data: bytes) -> bytes:
    """The manifest with its correct digest; unchanged if it cannot be parsed."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            return data
        content.pop("digest", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content["digest"] = hashlib.sha256(text.encode()).hexdigest()
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    except (ValueError, RecursionError):
        return data


def _manifest_signed(data: bytes) -> None:
    manifest = Manifest.from_bytes(_signed(data))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    for table in manifest.tables:
        assert StepTable.from_dict(table.to_dict()) == table


def _table(data: bytes) -> None:
    table = StepTable.from_dict(strict_json.parse(data, "a table"))
    assert StepTable.from_dict(table.to_dict()) == table


def _safetensors(data: bytes) -> None:
    size = safetensors_header_size(data[:8], len(data), "x.safetensors")
    safetensors_header(data[8 : 8 + size], len(data) - 8 - size, "x.safetensors")


def _npz(data: bytes) -> None:
    arrays = npz_arrays(data, "x.npz")
    assert sum(array.nbytes for array in arrays.values()) <= LARGEST_ARRAYS


def _tokenizer(data: bytes) -> None:
    contents.check("tokenizer/tokenizer.json", data, "tokenizer.json")


def _graph(data: bytes) -> None:
    check_graph(data, _description(), {"w.data": 4096}, "x.onnx")


def _sections(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for name, content in card_sections.user_sections(text).items():
        assert content in text.replace("\r\n", "\n")
        assert name


@cache
def _manifest() -> Manifest:
    rows = np.linspace(0.1, 0.9, 12).reshape(2, 6)
    return Manifest(
        name="tiny",
        licence="mit",
        task="unconditional",
        step_tables=[StepTable(rows, "v_prediction", "ddim").to_dict()],
        latents=Latents(channels=4, height=14, width=14),
        postprocess=Postprocess(pixel_shuffle=2),
        network=Network(class_path="diffusers.UNet2DModel", folder="unet"),
        graphs=[_description()],
        golden=[{"file": "golden/a.npz", "num_inference_steps": 2, "batch": 1}],
        files=[
            {"path": path, "bytes": 3, "sha256": "0" * 64} for path in ("onnx/x.onnx", "golden/a.npz", "onnx/w.data")
        ],
    ).digested()


@cache
def _description() -> Graph:
    side = [{"name": "x", "dtype": "float32", "shape": ["batch", 4, 14, 14]}]
    return Graph(
        component="denoiser",
        precision="fp32",
        file="onnx/x.onnx",
        data=["onnx/w.data"],
        opset=20,
        inputs=side,
        outputs=[{**side[0], "name": "y"}],
    )


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _message(*parts: tuple[int, int | bytes | str]) -> bytes:
    """A protobuf message of numbers and of spans."""
    data = b""
    for number, value in parts:
        if isinstance(value, int):
            data += _varint(number << 3) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            data += _varint(number << 3 | 2) + _varint(len(content)) + content
    return data


def _models() -> list[bytes]:
    """y = a loop over x + w, with a Constant, an Expand and a weight in a file: every message that the reader knows."""
    shape = b"".join(_message((1, _message((2, "batch") if dim is None else (1, dim)))) for dim in (None, 4, 14, 14))

    def value(name: str, kind: int = 1, dims: bytes = shape) -> bytes:
        return _message((1, name), (2, _message((1, _message((1, kind), (2, dims))))))

    literal = _message((1, 2), (2, 7), (8, "dims"), (9, struct.pack("<qq", 1, 1)))
    listed = _message((1, 2), (2, 7), (7, b"\x01\x02"), (8, "packed"))
    trips = _message((2, 7), (8, "trips"), (9, struct.pack("<q", 2)))
    go = _message((2, 9), (8, "go"), (9, b"\x01"))
    place = [_message((1, key), (2, said)) for key, said in (("location", "w.data"), ("offset", "0"), ("length", "64"))]
    outer = _message((1, 16), (2, 1), (8, "outer"), *((13, entry) for entry in place), (14, 1))
    number = _message((1, "value_float"), (2, b"")).replace(b"\x12\x00", b"\x15" + struct.pack("<f", 1.0))
    constant = _message((2, "c"), (4, "Constant"), (5, number + _message((20, 1))))
    expand = _message((1, "c"), (1, "dims"), (2, "e"), (3, "expand"), (4, "Expand"))
    add = _message((1, "x_in"), (1, "e"), (2, "x_out"), (4, "Add"))
    same = _message((1, "go_in"), (2, "go_out"), (4, "Identity"))
    body = _message(
        (1, add),
        (1, same),
        (2, "body"),
        *((11, value(name, kind, b"")) for name, kind in (("k", 7), ("go_in", 9))),
        (11, value("x_in")),
        (12, value("go_out", 9, b"")),
        (12, value("x_out")),
    )
    loop = _message(
        *((1, name) for name in ("trips", "go", "x")),
        (2, "y"),
        (4, "Loop"),
        (5, _message((1, "body"), (6, body), (20, 5))),
    )
    graph = _message(
        *((1, node) for node in (constant, expand, loop)),
        *((5, tensor) for tensor in (literal, listed, trips, go, outer)),
        (11, value("x")),
        (12, value("y")),
        (13, value("e", 1, b"")),
    )
    plain = _message((1, 10), (7, graph), (8, _message((2, 20))))
    check_graph(plain, _description(), {"w.data": 4096}, "the fuzzer's own graph")
    return [plain]


def _archives() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", method) as archive:
            for name, array in (("x", np.zeros((2, 3), np.float32)), ("seeds", np.zeros((1, 2), np.uint64))):
                raw = io.BytesIO()
                np.lib.format.write_array(raw, array, (1, 0), allow_pickle=False)
                archive.writestr(f"{name}.npy", raw.getvalue())
        found.append(data.getvalue())
    for archive in found:
        npz_arrays(archive, "the fuzzer's own archive")
    return found


def _tensors() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
    }
    text = json.dumps(header).encode()
    found = [struct.pack("<Q", len(text)) + text + bytes(18)]
    _safetensors(found[0])
    return found


def _tokenizers() -> list[bytes]:
    replace = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    sequence = {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace]}
    return [
        json.dumps({"normalizer": sequence, "decoder": replace, "added_tokens": [{"id": 0, "content": "a"}]}).encode()
    ]


CARDS = [
    "---\nlicense: mit\n---\n# x\n<!-- user:about start -->\ntext\n<!-- user:about end -->\n![a](images/a.png) <br>\n",
    "# x\r\n<!-- user:a start -->\r\n\r\n<!-- user:a end -->\n[x](https://example.org) `code` <b>x</b> &amp; &#106;\n",
]
JSON_WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-0",
    b"\\ud800",
    b"\\u0000",
)
CARD_WORDS = (
    *(b"<script>", b"javascript:", b"onerror=", b"&#x6a;", b"&Tab;", b"](", b"<!-- user:", b"start -->", b" end -->"),
    *(b"---\n", b"data:text", b"<svg", b"url(", b"\x00", b"\\"),
)

TARGETS: dict[str, Target] = {
    "manifest": Target(lambda data: Manifest.from_bytes(data), lambda: [_manifest().to_bytes()], JSON_WORDS),
    "manifest, signed": Target(_manifest_signed, lambda: [_manifest().to_bytes()], JSON_WORDS),
    "step table": Target(_table, lambda: [json.dumps(_manifest().tables[0].to_dict()).encode()], JSON_WORDS),
    "safetensors": Target(_safetensors, _tensors, (*JSON_WORDS, b'"F32"', b"data_offsets", b"\x00" * 8)),
    "npz": Target(_npz, _archives, (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"|O", b"(-1,)")),
    "json": Target(lambda data: strict_json.parse(data, "x.json"), lambda: [b'{"a": [1, 2.5, "x", null]}'], JSON_WORDS),
    "tokenizer": Target(_tokenizer, _tokenizers, (*JSON_WORDS, b'"Regex"', b'"content"', b'"normalizers"')),
    "onnx": Target(_graph, _models, (b"\xff" * 9 + b"\x01", b"w.data", b"../", b"Loop", b"If", b"\xa0\x01\x05")),
    "card sections": Target(_sections, lambda: [text.encode() for text in CARDS], CARD_WORDS),
}

# ---------------------------------------------------------------- one input


@dataclass
class Fuzzed:
    """The result for one target. `findings`: files with the inputs, one for each place that failed."""

    target: str
    engine: str
    executions: int = 0
    seconds: float = 0.0
    taken: int = 0
    slowest: float = 0.0
    findings: list[str] = field(default_factory=list)


class _HangError(BaseException):
    """An input took too long. Not an Exception, so that a reader cannot swallow it."""


@contextmanager
def _alarm() -> Iterator[None]:
    """Raises _HangError where an input takes longer than `SLOWEST`."""

    def ring(_: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SLOWEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_one(target: str, data: bytes) -> str | None:
    """What is wrong with how the reader handled `data`, and where; None if it refused it, "" if it accepted it."""
    try:
        with _alarm():
            TARGETS[target].read(data)
    except RedifError:
        return None
    except _HangError:
        return "hang"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"
    return ""


def keep(target: str, fault: str, data: bytes, engine: str) -> str:
    """Write an input on which a reader failed, and the failure; returns the file's name."""
    FOUND.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(fault.partition(": ")[0].encode()).hexdigest()[:8]
    path = FOUND / f"{target.replace(', ', '-').replace(' ', '-')}-{name}.bin"
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps({"target": target, "fault": fault, "engine": engine}) + "\n")
    return path.as_posix()


# ---------------------------------------------------------------- plain mutation

NUMBERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
    0.5,
    1e308,
)
VALUES: tuple[Any, ...] = (*NUMBERS, None, True, False, "", "x" * 300, "\x1b[31m", "\u202e", "../x", [], {}, [[]], "1")


def _bytes(chance: random.Random, data: bytes, pool: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One change that ignores the format."""
    at, kind = chance.randrange(len(data) + 1), chance.randrange(8)
    length = min(chance.choice((1, 1, 2, 4, 8, 64)), len(data) - at)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + chance.randbytes(length) + data[at + length :]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * chance.choice((2, 3, 100)) + data[at + length :]
    if kind == 4:
        other = chance.choice(pool)
        return data[:at] + other[chance.randrange(len(other) + 1) :]
    if kind == 5 and words:
        return data[:at] + chance.choice(words) + data[at + chance.choice((0, length)) :]
    number = chance.choice(NUMBERS[:12])
    packed = struct.pack("<q", int(number) & (1 << 63) - 1)[: chance.choice((1, 2, 4, 8))]
    return data[:at] + packed + data[at + (len(packed) if kind == 6 else 0) :]


def _json(chance: random.Random, data: bytes) -> bytes:
    """One change of a JSON document: a value replaced, doubled, moved, removed or renamed."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
    if not places:
        return data
    node, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind < 2:
        node[key] = chance.choice(VALUES)
    elif kind == 2:
        other, place = chance.choice(places)
        node[key] = json.loads(json.dumps(other[place]))
    elif kind == 3:
        del node[key]
    elif isinstance(node, list):
        node += [node[key]] * chance.choice((1, 2, 70))
    else:
        node[str(chance.choice(VALUES))[:50]] = node.pop(key)
    try:
        return json.dumps(root, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return data


def _structured(chance: random.Random, data: bytes) -> bytes:
    """One change of the JSON that is the input, or its header (safetensors)."""
    if data[:1] == b"{":
        return _json(chance, data)
    if data[8:9] == b"{":
        size = int.from_bytes(data[:8], "little")
        header = _json(chance, data[8 : 8 + size])
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    return data


def plain(target: str, seconds: float, seed: int) -> Fuzzed:
    """Mutate the target's inputs, and those that were accepted, or refused for a new reason."""
    chance = random.Random(f"{target} {seed}")
    one = TARGETS[target]
    good = one.seeds()
    pool = list(good)
    done, known, failed = Fuzzed(target, "plain"), set[str](), set[str]()
    start = time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        data = chance.choice(good if chance.random() < 0.5 else pool)
        for _ in range(chance.choice((1, 1, 2, 4))):
            data = _structured(chance, data) if chance.random() < 0.5 else _bytes(chance, data, pool, one.words)
        data = data[:LONGEST]
        fault, place = _run_and_place(target, data)
        done.slowest = max(done.slowest, time.perf_counter() - now)
        done.executions += 1
        if fault == "":
            done.taken += 1
            good = [*good[:100], data]
        if fault and fault.partition(": ")[0] not in failed:
            failed.add(fault.partition(": ")[0])
            done.findings.append(keep(target, fault, data, "plain"))
        if place not in known and len(pool) < 2000:
            known.add(place)
            pool.append(data)
    done.seconds = time.perf_counter() - start
    return done


def _run_and_place(target: str, data: bytes) -> tuple[str | None, str]:
    """`run_one`, and the lines that refused the input, which tell it from others."""
    try:
        with _alarm():
            TARGETS[target].read(data)
    except RedifError as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
        return None, f"{lines} {str(error)[-25:]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return run_one(target, data), type(error).__name__
    return "", "taken"


# ---------------------------------------------------------------- guided by coverage


def atheris(target: str, seconds: float, seed: int) -> Fuzzed:
    """The same target under atheris, in a process of its own, because atheris ends its process."""
    report = FOUND / f"{target.replace(', ', '-').replace(' ', '-')}.report"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", target, "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run([*command, "--report", str(report)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if not report.exists():
        raise RuntimeError(f"atheris failed in {target}: {done.stderr.decode(errors='replace')[-2000:]}")
    return Fuzzed(**json.loads(report.read_text()))


def atheris_here(target: str, seconds: float, seed: int, report: Path) -> None:
    """Run atheris on one target until the time is over, and write `report`. Does not return."""
    import atheris as engine

    from redif_sdk.artifact import folder, manifest, paths
    from redif_sdk.artifact.untrusted import configs, npz, protobuf, safetensors
    from redif_sdk.artifact.untrusted import onnx as onnx_check
    from redif_sdk.sampling import table as steps

    readers = [
        card_sections,
        configs,
        contents,
        folder,
        manifest,
        npz,
        onnx_check,
        paths,
        protobuf,
        safetensors,
        steps,
        strict_json,
    ]
    for module in readers:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, engine.instrument_func(value))
            elif (
                isinstance(value, type) and value.__module__ == module.__name__ and not issubclass(value, BaseException)
            ):
                for method in list(vars(value).values()):
                    if hasattr(method, "__code__"):
                        engine.instrument_func(method)
    done, failed = Fuzzed(target, "atheris"), set[str]()
    start = time.perf_counter()

    def test(data: bytes) -> None:
        now = time.perf_counter()
        fault = run_one(target, data)
        end = time.perf_counter()
        done.slowest = max(done.slowest, end - now)
        done.executions += 1
        done.taken += fault == ""
        if fault and fault.partition(": ")[0] not in failed:
            failed.add(fault.partition(": ")[0])
            done.findings.append(keep(target, fault, data, "atheris"))
        if done.executions % 100 == 0 or end - start > seconds:
            done.seconds = end - start
            report.write_text(json.dumps(vars(done)))

    corpus = report.with_suffix(".corpus")
    corpus.mkdir(exist_ok=True)
    for index, data in enumerate(TARGETS[target].seeds()):
        (corpus / f"seed-{index}").write_bytes(data)
    words = report.with_suffix(".words")
    spelt = ["".join(f"\\x{byte:02x}" for byte in word) for word in TARGETS[target].words]
    words.write_text("".join(f'"{word}"\n' for word in spelt))
    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", f"-max_len={LONGEST}", f"-dict={words}"]
    engine.Setup([sys.argv[0], *options, "-timeout=60", str(corpus)], test)
    engine.Fuzz()


# ---------------------------------------------------------------- the command


def fuzz(seconds: float, seed: int = 0, engine: str = "plain", targets: Sequence[str] | None = None) -> list[Fuzzed]:
    """Every target (default: all) for its share of `seconds`."""
    chosen = targets or list(TARGETS)
    share = seconds / len(chosen)
    return [(atheris if engine == "atheris" else plain)(target, share, seed) for target in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of every engine, for all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["atheris", "plain"], action="append", help="default: those that are there")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--json", default=None)
    parser.add_argument("--reproduce", type=Path, metavar="FILE")
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.reproduce is not None:
        about = json.loads(asked.reproduce.with_suffix(".json").read_text())
        TARGETS[about["target"]].read(asked.reproduce.read_bytes())
        return 0
    if asked.one is not None:
        atheris_here(asked.one, asked.seconds, asked.seed, asked.report)
    try:
        import atheris as _  # noqa: F401

        engines = asked.engine or ["atheris", "plain"]
    except ImportError:
        engines = asked.engine or ["plain"]
    done = [one for engine in engines for one in fuzz(asked.seconds, asked.seed, engine, asked.target)]
    print("| target | engine | inputs | inputs a second | taken | slowest, ms | findings |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for one in done:
        rate = one.executions / one.seconds if one.seconds else 0.0
        row = {"target": one.target, "engine": one.engine, "executions": one.executions, "per_second": round(rate, 1)}
        row |= {"taken": one.taken, "slowest_ms": round(1000 * one.slowest, 1), "findings": len(one.findings)}
        rows.append(row)
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    total = Counter({one: sum(row["executions"] for row in rows if row["engine"] == one) for one in engines})
    print(f"\n{sum(total.values())} inputs in all: " + ", ".join(f"{count} by {one}" for one, count in total.items()))
    for one in done:
        for name in one.findings:
            print(f"FINDING: {one.target}: {json.loads(Path(name).with_suffix('.json').read_text())['fault']}: {name}")
    if asked.json:
        write_json(asked.json, document("benchmarks/fuzz.py", rows, seconds=asked.seconds, seed=asked.seed))
    return 1 if any(one.findings for one in done) else 0


if __name__ == "__main__":
    sys.exit(main())
