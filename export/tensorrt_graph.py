"""Refuses ONNX graphs that TensorRT cannot build, with a reason, before minutes are spent on them.

The refusals were observed with TensorRT-RTX 1.7. Nothing here needs TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto

from redif_sdk.errors import ExportError

__all__ = ["OPSETS", "refuse_opset", "refuse_rtx"]

#: The opsets that TensorRT's parser is documented for.
OPSETS = range(9, 26)

_PRODUCTS = ("MatMul", "Gemm", "Einsum")
_LEAST_HEAD = 16  # channels of an attention head for which TensorRT-RTX has kernels
_TURING = 75


def refuse_opset(model: onnx.ModelProto, file: str) -> None:
    """Raise ExportError for an opset that TensorRT's parser does not document."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise ExportError(
            f"{file} is of opset {opset}; TensorRT reads {OPSETS[0]} to {OPSETS[-1]}: export the student again"
        )


def refuse_rtx(model: onnx.ModelProto, file: str, targets: Sequence[int]) -> None:
    """Raise ExportError, naming the node, if TensorRT-RTX has no kernel for it on `targets` (compute capabilities)."""
    turing = _TURING in targets
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"the shapes of {file} are inconsistent: {' '.join(str(error).split())}; export it again"
        ) from error
    for node, values in _walk(inferred, {}):
        types = [values[name].elem_type for name in node.input if name in values]
        reason = None
        if turing and node.op_type in _PRODUCTS and TensorProto.FLOAT in types:
            reason = (
                f"multiplies matrices in fp32 and sm {_TURING} cannot; use --precision fp16, or leave that target out"
            )
        elif turing and TensorProto.BFLOAT16 in types:
            reason = f"computes in bf16 and sm {_TURING} cannot; use --precision fp16, or leave that target out"
        elif node.op_type == "DequantizeLinear" and _blocked_inside(node, values):
            reason = "rounds the weights of a convolution in blocks of channels, which it cannot read; use int8wo"
        elif node.op_type == "Loop" and _holds_rounded_weights(node):
            reason = "is a loop around weights that are rounded, on which its compiler fails; name --component denoiser"
        elif node.op_type == "Attention" and TensorProto.FLOAT in types:
            reason = "is attention in fp32, for which there is no kernel; export it at opset 20, which decomposes it"
        elif node.op_type == "Attention" and _head(node, values) < _LEAST_HEAD:
            reason = f"is attention with heads of fewer than {_LEAST_HEAD} channels; export it at opset 20"
        if reason is not None:
            raise ExportError(f"tensorrt-rtx cannot build {file}: node {node.name} ({node.op_type}) {reason}")


def _walk(graph: onnx.GraphProto, outer: Mapping[str, Any]) -> Iterator[tuple[onnx.NodeProto, Mapping[str, Any]]]:
    """Every node, those in loops and branches too, with the types (TypeProto.Tensor) of the values that it can see."""
    values = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        values[value.name] = value.type.tensor_type
    for tensor in graph.initializer:
        values[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    for node in graph.node:
        yield node, values
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _walk(inner, values)


def _blocked_inside(node: onnx.NodeProto, values: Mapping[str, Any]) -> bool:
    """Whether blocks lie along an axis before the last two."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    rank = len(values[node.input[0]].shape.dim) if node.input[0] in values else 0
    return attributes.get("block_size", 0) > 0 and attributes.get("axis", 1) % max(rank, 1) < rank - 2


def _holds_rounded_weights(node: onnx.NodeProto) -> bool:
    """Whether in the body of a loop weights alone are rounded, not activations."""
    (body,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
    kinds = {inner.op_type for inner in body.node}
    return "DequantizeLinear" in kinds and "QuantizeLinear" not in kinds


def _head(node: onnx.NodeProto, values: Mapping[str, Any]) -> float:
    """Channels of one head of an Attention node; infinite where the graph does not say."""
    sizes = [dim.dim_value for dim in values[node.input[0]].shape.dim] if node.input[0] in values else []
    heads = next((value.i for value in node.attribute if value.name == "q_num_heads"), 1)
    return sizes[-1] / (heads if len(sizes) == 3 else 1) if sizes and sizes[-1] else math.inf
