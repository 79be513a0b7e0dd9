"""ONNX Runtime, on the CPU or an NVIDIA GPU.

ONNX Runtime by itself falls back to the CPU with no more than a line in the log; here what was asked for runs, or an
error says why not. Graphs come as verified bytes, with the files of large weights as further bytes, never as paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Self

from numpy.typing import NDArray

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.manifest import Graph, StudentFolder
from redif_sdk.runtimes.base import RuntimeInfo, parse_device

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ImportError as error:  # not installed, or one of the two packages removed the other's files
    raise RuntimeUnavailable(
        f'onnxruntime cannot be imported ({error}); pip install "redif-sdk[cpu]", or "redif-sdk[gpu]" for NVIDIA GPUs'
    ) from error

__all__ = ["DEVICES", "PROBE", "VERSION", "OnnxRuntime", "usable"]

VERSION: str = onnxruntime.__version__
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
DEVICES = {CPU: "cpu", CUDA: "cuda"}

# Its errors share no base class but Exception.
ENGINE_ERRORS: tuple[type[Exception], ...] = (
    *(value for value in vars(_state).values() if isinstance(value, type) and issubclass(value, Exception)),
    RuntimeError,
    ValueError,
)

#: The smallest graph, y = x + x, to find out what really works: what the library says of itself is not reliable.
PROBE = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def _session(model: bytes, provider: str, index: int, options: Any) -> Any:
    """A session of which `provider` runs every node. Raises RuntimeUnavailable."""
    device = "the CPU" if provider == CPU else f"{DEVICES[provider]}:{index}"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(
            f"the installed onnxruntime {VERSION} has no {provider}; pip uninstall onnxruntime, then "
            f'pip install "redif-sdk[gpu]" (the two packages overwrite each other)'
        )
    if provider == CPU:
        providers: list[Any] = [CPU]
    else:
        providers = [(provider, {"device_id": index})]
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except ENGINE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise RuntimeUnavailable(f"onnxruntime cannot run this on {device}: {reason}; see redif doctor") from error
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailable(
            f"onnxruntime took {session.get_providers()[0]} in place of {provider}; see redif doctor for the reason"
        )
    return session


@cache
def usable(provider: str, index: int = 0) -> str | None:
    """None if `provider` runs a small graph here, else the reason why not."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        _session(PROBE, provider, index, options)
    except RuntimeUnavailable as error:
        return str(error)
    return None


class OnnxRuntime:
    """A graph in ONNX Runtime. `run` may be called from several threads."""

    def __init__(self, session: Any, info: RuntimeInfo) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, *, device: str, num_threads: int | None) -> Self:
        kind, index = parse_device(device)
        if kind == "auto":
            have_gpu = CUDA in onnxruntime.get_available_providers() and usable(CUDA) is None
            kind = "cuda" if have_gpu else "cpu"
        provider = CUDA if kind == "cuda" else CPU
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        if graph.data:
            # The graph names its data files relative to itself; the engine takes them from these bytes, not from disk.
            blobs = [student.read(path) for path in graph.data]
            names = [PurePosixPath(path).name for path in graph.data]
            options.add_external_initializers_from_files_in_memory(names, blobs, [len(blob) for blob in blobs])
        session = _session(student.read(graph.file), provider, index, options)
        info = RuntimeInfo(
            runtime="onnxruntime",
            version=VERSION,
            provider=provider,
            device="cpu" if kind == "cpu" else f"cuda:{index}",
            precision=graph.precision,
            component=graph.component,
            file=graph.file,
            num_threads=num_threads,
        )
        return cls(session, info)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except ENGINE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise RuntimeUnavailable(
                f"onnxruntime failed in {self.info.file} on {self.info.device}: {reason}"
            ) from error
        return dict(zip(self._outputs, outputs, strict=True))
