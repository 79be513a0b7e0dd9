"""Classifier-free guidance inside a denoiser's graph: a row for each network call, and the mix of the two of an image.

It is added to the ONNX graph, since torch.export cannot gather rows of a free batch axis through diffusers' networks.
What the inputs are is said in `redif_sdk.runtimes.guided`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from redif_sdk.artifact.manifest import GUIDANCE_ROWS, GUIDANCE_SCALE, MASK_LATENTS, MASKED_LATENTS, NULL_ROWS
from redif_sdk.artifact.records import TensorSpec

__all__ = ["add_guidance"]

_DTYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


def add_guidance(model: onnx.ModelProto, conditions: Sequence[TensorSpec]) -> None:
    """Add guidance to a denoiser's graph, whose batch becomes one of rows.

    Args:
        model: The denoiser: sample, timestep and conditions -> f. It is changed.
        conditions: The inputs that it has afterwards beside sample and timestep.
    """
    graph, make = model.graph, onnx.helper.make_node
    images = ["sample", "timestep", *(spec.name for spec in conditions if spec.name in (MASK_LATENTS, MASKED_LATENTS))]
    for node in graph.node:
        for name in (*images, "f"):
            rename(node, name, f"{name}_by_rows")
    constants = {"guidance_first": np.array([0], np.int64), "guidance_axes": np.array([1, 2, 3], np.int64)}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    before = [make("Gather", [name, GUIDANCE_ROWS], [f"{name}_by_rows"], axis=0) for name in images]
    after = [
        make("Shape", [NULL_ROWS], ["guidance_batch"]),
        make("Slice", ["f_by_rows", "guidance_first", "guidance_batch", "guidance_first"], ["f_asked"]),
        make("Gather", ["f_by_rows", NULL_ROWS], ["f_unasked"], axis=0),
        make("Sub", ["f_asked", "f_unasked"], ["f_difference"]),
        make("Unsqueeze", [GUIDANCE_SCALE, "guidance_axes"], ["guidance_scales"]),
        make("Mul", ["f_difference", "guidance_scales"], ["f_guidance"]),
        make("Add", ["f_unasked", "f_guidance"], ["f"]),
    ]
    nodes = [*before, *graph.node, *after]
    graph.ClearField("node")
    graph.node.extend(nodes)
    del graph.input[2:]
    graph.input.extend(onnx.helper.make_tensor_value_info(s.name, _DTYPES[s.dtype], s.shape) for s in conditions)


def rename(node: onnx.NodeProto, old: str, new: str) -> None:
    """Give a value another name in one node's inputs and outputs."""
    for side in (node.input, node.output):
        for index, name in enumerate(side):
            if name == old:
                side[index] = new
