"""An engine that needs no engine, for tests of what stands around one: pipelines, servers, applications.

Its network is a formula, so its pictures are noise, but every shape, dtype and dependence is that of a real student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.folder import StudentFolder
from redif_sdk.images import to_uint8
from redif_sdk.manifest import Graph, Manifest
from redif_sdk.runtimes.base import RuntimeInfo, RuntimeOptions, parse_device
from redif_sdk.steps import StepTable, sample

__all__ = ["FakeRuntime", "network"]


def network(x: NDArray[np.float32], t: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """f = tanh(x + label / 8 + t / 1000), (B, C, H, W): bounded, and of every input."""
    shift = t / np.float32(1000)
    if labels is not None:
        shift = shift + labels.astype(np.float32) / np.float32(8)
    result: NDArray[np.float32] = np.tanh(x + shift.astype(np.float32)[:, None, None, None])
    return result


class FakeRuntime:
    """Computes a student's graphs with `network` in place of its weights."""

    def __init__(self, manifest: Manifest, info: RuntimeInfo) -> None:
        self._manifest = manifest
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        if parse_device(options.device)[0] not in ("auto", "cpu"):
            raise RuntimeUnavailable(f'runtime fake has no device {options.device}, and no GPU; use device="cpu"')
        student.read_bytes(graph.file)
        info = RuntimeInfo(
            "fake", "1", "numpy", "cpu", graph.precision, graph.component, graph.file, options.num_threads
        )
        return cls(student.manifest, info)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        labels = inputs.get("class_labels")
        if self.info.component == "denoiser":
            return {"f": network(inputs["sample"], inputs["timestep"], labels)}
        table = StepTable(inputs["table"], "sample", init_scale=float(inputs["init_scale"]))
        latents = sample(network, table, inputs["noise"], labels)
        return {"images": to_uint8(latents, self._manifest.postprocess)}
