"""The parts of NVIDIA's driver and CUDA's runtime that TensorRT needs: finding a GPU, and memory on it.

`find_gpu` asks the driver's library, which needs none of NVIDIA's Python packages. `Cuda` calls the package
cuda-bindings, and raises on every status but success. Written against cuda-bindings 12 and 13;
of it, only what fails without a GPU was run by this project so far.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.runtimes.protocol import nvidia_driver

__all__ = ["Buffer", "Cuda", "Gpu", "find_gpu"]

# CUdevice_attribute of the driver's API
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number as CUDA counts, its name, and its compute capability, 89 for 8.9."""

    index: int
    name: str
    sm: int


class _DriverError(Exception):
    """A call of the driver failed."""


def find_gpu(index: int = 0) -> Gpu | str:
    """The GPU with that index, or the reason why there is none."""
    library = nvidia_driver()
    if library is None:
        return "no libcuda.so.1 or nvcuda.dll"
    driver = _open(library)
    try:
        _ask(driver, "cuInit", 0)
        count = ctypes.c_int()
        _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
        if index >= count.value:
            return f"cuda:{index} was asked for and there are {count.value}"
        device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
        _ask(driver, "cuDeviceGet", ctypes.byref(device), index)
        _ask(driver, "cuDeviceGetName", name, _NAME_BYTES, device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
    except (_DriverError, AttributeError) as error:
        return str(error)
    return Gpu(index, name.value.decode(errors="replace"), 10 * major.value + minor.value)


def _open(library: str) -> Any:
    return ctypes.CDLL(library)


def _ask(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status != 0:
        raise _DriverError(f"{name} gave CUDA error {status}")


class Cuda:
    """CUDA's runtime on one GPU. Threads call `use` before anything else: CUDA's current device is a thread's own."""

    def __init__(self, index: int) -> None:
        try:
            self._api = import_module("cuda.bindings.runtime")
        except Exception as error:  # not ImportError alone: it also looks for the driver's libraries
            raise RuntimeUnavailable(
                f"cuda-bindings, which moves arrays to the GPU, cannot be imported ({error}); pip install cuda-bindings"
            ) from error
        self.index = index
        self.use()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime and return its value or values. Raises RuntimeUnavailable if it fails."""
        status, *values = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            _, text = self._api.cudaGetErrorString(status)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise RuntimeUnavailable(f"{name} failed on cuda:{self.index}: {status.name}, {reason}")
        return values[0] if len(values) == 1 else tuple(values)

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        self.call("cudaSetDevice", self.index)

    def stream(self) -> int:
        """The handle of a new stream that does not wait for the default one. It lives as long as the process."""
        return int(self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def wait(self, stream: int) -> None:
        """Wait until all work of a stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def free_memory(self) -> int:
        """Free bytes of the GPU's memory."""
        return int(self.call("cudaMemGetInfo")[0])

    def to_device(self, buffer: Buffer, size: int, stream: int) -> None:
        """Copy the first `size` bytes of a buffer from the host to the GPU, asynchronously."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", buffer.device, buffer.address, size, kind, stream)

    def to_host(self, buffer: Buffer, size: int, stream: int) -> None:
        """Copy the first `size` bytes of a buffer from the GPU to the host, asynchronously."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", buffer.address, buffer.device, size, kind, stream)


class Buffer:
    """Memory on the GPU, and as much page-locked memory on the host, so that copies between them are asynchronous."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = max(size, 1)
        self.device = int(cuda.call("cudaMalloc", self.size))
        _freed_with(self, cuda, "cudaFree", self.device)
        self.address = int(cuda.call("cudaMallocHost", self.size))
        _freed_with(self, cuda, "cudaFreeHost", self.address)
        self.host: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.address))


def _freed_with(owner: Buffer, cuda: Cuda, name: str, address: int) -> None:
    def free() -> None:
        try:
            cuda.use()
            cuda.call(name, address)
        except RuntimeUnavailable as error:  # nobody to raise it to
            _log.warning("%s", error)

    weakref.finalize(owner, free).atexit = False  # at exit the driver takes all back by itself, and CUDA may be gone
