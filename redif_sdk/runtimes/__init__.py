"""The inference engines by name, and the choice of one. An engine is imported only when it is asked for.

To add an engine, write one file with a class that follows `Runtime`, and add a line to `RUNTIMES`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.manifest import Graph, StudentFolder
from redif_sdk.runtimes.base import Runtime, RuntimeInfo, parse_device

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "installed", "load", "parse_device", "pick_graph", "resolve"]


class Engine(NamedTuple):
    target: str  # "module:class"
    module: str | None  # what has to be installed; None: nothing
    extra: str


RUNTIMES = {
    "onnxruntime": Engine("redif_sdk.runtimes.ort:OnnxRuntime", "onnxruntime", "cpu"),
    "fake": Engine("redif_sdk.runtimes.fake:FakeRuntime", None, ""),
}

#: What "auto" tries, best first. Not the fake: it draws no pictures.
PREFERENCE = ("onnxruntime",)

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def installed() -> list[str]:
    """The engines of `PREFERENCE` whose package is there."""
    return [name for name in PREFERENCE if find_spec(RUNTIMES[name].module or "redif_sdk") is not None]


def resolve(runtime: str) -> str:
    """The engine's name for "auto" or a name. InvalidRequest if it is unknown, RuntimeUnavailable if not installed."""
    if runtime == "auto":
        available = installed()
        if not available:
            raise RuntimeUnavailable(
                'no inference engine is installed; pip install "redif-sdk[cpu]", or "redif-sdk[gpu]" for NVIDIA GPUs'
            )
        return available[0]
    if runtime not in RUNTIMES:
        raise InvalidRequest(f"runtime {runtime!r} is unknown; use one of {', '.join(['auto', *RUNTIMES])}")
    engine = RUNTIMES[runtime]
    if engine.module is not None and find_spec(engine.module) is None:
        raise RuntimeUnavailable(f'runtime {runtime} is not installed; pip install "redif-sdk[{engine.extra}]"')
    return runtime


def pick_graph(student: StudentFolder, component: str, precision: str) -> Graph | None:
    """The graph of `component` in `precision`; "auto" is fp32, or else whatever there is. None if there is none.

    Raises InvalidRequest for an unknown precision, RuntimeUnavailable for one that the student has no graph in.
    """
    if precision not in ("auto", *PRECISIONS):
        raise InvalidRequest(f"precision {precision!r} is unknown; use one of {', '.join(['auto', *PRECISIONS])}")
    manifest = student.manifest
    present = [graph.precision for graph in manifest.graphs]
    if precision != "auto" and precision not in present:
        have = ", ".join(sorted(set(present))) or "none"
        raise RuntimeUnavailable(f"{student.path} has no graph in {precision} (it has {have}); export it first")
    for choice in PRECISIONS if precision == "auto" else (precision,):
        if graph := manifest.graph(component, choice):
            return graph
    return None


def load(
    runtime: str, student: StudentFolder, graph: Graph, *, device: str = "auto", num_threads: int | None = None
) -> Runtime:
    """Load `graph` into the engine `runtime`. RuntimeUnavailable, with reason and remedy, if that cannot be had."""
    parse_device(device)
    if num_threads is not None and (isinstance(num_threads, bool) or num_threads < 1):
        raise InvalidRequest(f"num_threads is {num_threads!r}; give at least 1, or None for the engine's default")
    module, _, name = RUNTIMES[resolve(runtime)].target.partition(":")
    engine: type[Runtime] = getattr(import_module(module), name)
    return engine.load(student, graph, device=device, num_threads=num_threads)
