"""Untrusted ONNX graphs, checked before an engine reads them: `check_graph`. Needs neither onnx nor an engine.

The bytes are read once or twice from front to back, without the weights. They are refused unless they are one whole
model of standard operators without side effects, whose tensors have the sizes of their bytes, whose data files are the
manifest's, and whose inputs and outputs are the manifest's.

What this cannot bound: a graph is a program. Literal shapes are bounded, and shapes computed from constants alone,
which an engine would compute while it loads, are refused; but a shape that depends on an input grows by every literal
that it is multiplied with, two large tensors broadcast or multiplied make a larger one, a loop may double what it
carries, and `Concat` and 200,000 nodes add up. Limit the memory and the time of a process that runs untrusted graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.artifact.untrusted.protobuf import (
    AGAIN,
    BITS,
    LITERALS,
    Attribute,
    Reader,
    RefusalError,
    Tensor,
    Value,
    fields,
    quote,
    table,
)
from redif_sdk.errors import IntegrityError

__all__ = ["OPERATORS", "check_graph"]

_OPERATORS = """
    Abs Add And ArgMax ArgMin Attention AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear
    Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization MatMul MatMulInteger Max
    MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearConv QLinearMatMul
    QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round ScatterElements ScatterND
    Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan
    Tanh Tile Transpose Trilu Unsqueeze Where Xor
"""

#: The operators that graphs may use: pure functions of tensors, whose outputs' sizes follow from their inputs' sizes or
#: from an input that is checked. Nothing random, no strings, sequences or optionals, no sizes that depend on values
#: (NonZero, Unique, Compress), and of control flow Loop alone.
OPERATORS = frozenset(_OPERATORS.split())

OPSETS = range(13, 29)  # in these the inputs that give shapes stand where `_SHAPES` says
MOST_NODES = 200_000
MOST_ENTRIES = 500_000  # nodes, tensors, inputs, outputs and declared values
MOST_GIVEN = 64  # numbers that give a shape, or are a Constant without being a tensor
MOST_PARTS = 65_536  # inputs, outputs and attributes of a node with their numbers; inputs and outputs of a graph
MOST_ATTRIBUTES = 1_000  # of a node
LARGEST_GROWTH = 1 << 28  # elements that a literal may ask for
LARGEST_FACTOR = 1 << 31  # of a literal in integer arithmetic
LARGEST_PAD = 65_536
LARGEST_SCALE = 64
MOST_TRIPS = 1_000

_IR_VERSIONS = range(4, 33)  # before 4, every initializer was an input
_DOMAINS = ("", "ai.onnx")
_DTYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
_INTEGERS = (6, 7)

_MODEL = table(
    "ir_version 1 varint, graph 7 span, *opset_import 8 span, !training_info 20 span, !functions 25 span,"
    "!configuration 26 span"
)
_OPSET = table("domain 1 span, version 2 varint")
_GRAPH = table(
    "*node 1 span, *initializer 5 span, *input 11 span, *output 12 span, *value_info 13 span,"
    "!quantization_annotation 14 span, !sparse_initializer 15 span"
)
_NODES = table("*node 1 span")  # of a graph: counted first, and read after the rest, which they refer to
_NODE = table(
    "*input 1 span, *output 2 span, name 3 span, op_type 4 span, *attribute 5 span, domain 7 span, overload 8 span,"
    "!device_configurations 10 span"
)


def check_graph(model: bytes, graph: Graph, data_sizes: Mapping[str, int], where: str) -> None:
    """Check the bytes of an ONNX model.

    Args:
        model: The bytes.
        graph: The manifest's description of it.
        data_sizes: Bytes of each data file, by the file's name.
        where: Names the file in errors.

    Raises:
        IntegrityError: It is not a graph that an engine may be given.
    """
    try:
        _Checker(model, data_sizes).check(graph)
    except RefusalError as error:
        raise IntegrityError(f"{where}: {error}") from None


def _elements(values: list[float]) -> bool:
    count: float = 1
    for value in values:
        count *= max(abs(value), 1)
        if not count <= LARGEST_GROWTH:  # at once, and so for NaN
            return False
    return True


def _padding(values: list[float]) -> bool:
    half = len(values) // 2
    added = [1 + abs(begin) + abs(end) for begin, end in zip(values[:half], values[half:], strict=False)]
    return all(abs(value) <= LARGEST_PAD for value in values) and _elements(added)


def _scales(values: list[float]) -> bool:
    return all(0 <= value <= LARGEST_SCALE for value in values)


def _trips(values: list[float]) -> bool:
    return max(values) <= MOST_TRIPS


#: Operators that grow a tensor, or repeat: the inputs that say by how much, and what they may say.
_SHAPES: dict[str, tuple[tuple[int, Callable[[list[float]], bool]], ...]] = {
    "ConstantOfShape": ((0, _elements),),
    "Expand": ((1, _elements),),
    "Loop": ((0, _trips),),
    "Pad": ((1, _padding),),
    "Resize": ((2, _scales), (3, _elements)),
    "Tile": ((1, _elements),),
}
_WINDOWS = frozenset({"dilations", "kernel_shape", "output_padding", "output_shape", "pads", "strides"})
_CASTS = frozenset({"dtype", "output_dtype", "to"})
_ARITHMETIC = frozenset({"Add", "Concat", "Div", "Mul", "Pow", "Sub"})

# What a Constant may be: the kind of the attribute, and the type of its numbers.
_CONSTANTS = {
    "value": ("t", 0),
    "value_float": ("f", 1),
    "value_floats": ("floats", 1),
    "value_int": ("i", 7),
    "value_ints": ("ints", 7),
}


class _Scope:
    """The values that a graph's nodes see. Each is a `Tensor`, True for computed from constants alone, or False."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.values: dict[str, Tensor | bool] = {}
        self.outer = {} if outer is None else outer.values
        self.is_main = outer is None

    def declare(self, name: str, value: Tensor | bool) -> None:
        if not name or name in self.values or name in self.outer:
            raise RefusalError(f"there are two values of the name {quote(name)}, or it is none")
        self.values[name] = value

    def find(self, name: str, user: _Node | None) -> Tensor | bool:
        value = self.values.get(name)
        if value is None:
            value = self.outer.get(name)
            if value is None:
                who = "an output" if user is None else user.who
                raise RefusalError(f"{who} uses {quote(name)}, which nothing before it makes", AGAIN)
        return value


class _Node:
    """A node, read but not yet judged. `who` names it in errors."""

    __slots__ = ("attributes", "domain", "inputs", "kind", "name", "outputs", "overload")

    def __init__(self, reader: Reader, start: int, stop: int) -> None:
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.attributes: dict[str, Attribute] = {}
        self.name = self.kind = self.domain = self.overload = ""
        parts = 0
        text = reader.text
        for field, value, end in fields(reader.data, start, stop, _NODE):
            parts += 1
            if field == "input":
                self.inputs.append(text(value, end))
            elif field == "output":
                self.outputs.append(text(value, end))
            elif field == "attribute":
                attribute = reader.attribute(value, end)
                parts += len(attribute.numbers)
                if attribute.name in self.attributes:
                    raise RefusalError(f"{self.who} has two attributes of the name {quote(attribute.name)}")
                self.attributes[attribute.name] = attribute
            elif field == "name":
                self.name = text(value, end)
            elif field == "op_type":
                self.kind = text(value, end)
            elif field == "domain":
                self.domain = text(value, end)
            else:
                self.overload = text(value, end)
            if parts > MOST_PARTS or len(self.attributes) > MOST_ATTRIBUTES:
                raise RefusalError(f"{self.who} has more than {MOST_PARTS} parts or {MOST_ATTRIBUTES} attributes")

    @property
    def who(self) -> str:
        return f"the node {quote(self.name)} ({quote(self.kind)})"


class _Checker:
    """One model. The methods raise RefusalError."""

    def __init__(self, data: bytes, data_sizes: Mapping[str, int]) -> None:
        self.data = data
        self.reader = Reader(data, data_sizes)
        self.nodes = 0
        self.entries = 0
        self.given: dict[tuple[int, int], list[float]] = {}  # literals that give shapes
        self.bounded: dict[tuple[int, int], bool] = {}  # integer literals seen in arithmetic

    def check(self, graph: Graph) -> None:
        version, opset, main = 0, None, None
        for field, value, stop in fields(self.data, 0, len(self.data), _MODEL):
            if field == "graph":
                main = (value, stop)
            elif field == "ir_version":
                version = value
            elif opset is not None:
                raise RefusalError("it imports more than one set of operators")
            else:
                opset = self.opset(value, stop)
        if main is None or version not in _IR_VERSIONS:
            what = "it has no graph" if main is None else f"its ir_version is {version}"
            raise RefusalError(f"it is no ONNX model that this release reads: {what}")
        if opset != graph.opset or opset not in OPSETS:
            listed = f"the manifest says {graph.opset}; this release takes {OPSETS[0]} to {OPSETS[-1]}"
            raise RefusalError(f"its opset is {opset}, {listed}", AGAIN)
        inputs, outputs = self.graph(*main, _Scope())
        _compare("inputs", inputs, graph.inputs)
        _compare("outputs", outputs, graph.outputs)
        if unused := sorted(set(self.reader.data_sizes) - self.reader.used):
            raise RefusalError(f"none of its tensors is in {quote(unused[0])}, which the manifest lists", AGAIN)

    def opset(self, start: int, stop: int) -> int:
        """The version of the one set of operators that is taken."""
        domain, version = "", 0
        for field, value, end in fields(self.data, start, stop, _OPSET):
            if field == "domain":
                domain = self.reader.text(value, end)
            else:
                version = value
        if domain not in _DOMAINS:
            raise RefusalError(f"it uses operators of the domain {quote(domain)}, and only ONNX's own are taken")
        return version

    def graph(
        self, start: int, stop: int, scope: _Scope, carried: list[bool] | None = None
    ) -> tuple[list[Value], list[Value]]:
        """Check a graph and return its inputs and outputs. `carried`, of a loop's body: which inputs are constants."""
        reader = self.reader
        inputs: list[Value] = []
        outputs: list[Value] = []
        for field, value, end in fields(self.data, start, stop, _GRAPH):
            self.entries += 1
            if field == "node":
                self.nodes += 1
            elif field == "initializer":
                scope.declare(*reader.tensor(value, end, "", external=scope.is_main))
            elif field == "input":
                constant = carried is not None and (len(inputs) >= len(carried) or carried[len(inputs)])
                inputs.append(reader.value(value, end))
                scope.declare(inputs[-1].name, constant)
            elif field == "output":
                outputs.append(reader.value(value, end))
            else:
                reader.value(value, end)
            if self.entries > MOST_ENTRIES or self.nodes > MOST_NODES:
                raise RefusalError(f"it has more than {MOST_NODES} nodes, or {MOST_ENTRIES} of all")
            if len(inputs) + len(outputs) > MOST_PARTS:
                raise RefusalError(f"a graph has more than {MOST_PARTS} inputs and outputs")
        for _, value, end in fields(self.data, start, stop, _NODES):
            self.node(_Node(reader, value, end), scope)
        for output in outputs:
            scope.find(output.name, None)
        return inputs, outputs

    def node(self, node: _Node, scope: _Scope) -> None:
        """Judge a node, and declare what it makes."""
        kind = node.kind
        if node.domain not in _DOMAINS or node.overload:
            raise RefusalError(f"{node.who} is of the domain {quote(node.domain)}, overload {quote(node.overload)}")
        if kind not in OPERATORS:
            raise RefusalError(f"{node.who} is of an operator that this release does not take (SECURITY.md says why)")
        operands = [scope.find(name, node) if name else None for name in node.inputs]
        made: Tensor | bool = False not in operands
        for attribute in node.attributes.values():
            made = self.attribute(node, attribute) or made
        if kind in _SHAPES:
            self.growth(node, operands)
        elif kind == "Range":
            self.range(node, operands)
        elif kind in _ARITHMETIC and not all(map(self.small, operands)):
            raise RefusalError(f"{node.who} computes with an integer literal that exceeds {LARGEST_FACTOR}")
        elif kind == "Identity" and operands:
            made = operands[0] or False
        elif kind == "Constant" and not (len(node.attributes) == 1 and isinstance(made, Tensor)):
            raise RefusalError(f"{node.who} has not one value of a kind that this release takes")
        if kind == "Loop":
            made = self.loop(node, operands, scope) and made
        for name in node.outputs:
            if name:
                scope.declare(name, made)

    def attribute(self, node: _Node, attribute: Attribute) -> Tensor | None:
        """Check a node's attribute; what it is worth, if it is a Constant's."""
        name, kind, numbers, span = attribute
        if kind == "g" and (node.kind, name) != ("Loop", "body"):
            raise RefusalError(f"{node.who} has a graph, {quote(name)}, that is no loop's body")
        if name in _WINDOWS and not (_padding if name == "pads" else _elements)(numbers):
            raise RefusalError(f"{node.who} has {name} that are too large, {str(numbers)[:100]}")
        if name in _CASTS and any(to and to not in BITS for to in numbers):
            raise RefusalError(f"{node.who} makes a tensor of element type {str(numbers)[:20]}, which is not taken")
        tensor = self.reader.tensor(*span, f"the tensor of {node.who}", external=False)[1] if kind == "t" else None
        said, element = _CONSTANTS.get(name, ("", 0))
        if node.kind != "Constant" or kind != said or len(numbers) > MOST_GIVEN:
            return None
        return tensor or Tensor(element, len(numbers), numbers=tuple(numbers))

    def loop(self, node: _Node, operands: list[Tensor | bool | None], scope: _Scope) -> bool:
        """Check a Loop's body; whether all that it makes is computed from constants.

        The body's counter and condition count as constants: no input of the graph decides them.
        """
        if not node.inputs or not node.inputs[0]:
            raise RefusalError(f"{node.who} has no number of trips, so nothing ends it")
        body = node.attributes.get("body")
        if body is None or body.kind != "g":
            raise RefusalError(f"{node.who} has no body")
        if not scope.is_main:
            raise RefusalError(f"{node.who} is in another loop, and this release takes no loop within a loop")
        inner = _Scope(scope)
        _, outputs = self.graph(*body.span, inner, [True, True, *(value is not False for value in operands[2:])])
        return all(inner.find(output.name, None) is not False for output in outputs)

    def growth(self, node: _Node, operands: list[Tensor | bool | None]) -> None:
        """Refuse a node whose literals, or values computed from literals, make its output too large."""
        for index, allowed in _SHAPES[node.kind]:
            values = self.literal(node, operands[index]) if index < len(operands) else None
            if values and not allowed(values):
                raise RefusalError(f"{node.who} makes a tensor that is too large, by the literal {str(values)[:100]}")

    def range(self, node: _Node, operands: list[Tensor | bool | None]) -> None:
        """Refuse a Range of too many elements, as far as its literals say."""
        said = [self.literal(node, operand) for operand in operands]
        if len(said) != 3:
            raise RefusalError(f"{node.who} has {len(said)} inputs and should have 3")
        start, limit, delta = (values[0] if values else None for values in said)
        way = max(abs(start or 0), abs(limit or 0)) if start is None or limit is None else abs(limit - start)
        step = 1 if delta is None else abs(delta)
        if way > LARGEST_GROWTH * step or step * LARGEST_PAD < 1:
            raise RefusalError(f"{node.who} makes a tensor that is too large, by the literals {str(said)[:100]}")

    def literal(self, node: _Node, operand: Tensor | bool | None) -> list[float] | None:
        """The values of an operand that says how large something gets; None if it depends on an input, or is absent."""
        if operand is None or operand is False:
            return None
        if operand is True:
            raise RefusalError(f"{node.who} takes a shape that is computed from constants alone, unfolded", AGAIN)
        values = list(operand.numbers) or self.given.get(operand.span, [])
        if not values and operand.kind in LITERALS and not operand.external and operand.elements <= MOST_GIVEN:
            values = self.given[operand.span] = self.reader.numbers(operand).tolist()
        if len(values) != operand.elements or not all(map(math.isfinite, values)):
            raise RefusalError(f"{node.who} takes a literal for a shape that is none")
        return values

    def small(self, operand: Tensor | bool | None) -> bool:
        """Whether no element of an integer literal exceeds `LARGEST_FACTOR`. Each literal is read once."""
        if not isinstance(operand, Tensor) or operand.kind not in _INTEGERS or not operand.elements:
            return True
        if operand.external:
            return False
        if operand.span not in self.bounded or operand.numbers:
            numbers = self.reader.numbers(operand)
            self.bounded[operand.span] = max(-int(numbers.min()), int(numbers.max())) <= LARGEST_FACTOR
        return self.bounded[operand.span]


def _compare(side: str, found: list[Value], listed: list[TensorSpec]) -> None:
    """Refuse a graph whose inputs or outputs are not those of the manifest."""
    said = [(value.name, value.elem_type, value.shape) for value in found]
    if said != [(spec.name, _DTYPES.get(spec.dtype, 0), spec.shape) for spec in listed]:
        raise RefusalError(f"its {side} are {str(said)[:300]}, not those that the manifest lists", AGAIN)
