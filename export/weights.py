"""Graphs without their weights: a weight is read, folded and cast when it is written, one at a time.

torch's exporter and the optimisers see weights as inputs of the graph, so that nothing they do needs a value. What the
graph computes from weights alone (a matrix transposed for MatMul, say) is then taken out of it, and computed when the
graph is written or filled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from redif_sdk.artifact.untrusted.protobuf import BITS
from redif_sdk.models.hollow import stored

__all__ = ["Content", "LazyModel", "Weight", "lazy_model"]

#: What is left in the graph, though it depends on weights alone.
_KEPT = frozenset({"Loop", "If", "Scan", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})


class Content(Protocol):
    """What makes the value of an initializer."""

    def content(self) -> bytes:
        """The value as ONNX stores it: little-endian, row after row."""


@dataclass(frozen=True)
class Weight:
    """The value of an initializer: a tensor of the module, or what `fold` computes of several.

    Attributes:
        tensors: The module's tensors by their names in the graph. Hollow ones are read and cast when they are needed.
        fold: Computes the value, its only output, from these; None: it is the only tensor.
    """

    tensors: Mapping[str, Tensor]
    fold: onnx.ModelProto | None = None

    def content(self) -> bytes:
        """The value as ONNX stores it: little-endian, row after row."""
        if self.fold is None:
            (tensor,) = self.tensors.values()
            return _bytes(tensor)
        arrays = {name: numpy_helper.to_array(_proto(name, tensor)) for name, tensor in self.tensors.items()}
        (value,) = ReferenceEvaluator(self.fold).run(None, arrays)
        return bytes(numpy_helper.from_array(value).raw_data)


@dataclass(frozen=True)
class LazyModel:
    """An ONNX model, some of whose initializers have no data yet.

    Attributes:
        proto: The model. It may be changed; initializers named in `weights` have dimensions and type alone.
        weights: The values by name.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Content] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all initializers."""
        return sum(
            math.prod(tensor.dims) * BITS.get(tensor.data_type, 0) // 8  # strings have none
            for tensor in _initializers(self.proto.graph)
        )

    def filled(self) -> onnx.ModelProto:
        """A copy with all its weights."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for tensor in _initializers(model.graph):
            if tensor.name in self.weights:
                tensor.raw_data = self.weights[tensor.name].content()
        return model

    def initializers(self) -> Iterator[tuple[onnx.TensorProto, Content | None]]:
        """Every initializer of the model and of its subgraphs, with what makes its data; None: it has them."""
        for tensor in _initializers(self.proto.graph):
            yield tensor, self.weights.get(tensor.name)


def lazy_model(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> LazyModel:
    """The model with the inputs that are named in `tensors` as initializers without data.

    What nodes compute from them alone becomes an initializer too, where it is no larger than what it is made of.

    Args:
        model: A model whose weights are inputs; it is changed.
        tensors: The module's parameters and buffers by name.
    """
    graph = model.graph
    given = {value.name: value for value in graph.input if value.name in tensors}
    folds = _Folds(model, given)
    outputs = {value.name for value in graph.output}
    used = {name for node in folds.kept for name in _reads(node)} | outputs
    made = {name: Weight({name: tensors[name]}) for name in given if name in used}
    made |= {
        name: Weight({part: tensors[part] for part in fold.parts}, fold.model)
        for name, fold in ((name, folds.fold(name)) for name in folds.values if name in used)
    }
    inputs = [value for value in graph.input if value.name not in given]
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    described = [_described(name, folds.types[name]) for name in made]
    for name, values in (("input", inputs), ("node", folds.kept), ("initializer", [*constants, *described])):
        graph.ClearField(name)
        getattr(graph, name).extend(values)
    return LazyModel(model, made)


@dataclass(frozen=True)
class _Fold:
    model: onnx.ModelProto
    parts: list[str]  # the weights that it reads


class _Folds:
    """What a graph computes from weights and constants alone.

    Attributes:
        types: The inferred type of each value.
        kept: The nodes that stay in the graph.
        values: The values that depend on weights alone, with the node that makes each.
    """

    def __init__(self, model: onnx.ModelProto, given: Mapping[str, onnx.ValueInfoProto]) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.types = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input)}
        self._opsets, self._ir_version = model.opset_import, model.ir_version
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._given = given
        self.values: dict[str, onnx.NodeProto] = {}
        self.kept: list[onnx.NodeProto] = []
        for node in map(self._cast, model.graph.node):
            if self._folds(node):
                self.values[node.output[0]] = node
            else:
                self.kept.append(node)

    def _cast(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node, or a Cast for a CastLike that gives a weight the type of an activation."""
        kind = self.types.get(node.input[1]) if node.op_type == "CastLike" else None
        if kind is None or not kind.elem_type or not self._known(node.input[0]):
            return node
        return helper.make_node("Cast", [node.input[0]], list(node.output), name=node.name, to=kind.elem_type)

    def _known(self, name: str) -> bool:
        return any(name in known for known in (self.values, self._given, self._constants))

    def _folds(self, node: onnx.NodeProto) -> bool:
        names = [name for name in node.input if name]
        if node.op_type in _KEPT or len(node.output) != 1 or not all(map(self._known, names)):
            return False
        sources = [name for name in names if name not in self._constants]
        size = self._size(node.output[0])
        return bool(sources) and size is not None and size <= max(self._size(name) or 0 for name in sources)

    def _size(self, name: str) -> int | None:
        """Elements of a value, or None if they are not known."""
        kind = self.types.get(name)
        if kind is None or not kind.HasField("shape") or not kind.elem_type:
            return None
        sides = [side.dim_value if side.HasField("dim_value") else None for side in kind.shape.dim]
        return None if None in sides else math.prod(side for side in sides if side is not None)

    def fold(self, name: str) -> _Fold:
        """The model that computes a value, and the weights that it takes."""
        nodes: list[onnx.NodeProto] = []
        parts: dict[str, None] = {}
        constants: dict[str, onnx.TensorProto] = {}

        def visit(value: str) -> None:
            if value in self._given:
                parts[value] = None
            elif value in self._constants:
                constants[value] = self._constants[value]
            elif value and self.values[value] not in nodes:
                for source in self.values[value].input:
                    visit(source)
                nodes.append(self.values[value])

        visit(name)
        output = helper.make_empty_tensor_value_info(name)
        graph = helper.make_graph(nodes, "weight", [self._given[part] for part in parts], [output])
        graph.initializer.extend(constants.values())
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        return _Fold(model, list(parts))


def _reads(node: onnx.NodeProto) -> Collection[str]:
    """The values that a node reads, those that its subgraphs take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            names |= {name for inner in graph.node for name in _reads(inner)} | {value.name for value in graph.output}
    return names


def _described(name: str, kind: onnx.TypeProto.Tensor) -> TensorProto:
    """An initializer without data."""
    return TensorProto(name=name, data_type=kind.elem_type, dims=[side.dim_value for side in kind.shape.dim])


def _initializers(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _initializers(attribute.g)


_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


def _bytes(value: Tensor) -> bytes:
    """A tensor as ONNX stores it, read here if it is hollow; numpy has no bfloat16."""
    plain = stored(value).detach().to("cpu", value.dtype).contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes()


def _proto(name: str, value: Tensor) -> TensorProto:
    return TensorProto(name=name, data_type=_ONNX_TYPES[value.dtype], dims=list(value.shape), raw_data=_bytes(value))
