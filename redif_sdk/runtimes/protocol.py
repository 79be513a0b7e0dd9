"""The runtime protocol, and helpers that all runtimes share.

The registry of engines and the choice between them are in `redif_sdk.runtimes`; each engine has a file of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Graph
from redif_sdk.errors import InvalidRequest

__all__ = [
    "DEVICES",
    "Runtime",
    "RuntimeInfo",
    "RuntimeOptions",
    "cores",
    "nvidia_driver",
    "parse_device",
]

#: Kinds of device: "cuda" is an NVIDIA GPU, "dml" DirectML, "coreml" Apple's; "gpu" and "npu" are Intel's.
DEVICES = ("cpu", "cuda", "dml", "coreml", "gpu", "npu")
NUMBERED = ("cuda", "dml", "gpu")

_DEVICE = re.compile(r"(auto|%s)(?::(\d{1,4}))?" % "|".join(DEVICES))  # noqa: UP031


@dataclass(frozen=True)
class RuntimeOptions:
    """How a graph is run. An engine raises InvalidRequest for an option that it does not support.

    Attributes:
        device: "auto", a kind of `DEVICES`, or "cuda:N", "dml:N", "gpu:N".
        num_threads: Threads on a CPU; None: the engine's default.
        provider: ONNX Runtime's execution provider by its own name, or the package of a plugin provider.
        cache_dir: Where compiled graphs are kept; None: see `redif_sdk.cache.cache_folder`.
        engine_dir: The folder of TensorRT engines; None: the cache.
    """

    device: str = "auto"
    num_threads: int | None = None
    provider: str | None = None
    cache_dir: Path | None = None
    engine_dir: Path | None = None

    def __post_init__(self) -> None:
        parse_device(self.device)
        threads = self.num_threads
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InvalidRequest(f"num_threads is {threads!r}; give at least 1, or None for the engine's default")


@dataclass(frozen=True)
class RuntimeInfo:
    """What really computes a graph, as opposed to what was requested."""

    runtime: str
    version: str
    provider: str  # the engine's own name for what runs the nodes
    device: str  # "cpu", "cuda:0"
    precision: str  # of the graph, and so of its arithmetic
    component: str
    file: str
    num_threads: int | None  # None: the engine's default


class Runtime(Protocol):
    """A loaded graph. Implementations are safe to run from several threads at once."""

    info: RuntimeInfo

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """Read `graph` through `student`, which checks its bytes, and prepare it.

        Raises:
            RuntimeUnavailable: The engine, device or precision is not available, with reason and remedy. No other is
                used instead.
        """
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs by name, for its inputs by name."""
        ...


def parse_device(device: str) -> tuple[str, int]:
    """(kind, index) of a device: "auto", a kind of `DEVICES`, or "cuda:N", "dml:N", "gpu:N".

    Raises:
        InvalidRequest: Any other device.
    """
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None or (match[2] is not None and match[1] not in NUMBERED):
        known = ", ".join(f'"{name}"' for name in ("auto", *DEVICES, *(f"{name}:N" for name in NUMBERED)))
        raise InvalidRequest(f"device is {device!r}; use one of {known}")
    return match[1], int(match[2] or 0)


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def nvidia_driver() -> str | None:
    """The file name of NVIDIA's driver library, or None where there is no driver."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return library
    return None
