"""What an inference engine is to us: it loads a verified graph, and runs it. Two methods, and what it says of itself.

The registry of engines and the choice between them are in `redif_sdk.runtimes`; each engine has one file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.manifest import Graph, StudentFolder

__all__ = ["Runtime", "RuntimeInfo", "parse_device"]

_DEVICE = re.compile(r"(auto|cpu|cuda)(?::(\d{1,4}))?")


@dataclass(frozen=True)
class RuntimeInfo:
    """What computes a graph, as it really is and not as it was asked for."""

    runtime: str
    version: str
    provider: str  # the engine's own name for what runs the nodes
    device: str  # "cpu", "cuda:0"
    precision: str
    component: str
    file: str
    num_threads: int | None  # None: the engine's default


class Runtime(Protocol):
    """A loaded graph. Implementations are safe to run from several threads at once."""

    info: RuntimeInfo

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, *, device: str, num_threads: int | None) -> Self:
        """Read `graph` through `student`, which checks the bytes, and prepare it on `device`.

        Raises RuntimeUnavailable, with reason and remedy, if engine or device cannot be had; never uses another.
        """
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs by name, for its inputs by name."""
        ...


def parse_device(device: str) -> tuple[str, int]:
    """("auto" | "cpu" | "cuda", index) of "auto", "cpu", "cuda" or "cuda:N". InvalidRequest for anything else."""
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None or (match[2] is not None and match[1] != "cuda"):
        raise InvalidRequest(f'device is {device!r}; use "auto", "cpu", "cuda" or "cuda:N"')
    return match[1], int(match[2] or 0)
