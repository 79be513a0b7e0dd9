"""Classifier-free guidance inside a denoiser's graph: each image once with and once without its condition, and the mix.

It is added to the ONNX graph, since torch.export cannot double a free batch axis through diffusers' networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from redif_sdk.artifact.records import Guidance

__all__ = ["add_guidance"]


def add_guidance(model: onnx.ModelProto, guidance: Guidance, nulls: Mapping[str, NDArray[Any]]) -> None:
    """Add guidance to a denoiser's graph: double the batch, give the second half the null condition, mix the halves.

    `nulls`: the null condition by the names of the condition's inputs, each for one image: (1, ...). They become
    constants of the graph.
    """
    graph, make = model.graph, onnx.helper.make_node
    names = [value.name for value in graph.input]
    for node in graph.node:
        for old in names:
            rename(node, old, f"{old}_twice")
        rename(node, "f", "f_twice")
    constants = {f"guidance_null.{name}": value for name, value in nulls.items()}
    constants["guidance_scale"] = np.array(guidance.scale, np.float32)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    before = []
    for name in nulls:
        before += [
            make("Shape", [name], [f"guidance_shape.{name}"]),
            make("Expand", [f"guidance_null.{name}", f"guidance_shape.{name}"], [f"guidance_nulls.{name}"]),
        ]
    for name in names:
        second = f"guidance_nulls.{name}" if name in nulls else name
        before.append(make("Concat", [name, second], [f"{name}_twice"], axis=0))
    after = [
        make("Split", ["f_twice"], ["f_asked", "f_unasked"], axis=0, num_outputs=2),
        make("Sub", ["f_asked", "f_unasked"], ["f_difference"]),
        make("Mul", ["f_difference", "guidance_scale"], ["f_guidance"]),
        make("Add", ["f_unasked", "f_guidance"], ["f"]),
    ]
    nodes = [*before, *graph.node, *after]
    graph.ClearField("node")
    graph.node.extend(nodes)


def rename(node: onnx.NodeProto, old: str, new: str) -> None:
    """Give a value another name in one node's inputs and outputs."""
    for side in (node.input, node.output):
        for index, name in enumerate(side):
            if name == old:
                side[index] = new
