"""ONNX Runtime: on the CPU, on NVIDIA GPUs (CUDA, TensorRT), DirectML, CoreML, and by plugin providers.

By default ONNX Runtime falls back to the CPU and only logs it. Here the chosen provider runs every node, or
RuntimeUnavailable gives the reason. Graphs are passed as checked bytes. Weights beside a graph are mapped by ONNX
Runtime itself, from files that are checked before and are the same afterwards; on the CPU it computes from these pages
and keeps no copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.paths import MappedFile, folder_of
from redif_sdk.artifact.records import Graph
from redif_sdk.cache import writable_cache
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes.cores import Arrays, Batches, Workers
from redif_sdk.runtimes.finite import with_levels
from redif_sdk.runtimes.protocol import RuntimeInfo, RuntimeOptions, cores, parse_device

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ImportError as error:  # not installed, or one of the two packages removed the other's files
    raise RuntimeUnavailable(
        f'onnxruntime cannot be imported ({error}); pip install "redif-sdk[cpu]", or "redif-sdk[gpu]" for NVIDIA GPUs'
    ) from error

__all__ = ["ENGINE_ERRORS", "PROBE", "PROVIDERS", "VERSION", "OnnxRuntime", "available", "session_of", "usable"]

if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":  # Windows ignores the variable
    onnxruntime.disable_telemetry_events()

VERSION: str = onnxruntime.__version__
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"  # a plugin's

#: The providers that ONNX Runtime's own packages hold: the device of each, and the package that has it.
PROVIDERS = {
    CPU: ("cpu", 'pip install "redif-sdk[cpu]"'),
    CUDA: (
        "cuda",
        'pip uninstall onnxruntime, then pip install "redif-sdk[gpu]" (the two packages overwrite each other)',
    ),
    TENSORRT: ("cuda", 'pip uninstall onnxruntime, then pip install "redif-sdk[gpu]" and tensorrt'),
    "DmlExecutionProvider": ("dml", "on Windows, pip uninstall onnxruntime, then pip install onnxruntime-directml"),
    "CoreMLExecutionProvider": ("coreml", "on a Mac, pip install onnxruntime"),
}

NO_DATA: Mapping[str, MappedFile] = {}

# Its errors share no base class but Exception.
ENGINE_ERRORS: tuple[type[Exception], ...] = (
    *(value for value in vars(_state).values() if isinstance(value, type) and issubclass(value, Exception)),
    RuntimeError,
    ValueError,
)

PLUGIN_ERRORS: tuple[type[Exception], ...] = (AttributeError, OSError, ImportError, *ENGINE_ERRORS)

#: The smallest graph, y = x + x. Running it shows whether a provider works, which the library's list does not.
PROBE = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

#: Weights that are laid out anew would be copied, all of them. Large networks are as fast from the mapped file:
#: docs/performance.md, "Real sizes".
_MAPPED = {"session.disable_prepacking": "1"}
#: Beside integer weights ONNX Runtime would round activations to integers too (relative error .02); 1 is float32.
_FLOAT_ACTIVATIONS = ("session.qdq_matmulnbits_accuracy_level", "1")
_FOLDER_OF_DATA = "session.model_external_initializers_file_folder_path"


def available() -> list[str]:
    """The providers that the library lists; `usable` says whether one works."""
    return list(onnxruntime.get_available_providers())


class Place(NamedTuple):
    """The provider and device that run a graph's nodes."""

    provider: str
    device: str  # as RuntimeInfo says it
    settings: dict[str, str]
    plugin: tuple[Any, ...] = ()  # OrtEpDevice


def _place(options: RuntimeOptions, prefix: str, precision: str = "fp32") -> Place:
    """The provider and device of `options`. `prefix` names the graph in TensorRT's engine cache."""
    kind, index = parse_device(options.device)
    if options.provider is not None and options.provider not in PROVIDERS:
        return _plugin(options.provider, kind, precision)
    if options.provider is not None:
        provider = options.provider
        if kind not in ("auto", PROVIDERS[provider][0]):
            raise InvalidRequest(
                f"device={options.device!r} is not supported by {provider}; use {PROVIDERS[provider][0]!r}"
            )
    elif kind == "auto":
        have_gpu = CUDA in available() and usable(CUDA) is None
        provider = CUDA if have_gpu else CPU
    else:
        fitting = [name for name, (device, _) in PROVIDERS.items() if device == kind]
        if not fitting:
            raise RuntimeUnavailable(f'runtime onnxruntime has no device {kind}; use runtime="openvino" for it')
        provider = fitting[0]
    kind = PROVIDERS[provider][0]
    settings = {"device_id": str(index)} if kind in ("cuda", "dml") else {}
    if provider == CUDA:
        settings["use_tf32"] = "0"  # fp32 is fp32: TF32 multiplies with 10-bit mantissas
    if provider == TENSORRT:
        folder = writable_cache("onnxruntime-tensorrt", options.cache_dir)
        if folder is not None:
            settings |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_engine_cache_prefix": prefix,  # without it graphs of one name are given one another's engines
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
    return Place(provider, f"{kind}:{index}" if kind in ("cuda", "dml") else kind, settings)


def _openvino_precision(place: str, precision: str) -> dict[str, str]:
    """OpenVINO computes in the fastest precision, not in the graph's, unless the hint is set."""
    hint = {"fp16": "f16", "bf16": "bf16"}.get(precision, "f32")
    return {"load_config": json.dumps({place.upper(): {"INFERENCE_PRECISION_HINT": hint}})}


def _plugin(package: str, kind: str, precision: str) -> Place:
    """A provider from a package of its own, such as ``onnxruntime_ep_openvino``. Raises RuntimeUnavailable."""
    module = package.replace("-", "_")
    if not module.isidentifier() or find_spec(module) is None:
        known = ", ".join(PROVIDERS)
        raise RuntimeUnavailable(
            f"provider {package!r} is neither of ONNX Runtime's own ({known}) nor an installed plugin package; "
            f"pip install it, for example onnxruntime-ep-openvino"
        )
    try:
        plugin: Any = import_module(module)
        name: str = plugin.get_ep_name()
        _register(name, plugin.get_library_path())
        found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    except PLUGIN_ERRORS as error:
        reason = " ".join(str(error).split())
        raise RuntimeUnavailable(f"the plugin provider {package} cannot be used here: {reason}") from error
    kinds = [device.device.type.name.lower() for device in found]
    for place in dict.fromkeys(["cpu", "gpu", "npu"] if kind == "auto" else [kind]):
        if place in kinds:
            settings = _openvino_precision(place, precision) if name == OPENVINO else {}
            return Place(name, place, settings, tuple(d for d, k in zip(found, kinds, strict=True) if k == place)[:1])
    wanted = "device" if kind == "auto" else f"device {kind}"
    raise RuntimeUnavailable(
        f"{name} offers no {wanted} on this machine (it offers: {', '.join(dict.fromkeys(kinds)) or 'none'}); "
        f"use another provider"
    )


@cache
def _register(name: str, library: str) -> None:
    onnxruntime.register_execution_provider_library(name, library)


def _session(model: bytes, place: Place, options: Any) -> Any:
    """A session of which the place's provider runs every node. Raises RuntimeUnavailable."""
    if not place.plugin and place.provider not in available():
        remedy = PROVIDERS[place.provider][1]
        raise RuntimeUnavailable(f"the installed onnxruntime {VERSION} has no {place.provider}; {remedy}")
    try:
        if place.plugin:
            options.add_provider_for_devices(list(place.plugin), place.settings)
            session = onnxruntime.InferenceSession(model, options)
        else:
            providers: list[Any] = [(place.provider, place.settings)]
            if place.provider != CPU:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            if place.provider == TENSORRT:
                providers.append((CUDA, {"device_id": place.settings["device_id"], "use_tf32": "0"}))
            session = onnxruntime.InferenceSession(model, options, providers=providers)
    except ENGINE_ERRORS as error:
        reason = " ".join(str(error).split())
        device = "the CPU" if place.device == "cpu" else place.device
        raise RuntimeUnavailable(f"onnxruntime cannot run this on {device}: {reason}; see redif doctor") from error
    if session.get_providers()[0] != place.provider:
        raise RuntimeUnavailable(
            f"onnxruntime took {session.get_providers()[0]} in place of {place.provider}; see redif doctor for the "
            f"reason"
        )
    return session


def session_of(model: bytes, *, device: str = "cpu", num_threads: int | None = None) -> Any:
    """A session for a graph that is not a student's, such as a classifier. Raises RuntimeUnavailable."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    return _session(model, _place(RuntimeOptions(device=device), hashlib.sha256(model).hexdigest()[:16]), options)


@cache
def usable(provider: str, index: int = 0) -> str | None:
    """None if `provider` runs a small graph on this machine, else the reason why it does not."""
    kind = PROVIDERS[provider][0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        device = f"{kind}:{index}" if kind in ("cuda", "dml") else kind
        _session(PROBE, _place(RuntimeOptions(device=device, provider=provider), "probe"), options)
    except RuntimeUnavailable as error:
        return str(error)
    return None


def _take_weights(options: Any, data: Mapping[str, MappedFile], *, on_cpu: bool) -> None:
    """Let a session take its weights from checked files, which its graph names relative to itself."""
    if on_cpu:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        for key, value in _MAPPED.items():
            options.add_session_config_entry(key, value)
    if (folder := folder_of(data)) is not None:
        options.add_session_config_entry(_FOLDER_OF_DATA, str(folder))
    else:  # links into a cache, which ONNX Runtime does not follow: it copies them from memory
        views = [file.view for file in data.values()]
        options.add_external_initializers_from_files_in_memory(list(data), views, [len(view) for view in views])


class OnnxRuntime:
    """A graph in ONNX Runtime. `run` may be called from several threads.

    On the CPU there are two sessions: one whose threads share every operation, for single images, and one without
    threads of its own, made when it is first needed, for the pieces of a batch (`cores.py`). A graph whose weights lie
    beside it has the first one only.
    """

    def __init__(
        self, model: bytes, data: Mapping[str, MappedFile], place: Place, info: RuntimeInfo, graph: Graph
    ) -> None:
        self._model: bytes | None = model
        self._assigned = place
        self._batches = Batches(graph)
        self._outputs = [output.name for output in graph.outputs]
        self._lock = Lock()
        self.info = info
        on_cpu = place.provider == CPU
        threads = info.num_threads if on_cpu and info.num_threads is not None else 1
        self._workers = Workers(threads) if threads > 1 and not data else None
        self._shared_session = self._new_session(info.num_threads, data)
        if self._workers is None:
            self._model = None

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """As `Runtime.load`."""
        if options.engine_dir is not None:
            raise InvalidRequest("engine_dir is not supported by runtime onnxruntime; use cache_dir")
        place = _place(options, f"redif-{student.sha256(graph.file)[:16]}-levels", graph.precision)
        if graph.precision == "bf16" and place.provider == CPU:
            raise RuntimeUnavailable('onnxruntime has no bf16 arithmetic on the CPU; use precision="fp32"')
        model, data = student.map_graph(graph)
        model, graph = with_levels(model, graph)
        info = RuntimeInfo(
            runtime="onnxruntime",
            version=VERSION,
            provider=place.provider,
            device=place.device,
            precision=graph.precision,
            component=graph.component,
            file=graph.file,
            num_threads=options.num_threads or cores() if place.device == "cpu" else None,
        )
        return cls(model, data, place, info, graph)

    def _new_session(self, num_threads: int | None, data: Mapping[str, MappedFile] = NO_DATA) -> Any:
        assert self._model is not None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.add_session_config_entry(*_FLOAT_ACTIVATIONS)
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        if data:
            _take_weights(options, data, on_cpu=self._assigned.provider == CPU)
        session = _session(self._model, self._assigned, options)
        for file in data.values():
            file.check_same()
        return session

    @cached_property
    def _single_session(self) -> Any:
        """The session for pieces, each computed by the calling thread."""
        session = self._new_session(1)
        self._model = None  # the bytes are not needed again
        return session

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """As `Runtime.run`."""
        try:
            if self._workers is None:
                return self._whole(inputs)
            return self._workers.run(self._batches, inputs, self._whole, self._piece)
        except ENGINE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise RuntimeUnavailable(
                f"onnxruntime failed in {self.info.file} on {self.info.device}: {reason}"
            ) from error

    def _whole(self, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._call(self._shared_session, feed)

    def _piece(self, feed: Arrays) -> Arrays:
        with self._lock:
            session = self._single_session
        return self._call(session, feed)

    def _call(self, session: Any, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self._outputs, session.run(self._outputs, self._batches.inputs_of(feed)), strict=True))
