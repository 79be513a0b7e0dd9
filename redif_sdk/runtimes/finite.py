"""Non-finite images are found, though the fused generator returns uint8, in which NaN and infinity do not show.

Every generator that `redif export` writes holds the images as a float32 tensor before they are clipped and rounded. The
runtimes that read the ONNX file (`with_levels`) return this tensor beside the images, and `FastPipeline` checks it: no
file changes, and the images are computed as before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.errors import NonFiniteOutput

__all__ = ["LEVELS", "require_finite", "with_levels"]

#: The images of a generator before they are clipped, float32 (batch, C, H, W), as `redif_sdk.export.fuse` names them.
LEVELS = "redif.shifted"

_GRAPH, _OUTPUT, _NAME = (
    7,
    12,
    1,
)  # field numbers of onnx.proto: ModelProto.graph, GraphProto.output, ValueInfoProto.name


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data


#: Appended to a model, this declares `LEVELS` as one more output: protobuf merges a field that comes a second time.
_DECLARATION = _field(_GRAPH, _field(_OUTPUT, _field(_NAME, LEVELS.encode())))


def with_levels(model: bytes, graph: Graph) -> tuple[bytes, Graph]:
    """An ONNX `model` and its description; those of a generator that holds `LEVELS` with this as a second output."""
    if graph.component != "generator" or LEVELS.encode() not in model:
        return model, graph
    levels = TensorSpec(name=LEVELS, dtype="float32", shape=["batch", "channels", "image_height", "image_width"])
    return model + _DECLARATION, graph.model_copy(update={"outputs": [*graph.outputs, levels]})


def require_finite(values: NDArray[Any]) -> None:
    """Raise NonFiniteOutput, naming the images, if `values` (B, ...) hold NaN or infinite numbers."""
    finite = np.isfinite(values)
    if not finite.all():
        images = np.flatnonzero(~finite.reshape(len(values), -1).all(1))
        raise NonFiniteOutput([int(image) for image in images], len(values))
