"""OpenVINO: Intel and AMD processors, Intel GPUs and NPUs.

By default OpenVINO computes in the fastest precision of the device. Here the precision is always set, and a compiled
graph that computes in another one is an error. A graph is compiled for each set of input shapes when these first occur,
which runs up to 1.5 times as fast as free shapes; compiled graphs are kept in memory and in the cache folder.

Tested on processors. Intel GPUs and NPUs go through the same calls and were not tested.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.paths import MappedFile, folder_of
from redif_sdk.artifact.records import Graph
from redif_sdk.cache import writable_cache
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes.cores import Arrays, Batches, Workers
from redif_sdk.runtimes.finite import with_levels
from redif_sdk.runtimes.protocol import RuntimeInfo, RuntimeOptions, cores, parse_device

# openvino_telemetry is kept from being imported; openvino has a stand-in for when it is not installed.
_telemetry_absent = "openvino_telemetry" not in sys.modules
if _telemetry_absent:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
try:
    import openvino
except ImportError as error:
    raise RuntimeUnavailable(f'openvino cannot be imported ({error}); pip install "redif-sdk[openvino]"') from error
finally:
    if _telemetry_absent:
        del sys.modules["openvino_telemetry"]

__all__ = ["VERSION", "OpenVino", "capabilities", "devices", "refusal"]

VERSION: str = openvino.__version__.split("-")[0]

# OpenVINO makes its tables of dtypes at the first call that needs them, and two threads that come first at once wait
# for each other for ever (seen with 2026.4). So they are made here, by the one thread that imports this.
_first = openvino.Tensor(np.zeros(1, np.float32), shared_memory=True)
_first.element_type.to_dtype()
_first.data.copy()
del _first

#: Graph precision -> the precision that OpenVINO is told to compute in, and what a device must be capable of for it.
HINTS = {"fp32": ("f32", "FP32"), "fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
#: Weights alone are integers. Several streams compute such graphs wrongly (relative error 1.9; seen with 2026.4).
WEIGHT_ONLY = ("int8wo", "int4wo")
HINTS |= dict.fromkeys(WEIGHT_ONLY, HINTS["fp32"])
#: Compiled graphs kept at a time; the least recently used one goes. Each has the weights in a layout of its own, so of
#: a graph whose weights lie beside it one is kept, and none in the cache folder.
KEPT = 8

ENGINE_ERRORS = (RuntimeError, ValueError, TypeError)

_processes: set[int] = set()  # the one that made the core


@cache
def _core() -> Any:
    _processes.add(os.getpid())
    return openvino.Core()


def _check_process() -> None:
    """Raise RuntimeUnavailable in a process that was forked from one that used OpenVINO.

    Its threads are gone there, and compiling waits for them for ever, for another graph or core too (seen with 2026.4).
    """
    if _processes and os.getpid() not in _processes:
        raise RuntimeUnavailable(
            "openvino cannot be used in a process that was forked from one that used it; start it with "
            'multiprocessing\'s "spawn", or use runtime="onnxruntime"'
        )


def devices() -> list[str]:
    """OpenVINO's names of the devices of this machine: CPU, GPU, NPU."""
    return list(_core().available_devices)


@cache
def capabilities(device: str = "CPU") -> tuple[str, ...]:
    """OpenVINO's names of the precisions that a device computes in: FP32, BF16, FP16, INT8."""
    return tuple(_core().get_property(device, "OPTIMIZATION_CAPABILITIES"))


def refusal(precision: str, device: str = "CPU") -> str | None:
    """The reason why `device` does not compute in `precision`, or None if it does."""
    if precision not in HINTS:
        return (
            "it does not compute symmetric int8 graphs as they stand (relative error .30, where ONNX Runtime has .06: "
            'docs/performance.md); use runtime="onnxruntime"'
        )
    if HINTS[precision][1] in capabilities(device):
        return None
    name = _core().get_property(device, "FULL_DEVICE_NAME")
    return (
        f"{name} has no {precision} instructions, and OpenVINO would compute in fp32 instead; use precision="
        f'"fp32", or a processor that has them'
    )


def _device(options: RuntimeOptions) -> tuple[str, str]:
    """(OpenVINO's name of the device, ours). Raises RuntimeUnavailable if it is not there."""
    kind, index = parse_device(options.device)
    kind = "cpu" if kind == "auto" else kind
    if kind not in ("cpu", "gpu", "npu"):
        raise RuntimeUnavailable(f'runtime openvino has no device {kind}; use "cpu", "gpu", "gpu:N" or "npu"')
    name = f"GPU.{index}" if kind == "gpu" and index else kind.upper()
    present = devices()
    if name not in present and f"{name}.0" not in present:
        raise RuntimeUnavailable(
            f"OpenVINO finds no {name} here (it finds {', '.join(present)}); install its driver, or use another device"
        )
    return name, kind if index == 0 else f"{kind}:{index}"


class _Shape:
    """The graph compiled for one set of input shapes, with its idle inference requests."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: list[Any] = []
        self._lock = Lock()

    def run(self, feed: Arrays, outputs: list[str]) -> Arrays:
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        request.infer(feed, share_inputs=True)
        result = {name: request.get_tensor(name).data.copy() for name in outputs}
        with self._lock:
            self._idle.append(request)
        return result


class OpenVino:
    """A graph in OpenVINO. `run` may be called from several threads."""

    def __init__(
        self, model: Any, device: str, info: RuntimeInfo, graph: Graph, options: RuntimeOptions, *, large: bool = False
    ) -> None:
        self._model = model
        self._device = device
        self._outputs = [output.name for output in graph.outputs]
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[graph.precision][0]}
        if graph.precision in WEIGHT_ONLY and device.startswith(("CPU", "GPU")):
            self._settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # else it rounds activations too, with AVX512-VNNI
        self._kept = 1 if large else KEPT
        if not large and (folder := writable_cache("openvino", options.cache_dir)) is not None:
            self._settings["CACHE_DIR"] = str(folder)
        self._batches = Batches(graph)
        streams = not large and graph.precision not in WEIGHT_ONLY
        self._workers = Workers(info.num_threads) if info.num_threads is not None and streams else None
        self._shapes: OrderedDict[tuple[Any, ...], _Shape] = OrderedDict()
        self._lock = Lock()
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """As `Runtime.load`."""
        _check_process()
        if options.provider is not None or options.engine_dir is not None:
            raise InvalidRequest("provider and engine_dir are not supported by runtime openvino; leave them out")
        device, ours = _device(options)
        if reason := refusal(graph.precision, device):
            raise RuntimeUnavailable(f"runtime openvino cannot compute in {graph.precision}: {reason}")
        data, weights = student.map_graph(graph)
        data, graph = with_levels(data, graph)
        try:
            model = _with_weights(student.path / graph.file, weights) if weights else _core().read_model(data)
        except ENGINE_ERRORS as error:
            raise RuntimeUnavailable(f"openvino cannot read {graph.file}: {_line(error)}") from error
        info = RuntimeInfo(
            runtime="openvino",
            version=VERSION,
            provider=device,
            device=ours,
            precision=graph.precision,
            component=graph.component,
            file=graph.file,
            num_threads=(options.num_threads or cores()) if device == "CPU" else None,
        )
        return cls(model, device, info, graph, options, large=bool(weights))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """As `Runtime.run`."""
        _check_process()
        try:
            if self._workers is None:
                return self._on_all_threads(inputs) if self.info.num_threads is not None else self._call(inputs, {})
            return self._workers.run(self._batches, inputs, self._on_all_threads, self._on_one_thread)
        except ENGINE_ERRORS as error:
            raise RuntimeUnavailable(
                f"openvino failed in {self.info.file} on {self.info.device}: {_line(error)}"
            ) from error

    def _on_all_threads(self, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """One request on all threads."""
        return self._call(feed, {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.info.num_threads})

    def _on_one_thread(self, feed: Arrays) -> Arrays:
        """One of several requests, each on a thread of its own."""
        number = self.info.num_threads
        return self._call(feed, {"NUM_STREAMS": str(number), "INFERENCE_NUM_THREADS": number})

    def _call(self, feed: Mapping[str, NDArray[Any]], threads: dict[str, Any]) -> Arrays:
        arrays = {name: np.ascontiguousarray(value) for name, value in self._batches.inputs_of(feed).items()}
        return self._compiled(arrays, threads).run(arrays, self._outputs)

    def _compiled(self, feed: Arrays, threads: dict[str, Any]) -> _Shape:
        """The graph for the shapes of `feed`, compiled by the first caller; other callers wait for it."""
        key = (*sorted((name, value.shape) for name, value in feed.items()), *threads)
        with self._lock:
            if key not in self._shapes:
                while len(self._shapes) >= self._kept:
                    self._shapes.popitem(last=False)
                model = self._model.clone()
                model.reshape({name: list(value.shape) for name, value in feed.items()})
                compiled = _core().compile_model(model, self._device, self._settings | threads)
                self._check_precision(compiled)
                self._shapes[key] = _Shape(compiled)
            self._shapes.move_to_end(key)
            return self._shapes[key]

    def _check_precision(self, compiled: Any) -> None:
        asked = self._settings["INFERENCE_PRECISION_HINT"]
        took = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if took != asked:
            raise RuntimeUnavailable(
                f"openvino took {took} in place of {asked} for {self.info.file}; use another precision"
            )


def _with_weights(path: Path, data: Mapping[str, MappedFile]) -> Any:
    """The graph at `path` with its weights, which OpenVINO maps by itself, from files beside it that are no links.

    In a Hub cache they are links; then graph and weights are put into a folder that is gone when they are read.

    Raises:
        RuntimeUnavailable: That cannot be done without copying the weights.
    """
    if folder_of(data) is not None:
        found = _core().read_model(str(path))
    else:
        target = next(iter(data.values())).path
        try:
            with tempfile.TemporaryDirectory(prefix=".redif-", dir=target.parent) as folder:
                for name, file in data.items():
                    Path(folder, name).hardlink_to(file.path)
                found = _core().read_model(shutil.copy(path, Path(folder, path.name)))
        except OSError as error:
            raise RuntimeUnavailable(
                f"openvino needs a hard link to the weights in {target}, and none can be made there: "
                f'{error.strerror}; let that folder be written to, or use runtime="onnxruntime"'
            ) from error
    for file in data.values():
        file.check_same()
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
