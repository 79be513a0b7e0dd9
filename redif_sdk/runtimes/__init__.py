"""The inference engines by name, and the choice of one. An engine is imported only when it is asked for.

To add an engine, write one file with a class that follows `Runtime`, and add a line to `RUNTIMES`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, get_args

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Graph, Precision
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes.protocol import Runtime, RuntimeInfo, RuntimeOptions, nvidia_driver, parse_device

__all__ = [
    "AUTO",
    "PRECISIONS",
    "RUNTIMES",
    "Choice",
    "Runtime",
    "RuntimeInfo",
    "RuntimeOptions",
    "candidates",
    "choose",
    "installed",
    "load",
    "parse_device",
    "resolve",
    "runnable",
    "steps_alone",
]

_log = logging.getLogger(__name__)


class Engine(NamedTuple):
    target: str  # "module:class"
    module: str | None  # what has to be installed; None: nothing
    extra: str
    devices: tuple[str, ...]


RUNTIMES = {
    "onnxruntime": Engine(
        "redif_sdk.runtimes.onnxruntime:OnnxRuntime",
        "onnxruntime",
        "cpu",
        ("cpu", "cuda", "dml", "coreml", "gpu", "npu"),
    ),
    "openvino": Engine("redif_sdk.runtimes.openvino:OpenVino", "openvino", "openvino", ("cpu", "gpu", "npu")),
    "tensorrt": Engine("redif_sdk.runtimes.tensorrt.runtime:TensorRT", "tensorrt", "tensorrt", ("cuda",)),
    "tensorrt-rtx": Engine(
        "redif_sdk.runtimes.tensorrt.runtime:TensorRTRtx", "tensorrt_rtx", "tensorrt-rtx", ("cuda",)
    ),
    "fake": Engine("redif_sdk.runtimes.fake:FakeRuntime", None, "", ("cpu",)),
}

PRECISIONS: tuple[str, ...] = get_args(Precision)


class Choice(NamedTuple):
    """An engine and a precision, with the reason why it is where it is in `AUTO`."""

    runtime: str
    precision: str
    reason: str


NO_ENGINE = 'no inference engine is installed; pip install "redif-sdk[cpu]", or "redif-sdk[gpu]" for NVIDIA GPUs'

#: What "auto" tries, best first, as measured (docs/performance.md). It changes the pictures no more than bfloat16 does,
#: and that only for graphs whose gate passed; int8 and fp16, and engines that we could not time, have to be asked for.
AUTO = (
    Choice("openvino", "bf16", "the fastest where the processor has bfloat16 instructions"),
    Choice("onnxruntime", "fp32", "the fastest in fp32"),
    Choice("openvino", "fp32", "the next fastest in fp32"),
)

#: OpenVINO computes a whole graph in bfloat16, the sampler's arithmetic too, which must stay fp32: here it is given the
#: network alone, and the steps are done in numpy.
_STEPS_ALONE = {("openvino", "bf16"), ("openvino", "fp16")}


def steps_alone(runtime: str, precision: str) -> bool:
    """Whether the fused graph is not for this engine in this precision."""
    return (runtime, precision) in _STEPS_ALONE


def installed() -> list[str]:
    """The engines whose package is there; not the fake, which draws no pictures."""
    return [name for name, engine in RUNTIMES.items() if engine.module is not None and _present(engine.module)]


def runnable() -> list[str]:
    """The engines that may run something here: those installed, TensorRT's only with a driver.

    Raises RuntimeUnavailable if there is none.
    """
    found = [name for name in installed() if RUNTIMES[name].devices != ("cuda",) or nvidia_driver() is not None]
    if not found:
        raise RuntimeUnavailable(NO_ENGINE)
    return found


def _present(module: str) -> bool:
    return find_spec(module) is not None


def resolve(runtime: str) -> str:
    """A name that may be asked for. InvalidRequest if it is unknown, RuntimeUnavailable if it is not installed."""
    if runtime not in RUNTIMES:
        raise InvalidRequest(f"runtime {runtime!r} is unknown; use one of {', '.join(['auto', *RUNTIMES])}")
    engine = RUNTIMES[runtime]
    if engine.module is not None and not _present(engine.module):
        raise RuntimeUnavailable(f'runtime {runtime} is not installed; pip install "redif-sdk[{engine.extra}]"')
    return runtime


def candidates(manifest: Manifest, runtime: str = "auto", precision: str = "auto") -> list[Choice]:
    """The engines and precisions to try for what was asked, best first; there is at least one.

    Raises InvalidRequest for an unknown name, RuntimeUnavailable where nothing that was asked for is there.
    """
    if precision not in ("auto", *PRECISIONS):
        raise InvalidRequest(f"precision {precision!r} is unknown; use one of {', '.join(['auto', *PRECISIONS])}")
    present = list(dict.fromkeys(graph.precision for graph in manifest.graphs))
    if not present:
        raise RuntimeUnavailable(f"{manifest.name} has no compiled network; run redif export on its folder")
    if precision not in ("auto", *present):
        raise RuntimeUnavailable(
            f"{manifest.name} has no graph in {precision} (it has {', '.join(sorted(present))}); "
            f"redif export --precision {precision} makes one"
        )
    if runtime != "auto":
        resolve(runtime)
    found = [choice for choice in _ordered(present) if _fits(choice, manifest, runtime, precision)]
    if not found:
        raise RuntimeUnavailable(NO_ENGINE)
    return found


def _ordered(present: Sequence[str]) -> Iterator[Choice]:
    """`AUTO`, and then every other pair, fp32 first: what there is when nothing better is, or what was asked for."""
    yield from AUTO
    known = {(choice.runtime, choice.precision) for choice in AUTO}
    for precision in sorted(present, key=PRECISIONS.index):
        for runtime in RUNTIMES:
            if (runtime, precision) not in known:
                yield Choice(runtime, precision, "the first that can be had")


def _fits(choice: Choice, manifest: Manifest, runtime: str, precision: str) -> bool:
    """Whether a choice answers the request, as far as can be told without loading anything."""
    if runtime not in ("auto", choice.runtime) or precision not in ("auto", choice.precision):
        return False
    if choice.precision not in {graph.precision for graph in manifest.graphs}:
        return False
    if runtime == "auto" and (choice.runtime == "fake" or choice.runtime not in installed()):
        return False
    # What nobody asked for by name must have passed its gate.
    return precision != "auto" or choice.precision == "fp32" or gate_passed(manifest, choice.precision)


def gate_passed(manifest: Manifest, precision: str) -> bool:
    """Whether the graphs of `precision` were verified when they were exported, and every check passed."""
    verdicts = [
        row.get("passed")
        for row in manifest.verification
        if row.get("precision") == precision and row.get("component") != "noise"
    ]
    return True in verdicts and False not in verdicts


def choose(
    student: StudentFolder, component: str, runtime: str, precision: str, options: RuntimeOptions
) -> tuple[Runtime, Choice]:
    """Load the first candidate that can be had: the engine with its graph, and why it was taken.

    With device "auto", an NVIDIA GPU comes before the processor. Raises RuntimeUnavailable with every reason why
    nothing could be had.
    """
    reasons: dict[str, None] = {}
    choices = candidates(student.manifest, runtime, precision)
    for device in _devices(options.device):
        for choice in choices:
            graph = _graph(student.manifest, component, choice)
            if graph is None or (runtime == "auto" and not _serves(choice.runtime, device)):
                continue
            try:
                engine = load(choice.runtime, student, graph, replace(options, device=device))
            except RuntimeUnavailable as error:
                reasons[str(error)] = None
                continue
            for reason in reasons:
                _log.info("%s: passed over: %s", student.manifest.name, reason)
            _log.info("%s: %s in %s on %s", student.manifest.name, choice.runtime, choice.precision, engine.info.device)
            asked = "auto" not in (runtime, precision)
            return engine, choice._replace(reason="asked for") if asked else choice
    raise RuntimeUnavailable(
        "; ".join(reasons) or f"no installed engine runs {student.manifest.name} on {options.device}; see redif doctor"
    )


def _devices(device: str) -> list[str]:
    return ["cuda", "cpu"] if device == "auto" and nvidia_driver() is not None else [device]


def _serves(runtime: str, device: str) -> bool:
    kind, _ = parse_device(device)
    if kind == "auto":  # there is no driver: see _devices
        return RUNTIMES[runtime].devices != ("cuda",)
    return kind in RUNTIMES[runtime].devices


def _graph(manifest: Manifest, component: str, choice: Choice) -> Graph | None:
    """The graph to load: for a generator the network's own where there is none, or it is not for this engine."""
    if component != "generator":
        return manifest.graph(component, choice.precision)
    fused = None if steps_alone(*choice[:2]) else manifest.graph("generator", choice.precision)
    return fused or manifest.graph("denoiser", choice.precision)


def load(runtime: str, student: StudentFolder, graph: Graph, options: RuntimeOptions | None = None) -> Runtime:
    """Load `graph` into the engine `runtime`. RuntimeUnavailable, with reason and remedy, if that cannot be had."""
    module, _, name = RUNTIMES[resolve(runtime)].target.partition(":")
    engine: type[Runtime] = getattr(import_module(module), name)
    return engine.load(student, graph, options or RuntimeOptions())
