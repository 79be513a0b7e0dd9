"""Weight-only int8 and int4: matrices and convolutions are stored as integers with scales, and computed in float32.

``DequantizeLinear`` gives each weight back where it is used; activations, and everything else, stay float32. int8 has
one scale for each output channel; int4 one for each block of 32 inputs of an output channel (opset 21). Rounding is to
the nearest, symmetric around 0. Weights are read, rounded and written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from redif_sdk.export.weights import Content, LazyModel

__all__ = ["WEIGHT_ONLY", "weight_only"]

#: Bits of a weight, by precision.
WEIGHT_ONLY: Mapping[str, int] = {"int8wo": 8, "int4wo": 4}

BLOCK = 32  # inputs that share a scale in int4
INT4_OPSET = 21  # DequantizeLinear takes int4 and blocks from here on
LEAST = 4096  # elements; smaller weights would save nothing
#: Of a block's largest magnitude, what the largest integer may stand for. The least squared error is taken: rounding
#: finer can be worth clipping.
CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76)

_TYPES = {8: TensorProto.INT8, 4: TensorProto.INT4}


def weight_only(model: LazyModel, precision: str) -> LazyModel:
    """The model with integers for the weights of its matrices and convolutions.

    The first and the last convolution (in a network without any: matrix) stay float32, and so do biases, norms and
    embeddings. In int4, a weight whose inputs are no multiple of `BLOCK` is int8.

    Args:
        model: A float32 model; it is changed.
        precision: "int8wo" or "int4wo".
    """
    bits = WEIGHT_ONLY[precision]
    graph = model.proto.graph
    sizes = {tensor.name: tensor for tensor in graph.initializer}
    found = [node for node in graph.node if _inputs_axis(node) is not None and node.input[1] in model.weights]
    outer = [node for node in found if node.op_type == "Conv"] or found
    kept = {node.input[1] for node in (outer[0], outer[-1])} if outer else set()
    users = {
        name for node in graph.node for place, name in enumerate(node.input) if place != 1 or _inputs_axis(node) is None
    }
    weights: dict[str, Content] = dict(model.weights)
    made: dict[str, onnx.NodeProto] = {}
    for node in found:
        name, axis = node.input[1], _inputs_axis(node)
        assert axis is not None
        shape = tuple(sizes[name].dims)
        if name in kept or name in users or math.prod(shape) < LEAST:
            continue  # a weight that something else reads too stays as it is
        if name not in made:
            quantised = _Quantised(weights.pop(name), shape, axis, bits if bits == 8 or not shape[axis] % BLOCK else 8)
            made[name] = quantised.put_into(graph, sizes[name], weights)
    nodes = [*made.values(), *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
    for opset in model.proto.opset_import:
        if bits == 4 and not opset.domain:
            opset.version = max(opset.version, INT4_OPSET)
    return LazyModel(model.proto, weights)


def _inputs_axis(node: onnx.NodeProto) -> int | None:
    """The axis of a node's weight along which it is summed; None for other operators."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "MatMul":
        return 0
    if node.op_type == "Gemm":
        return int(any(attribute.name == "transB" and attribute.i for attribute in node.attribute))
    return None


class _Quantised:
    """A weight as integers and scales, both made when the first of them is written.

    Args:
        source: What makes the float32 weight.
        shape: Of the weight.
        axis: The axis of the inputs.
        bits: 8 or 4.
    """

    def __init__(self, source: Content, shape: tuple[int, ...], axis: int, bits: int) -> None:
        self.source = source
        self.shape = shape
        self.axis = axis
        self.bits = bits
        self._left: dict[str, bytes] = {}

    def put_into(self, graph: onnx.GraphProto, tensor: onnx.TensorProto, weights: dict[str, Content]) -> onnx.NodeProto:
        """Describe both tensors in `graph` in place of `tensor`; returns the node that gives its name back."""
        name = tensor.name
        integers, scales = f"{name}_int{self.bits}", f"{name}_scale"
        if self.bits == 8:
            channels = 0 if self.axis else len(self.shape) - 1  # of a matrix of inputs x outputs the last one
            described, attributes = [self.shape[channels]], {"axis": channels}
        else:
            described = [*self.shape]
            described[self.axis] //= BLOCK
            attributes = {"axis": self.axis, "block_size": BLOCK}
        tensor.name, tensor.data_type = integers, _TYPES[self.bits]
        graph.initializer.append(TensorProto(name=scales, data_type=TensorProto.FLOAT, dims=described))
        weights |= {integers: _Part(self.part, "integers"), scales: _Part(self.part, "scales")}
        return helper.make_node(
            "DequantizeLinear", [integers, scales], [name], name=f"{name}/DequantizeLinear", **attributes
        )

    def part(self, which: str) -> bytes:
        """The integers or the scales. Both are held from the first call to the second, and made anew for a third."""
        if which not in self._left:
            weight = np.frombuffer(self.source.content(), np.float32).reshape(self.shape)
            integers, scales = _by_channel(weight, self.axis) if self.bits == 8 else _by_block(weight, self.axis)
            self._left = {"integers": _packed(integers, self.bits), "scales": scales.tobytes()}
        return self._left.pop(which)


@dataclass(frozen=True)
class _Part:
    make: Callable[[str], bytes] = field(repr=False)
    which: str

    def content(self) -> bytes:
        return self.make(self.which)


def _by_channel(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers of -127 to 127, and a scale for each output channel."""
    channels = 0 if axis else weight.ndim - 1
    others = tuple(place for place in range(weight.ndim) if place != channels)
    scales = _scale(np.abs(weight).max(others, keepdims=True), 127)
    return np.rint(weight / scales).astype(np.int8), scales.ravel()


def _by_block(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers of -7 to 7, and a scale for each block of `BLOCK` along `axis`, clipped to the least squared error."""
    shape = weight.shape
    blocks = weight.reshape(*shape[:axis], shape[axis] // BLOCK, BLOCK, *shape[axis + 1 :])
    within = axis + 1
    largest = np.abs(blocks).max(within, keepdims=True)
    best, least = largest, np.full(largest.shape, np.inf, np.float32)
    for clip in CLIPS:
        scales = _scale(largest * np.float32(clip), 7)
        rounded = np.clip(np.rint(blocks / scales), -7, 7) * scales
        error = np.square(blocks - rounded).sum(within, keepdims=True)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    integers = np.clip(np.rint(blocks / best), -7, 7).astype(np.int8).reshape(shape)
    return integers, np.ascontiguousarray(best.squeeze(within))


def _scale(largest: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    """What 1 stands for, so that `top` stands for the largest magnitude; 1 where all are 0."""
    return np.where(largest > 0, largest / np.float32(top), np.float32(1)).astype(np.float32)


def _packed(integers: NDArray[np.int8], bits: int) -> bytes:
    """As ONNX stores them: of two int4 in a byte the first is in the low half."""
    if bits == 8:
        return integers.tobytes()
    flat = (integers.ravel() & 0xF).view(np.uint8)
    return (flat[0::2] | flat[1::2] << 4).tobytes()
