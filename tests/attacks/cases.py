"""The hostile students: each function turns a copy of a good one into one that must be refused.

Whoever makes a student writes its hashes too, so every case is signed anew (`Student.sign`) where that is possible.
`@case(kind, readers, match)` names the readers (see `harness.py`) that must refuse, and what their message says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CASES", "Case", "Student", "case", "each"]

MIB = 1 << 20
GRAPH = "onnx/generator.fp32.onnx"  # what the reader "load" loads
GOLDEN = "golden/steps-2-batch-1.npz"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
ALL = ("load", "verify", "copy")
WHOLE = ("verify", "copy")


class Student:
    """A copy of the student `good`, in `place`, that a case alters. What lies in `place` beside it is off limits."""

    def __init__(self, good: Path, place: Path) -> None:
        self.good = good
        self.place = place
        self.folder = place / "tiny"
        self.outside = place / "outside"
        self.marker = place.with_name(f"{place.name}.marker")  # a pickle that is loaded creates it
        self.quiet: Callable[[], AbstractContextManager[None]] = nullcontext  # around what `during` does to files
        self.secret = f"secret-{hashlib.sha256(place.name.encode()).hexdigest()[:12]}"

    def begin(self) -> None:
        """Copy the good student, and lay a secret beside it."""
        shutil.copytree(self.good, self.folder)
        self.outside.mkdir()
        (self.outside / "secret.json").write_text(json.dumps({"secret": self.secret}))

    @property
    def pickle(self) -> bytes:
        """A pickle that creates `marker` when it is loaded."""
        return pickle.dumps(_Bomb(str(self.marker)))

    def document(self) -> dict[str, Any]:
        return json.loads((self.folder / "redif.json").read_text())

    def sign(self, document: dict[str, Any]) -> None:
        """Write ``redif.json`` with the digest that it should have."""
        content = {key: value for key, value in document.items() if key != "digest"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        document["digest"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "redif.json").write_bytes(text.encode("utf-8", "surrogatepass"))

    def set(self, place: str, value: Any) -> None:
        """Set a field of the manifest, such as ``graphs.0.file``, and sign."""
        document = self.document()
        *way, last = (int(part) if part.isdigit() else part for part in place.split("."))
        node: Any = document
        for part in way:
            node = node[part]
        node[last] = value
        self.sign(document)

    def add(self, path: str, size: int, sha256: str) -> None:
        """List a file, in place of what was listed under its name."""
        document = self.document()
        document["files"] = [entry for entry in document["files"] if entry["path"] != path]
        document["files"].append({"path": path, "bytes": size, "sha256": sha256})
        self.sign(document)

    def drop(self, path: str) -> None:
        """Take a file out of the list."""
        document = self.document()
        document["files"] = [entry for entry in document["files"] if entry["path"] != path]
        self.sign(document)

    def free(self, path: str) -> Path:
        """Where `path` was, with nothing there."""
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        return place

    def put(self, path: str, data: bytes, *, listed: bool = True) -> None:
        """Write a file, and list it with its true hash."""
        self.free(path).write_bytes(data)
        if listed:
            self.add(path, len(data), hashlib.sha256(data).hexdigest())

    def sparse(self, path: str, size: int, *, listed: bool = True, head: bytes = b"") -> None:
        """A file of `size` bytes that takes no room, listed with a hash of nothing."""
        with self.free(path).open("wb") as file:
            file.write(head)
            file.truncate(size)
        if listed:
            self.add(path, size, "0" * 64)

    def model(self, change: Callable[[Any], object], path: str = GRAPH) -> None:
        """Change a graph with onnx."""
        import onnx

        model = onnx.ModelProto.FromString((self.folder / path).read_bytes())
        change(model)
        self.put(path, model.SerializeToString())

    def graph(self) -> dict[str, Any]:
        """What the manifest says of `GRAPH`."""
        return next(graph for graph in self.document()["graphs"] if graph["file"] == GRAPH)

    def graph_set(self, key: str, value: Any) -> None:
        document = self.document()
        for graph in document["graphs"]:
            if graph["file"] == GRAPH:
                graph[key] = value
        self.sign(document)


class _Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({self.marker!r}, 'w').close()",)


Build = Callable[[Student], object]
Stop = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """`build` makes the student; each of `readers` must raise `error`, of which the message matches `match`.

    `during` is called in the reader's process, and returns what undoes it. `may_pass`: the reader may succeed, if what
    comes back is what the good student gives: for races, which may be lost.
    """

    name: str
    kind: str
    readers: tuple[str, ...]
    match: str
    build: Build
    error: str = "ManifestError"
    during: Callable[[Student], Stop] | None = None
    may_pass: bool = False


CASES: list[Case] = []


def case(kind: str, readers: tuple[str, ...], match: str, **more: Any) -> Callable[[Build], Build]:
    """Register a function as a case of its own name."""

    def register(build: Build) -> Build:
        CASES.append(Case(getattr(build, "__name__", "").strip("_"), kind, readers, match, build, **more))
        return build

    return register


def each(
    kind: str, readers: tuple[str, ...], match: str, variants: dict[str, Any], **more: Any
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Register a function (student, value) as a case for each of `variants`, by name."""

    def register(build: Callable[..., object]) -> Callable[..., object]:
        for name, value in variants.items():
            own = f"{getattr(build, '__name__', '').strip('_')}_{name}"
            CASES.append(Case(own, kind, readers, match, lambda student, v=value: build(student, v), **more))
        return build

    return register


# ---------------------------------------------------------------- paths

BAD_PATHS = {
    "parent": "../outside/secret.json",
    "parents": "unet/../../outside/secret.json",
    "absolute": "/etc/passwd.json",
    "drive": "C:\\Windows\\win.json",
    "drive_relative": "C:win.json",
    "share": "\\\\server\\share\\x.json",
    "backslash": "..\\outside\\secret.json",
    "here": "./unet/config.json",
    "empty_part": "unet//config.json",
    "empty": "",
    "trailing_slash": "unet/config.json/",
    "console": "unet/CON.json",
    "nul": "nul.json",
    "port": "unet/com1.txt",
    "trailing_dot": "unet/config.json.",
    "trailing_blank": "unet/config.json ",
    "leading_blank": " unet/config.json",
    "stream": "unet/config.json:evil.json",
    "percent": "..%2foutside%2fsecret.json",
    "home": "~/x.json",
    "variable": "$HOME/x.json",
    "nul_byte": "unet/config.json\0.json",
    "newline": "unet/a\nb.json",
    "option": "-rf.json",
    "wildcard": "unet/*.json",
    "deep": "a/" * 9 + "x.json",
    "long": "a" * 300 + ".json",
    "dots": ".../x.json",
    "fullwidth_dots": "\uff0e\uff0e/outside/secret.json",
    "cyrillic": "un\u0435t/config.json",
    "combining": "unet/cafe\u0301.json",
    "zero_width": "unet/con\u200bfig.json",
    "bidi": "unet/\u202enosj.config.json",
    "escape": "unet/\x1b[31mx.json",
    "c1_pickle": "unet/\x9b31mx.pkl",
    "bidi_pickle": "unet/\u202elkp.txt.pkl",
    "delete_pickle": "unet/\x7f.pkl",
}


@each("path traversal", ALL, r"redif\.json|path|name for a student's file|pickle", BAD_PATHS)
def listed_file(student: Student, path: str) -> None:
    student.set("files.0.path", path)


@each(
    "path traversal",
    ALL,
    r"unsafe path|name for a student's file",
    {name: BAD_PATHS[name] for name in ("parent", "absolute", "drive", "share", "stream", "trailing_dot")},
)
def graph_file(student: Student, path: str) -> None:
    student.graph_set("file", path)


@each("path traversal", ALL, "unsafe path", {name: BAD_PATHS[name] for name in ("parent", "absolute", "share")})
def graph_data(student: Student, path: str) -> None:
    student.graph_set("data", [path])


@each("path traversal", ALL, "unsafe path", {name: BAD_PATHS[name] for name in ("parent", "absolute", "share")})
def golden_file(student: Student, path: str) -> None:
    student.set("golden.0.file", path)


@each(
    "path traversal",
    (*ALL, "network", "student"),
    r"unsafe path|name for a student's file",
    {"parent": "../outside", "absolute": "/etc", "drive": "C:\\x", "here": ".", "console": "aux"},
)
def network_folder(student: Student, path: str) -> None:
    student.set("network.folder", path)


@each(
    "path traversal",
    ("verify",),
    "holds no arrays",
    {"parent": "../x.npy", "absolute": "/tmp/x.npy", "backslash": "..\\x.npy", "drive": "C:\\x.npy", "nul": "x\0.npy"},
)
def npz_member(student: Student, name: str) -> None:
    student.put(GOLDEN, _zip({name: _npy(np.zeros(3))}))


@case("path traversal", ALL, "cannot be listed")
def manifest_lists_itself(student: Student) -> None:
    student.put("redif.json", (student.folder / "redif.json").read_bytes())


@case("path traversal", ALL, "cannot be listed")
def card_listed(student: Student) -> None:
    student.put("README.md", b"# x\n")


@case("path traversal", ALL, "listed twice")
def names_differ_by_case(student: Student) -> None:
    student.put("unet/Config.json", b"{}")


@case("path traversal", ALL, "listed twice")
def a_file_twice(student: Student) -> None:
    document = student.document()
    document["files"].append(document["files"][0])
    student.sign(document)


# ---------------------------------------------------------------- links and what is no file


@each("links", WHOLE, rf"{CONFIG}.*leaves the folder", {"up": "../../outside/secret.json", "passwd": "/etc/passwd"})
def link_out(student: Student, target: str) -> None:
    student.free(CONFIG).symlink_to(target)


@each(
    "links",
    WHOLE,
    rf"{CONFIG}",
    {
        "zero": "/dev/zero",
        "environ": "/proc/self/environ",
        "memory": "/proc/self/mem",
        "descriptor": "/proc/self/fd/0",
        "root": "/proc/self/root/etc/passwd",
        "tty": "/dev/tty",
    },
)
def link_to_device(student: Student, target: str) -> None:
    student.free(CONFIG).symlink_to(target)


@case("links", ("load", "verify", "copy", "save"), "leaves the folder")
def manifest_link_out(student: Student) -> None:
    (student.outside / "redif.json").write_bytes((student.folder / "redif.json").read_bytes())
    student.free("redif.json").symlink_to("../outside/redif.json")


@case("links", ALL, rf"{GRAPH}.*leaves the folder")
def graph_link_out(student: Student) -> None:
    shutil.copy(student.folder / GRAPH, student.outside / "g.onnx")
    student.free(GRAPH).symlink_to("../../outside/g.onnx")


@case("links", ("verify", "copy", "student", "network"), "leaves the folder|not in the list|config.json")
def folder_link_out(student: Student) -> None:
    shutil.copytree(student.folder / "unet", student.outside / "unet")
    shutil.rmtree(student.folder / "unet")
    (student.folder / "unet").symlink_to("../outside/unet", target_is_directory=True)


@case("links", ("verify", "copy", "student", "network"), "config|other")
def link_loop(student: Student) -> None:
    student.free(CONFIG).symlink_to("other.json")
    (student.folder / "unet" / "other.json").symlink_to("config.json")


@case("links", ("verify", "copy"), "not in the list|reached|missing")
def link_to_itself(student: Student) -> None:
    shutil.rmtree(student.folder / "unet")
    (student.folder / "unet").symlink_to("unet")


@case("links", ("verify", "copy", "student", "network"), "leaves the folder|not in the list")
def link_chain(student: Student) -> None:
    place = student.free(CONFIG).parent
    for index in range(30):
        (place / f"l{index}.json").symlink_to(f"l{index + 1}.json")
    (place / "l30.json").symlink_to("../../outside/secret.json")
    (place / "config.json").symlink_to("l0.json")


@case("links", ("copy", "save"), r"README\.md.*leaves the folder")
def card_link_out(student: Student) -> None:
    student.free("README.md").symlink_to("../outside/secret.json")


@case("links", ("copy", "save"), r"\.gitattributes.*leaves the folder")
def attributes_link_out(student: Student) -> None:
    student.free(".gitattributes").symlink_to("../outside/secret.json")


@case("links", WHOLE, "not in the list")
def version_control_link_out(student: Student) -> None:
    (student.folder / ".git").symlink_to("../outside", target_is_directory=True)


def _cache(student: Student) -> tuple[Path, Path]:
    """The student laid out as in a Hub cache: (the snapshot, blobs). It becomes the student's folder."""
    repository = student.place / "hub" / "models--evil--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    student.folder.rename(snapshot)
    student.folder = snapshot
    return snapshot, repository / "blobs"


@each(
    "links",
    ("verify", "copy"),
    rf"{CONFIG}.*leaves the folder",
    {
        "up": "../../../blobs/../../../outside/secret.json",
        "deeper": "../../../blobs/x/y",
        "sibling": "../../../../models--other--x/blobs/y",
        "refs": "../../../refs/main",
    },
)
def fake_cache(student: Student, target: str) -> None:
    snapshot, blobs = _cache(student)
    for place in (blobs / "x" / "y", blobs.parents[1] / "models--other--x" / "blobs" / "y", blobs.parent / "refs/main"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(target)


@case("links", WHOLE, rf"{CONFIG}.*leaves the folder")
def fake_cache_blob_link(student: Student) -> None:
    snapshot, blobs = _cache(student)
    (blobs / "abc").symlink_to("../../../outside/secret.json")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../blobs/abc")


@case("links", WHOLE, rf"{CONFIG}.*leaves the folder")
def fake_cache_blobs_link(student: Student) -> None:
    snapshot, blobs = _cache(student)
    blobs.rmdir()
    blobs.symlink_to("../../outside", target_is_directory=True)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../blobs/secret.json")


@case("links", WHOLE, "altered")
def hard_link_listed(student: Student) -> None:
    os.link(student.outside / "secret.json", student.free(CONFIG))


@case("links", WHOLE, "not in the list")
def hard_link_unlisted(student: Student) -> None:
    os.link(student.outside / "secret.json", student.folder / "unet" / "more.json")


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # the path of a socket may have 107 characters
    server = socket.socket(socket.AF_UNIX)
    server.bind(place.name)
    os.chdir(here)


def _folder(place: Path) -> None:
    place.mkdir()


NO_FILES = {"fifo": _fifo, "socket": _socket, "folder": _folder}


@each("no file", WHOLE, rf"{CONFIG}", NO_FILES)
def config(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free(CONFIG))


@each("no file", ALL, rf"{GRAPH}", NO_FILES)
def graph(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free(GRAPH))


@each("no file", ALL, r"redif\.json", NO_FILES)
def manifest(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free("redif.json"))


@each("no file", ("copy", "save"), r"README\.md", NO_FILES)
def card(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free("README.md"))


@each("no file", WHOLE, "not in the list", {"fifo": _fifo, "socket": _socket})
def unlisted(student: Student, make: Callable[[Path], None]) -> None:
    make(student.folder / "unet" / "more.json")


@case("no file", ALL, "more than 10000 files")
def many_files(student: Student) -> None:
    for index in range(20_000):
        (student.folder / "unet" / f"{index}.json").touch()


@case("no file", ALL, "deep|files")
def deep_folders(student: Student) -> None:
    place = os.open(student.folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner


# ---------------------------------------------------------------- pickles and engines


def _named(*names: str) -> dict[str, str]:
    """Names of files or classes, as values of cases."""
    return {name.replace("/", "_").replace(".", "_"): name for name in names}


PICKLES = ("bin", "pt", "ckpt", "joblib", "pkl", "PT", "pt.json", "npy", "pth", "pickle", "h5", "dill")


@each("pickles", (*ALL, "student", "network"), "can hold a pickle", _named(*PICKLES))
def unlisted_pickle(student: Student, suffix: str) -> None:
    student.put(f"unet/diffusion_pytorch_model.{suffix}", student.pickle, listed=False)


@each("pickles", (*ALL, "student"), "can hold a pickle", _named(*PICKLES[:7]))
def listed_pickle(student: Student, suffix: str) -> None:
    student.put(f"more/deep/x.{suffix}", student.pickle)


@case("pickles", ("student", "network"), "pickle|safetensors")
def pickle_only_weights(student: Student) -> None:
    student.drop(WEIGHTS)
    student.free(WEIGHTS)
    student.put("unet/diffusion_pytorch_model.bin", student.pickle, listed=False)


@case("pickles", (*WHOLE, "student", "network"), "safetensors")
def pickle_named_safetensors(student: Student) -> None:
    student.put(WEIGHTS, student.pickle)


@case("pickles", ("verify",), "holds no arrays")
def pickle_named_npz(student: Student) -> None:
    student.put(GOLDEN, student.pickle)


@case("pickles", WHOLE, "holds no arrays")
def object_arrays(student: Student) -> None:
    data = io.BytesIO()
    np.savez(data, x=np.array([_Bomb(str(student.marker))], dtype=object), allow_pickle=True)
    student.put(GOLDEN, data.getvalue())


@case("pickles", WHOLE, "holds no arrays")
def pickle_in_npz(student: Student) -> None:
    student.put(GOLDEN, _zip({"x.pkl": student.pickle}))


@case("pickles", WHOLE, "holds no arrays")
def code_in_npy_header(student: Student) -> None:
    header = f"{{'descr': open({str(student.marker)!r}, 'w'), 'fortran_order': False, 'shape': (1,), }}\n".encode()
    student.put(GOLDEN, _zip({"x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)}))


@case("pickles", (*WHOLE,), "belongs to no graph")
def pickle_named_data(student: Student) -> None:
    student.put("onnx/weights.data", student.pickle)


@case("pickles", ALL, "no ONNX model")
def pickle_named_onnx(student: Student) -> None:
    student.put(GRAPH, student.pickle)


ENGINES = ("onnx/generator.engine", "onnx/x.plan", "lib/evil.so", "evil.dll", "onnx/x.trt", "x.timing")


@each("engines", ALL, "compiled engines never travel", _named(*ENGINES))
def listed_engine(student: Student, name: str) -> None:
    student.put(name, b"\x7fELF" + bytes(60))


@each("engines", WHOLE, "not in the list", _named(*ENGINES[:3]))
def unlisted_engine(student: Student, name: str) -> None:
    student.put(name, b"\x7fELF" + bytes(60), listed=False)


@each("engines", ALL, "no part of a student", {"py": "evil.py", "sh": "run.sh", "html": "x.html", "none": "Makefile"})
def listed_program(student: Student, name: str) -> None:
    student.put(name, b"import os\n")


@case("engines", WHOLE, "not in the list")
def unlisted_program(student: Student) -> None:
    student.put("unet/__init__.py", f"open({str(student.marker)!r}, 'w')".encode(), listed=False)


CLASSES = ("os.system", "posix.system", "tiny.evil.Network", "builtins.eval", "torch.load", "diffusers.utils.os.system")


@each("engines", ("network",), "diffusers", _named(*CLASSES), error="UnsupportedModel")
def class_path(student: Student, name: str) -> None:
    student.put("evil.py", f"open({str(student.marker)!r}, 'w')".encode(), listed=False)
    student.set("network.class_path", name)


# ---------------------------------------------------------------- safetensors


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


# ---------------------------------------------------------------- ONNX


def _node(operator: str, *inputs: Any, **attributes: Any) -> Callable[[Any], None]:
    """Appends a node named "bad" to a graph. An input that is no name becomes an initializer."""

    def change(model: Any) -> None:
        from onnx import helper, numpy_helper

        names = []
        for index, value in enumerate(inputs):
            names.append(value if isinstance(value, str) else f"given_{index}")
            if not isinstance(value, str):
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), names[-1]))
        model.graph.node.append(helper.make_node(operator, names, ["bad_out"], name="bad", **attributes))

    return change


def _loop(model: Any) -> Any:
    """The body of the graph's loop."""
    return next(
        attribute.g
        for node in model.graph.node
        if node.op_type == "Loop"
        for attribute in node.attribute
        if attribute.name == "body"
    )


def _declared(model: Any) -> None:
    from onnx import TensorProto, helper

    model.graph.value_info.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [1 << 30, 1 << 30]))


def _no_data(model: Any) -> None:
    import onnx

    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=1, dims=[1 << 20, 1 << 10]))


def _sub(model: Any, operator: str, attribute: str) -> None:
    from onnx import helper

    body = helper.make_graph([], "g", [], [])
    model.graph.node.append(helper.make_node(operator, [], ["bad_out"], name="bad", **{attribute: body}))


def _nested(model: Any) -> None:
    from onnx import helper

    body = helper.make_graph([], "g", [], [])
    for _ in range(16):
        body = helper.make_graph([helper.make_node("Loop", ["", ""], [], body=body)], "g", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], name="bad", body=body))


def _trips(model: Any) -> None:
    from onnx import numpy_helper

    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    model.graph.initializer.append(numpy_helper.from_array(np.int64(1 << 60), "trips"))
    loop.input[0] = "trips"


def _computed(model: Any) -> None:
    from onnx import helper, numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20]), "few"))
    model.graph.node.append(helper.make_node("Mul", ["few", "few"], ["much"]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["much"], ["bad_out"], name="bad"))


def _functions(model: Any) -> None:
    model.functions.add(name="f", domain="local").opset_import.add(version=20)


def _outputs(model: Any) -> None:
    from onnx import TensorProto, helper

    model.graph.output.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, ["steps", 6]))


ONNX: dict[str, Callable[[Any], object]] = {
    "shape_without_data": _no_data,
    "declared_shape": _declared,
    "custom_domain": lambda model: model.graph.node.add(
        op_type="Evil", domain="com.evil", name="bad", output=["bad_out"]
    ),
    "custom_domain_imported": lambda model: model.opset_import.add(domain="com.evil", version=1),
    "microsoft_domain": lambda model: setattr(model.opset_import[0], "domain", "com.microsoft"),
    "constant_of_shape": _node("ConstantOfShape", np.array([1 << 40])),
    "computed_shape": _computed,
    "expand": _node("Expand", "table", np.array([1 << 20, 1 << 20])),
    "tile": _node("Tile", "noise", np.array([1 << 20, 1 << 20, 1, 1, 1])),
    "resize": _node("Resize", "table", "", np.array([1e9, 1e9], np.float32)),
    "pad": _node("Pad", "table", np.array([0, 0, 1 << 40, 0])),
    "range": _node("Range", np.int64(0), np.int64(1 << 50), np.int64(1)),
    "loop_2_60": _trips,
    "if": lambda model: _sub(model, "If", "then_branch"),
    "scan": lambda model: _sub(model, "Scan", "body"),
    "random": _node("RandomNormal", shape=[1 << 20]),
    "random_like": _node("RandomUniformLike", "noise"),
    "strings": _node("StringNormalizer", "noise"),
    "sequence": _node("SequenceEmpty"),
    "nested_loops": _nested,
    "function": _functions,
    "training": lambda model: model.training_info.add(),
    "other_outputs": _outputs,
    "other_opset": lambda model: setattr(model.opset_import[0], "version", 1 << 40),
    "no_graph": lambda model: model.ClearField("graph"),
    "cast_to_string": _node("Cast", "noise", to=8),
    "long_name": lambda model: setattr(model.graph.node[0], "name", "n" * (1 << 20)),
    "escape_in_name": lambda model: model.graph.node.add(op_type="\x1b[31m\n", name="\x9b\u202e", output=["bad_out"]),
}


@each("onnx", ALL, GRAPH, ONNX)
def onnx_graph(student: Student, change: Callable[[Any], object]) -> None:
    student.model(change)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _span(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _deep_protobuf() -> bytes:
    """Attributes with graphs with nodes with attributes, 30,000 deep."""
    content = b""
    for _ in range(10_000):
        content = _span(1, _span(5, _span(1, b"body") + _span(6, content) + b"\xa0\x01\x05") + _span(4, b"Loop"))
        if len(content) > 8 * MIB:
            break
    return b"\x08\x0a" + _span(7, content) + _span(8, _span(1, b"") + b"\x10\x14")


RAW_ONNX: dict[str, Callable[[], bytes]] = {
    "deep_protobuf": _deep_protobuf,
    "deep_groups": lambda: b"\x0b" * MIB,
    "empty": lambda: b"",
    "zeros": lambda: bytes(MIB),
    "length_beyond": lambda: b"\x08\x0a" + _varint(7 << 3 | 2) + _varint(1 << 62) + bytes(16),
    "endless_varint": lambda: b"\x08" + b"\xff" * MIB,
    "million_nodes": lambda: b"\x08\x0a" + _span(7, _span(1, b"") * MIB) + _span(8, b"\x10\x14"),
    "million_initializers": lambda: b"\x08\x0a" + _span(7, _span(5, b"\x10\x01\x08\x00") * MIB) + _span(8, b"\x10\x14"),
    "html": lambda: b"<html><script>alert(1)</script></html>",
}


@each("onnx", ALL, GRAPH, RAW_ONNX)
def onnx_bytes(student: Student, make: Callable[[], bytes]) -> None:
    student.put(GRAPH, make())


@case("onnx", WHOLE, "belongs to no graph")
def onnx_of_no_graph(student: Student) -> None:
    student.put("onnx/more.onnx", (student.folder / GRAPH).read_bytes())


@case("onnx", ALL, r"used as a \.onnx file")
def graph_is_no_onnx(student: Student) -> None:
    student.put("onnx/graph.json", (student.folder / GRAPH).read_bytes())
    student.graph_set("file", "onnx/graph.json")


@case("onnx", ALL, "used by .* not in its list")
def graph_unlisted(student: Student) -> None:
    student.drop(GRAPH)


@case("onnx", ALL, "its outputs are")
def manifest_says_other_outputs(student: Student) -> None:
    outputs = student.graph()["outputs"]
    student.graph_set("outputs", [*outputs, *outputs])


@case("onnx", ALL, "at most|bytes")
def onnx_of_3_gb(student: Student) -> None:
    student.sparse(GRAPH, 3 << 30)


# ---------------------------------------------------------------- ONNX's external data


def _external(student: Student, *, listed: bool = True, where: str = "main", **place: str) -> None:
    """A weight of 64 bytes in a file beside the graph, which is whole, listed and holds them; `place` says where."""
    import onnx
    from onnx import helper

    student.put("onnx/w.data", bytes(4096), listed=listed)
    if listed:
        student.graph_set("data", ["onnx/w.data"])
    tensor = onnx.TensorProto(name="outer", data_type=1, dims=[16], data_location=1)
    for key, value in ({"location": "w.data", "offset": "0", "length": "64"} | place).items():
        tensor.external_data.add(key=key, value=value)

    def change(model: Any) -> None:
        if where == "main":
            model.graph.initializer.append(tensor)
        elif where == "loop":
            _loop(model).initializer.append(tensor)
        else:
            model.graph.node.append(helper.make_node("Constant", [], ["bad_out"], name="bad", value=tensor))

    student.model(change)


PLACES: dict[str, dict[str, Any]] = {
    "parent": {"location": "../../outside/secret.json"},
    "absolute": {"location": "/etc/passwd"},
    "other_listed": {"location": "../unet/diffusion_pytorch_model.safetensors"},
    "other_beside": {"location": "denoiser.fp32.onnx"},
    "nested": {"location": "sub/../w.data"},
    "here": {"location": "./w.data"},
    "windows": {"location": "..\\..\\outside\\secret.json"},
    "drive": {"location": "C:\\x"},
    "empty": {"location": ""},
    "nul": {"location": "w.data\0"},
    "memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"},
    "unlisted": {"listed": False},
    "in_loop": {"where": "loop"},
    "in_loop_parent": {"where": "loop", "location": "../../outside/secret.json"},
    "in_constant": {"where": "constant", "location": "../../outside/secret.json"},
    "offset_beyond": {"offset": "4096"},
    "offset_huge": {"offset": str(1 << 63)},
    "offset_negative": {"offset": "-64"},
    "offset_text": {"offset": "0x10"},
    "length_short": {"length": "1"},
    "length_huge": {"length": str(1 << 40)},
    "more_keys": {"basepath": "/etc"},
}


@each("external data", ALL, rf"{GRAPH}|w\.data", PLACES)
def external(student: Student, place: dict[str, Any]) -> None:
    _external(student, **place)


@case("external data", ALL, r"w\.data.*leaves the folder")
def external_through_link(student: Student) -> None:
    _external(student)
    shutil.move(student.folder / "onnx/w.data", student.outside / "w.data")
    (student.folder / "onnx/w.data").symlink_to("../../outside/w.data")


@case("external data", ALL, "manifest lists|w\\.data")
def external_data_unused(student: Student) -> None:
    student.put("onnx/w.data", bytes(4096))
    student.graph_set("data", ["onnx/w.data"])


# ---------------------------------------------------------------- JSON

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
    student.put(GOLDEN, _zip({f"{name}.npy": _npy(value) for name, value in arrays.items()}, zipfile.ZIP_DEFLATED))
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


# ---------------------------------------------------------------- npz


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    data = io.BytesIO()
    np.lib.format.write_array(data, array, (1, 0), allow_pickle=False)
    return data.getvalue()


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo cuts it at a NUL, and turns backslashes round on Windows
            info.compress_type = compression
            archive.writestr(info, content)
    return data.getvalue()


def _member(name: str, packed: bytes, size: int, *, method: int = 8, flags: int = 0, copies: int = 1) -> bytes:
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


def _deflated(mebibytes: int, head: bytes = b"") -> bytes:
    """A deflate stream of `head` and that many MiB of zeros; a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + piece * mebibytes + packer.flush(zlib.Z_FINISH)


def _declared_npy(shape: str, dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


NPZ: dict[str, Callable[[], bytes]] = {
    "unpacks_to_3_gb": lambda: _member("x.npy", _deflated(3072), 3072 * MIB),
    "unpacks_to_10_gb": lambda: _member("x.npy", _deflated(2048), 2048 * MIB, copies=5),
    "says_little_unpacks_to_2_gb": lambda: _member("x.npy", _deflated(1900, _declared_npy("1,") + bytes(4)), 100),
    "declares_10_12_elements": lambda: _zip({"x.npy": _declared_npy("1000000, 1000000")}),
    "declares_10_30_elements": lambda: _zip({"x.npy": _declared_npy("1000000000, 1000000000, 1000000000, 1000")}),
    "negative_shape": lambda: _zip({"x.npy": _declared_npy("-1,")}),
    "many_members": lambda: _zip({f"x{index}.npy": b"" for index in range(20_000)}),
    "many_entries": lambda: _member("x.npy", b"", 0, copies=100_000),
    "a_member_twice": lambda: _member("x.npy", b"", 0, copies=1)[:-22] + _member("x.npy", b"", 0),
    "encrypted": lambda: _member("x.npy", _deflated(0, _npy(np.zeros(1))), 136, flags=1),
    "lzma": lambda: _zip({"x.npy": _npy(np.zeros(1))}, zipfile.ZIP_LZMA),
    "objects": lambda: _zip({"x.npy": _declared_npy("1,", "|O") + bytes(8)}),
    "records": lambda: _zip({"x.npy": _declared_npy("1,", "[('a', '<f4')]") + bytes(4)}),
    "long_header": lambda: _zip({"x.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b" " * 100}),
    "no_zip": lambda: b"PK\x03\x04" + bytes(1000),
    "empty": lambda: b"",
    "directory_beyond": lambda: b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 1 << 31, 1 << 31, 0),
    "text": lambda: b"x" * 1000,
}


@each("npz", WHOLE, "holds no arrays", NPZ)
def npz(student: Student, make: Callable[[], bytes]) -> None:
    student.put(GOLDEN, make())


@case("npz", WHOLE, r"golden.*at most")
def npz_of_1_gb(student: Student) -> None:
    student.sparse(GOLDEN, 1 << 30)


# ---------------------------------------------------------------- tokenizers

_REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * MIB}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "replace_by_a_megabyte": {"normalizer": _REPLACE},
    "many_normalizers": {"normalizer": {"type": "Sequence", "normalizers": [_REPLACE | {"content": "aa"}] * 1000}},
    "nested_normalizers": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [_REPLACE | {"content": "a" * 60}] * 10}] * 10,
        }
    },
    "huge_regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+" * 100_000}, "behavior": "Removed"}},
    "prepend_a_megabyte": {"normalizer": {"type": "Prepend", "prepend": "x" * MIB}},
    "decoder": {"decoder": _REPLACE},
    "many_added_tokens": {"added_tokens": [{"id": index, "content": str(index)} for index in range(20_000)]},
    "added_tokens_object": {"added_tokens": {"a": 1}},
}


@each("tokenizers", WHOLE, r"tokenizer\.json", TOKENIZERS)
def tokenizer(student: Student, document: dict[str, Any]) -> None:
    student.put("tokenizer/tokenizer.json", json.dumps(document).encode())


@case("tokenizers", WHOLE, r"vocab\.json.*twice")
def vocabulary_with_a_key_twice(student: Student) -> None:
    student.put("tokenizer/vocab.json", b'{"a": 0, "a": 1}')


@case("tokenizers", WHOLE, r"merges\.txt.*at most")
def merges_of_100_mb(student: Student) -> None:
    student.sparse("tokenizer/merges.txt", 100 * MIB)


@case("tokenizers", WHOLE, r"tokenizer\.json")
def tokenizer_deep(student: Student) -> None:
    student.put("tokenizer/tokenizer.json", b'{"normalizer":' * 50_000 + b"1" + b"}" * 50_000)


# ---------------------------------------------------------------- the network's configuration

CONFIGS: dict[str, dict[str, Any]] = {
    "channels": {"block_out_channels": [1 << 40, 1 << 40]},
    "channels_30_gb": {"block_out_channels": [32768, 32768], "norm_num_groups": 32},
    "layers": {"layers_per_block": 1_000_000},
    "blocks": {
        "block_out_channels": [32] * 100_000,
        "down_block_types": ["DownBlock2D"] * 100_000,
        "up_block_types": ["UpBlock2D"] * 100_000,
    },
    "classes": {"num_class_embeds": 1 << 50},
    "heads": {"attention_head_dim": 0},
    "block_type": {"down_block_types": ["os.system", "DownBlock2D"]},
    "channels_text": {"block_out_channels": "evil"},
    "norm": {"norm_num_groups": 0},
    "negative": {"in_channels": -4},
    "activation": {"act_fn": "__import__('os').system"},
}


@each("network", ("network", "student"), "config|weights|unet|no network", CONFIGS, error="RedifError")
def network(student: Student, change: dict[str, Any]) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | change).encode())


@case("network", ("student",), "sample_size|config|size", error="RedifError")
def network_size_text(student: Student) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | {"sample_size": "evil"}).encode())


@each(
    "network",
    ("student",),
    "scheduler|timesteps|beta|schedule",
    {
        "timesteps": {"num_train_timesteps": 10**12},
        "timesteps_text": {"num_train_timesteps": "x"},
        "betas": {"trained_betas": [None]},
    },
    error="RedifError",
)
def scheduler(student: Student, change: dict[str, Any]) -> None:
    path = "scheduler/scheduler_config.json"
    config = json.loads((student.folder / path).read_text())
    student.put(path, json.dumps(config | change).encode())


@case("network", ("student",), "not in the list|leaves the folder|missing", error="RedifError")
def config_unlisted_and_linked(student: Student) -> None:
    """What is not listed is not hashed: it must not be read either."""
    shutil.move(student.folder / CONFIG, student.outside / "config.json")
    (student.folder / CONFIG).symlink_to("../../outside/config.json")
    student.drop(CONFIG)


@case("network", ("student",), "not in the list|leaves the folder|missing|no safetensors|weights", error="RedifError")
def weights_unlisted_and_linked(student: Student) -> None:
    shutil.move(student.folder / WEIGHTS, student.outside / "w.safetensors")
    (student.folder / WEIGHTS).symlink_to("../../outside/w.safetensors")
    student.drop(WEIGHTS)


@case("network", ("student",), "not in the list|leaves the folder|index", error="RedifError")
def shard_index_outside(student: Student) -> None:
    shutil.move(student.folder / WEIGHTS, student.outside / "w.safetensors")
    student.drop(WEIGHTS)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside/w.safetensors"}}
    path = "unet/diffusion_pytorch_model.safetensors.index.json"
    student.put(path, json.dumps(index).encode(), listed=False)


@each("network", ("student",), "weights|index|shard|outside|unet", {"up": False, "absolute": True}, error="RedifError")
def shard_index_listed(student: Student, absolute: bool) -> None:
    """A true index, hashed and listed, of weights that lie elsewhere."""
    data = (student.folder / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    place = student.outside / "w.safetensors"
    shutil.move(student.folder / WEIGHTS, place)
    student.drop(WEIGHTS)
    where = str(place) if absolute else f"{'../' * 12}{place}"
    index = {"metadata": {"total_size": 1}, "weight_map": {name: where for name in header if name != "__metadata__"}}
    student.put(f"{WEIGHTS}.index.json", json.dumps(index).encode())


@each(
    "network",
    ("student",),
    "quantization|quantizer|network|config|unet",
    {
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "gguf": {"quant_method": "gguf", "compute_dtype": "float32"},
        "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
        "unknown": {"quant_method": "evil"},
        "text": "evil",
    },
    error="RedifError",
)
def quantization(student: Student, change: Any) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | {"quantization_config": change}).encode())


# ---------------------------------------------------------------- names on disk


@each(
    "names on disk",
    WHOLE,
    "not in the list|no name",
    {
        "escape": "a\x1b[2Jb.json",
        "newline": "a\nRefused: no.json",
        "c1": "a\x9b31m.json",
        "bidi": "\u202enosj.json",
        "zero_width": "re\u200bdif.json",
        "cyrillic": "r\u0435dif.json",
        "fullwidth": "\uff52edif.json",
        "undecodable": b"\xff\xfe.json",
        "blank": " ",
    },
)
def disk(student: Student, own: str | bytes) -> None:
    (student.folder / os.fsdecode(own)).write_text("{}")


@each(
    "names on disk",
    ALL,
    "pickle",
    {"escape": "a\x1b[2Jb.pkl", "newline": "a\nb.pt", "bidi": "\u202etxt.bin", "undecodable": b"\xff.pkl"},
)
def disk_pickle(student: Student, own: str | bytes) -> None:
    (student.folder / os.fsdecode(own)).write_bytes(student.pickle)


# ---------------------------------------------------------------- model cards

CARDS = {
    "script": "# x\n<script>alert(1)</script>\n",
    "onerror": '# x\n<img src="x" onerror="alert(1)">\n',
    "javascript": "# x\n[click](javascript:alert(1))\n",
    "javascript_entity": "# x\n[click](java&#115;cript:alert(1))\n",
    "javascript_tab": '<a href="java\tscript:alert(1)">x</a>\n',
    "iframe": '# x\n<iframe src="https://evil.example"></iframe>\n',
    "svg": "<svg onload=alert(1)>",
    "data": "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "style": "<style>body{display:none}</style>",
    "form": '<form action="https://evil.example"><input name=a></form>',
    "meta": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "upper": "<ScRiPt>alert(1)</sCrIpT>",
    "nul": "# x\0\n",
    "large": "x" * (10 * MIB),
}


@each("model cards", WHOLE, r"README\.md", CARDS)
def readme(student: Student, text: str) -> None:
    (student.folder / "README.md").write_text(text)


@each("model cards", WHOLE, r"README\.md", {"utf16": "utf-16", "utf32": "utf-32", "utf16_no_mark": "utf-16-le"})
def readme_in(student: Student, encoding: str) -> None:
    (student.folder / "README.md").write_bytes(CARDS["script"].encode(encoding))


@case("model cards", ("copy", "save"), r"README\.md")
def readme_of_64_gb(student: Student) -> None:
    student.sparse("README.md", 64 << 30, listed=False)


@case("model cards", ("copy", "save"), r"\.gitattributes")
def attributes_of_64_gb(student: Student) -> None:
    student.sparse(".gitattributes", 64 << 30, listed=False)


# ---------------------------------------------------------------- changed between the check and the use


def _other(student: Student, path: str) -> bytes:
    """Another file that is just as valid: what is computed from it differs."""
    data = (student.folder / path).read_bytes()
    if path.endswith(".onnx"):
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto.FromString(data)
        for graph in (model.graph, *([_loop(model)] if "generator" in path else [])):
            for tensor in graph.initializer:
                if tensor.data_type == 1 and len(tensor.dims) == 4:
                    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2 + 1, tensor.name))
        return model.SerializeToString()
    if path.endswith(".safetensors"):
        return data[:-4096] + bytes(4096)
    return data.replace(b'"tiny"', b'"evil"') if path == "redif.json" else data[:-1] + b"!"


def _after_open(path: str, *, replace: bool) -> Callable[[Student], Stop]:
    """Swaps `path` for other bytes right after a reader opened it: a new file, or the same one overwritten."""

    def during(student: Student) -> Stop:
        from redif_sdk import files

        opened, other, target = files._open_regular, (student.place / "other").read_bytes(), student.folder / path

        def open_and_swap(root: Path, relative: str) -> int:
            descriptor = opened(root, relative)
            if relative == path:
                with student.quiet():
                    place = student.place / "new" if replace else target
                    place.write_bytes(other)
                    place.replace(target)
            return descriptor

        files._open_regular = open_and_swap
        return lambda: setattr(files, "_open_regular", opened)

    return during


def _after_read(path: str) -> Callable[[Student], Stop]:
    """Swaps `path` as soon as a reader has read and checked it."""

    def during(student: Student) -> Stop:
        from redif_sdk.folder import StudentFolder

        read, other = StudentFolder.read, (student.place / "other").read_bytes()

        def read_and_swap(folder: StudentFolder, relative: str) -> bytes:
            data = read(folder, relative)
            if relative == path:
                with student.quiet():
                    (student.folder / path).write_bytes(other)
            return data

        StudentFolder.read = read_and_swap  # type: ignore[method-assign]
        return lambda: setattr(StudentFolder, "read", read)

    return during


def _flipping(path: str) -> Callable[[Student], Stop]:
    """A thread that swaps `path` for another file and back, all the time."""

    def during(student: Student) -> Stop:
        target, done = student.folder / path, threading.Event()
        both = [student.place / "good", student.place / "other"]

        def flip() -> None:
            turn = 0
            while not done.is_set():
                turn += 1
                new = student.place / "new"
                new.unlink(missing_ok=True)
                os.link(both[turn % 2], new)
                new.replace(target)

        thread = threading.Thread(target=flip, daemon=True)
        thread.start()

        def stop() -> None:
            done.set()
            thread.join()

        return stop

    return during


def _race(name: str, path: str, readers: tuple[str, ...], during: Callable[[Student], Stop]) -> None:
    def build(student: Student) -> None:
        shutil.copy(student.folder / path, student.place / "good")
        (student.place / "other").write_bytes(_other(student, path))

    CASES.append(Case(name, "races", readers, "altered|config|weights|match", build, "RedifError", during, True))


for _name, _path, _readers in (
    ("graph", GRAPH, ("load", "verify", "copy")),
    ("golden", GOLDEN, ("verify", "copy")),
    ("manifest", "redif.json", ("load", "verify", "copy", "save")),
    ("weights", WEIGHTS, ("copy", "network", "student")),
):
    _race(f"race_replaced_{_name}", _path, _readers, _after_open(_path, replace=True))
    _race(f"race_overwritten_{_name}", _path, _readers, _after_open(_path, replace=False))
    _race(f"race_flipping_{_name}", _path, _readers, _flipping(_path))
_race("race_weights_after_read", WEIGHTS, ("network", "student"), _after_read(WEIGHTS))
_race("race_config_after_read", CONFIG, ("network", "student"), _after_read(CONFIG))


def _race_external(name: str, during: Callable[[Student], Stop]) -> None:
    def build(student: Student) -> None:
        _external(student)
        shutil.copy(student.folder / "onnx/w.data", student.place / "good")
        (student.place / "other").write_bytes(b"\x01" * 4096)

    CASES.append(Case(name, "races", ("load", "copy"), r"w\.data.*altered", build, "RedifError", during, True))


_race_external("race_replaced_data", _after_open("onnx/w.data", replace=True))
_race_external("race_overwritten_data", _after_open("onnx/w.data", replace=False))
_race_external("race_flipping_data", _flipping("onnx/w.data"))

assert len({case.name for case in CASES}) == len(CASES)
