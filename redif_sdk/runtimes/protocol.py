"""What an inference engine is to us: it loads a verified graph, and runs it. Two methods, and what it says of itself.

The registry of engines and the choice between them are in `redif_sdk.runtimes`; each engine has one file of its own.
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

#: What a device may be called: "cuda" is an NVIDIA GPU, "dml" DirectML, "coreml" Apple's; "gpu" and "npu" are Intel's.
DEVICES = ("cpu", "cuda", "dml", "coreml", "gpu", "npu")
NUMBERED = ("cuda", "dml", "gpu")

_DEVICE = re.compile(r"(auto|%s)(?::(\d{1,4}))?" % "|".join(DEVICES))  # noqa: UP031


@dataclass(frozen=True)
class RuntimeOptions:
    """How a graph is to be run. An engine refuses (InvalidRequest) what means nothing to it; None leaves it the choice.

    `provider`: ONNX Runtime's execution provider by its own name, or the package of a plugin one. `cache_dir`: where
    compiled graphs are kept between processes. `engine_dir`: the folder of TensorRT engines in place of the cache.
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
    """What computes a graph, as it really is and not as it was asked for."""

    runtime: str
    version: str
    provider: str  # the engine's own name for what runs the nodes
    device: str  # "cpu", "cuda:0"
    precision: str  # what it computes in, which is what the graph is in
    component: str
    file: str
    num_threads: int | None  # None: the engine's default


class Runtime(Protocol):
    """A loaded graph. Implementations are safe to run from several threads at once."""

    info: RuntimeInfo

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """Read `graph` through `student`, which checks the bytes, and prepare it as `options` say.

        Raises RuntimeUnavailable, with reason and remedy, if engine, device or precision cannot be had; never uses
        another.
        """
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs by name, for its inputs by name."""
        ...


def parse_device(device: str) -> tuple[str, int]:
    """(kind, index) of "auto", a name of `DEVICES`, or "cuda:N", "dml:N", "gpu:N". InvalidRequest for anything else."""
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None or (match[2] is not None and match[1] not in NUMBERED):
        known = ", ".join(f'"{name}"' for name in ("auto", *DEVICES, *(f"{name}:N" for name in NUMBERED)))
        raise InvalidRequest(f"device is {device!r}; use one of {known}")
    return match[1], int(match[2] or 0)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def nvidia_driver() -> str | None:
    """The library of NVIDIA's driver, if there is one."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return library
    return None
