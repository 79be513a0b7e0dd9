"""What is expensive to make and only read: exported students and traced graphs, made once for all workers and runs.

They lie in ``$REDIF_TEST_CACHE`` (``build/test-cache``) under a hash of the sources, libraries and machine that they
depend on, so that a change of any of these makes them anew. A clone starts without any.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CACHE = Path(os.environ.get("REDIF_TEST_CACHE") or ROOT / "build" / "test-cache")
SOURCES = ("redif_sdk", "models", "distill", "export")
#: Modules of the tests that every maker may use.
HELPERS = ("conftest.py", "made_once.py", "pipelines.py")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino")
#: As this process was started: what a run sets later, such as what it found out of the processor, parts no workers.
SETTINGS = [f"{name}={os.environ.get(name, '')}" for name in ("ONEDNN_MAX_CPU_ISA", "REDIF_CPU_BF16")]
KEPT = 3  # caches of other sources, so that work on two branches keeps both

_used: dict[Path, dict[str, str]] = {}


def _digest(paths: list[Path], *more: str) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for text in more:
        found.update(f"{text}\n".encode())
    return found.hexdigest()[:24]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """What the machine can compute with: engines take other paths, and offer other precisions, elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), platform.machine())
    return platform.machine()


@cache
def _folder() -> Path:
    """The cache of these sources; those of the oldest others are removed."""
    sources = [path for name in SOURCES for path in (ROOT / name).rglob("*.py") if "__pycache__" not in path.parts]
    libraries = [f"{name}={_version(name)}" for name in LIBRARIES]
    helpers = [TESTS / name for name in HELPERS]
    key = _digest([*sorted(sources), *helpers], sys.version, _processor(), *SETTINGS, *libraries)
    folder = CACHE / key
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    others = sorted((path for path in CACHE.iterdir() if path != folder), key=lambda path: -path.stat().st_mtime)
    for path in others[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _listing(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` as ``make(folder)`` fills it: by this process, another one, or an earlier run. Read only.

    Args:
        name: The last part of the path; one name is one thing within a test module.
        make: Writes into the path that it is given, which does not exist yet. The module that it is defined in is part
            of the key.
    """
    share_traces()
    module = Path(inspect.getsourcefile(make) or __file__)
    place = _folder() / f"{name}-{_digest([module], make.__qualname__)}"
    listed = place.with_suffix(".sha256")
    with FileLock(place.with_suffix(".lock")):
        if not listed.is_file() or not place.is_dir() or repr(_listing(place)) != listed.read_text():
            shutil.rmtree(place, ignore_errors=True)
            new = Path(tempfile.mkdtemp(dir=_folder()))
            try:
                make(new / name)
                listed.write_text(repr(_listing(new)))
                new.rename(place)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        _used.setdefault(place, _listing(place))
    return place / name


def altered() -> list[str]:
    """The shared files that a test has changed, added or removed since this process began to use them."""
    found = []
    for place, before in _used.items():
        now = _listing(place)
        found += [
            f"{place.name}/{name}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
        ]
    return found


def share_traces() -> None:
    """Let ``redif_sdk.export.trace`` find the graphs that other workers and runs have traced, where it is imported.

    A test that has to see a graph traced replaces ``trace._traced`` by a dictionary of its own.
    """
    if not isinstance(trace := sys.modules.get("redif_sdk.export.trace"), type(sys)) or hasattr(trace, "_unshared"):
        return
    import onnx

    class Traces(dict[str, onnx.ModelProto]):
        def __contains__(self, key: object) -> bool:
            if not super().__contains__(key) and (file := trace_file(key)).is_file():
                super().__setitem__(str(key), onnx.load(file))
            return super().__contains__(key)

        def __setitem__(self, key: str, model: onnx.ModelProto) -> None:
            super().__setitem__(key, model)
            with tempfile.NamedTemporaryFile(dir=_folder(), delete=False) as file:
                file.write(model.SerializeToString())
            Path(file.name).replace(trace_file(key))

    def trace_file(key: object) -> Path:
        return _folder() / f"{hashlib.sha256(str(key).encode()).hexdigest()[:24]}.onnx"

    def once(module: Any, tensors: Any, manifest: Any, inputs: Any, outputs: Any) -> Any:
        """Two workers that need one trace do not make it twice."""
        key = trace._structure(module, tensors, manifest, inputs)
        if key is None or key in trace._traced:
            return trace._unshared(module, tensors, manifest, inputs, outputs)
        with FileLock(trace_file(key).with_suffix(".lock")):
            return trace._unshared(module, tensors, manifest, inputs, outputs)

    trace._unshared, trace._trace, trace._traced = trace._trace, once, Traces()
    _trace_untraced()


def _trace_untraced() -> None:
    """Switch coverage off inside the exporter, which costs a third more with it, and runs little code of ours."""
    import onnxscript.optimizer
    import torch

    def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tracer = sys.gettrace()
            sys.settrace(None)
            try:
                return function(*arguments, **named)
            finally:
                sys.settrace(tracer)

        return wraps(function)(call)

    torch.onnx.export = untraced(torch.onnx.export)
    onnxscript.optimizer.optimize = untraced(onnxscript.optimizer.optimize)
