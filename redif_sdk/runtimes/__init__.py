"""The inference engines by name, and the choice of one. An engine is imported when it is first used.

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
    "EXACT",
    "PRECISIONS",
    "RUNTIMES",
    "Choice",
    "Runtime",
    "RuntimeInfo",
    "RuntimeOptions",
    "candidates",
    "choose",
    "installed",
    "is_exact",
    "load",
    "loops_in_numpy",
    "parse_device",
    "resolve",
    "runnable",
]

_log = logging.getLogger(__name__)


class Engine(NamedTuple):
    """A line of `RUNTIMES`."""

    target: str  # "module:class"
    module: str | None  # the package that it needs; None: none
    extra: str  # the extra of redif-sdk that installs the package
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

#: Asks for fp32 arithmetic throughout, on every runtime and device.
EXACT = "exact"
#: Providers of ONNX Runtime that compute fp32 graphs in fp32 (TF32 is switched off). CoreML and NPUs may use fp16, and
#: the TensorRT provider TF32.
_EXACT_PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider")


class Choice(NamedTuple):
    """An engine and a precision, with the reason for the choice."""

    runtime: str
    precision: str
    reason: str


NO_ENGINE = 'no inference engine is installed; pip install "redif-sdk[cpu]", or "redif-sdk[gpu]" for NVIDIA GPUs'

#: What "auto" tries, fastest first as measured (docs/performance.md). Of the reduced precisions only bfloat16 is chosen
#: automatically, for graphs that passed the parity gate; fp16, int8 and engines that were not timed must be named.
AUTO = (
    Choice("openvino", "bf16", "the fastest where the processor has bfloat16 instructions"),
    Choice("onnxruntime", "fp32", "the fastest in fp32"),
    Choice("openvino", "fp32", "the next fastest in fp32"),
)

#: The same for large networks (`Manifest.is_large`): OpenVINO takes .92 of ONNX Runtime's time, .84 where only weights
#: are rounded.
AUTO_LARGE = (
    AUTO[0],
    Choice("openvino", "fp32", "the fastest in fp32 for a large network"),
    Choice("onnxruntime", "fp32", "the next fastest in fp32"),
    Choice("openvino", "int8wo", "the fastest of what a large network was exported in"),
    Choice("openvino", "int4wo", "the fastest of what a large network was exported in"),
)

#: OpenVINO computes a whole graph in bfloat16 or fp16, with the sampler's arithmetic, which must stay fp32. There it
#: runs the denoiser only, and the sampling loop runs in numpy. TensorRT-RTX's compiler fails on a loop around weights
#: that are rounded (1.5).
_LOOP_IN_NUMPY = {("openvino", "bf16"), ("openvino", "fp16"), ("tensorrt-rtx", "int8wo")}


def loops_in_numpy(runtime: str, precision: str) -> bool:
    """Whether this engine, in this precision, runs the denoiser step by step instead of the fused graph."""
    return (runtime, precision) in _LOOP_IN_NUMPY


def installed() -> list[str]:
    """The engines whose package is installed, without the fake one."""
    return [name for name, engine in RUNTIMES.items() if engine.module is not None and _present(engine.module)]


def runnable() -> list[str]:
    """The installed engines that this machine can run; TensorRT's need an NVIDIA driver.

    Raises:
        RuntimeUnavailable: There is none.
    """
    found = [name for name in installed() if RUNTIMES[name].devices != ("cuda",) or nvidia_driver() is not None]
    if not found:
        raise RuntimeUnavailable(NO_ENGINE)
    return found


def _present(module: str) -> bool:
    return find_spec(module) is not None


def is_exact(info: RuntimeInfo) -> bool:
    """Whether a graph is computed in fp32 throughout: all such pipelines agree within one level of 255."""
    if info.precision != "fp32" or parse_device(info.device)[0] == "npu":
        return False
    return info.runtime != "onnxruntime" or info.provider in _EXACT_PROVIDERS


def resolve(runtime: str) -> str:
    """`runtime`, if it is the name of an installed engine.

    Raises:
        InvalidRequest: The name is unknown.
        RuntimeUnavailable: The engine is not installed.
    """
    if runtime not in RUNTIMES:
        raise InvalidRequest(f"runtime {runtime!r} is unknown; use one of {', '.join(['auto', *RUNTIMES])}")
    engine = RUNTIMES[runtime]
    if engine.module is not None and not _present(engine.module):
        raise RuntimeUnavailable(f'runtime {runtime} is not installed; pip install "redif-sdk[{engine.extra}]"')
    return runtime


def candidates(manifest: Manifest, runtime: str = "auto", precision: str = "auto") -> list[Choice]:
    """The engines and precisions to try, best first; at least one.

    Args:
        manifest: The student's manifest.
        runtime: The name of an engine, or "auto".
        precision: A precision, or "auto".

    Raises:
        InvalidRequest: An unknown name.
        RuntimeUnavailable: No installed engine, or no graph of the student, fits.
    """
    if precision not in ("auto", EXACT, *PRECISIONS):
        raise InvalidRequest(
            f"precision {precision!r} is unknown; use one of {', '.join(['auto', EXACT, *PRECISIONS])}"
        )
    precision = "fp32" if precision == EXACT else precision
    present = list(dict.fromkeys(graph.precision for graph in manifest.graphs))
    if not present:
        raise RuntimeUnavailable(f"{manifest.name} has no graphs; run redif export on its folder")
    if precision not in ("auto", *present):
        raise RuntimeUnavailable(
            f"{manifest.name} has no graph in {precision} (it has {', '.join(sorted(present))}); "
            f"redif export --precision {precision} makes one"
        )
    if runtime != "auto":
        resolve(runtime)
    found = [choice for choice in _ordered(present, manifest) if _fits(choice, manifest, runtime, precision)]
    if not found:
        raise RuntimeUnavailable(NO_ENGINE)
    return found


def _ordered(present: Sequence[str], manifest: Manifest) -> Iterator[Choice]:
    """`AUTO` or `AUTO_LARGE`, then every other pair of engine and precision, fp32 first."""
    first = AUTO_LARGE if manifest.is_large else AUTO
    yield from first
    known = {(choice.runtime, choice.precision) for choice in first}
    for precision in sorted(present, key=PRECISIONS.index):
        for runtime in RUNTIMES:
            if (runtime, precision) not in known:
                yield Choice(runtime, precision, "the first that is available")


def _fits(choice: Choice, manifest: Manifest, runtime: str, precision: str) -> bool:
    """Whether a choice fits the requested names, the student's graphs and the installed engines."""
    if runtime not in ("auto", choice.runtime) or precision not in ("auto", choice.precision):
        return False
    if choice.precision not in {graph.precision for graph in manifest.graphs}:
        return False
    if runtime == "auto" and (choice.runtime == "fake" or choice.runtime not in installed()):
        return False
    # A precision that is chosen automatically must have passed the parity gate.
    return precision != "auto" or choice.precision == "fp32" or gate_passed(manifest, choice.precision)


def gate_passed(manifest: Manifest, precision: str) -> bool:
    """Whether the graphs of `precision` were checked at export and every check passed."""
    verdicts = [
        row.get("passed")
        for row in manifest.verification
        if row.get("precision") == precision and row.get("component") != "noise"
    ]
    return True in verdicts and False not in verdicts


def choose(
    student: StudentFolder, component: str, runtime: str, precision: str, options: RuntimeOptions
) -> tuple[Runtime, Choice]:
    """Load a student's graph into the first engine that is available.

    With device "auto", an NVIDIA GPU comes before the processor.

    Args:
        student: The student's folder.
        component: The graph to load; for "generator" the denoiser where there is no fused graph to use.
        runtime: The name of an engine, or "auto".
        precision: A precision, or "auto".
        options: How the graph is run.

    Returns:
        The loaded graph, and the choice with its reason.

    Raises:
        InvalidRequest: An unknown name.
        RuntimeUnavailable: No engine is available; the message has the reason for each.
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
                if precision == EXACT and not is_exact(engine.info):
                    raise RuntimeUnavailable(
                        f"{engine.info.provider} on {engine.info.device} does not compute in fp32 throughout, which "
                        f'precision="exact" asks for; use device="cpu", or precision="fp32"'
                    )
            except RuntimeUnavailable as error:
                reasons[str(error)] = None
                continue
            for reason in reasons:
                _log.info("%s: not available: %s", student.manifest.name, reason)
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
    """The graph to load: for "generator" the denoiser where there is no fused graph, or the loop runs in numpy."""
    if component != "generator":
        return manifest.graph(component, choice.precision)
    fused = None if loops_in_numpy(*choice[:2]) else manifest.graph("generator", choice.precision)
    return fused or manifest.graph("denoiser", choice.precision)


def load(runtime: str, student: StudentFolder, graph: Graph, options: RuntimeOptions | None = None) -> Runtime:
    """Load `graph` into the engine `runtime`.

    Raises:
        InvalidRequest: The engine is unknown, or does not support an option.
        RuntimeUnavailable: The engine, device or precision is not available; the message has the reason and the remedy.
    """
    module, _, name = RUNTIMES[resolve(runtime)].target.partition(":")
    engine: type[Runtime] = getattr(import_module(module), name)
    return engine.load(student, graph, options or RuntimeOptions())
