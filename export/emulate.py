"""Emulates a bfloat16 graph in fp32, with rounding after every node.

The hardware does the same: products and sums in fp32, results in bfloat16. It lets the parity gate check bfloat16
graphs where no engine computes bfloat16; it is slower than fp32. Needs onnx, no torch.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["emulate"]


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in fp32 with a rounding to bfloat16 after each node whose result was bfloat16."""
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    result = onnx.ModelProto()
    result.CopyFrom(typed)
    _rewrite(result.graph)
    return result


def _rewrite(graph: onnx.GraphProto) -> None:
    in_bf16 = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            in_bf16.add(value.name)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            in_bf16.add(tensor.name)
            value = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rewrite(attribute.g)
        if node.op_type == "Cast" and node.output[0] in in_bf16:
            next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in in_bf16:
                exact, rounded = f"{name}.exact", f"{name}.bf16"
                node.output[index] = exact
                nodes.append(helper.make_node("Cast", [exact], [rounded], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("value_info")
