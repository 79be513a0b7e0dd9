"""The student that a case makes hostile, and the list of all cases: `@case` and `@each` add to it."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return pickle.dumps(Bomb(str(self.marker)))

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


class Bomb:
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
