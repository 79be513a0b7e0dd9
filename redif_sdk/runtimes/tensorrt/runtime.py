"""TensorRT on NVIDIA GPUs, Enterprise and RTX: runs engines that `redif export --target` built.

An engine is taken from the cache, or from the folder that the user names, if it was built from exactly this graph, with
this version of the library, for this GPU (`cache.py`). Its bytes are hashed and then used from memory. No engine is
built here: where there is none, the error has the command that builds it.

Written against the API of TensorRT 10.7 to 11 and TensorRT-RTX 1.7, **not run on a GPU by this project yet**. What was
run: everything up to the first call of CUDA, and all the rest against a stand-in for both libraries.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Graph
from redif_sdk.cache import cache_folder, done_without
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes.cores import Arrays, Batches
from redif_sdk.runtimes.protocol import RuntimeInfo, RuntimeOptions, parse_device
from redif_sdk.runtimes.tensorrt.cache import EngineCache, EngineRecord, Flavour, graph_digest
from redif_sdk.runtimes.tensorrt.cuda import Buffer, Cuda, Gpu, find_gpu

__all__ = ["MOST_CONTEXTS", "TensorRT", "TensorRTRtx", "even", "library", "load_weights", "logger"]

#: Calls that one loaded engine computes at a time. Each has its own memory on the GPU; further calls wait.
MOST_CONTEXTS = 4

_NUMPY = {name: np.dtype(name) for name in ("float32", "float16", "int64", "int32", "uint8", "bool")}

_log = logging.getLogger(__name__)


@cache
def library(flavour: Flavour) -> Any:
    """The module of a flavour: ``tensorrt`` or ``tensorrt_rtx``. Raises RuntimeUnavailable if it cannot be imported."""
    try:
        return import_module(flavour.replace("-", "_"))
    except (ImportError, OSError, RuntimeError) as error:  # its own libraries may be what is missing
        raise RuntimeUnavailable(
            f'{flavour} cannot be imported ({error}); pip install "redif-sdk[{flavour}]"'
        ) from error


@cache
def logger(flavour: Flavour) -> Any:
    """TensorRT's one logger of this process: it writes to Python's log, and keeps the last errors for messages."""
    trt = library(flavour)
    base: Any = trt.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, message: str) -> None:
            if severity <= base.ERROR:
                self._errors.append(" ".join(message.split()))
            # Errors are raised by whoever called the library, so they are no more than information here.
            _log.log(logging.DEBUG if severity >= base.VERBOSE else logging.INFO, "%s: %s", flavour, message)

        def take_errors(self) -> str:
            """What went wrong since this was last asked."""
            text = "; ".join(self._errors)
            self._errors.clear()
            return text or "it gives no reason"

    return Log()


@cache
def _runtime(flavour: Flavour) -> Any:
    """TensorRT's deserialiser of engines, which has to outlive them."""
    return library(flavour).Runtime(logger(flavour))


def load_weights(parser: Any, model: Any, blobs: Mapping[str, bytes]) -> list[NDArray[np.uint8]]:
    """Give a parser the weights that an ONNX `model` keeps in other files, `blobs` by their names in it.

    The arrays that are returned hold the memory, and have to live as long as the parser. Works for TensorRT's parser
    and for its refitter, after their ``load_model_proto``. Raises RuntimeUnavailable for weights that do not fit.
    """
    held = {name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        start = int(place.get("offset", 0))
        end = start + int(place["length"]) if "length" in place else None
        weights = held[place["location"]][start:end]
        if not parser.load_initializer(tensor.name, weights.ctypes.data, weights.nbytes):
            raise RuntimeUnavailable(f"TensorRT does not take the weights {tensor.name}; export the student again")
    return list(held.values())


def even(batch: int, most: int) -> list[int]:
    """The sizes of the fewest pieces of at most `most` images that make up `batch`; they differ by at most one."""
    pieces = -(-batch // most)
    return [batch // pieces + (index < batch % pieces) for index in range(pieces)]


class _Limits:
    """The shapes and dtypes that an engine was built for, and how a batch is cut to fit them."""

    def __init__(self, record: EngineRecord) -> None:
        self._record = record
        self._specs = {spec.name: spec for spec in record.inputs}
        name, axis = next((spec.name, spec.shape.index("batch")) for spec in record.inputs if "batch" in spec.shape)
        smallest, _, largest = record.key.profile[name]
        self.least, self.most = smallest[axis], largest[axis]

    def largest(self) -> dict[str, tuple[int, ...]]:
        """The largest shape of each input."""
        fixed = {
            name: tuple(int(size) for size in spec.shape) for name, spec in self._specs.items() if _fixed(spec.shape)
        }
        return fixed | {name: shapes[2] for name, shapes in self._record.key.profile.items()}

    def cut(self, batch: int) -> list[int]:
        """The sizes of the pieces of a batch. Raises RuntimeUnavailable if there are none within the limits."""
        sizes = even(batch, self.most) if batch else [0]
        if min(sizes) < self.least:
            raise RuntimeUnavailable(
                f"{self._record.file} takes batches of {self.least} to {self.most}, and {batch} cannot be cut into "
                f"such pieces; build it with other --batches"
            )
        return sizes

    def check(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Raise RuntimeUnavailable, naming the input and the axis, for inputs that the engine does not take."""
        file = self._record.file
        if set(inputs) != set(self._specs):
            raise RuntimeUnavailable(f"{file} takes {', '.join(self._specs)}, not {', '.join(inputs) or 'nothing'}")
        batches = set()
        for name, value in inputs.items():
            spec = self._specs[name]
            if value.dtype != _NUMPY[spec.dtype] or value.ndim != len(spec.shape):
                given, taken = f"{value.dtype} with {value.ndim} axes", f"{spec.dtype} with {len(spec.shape)}"
                raise RuntimeUnavailable(f"{name} is {given}; {file} takes {taken}")
            least, most = self._bounds(name)
            for axis, (label, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
                if label == "batch":
                    batches.add(size)
                elif label != "rows" and not least[axis] <= size <= most[axis]:  # rows are cut with their batch
                    what = label if isinstance(label, str) else f"on axis {axis}"
                    built = f"{least[axis]} to {most[axis]}"
                    raise RuntimeUnavailable(f"{name} has {size} {what}; {file} was built for {built}: build another")
        if len(batches) > 1:
            raise RuntimeUnavailable(f"the inputs have batches of {sorted(batches)}; give all the same")

    def _bounds(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""
        if name in self._record.key.profile:
            least, _, most = self._record.key.profile[name]
            return least, most
        fixed = self.largest()[name]
        return fixed, fixed


def _fixed(shape: list[int | str]) -> bool:
    return all(isinstance(size, int) for size in shape)


class _Slot:
    """One execution context with its stream and memory, for one call at a time."""

    def __init__(self, context: Any, cuda: Cuda, record: EngineRecord, limits: _Limits) -> None:
        self._context = context
        self._cuda = cuda
        self._stream = cuda.stream()
        self._outputs = {spec.name: _NUMPY[spec.dtype] for spec in record.outputs}
        _need(context.set_optimization_profile_async(0, self._stream), "choose the profile")
        cuda.wait(self._stream)
        shapes = limits.largest()
        self._free_shapes = frozenset(record.key.profile)
        for name in self._free_shapes:
            shape = shapes[name]
            _need(context.set_input_shape(name, shape), f"take {name} of shape {shape}")
        sizes = {spec.name: _NUMPY[spec.dtype].itemsize * _elements(shapes[spec.name]) for spec in record.inputs}
        sizes |= {name: dtype.itemsize * _elements(self._shape(name)) for name, dtype in self._outputs.items()}
        self._buffers = {name: Buffer(cuda, size) for name, size in sizes.items()}
        for name, buffer in self._buffers.items():
            _need(context.set_tensor_address(name, buffer.device), f"bind {name}")

    def run(self, inputs: Arrays) -> Arrays:
        """As `Runtime.run`."""
        for name, value in inputs.items():
            buffer = self._buffers[name]
            buffer.host[: value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            if name in self._free_shapes:
                _need(self._context.set_input_shape(name, tuple(value.shape)), f"take {name} of shape {value.shape}")
            self._cuda.to_device(buffer, value.nbytes, self._stream)
        _need(self._context.execute_async_v3(self._stream), "run")
        shapes = {name: self._shape(name) for name in self._outputs}
        sizes = {name: dtype.itemsize * _elements(shapes[name]) for name, dtype in self._outputs.items()}
        for name, size in sizes.items():
            self._cuda.to_host(self._buffers[name], size, self._stream)
        self._cuda.wait(self._stream)
        return {
            name: self._buffers[name].host[: sizes[name]].copy().view(dtype).reshape(shapes[name])
            for name, dtype in self._outputs.items()
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        _need(min(shape, default=0) >= 0, f"tell the shape of {name}")
        return shape


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _need(done: object, what: str) -> None:
    if not done:
        raise RuntimeUnavailable(f"TensorRT could not {what}; its message is in the log of {__name__}")


class _KernelCache:
    """The kernels that TensorRT-RTX compiles when an engine first runs, kept in the user's cache."""

    def __init__(self, engine: Any, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        try:
            kept = path.read_bytes()
        except OSError:
            kept = b""
        if kept and not self._cache.deserialize(kept):
            _log.info("%s is of another driver or library version; it is replaced", path)
        self._size = len(kept)
        self._calls = 0
        _need(self.config.set_runtime_cache(self._cache), "use a cache of kernels")

    def count(self) -> None:
        """Count a call; after the 1st, 2nd, 4th, 8th, ... write what was compiled since."""
        with self._lock:
            self._calls += 1
            if self._calls & (self._calls - 1):
                return
            data = bytes(self._cache.serialize())
            if len(data) == self._size:
                return
            self._size = len(data)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                atomic_write(self._path, data)
            except OSError as error:
                done_without(self._path.parent, error)


class TensorRT:
    """An engine of TensorRT Enterprise. `run` may be called from several threads."""

    flavour: ClassVar[Flavour] = "tensorrt"

    def __init__(
        self,
        engine: Any,
        record: EngineRecord,
        cuda: Cuda,
        info: RuntimeInfo,
        graph: Graph,
        kernels: _KernelCache | None,
    ) -> None:
        self._engine = engine
        self._record = record
        self._cuda = cuda
        self._kernels = kernels
        self._batches = Batches(graph)
        self._limits = _Limits(record)
        self._free = BoundedSemaphore(MOST_CONTEXTS)
        self._idle: list[_Slot] = []
        self._lock = Lock()
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """As `Runtime.load`."""
        gpu = _gpu(cls.flavour, options)
        trt = library(cls.flavour)
        record, data = _engine_file(student, graph, cls.flavour, trt.__version__, gpu, options)
        cuda = Cuda(gpu.index)
        engine = _runtime(cls.flavour).deserialize_cuda_engine(data)
        if engine is None:
            reason = logger(cls.flavour).take_errors()
            raise RuntimeUnavailable(f"{cls.flavour} cannot load {record.file} on {gpu.name}: {reason}")
        if record.key.settings.strip_weights:
            _refit(trt, cls.flavour, engine, student, graph)
        kernels = None
        if cls.flavour == "tensorrt-rtx":
            kept = cache_folder(options.cache_dir) / "kernels" / f"{record.key.name}.sm{gpu.sm}.bin"
            kernels = _KernelCache(engine, kept)
        info = RuntimeInfo(
            runtime=cls.flavour,
            version=trt.__version__,
            provider=gpu.name,
            device=f"cuda:{gpu.index}",
            precision=graph.precision,
            component=graph.component,
            file=record.file,
            num_threads=None,
        )
        loaded = cls(engine, record, cuda, info, graph, kernels)
        with loaded._slot():  # an engine that does not fit this GPU fails now
            return loaded

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """As `Runtime.run`."""
        self._limits.check(self._batches.inputs_of(inputs))
        cut = self._batches.cut(inputs, self._limits.cut(self._batches.size(inputs)))
        pieces = [self._batches.inputs_of(piece) for piece in cut]
        self._cuda.use()
        with self._slot() as slot:
            outputs = self._batches.join([slot.run(piece) for piece in pieces])
        if self._kernels is not None:
            self._kernels.count()
        return outputs

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """A context for the exclusive use of one call. A context in which a call failed is dropped."""
        with self._free:
            with self._lock:
                slot = self._idle.pop() if self._idle else self._new_slot()
            yield slot
            with self._lock:
                self._idle.append(slot)

    def _new_slot(self) -> _Slot:
        needed, free = int(self._engine.device_memory_size_v2), self._cuda.free_memory()
        if needed > free:
            raise RuntimeUnavailable(
                f"{self._record.file} needs {needed >> 20} MiB of {self.info.device} for one call, and "
                f"{free >> 20} MiB are free; build it for smaller --batches, or free the GPU"
            )
        arguments = () if self._kernels is None else (self._kernels.config,)
        context = self._engine.create_execution_context(*arguments)
        _need(context, "make an execution context")
        return _Slot(context, self._cuda, self._record, self._limits)


class TensorRTRtx(TensorRT):
    """An engine of TensorRT-RTX. `run` may be called from several threads."""

    flavour = "tensorrt-rtx"


def _gpu(flavour: Flavour, options: RuntimeOptions) -> Gpu:
    """The GPU of `options`. Raises RuntimeUnavailable if there is none."""
    for name in ("num_threads", "provider"):
        if getattr(options, name) is not None:
            raise InvalidRequest(f"{name} is not supported by runtime {flavour}; leave it out")
    kind, index = parse_device(options.device)
    if kind not in ("auto", "cuda"):
        raise RuntimeUnavailable(f'runtime {flavour} has no device {kind}; use "cuda" or "cuda:N"')
    gpu = find_gpu(index)
    if isinstance(gpu, str):
        raise RuntimeUnavailable(
            f"runtime {flavour} needs an NVIDIA GPU and its driver, and none was found ({gpu}); "
            f'use runtime="onnxruntime" or runtime="openvino"'
        )
    return gpu


def _engine_file(
    student: StudentFolder, graph: Graph, flavour: Flavour, version: str, gpu: Gpu, options: RuntimeOptions
) -> tuple[EngineRecord, bytes]:
    """The engine of a graph for this GPU, its bytes checked. RuntimeUnavailable, with the command that builds one."""
    engines = EngineCache(options)
    found = engines.pick(graph_digest(student, graph), flavour, version, gpu)
    if found.record is None:
        command = f"redif export {student.path} --target {flavour} --precision {graph.precision}"
        if options.engine_dir is not None:
            command += f" --engine-dir {options.engine_dir}" + (f" --sm {gpu.sm}" if flavour == "tensorrt-rtx" else "")
        raise RuntimeUnavailable(
            f"{engines.folder} has no engine of {graph.file} for {gpu.name} ({found.reason}); run: {command}"
        )
    wrong = [spec.name for spec in (*found.record.inputs, *found.record.outputs) if spec.dtype not in _NUMPY]
    if wrong:
        raise RuntimeUnavailable(f"{found.record.file} has {', '.join(wrong)} in a dtype that has no numpy equivalent")
    return found.record, found.data


def _refit(trt: Any, flavour: Flavour, engine: Any, student: StudentFolder, graph: Graph) -> None:
    """Put the student's weights into an engine that was built without them."""
    import onnx

    refitter = trt.Refitter(engine, logger(flavour))
    parser = trt.OnnxParserRefitter(refitter, logger(flavour))
    data, blobs = student.read_graph(graph)
    _need(parser.load_model_proto(data), "read the graph")
    held = load_weights(parser, onnx.load_model_from_string(data), blobs)
    _need(
        parser.refit_model_proto() and refitter.refit_cuda_engine(), f"put the weights of {graph.file} into the engine"
    )
    del held
