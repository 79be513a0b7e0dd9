"""Files that change between the check and the use. Whoever swaps them may come too late: a reader may succeed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from .graphs import loop_body, put_external
from .student import CASES, CONFIG, GOLDEN, GRAPH, WEIGHTS, Case, Stop, Student


def _other(student: Student, path: str) -> bytes:
    """Another file that is just as valid: what is computed from it differs."""
    data = (student.folder / path).read_bytes()
    if path.endswith(".onnx"):
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto.FromString(data)
        for graph in (model.graph, *([loop_body(model)] if "generator" in path else [])):
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
        from redif_sdk.artifact import paths

        opened, other, target = paths._open_regular, (student.place / "other").read_bytes(), student.folder / path

        def open_and_swap(root: Path, relative: str) -> int:
            descriptor = opened(root, relative)
            if relative == path:
                with student.quiet():
                    place = student.place / "new" if replace else target
                    place.write_bytes(other)
                    place.replace(target)
            return descriptor

        paths._open_regular = open_and_swap
        return lambda: setattr(paths, "_open_regular", opened)

    return during


def _after_read(path: str) -> Callable[[Student], Stop]:
    """Swaps `path` as soon as a reader has read and checked it."""

    def during(student: Student) -> Stop:
        from redif_sdk.artifact.folder import StudentFolder

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
        put_external(student)
        shutil.copy(student.folder / "onnx/w.data", student.place / "good")
        (student.place / "other").write_bytes(b"\x01" * 4096)

    CASES.append(Case(name, "races", ("load", "copy"), r"w\.data.*altered", build, "RedifError", during, True))


_race_external("race_replaced_data", _after_open("onnx/w.data", replace=True))
_race_external("race_overwritten_data", _after_open("onnx/w.data", replace=False))
_race_external("race_flipping_data", _flipping("onnx/w.data"))
