"""Graphs of strangers: what every export of ours holds is taken, and what could do harm is refused, with a reason."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_student, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Graph
from redif_sdk.artifact.untrusted import onnx as onnx_check
from redif_sdk.artifact.untrusted.onnx import OPERATORS, OPSETS, check_graph
from redif_sdk.errors import IntegrityError
from redif_sdk.export.fuse import generator_model
from redif_sdk.export.onnx import GraphDenoiser, denoiser_model, load_network
from redif_sdk.export.store import spec_of

INT, FLOAT = TensorProto.INT64, TensorProto.FLOAT
Change = Callable[[onnx.ModelProto], Any]


def initial(name: str, value: Any, dtype: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def build(opset: int = 20) -> onnx.ModelProto:
    """A denoiser in small, with a loop: f = conv(sample) + timestep, three times."""
    body = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["y"], name="conv", kernel_shape=[1, 1], pads=[0, 0, 0, 0]),
            helper.make_node("Add", ["y", "time"], ["x_next"], name="add"),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("k", INT, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", FLOAT, ["batch", 4, 14, 14]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_next", FLOAT, ["batch", 4, 14, 14]),
        ],
        [initial("weight", np.ones((4, 4, 1, 1)), np.float32)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["timestep", "axes"], ["time"], name="unsqueeze"),
            helper.make_node("Shape", ["sample"], ["shape"], name="shape"),
            helper.make_node("Loop", ["trips", "go", "sample"], ["f"], name="loop", body=body),
        ],
        "denoiser",
        [
            helper.make_tensor_value_info("sample", FLOAT, ["batch", 4, 14, 14]),
            helper.make_tensor_value_info("timestep", FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("f", FLOAT, ["batch", 4, 14, 14])],
        [initial("axes", [1, 2, 3]), initial("trips", 3), initial("go", True, np.bool_)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def described(model: onnx.ModelProto, data: tuple[str, ...] = ()) -> Graph:
    sides = {"inputs": [spec_of(v) for v in model.graph.input], "outputs": [spec_of(v) for v in model.graph.output]}
    kind: dict[str, Any] = {"component": "denoiser", "precision": "fp32", "opset": model.opset_import[0].version}
    return Graph(**kind, **sides, file="onnx/x.onnx", data=list(data))


GOOD = build()
GRAPH = described(GOOD)


def check(model: onnx.ModelProto | bytes, sizes: Mapping[str, int] | None = None, graph: Graph = GRAPH) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    check_graph(data, graph, sizes or {}, "onnx/x.onnx")


def changed(change: Change) -> onnx.ModelProto:
    model = build()
    change(model)
    return model


def node(operator: str, *inputs: Any, **attributes: Any) -> Change:
    """Appends a node named "bad". An input that is no name becomes an initializer."""

    def change(model: onnx.ModelProto) -> None:
        names = []
        for index, value in enumerate(inputs):
            names.append(value if isinstance(value, str) else f"given_{index}")
            if not isinstance(value, str):
                array = np.asarray(value)
                model.graph.initializer.append(numpy_helper.from_array(array, names[-1]))
        model.graph.node.append(helper.make_node(operator, names, ["bad_out"], name="bad", **attributes))

    return change


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def inner(model: onnx.ModelProto) -> onnx.GraphProto:
    return next(a.g for a in model.graph.node[2].attribute if a.name == "body")


# ---------------------------------------------------------------- what is taken


@pytest.mark.parametrize("student", ["tiny_student", "plain_student", "full_student"])
def test_our_own_graphs_are_taken(student: str, request: pytest.FixtureRequest) -> None:
    folder = StudentFolder(request.getfixturevalue(student))
    for graph in folder.manifest.graphs:
        assert not graph.data
        check_graph((folder.path / graph.file).read_bytes(), graph, {}, graph.file)


@pytest.mark.slow
def test_attention_is_taken(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    student = StudentFolder(build_student(tmp_path / "attention", **blocks))
    model = denoiser_model(GraphDenoiser(load_network(student), 4), student.manifest)
    for made in (model.filled(), generator_model(model, student.manifest).filled()):
        assert sum(node.op_type == "Softmax" for node in made.graph.node) or made is not model
        check(made, graph=described(made))


def test_the_operators_are_standard_and_give_their_shapes_where_we_look() -> None:
    places = {"Expand": {1: "shape"}, "Tile": {1: "repeats"}, "Pad": {1: "pads"}, "Resize": {2: "scales", 3: "sizes"}}
    places |= {"ConstantOfShape": {0: "input"}, "Loop": {0: "M"}}
    assert {name: set(at) for name, at in places.items()} == {
        name: {index for index, _ in rules} for name, rules in onnx_check._SHAPES.items()
    }
    for name in OPERATORS:
        assert onnx.defs.has(name), name
    for version in range(OPSETS[0], min(OPSETS[-1], onnx.defs.onnx_opset_version()) + 1):
        for name, at in places.items():
            schema = onnx.defs.get_schema(name, version)
            assert {index: schema.inputs[index].name for index in at} == at
    assert not OPERATORS & {"If", "Scan", "RandomNormal", "Bernoulli", "StringConcat", "NonZero", "SequenceAt"}


def test_the_field_numbers_are_those_of_onnx() -> None:
    from redif_sdk.artifact.untrusted import protobuf

    tables = {
        onnx.ModelProto: [onnx_check._MODEL],
        onnx.GraphProto: [onnx_check._GRAPH, onnx_check._NODES],
        onnx.NodeProto: [onnx_check._NODE],
        onnx.OperatorSetIdProto: [onnx_check._OPSET],
        onnx.AttributeProto: [protobuf._ATTRIBUTE],
        onnx.TensorProto: [protobuf._TENSOR],
        onnx.StringStringEntryProto: [protobuf._ENTRY],
        onnx.ValueInfoProto: [protobuf._VALUE],
        onnx.TypeProto: [protobuf._TYPE],
        onnx.TypeProto.Tensor: [protobuf._TENSOR_TYPE],
        onnx.TensorShapeProto: [protobuf._SHAPE],
        onnx.TensorShapeProto.Dimension: [protobuf._DIM],
    }
    for message, known in tables.items():
        numbers = {field.name: field.number for field in message.DESCRIPTOR.fields}
        for one in known:
            assert {name: numbers[name] for name, _ in one.values()} == {
                name: tag >> 3 for tag, (name, _) in one.items()
            }


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        node("Expand", "timestep", "shape"),
        node("Expand", "timestep", np.array([64, 1024])),
        node("Resize", "sample", "", np.array([1, 1, 2, 2], np.float32)),
        node("Resize", "sample", "", "", np.array([1, 4, 28, 28])),
        node("Pad", "sample", np.array([0, 0, 1, 1, 0, 0, -1, 1])),
        node("Range", np.int64(0), np.int64(77), np.int64(1)),
        node("Tile", "sample", np.array([1, 2, 1, 1])),
        both(node("Constant", value_ints=[2, 3])),
        node("Constant", value=helper.make_tensor("t", FLOAT, [2], [1, 2])),
        node("Slice", "shape", np.array([0]), np.array([2**63 - 1])),
        node("Mul", "shape", np.array([2**31])),
        lambda model: model.graph.node[0].metadata_props.add(key="a", value="b"),
        lambda model: model.graph.value_info.append(helper.make_tensor_value_info("time", FLOAT, ["batch", 1, 1, 1])),
        lambda model: setattr(model.opset_import[0], "domain", "ai.onnx"),
    ],
)
def test_harmless_changes_are_taken(change: Change) -> None:
    check(changed(change))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.FLOAT16, [1.5, 2.5, -1.0]),
        (TensorProto.BFLOAT16, [1.5, 2.5, -1.0]),
        (TensorProto.INT8, [1, -2, 3]),
        (TensorProto.INT4, [1, -2, 3]),
        (TensorProto.UINT4, [1, 2, 3]),
        (TensorProto.FLOAT8E4M3FN, [1.0, 2.0, 3.0]),
        (TensorProto.INT64, [-1, 1 << 40, 3]),
        (TensorProto.UINT64, [1, 1 << 63, 3]),
        (TensorProto.DOUBLE, [1.0, 2.0, 3.0]),
        (TensorProto.FLOAT, [1.0, 2.0, 3.0]),
        (TensorProto.BOOL, [True, False, True]),
    ],
)
def test_tensors_hold_what_their_shape_says(kind: int, values: list[Any]) -> None:
    tensor = helper.make_tensor("t", kind, [3], values)
    check(changed(lambda model: model.graph.initializer.append(tensor)))
    raw = onnx.TensorProto(name="t", data_type=kind, dims=[3])
    raw.raw_data = bytes((3 * onnx_check.BITS[kind] + 7) // 8)
    check(changed(lambda model: model.graph.initializer.append(raw)))
    for wrong in (tensor, raw):
        wrong.dims[0] = 5
        with pytest.raises(IntegrityError, match=r"x\.onnx: the tensor 't' (has 5 elements|should have \d+ bytes)"):
            check(changed(lambda model, wrong=wrong: model.graph.initializer.append(wrong)))


# ---------------------------------------------------------------- what is refused


def tensor(**changes: Any) -> Change:
    """Alters the initializer "axes"."""

    def change(model: onnx.ModelProto) -> None:
        target = model.graph.initializer[0]
        for name, value in changes.items():
            if isinstance(value, list):
                del getattr(target, name)[:]
                getattr(target, name).extend(value)
            else:
                setattr(target, name, value)

    return change


def nested(model: onnx.ModelProto) -> None:
    loop = helper.make_node("Loop", ["trips", "go_in"], [], name="deep", body=helper.make_graph([], "g", [], []))
    inner(model).node.append(loop)


REFUSED: list[tuple[Change, str]] = [
    (lambda model: model.ClearField("graph"), "it has no graph"),
    (lambda model: model.ClearField("opset_import"), "its opset is None"),
    (lambda model: setattr(model, "ir_version", 1 << 40), "ir_version"),
    (lambda model: setattr(model.opset_import[0], "version", 21), "its opset is 21, the manifest says 20"),
    (lambda model: model.opset_import.add(domain="com.microsoft", version=1), "more than one set"),
    (lambda model: model.opset_import.add(version=20), "more than one set"),
    (lambda model: setattr(model.opset_import[0], "domain", "com.microsoft"), "domain 'com.microsoft'"),
    (lambda model: model.functions.add(name="f"), "functions"),
    (lambda model: model.training_info.add(), "training_info"),
    (lambda model: setattr(inner(model).node[0], "domain", "com.evil"), "'conv' .* domain 'com.evil'"),
    (lambda model: setattr(model.graph.node[0], "overload", "x"), "overload 'x'"),
    (node("NonZero", "sample"), r"'bad' \('NonZero'\) is of an operator .*\(SECURITY\.md"),
    (node("RandomNormalLike", "sample"), "operator that this release does not take"),
    (lambda model: inner(model).node[0].ClearField("op_type"), r"'conv' \(''\) is of an operator"),
    (lambda model: setattr(model.graph.node[0], "name", "n" * 1001), "more than 1000 bytes"),
    (node("Cast", "sample", to=TensorProto.STRING), "element type"),
    (node("Constant", value_string="x"), "not one value"),
    (node("Relu", "sample", body=helper.make_graph([], "g", [], [])), "no loop's body"),
    (node("Loop", "shape", "go", graphs=[helper.make_graph([], "g", [], [])]), "graphs"),
    (node("Relu", "sample", x=helper.make_tensor_type_proto(1, [])), "field tp"),
    (nested, "loop within a loop"),
    (lambda model: model.graph.node[2].attribute[0].ClearField("g"), "holds nothing"),
    (lambda model: model.graph.node[2].attribute.append(model.graph.node[2].attribute[0]), "two attributes"),
    (lambda model: setattr(model.graph.node[2].attribute[0], "i", 1), "two kinds of value"),
    (lambda model: model.graph.node[0].attribute.add(name="a", ref_attr_name="b", type=2), "function"),
    (lambda model: model.graph.node[0].attribute.add(name="a", type=13), "type 13"),
    (lambda model: model.graph.sparse_initializer.add(), "sparse_initializer"),
    # tensors
    (tensor(data_type=0), "element type 0"),
    (tensor(data_type=TensorProto.STRING), "element type 8"),
    (tensor(data_type=TensorProto.COMPLEX64), "element type 14"),
    (tensor(dims=[-3]), "negative"),
    (tensor(dims=[2]), "should have 16 bytes and has 24"),
    (tensor(dims=[3, 1 << 31]), "negative dimension or one above"),
    (tensor(dims=[(1 << 31) - 1] * 16), "should have"),
    (tensor(dims=[1] * 17), "16 entries"),
    (tensor(int64_data=[1]), "more than one place"),
    (tensor(string_data=[b"x"]), "string_data"),
    (lambda model: setattr(model.graph.initializer[0].segment, "begin", 1), "segment"),
    (lambda model: model.graph.initializer[0].ClearField("raw_data"), "should have 24 bytes and has 0"),
    (tensor(name=""), "or it is none"),
    (tensor(data_location=1), "more than one place"),
    (
        node("Constant", value=onnx.TensorProto(data_type=1, dims=[1 << 20, 1 << 20])),
        r"the tensor of the node 'bad' .* should have",
    ),
    # names, inputs and outputs
    (lambda model: model.graph.initializer.append(initial("sample", 1)), "two values of the name 'sample'"),
    (lambda model: inner(model).initializer.append(initial("sample", 1)), "two values of the name 'sample'"),
    (node("Relu", "bad_out"), "'bad_out', which nothing before it makes"),
    (lambda model: setattr(model.graph.input[1], "name", "time_step"), "nothing before it makes"),
    (lambda model: setattr(model.graph.output[0], "name", "time"), "its outputs are"),
    (lambda model: model.graph.input.append(helper.make_tensor_value_info("more", FLOAT, [1])), "its inputs are"),
    (lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 10), "its inputs are"),
    (lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 5), "its inputs are"),
    (lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "b"), "its inputs are"),
    (lambda model: model.graph.input[1].type.tensor_type.ClearField("shape"), "its inputs are"),
    (lambda model: model.graph.input[1].type.sequence_type.elem_type.SetInParent(), "sequence_type"),
    (
        lambda model: model.graph.value_info.append(helper.make_tensor_value_info("v", FLOAT, [1 << 20, 1 << 20])),
        "'v' is declared of shape",
    ),
    (lambda model: model.graph.value_info.append(helper.make_tensor_value_info("v", FLOAT, [-1])), "'v' is declared"),
    (lambda model: model.graph.value_info.append(helper.make_tensor_value_info("v", 8, [1])), "element type 8"),
    # literals that say how large something gets
    (node("Expand", "timestep", np.array([1 << 20, 1 << 20])), "makes a tensor that is too large"),
    (node("Expand", "timestep", np.arange(65)), "that is none"),
    (node("Expand", "timestep", np.array([1.5], np.float16)), "that is none"),
    (node("ConstantOfShape", np.array([1 << 29])), "makes a tensor that is too large"),
    (node("Tile", "sample", np.array([1 << 15, 1 << 15, 1, 1])), "makes a tensor that is too large"),
    (node("Pad", "sample", np.array([0, 0, 0, 0, 0, 0, 0, 1 << 17])), "makes a tensor that is too large"),
    (node("Pad", "sample", np.array([0, 0, 60000, 60000, 0, 0, 0, 0])), "makes a tensor that is too large"),
    (node("Resize", "sample", "", np.array([1, 1, 65, 1], np.float32)), "makes a tensor that is too large"),
    (node("Resize", "sample", "", np.array([1, 1, np.inf, 1], np.float32)), "that is none"),
    (node("Resize", "sample", "", "", np.array([1, 4, 1 << 20, 1 << 20])), "makes a tensor that is too large"),
    (node("Range", np.int64(0), np.int64(1 << 40), np.int64(1)), "makes a tensor that is too large"),
    (node("Range", np.float32(0), np.float32(1), np.float32(1e-30)), "makes a tensor that is too large"),
    (node("Range", np.int64(0), np.int64(1), np.int64(0)), "makes a tensor that is too large"),
    (node("Conv", "sample", np.ones((4, 4, 1, 1), np.float32), pads=[0, 0, 1 << 30, 0]), "pads that are too large"),
    (node("ConvTranspose", "sample", "sample", strides=[1 << 15, 1 << 15]), "strides that are too large"),
    (node("Conv", "sample", "sample", pads=[float("inf")] * 2), "pads that are too large"),
    (node("Conv", "sample", "sample", kernel_shape=[float("nan")]), "kernel_shape that are too large"),
    (node("AveragePool", "sample", kernel_shape=[1 << 62] * 60_000), "kernel_shape that are too large"),
    (node("Constant", value_int=float("inf")), "not one value"),
    (node("Constant", value_ints=[1] * 65), "not one value"),
    (node("Mul", "shape", np.array([1 << 32])), "literal that exceeds"),
    (node("Concat", "shape", np.array([-(1 << 63)]), axis=0), "literal that exceeds"),
    (both(node("Neg", "sample"), node("Abs", "sample")), "two values of the name 'bad_out'"),
    (
        lambda model: model.graph.node.extend(
            [
                helper.make_node("Mul", ["axes", "axes"], ["product"]),
                helper.make_node("Expand", ["timestep", "product"], ["bad"]),
            ]
        ),
        "computed from constants alone",
    ),
    (
        lambda model: inner(model).node.extend(
            [
                helper.make_node("Reshape", ["k", "axes"], ["counter"]),
                helper.make_node("Expand", ["x", "counter"], ["bad"]),
            ]
        ),
        "computed from constants alone",
    ),
    (lambda model: model.graph.initializer[1].CopyFrom(initial("trips", 1001)), "makes a tensor that is too large"),
    (lambda model: model.graph.node[2].input.__setitem__(0, ""), "no number of trips"),
    (lambda model: model.graph.node[2].ClearField("attribute"), "has no body"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_harmful_changes_are_refused(change: Change, message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        check(changed(change))
    assert str(caught.value).startswith("onnx/x.onnx: ")
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_a_literal_is_read_once_however_often_it_is_used() -> None:
    """A literal whose message is long, and a thousand nodes that use it: the time must not be their product."""
    long = onnx.TensorProto.FromString(initial("long", [1, 2]).SerializeToString() + field(900, b"") * 100_000)
    model = changed(lambda model: model.graph.initializer.append(long))
    for index in range(1_000):
        operator = "Expand" if index % 2 else "Mul"
        model.graph.node.append(
            helper.make_node(operator, ["timestep" if index % 2 else "shape", "long"], [f"o{index}"])
        )
    start = time.process_time()
    check(model)
    assert time.process_time() - start < 5


def test_old_opsets_are_refused() -> None:
    model = build(opset=9)
    with pytest.raises(IntegrityError, match="its opset is 9"):
        check(model, graph=described(model))


def external(place: Mapping[str, str], name: str = "w", elements: int = 4) -> onnx.TensorProto:
    made = onnx.TensorProto(name=name, data_type=FLOAT, dims=[elements], data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        made.external_data.add(key=key, value=value)
    return made


WHOLE = {"location": "x.data", "offset": "8", "length": "16"}


def test_weights_may_be_in_the_listed_file() -> None:
    for place in (WHOLE, {"location": "x.data", "length": "16"}, WHOLE | {"checksum": "00"}):
        check(changed(lambda model, place=place: model.graph.initializer.append(external(place))), {"x.data": 24})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"location": "../x.data"}, r"'\.\./x\.data', which the manifest does not list"),
        ({"location": "/etc/passwd"}, "'/etc/passwd', which the manifest does not list"),
        ({"location": "./x.data"}, "does not list"),
        ({"location": "X.data"}, "does not list"),
        ({"offset": "9"}, r"16 at 9 of 'x\.data' \(24 bytes\) are not those"),
        ({"length": "12"}, "are not those"),
        ({"length": ""}, "no numbers"),
        ({"offset": "-1"}, "no numbers"),
        ({"offset": "9" * 5000}, "more than 1000 bytes"),
        ({"offset": "٣"}, "no numbers"),
        ({"basepath": "/"}, "'basepath'"),
    ],
)
def test_weights_elsewhere_are_refused(place: dict[str, str], message: str) -> None:
    model = changed(lambda model: model.graph.initializer.append(external(WHOLE | place)))
    with pytest.raises(IntegrityError, match=message):
        check(model, {"x.data": 24})


def test_data_files_hold_weights_of_the_main_graph_and_nothing_else() -> None:
    with pytest.raises(IntegrityError, match=r"none of its tensors is in 'x\.data'"):
        check(GOOD, {"x.data": 24})
    in_loop = changed(lambda model: inner(model).initializer.append(external(WHOLE)))
    in_attribute = changed(node("Constant", value=external(WHOLE)))
    twice = changed(lambda model: model.graph.initializer.append(external(WHOLE)))
    twice.graph.initializer[-1].external_data.add(key="location", value="x.data")
    inside = changed(lambda model: model.graph.initializer[0].external_data.add(key="location", value="x.data"))
    shape = changed(node("Expand", "timestep", "w"))
    shape.graph.initializer.append(external(WHOLE))
    for model, message in (
        (in_loop, "no weight of the main graph"),
        (in_attribute, "no weight of the main graph"),
        (twice, "twice"),
        (inside, "more than one place"),
        (shape, "that is none"),
    ):
        with pytest.raises(IntegrityError, match=message):
            check(model, {"x.data": 24})


# ---------------------------------------------------------------- the wire


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


BYTES = GOOD.SerializeToString()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no graph"),
        (b"\x80", "cut off"),
        (BYTES[:-1], "cut off|beyond its message|its opset"),
        (BYTES + b"\x00", "cut off"),
        (BYTES + b"\x00\x01", "no number that protobuf allows"),
        (BYTES + b"\x3b", "wire type 3"),
        (BYTES + b"\x3c", "wire type 4"),
        (BYTES + b"\x3e", "wire type 6"),
        (BYTES + b"\x38\x01", "graph .* wire type 0"),
        (BYTES + field(7, b""), "graph .* comes twice"),
        (BYTES + b"\x9a\x06\x7f", "beyond its message"),
        (BYTES + b"\x99\x06\x7f", "beyond its message"),
        (BYTES + b"\x98\x06" + b"\xff" * 10 + b"\x01", "too long"),
        (BYTES + b"\x98\x06" + b"\xff" * 9 + b"\x7f", "too long"),
        (BYTES + b"\xf8\xff\xff\xff\xff\x01\x00", "no number that protobuf allows"),
        (field(7, field(1, field(3, b"\xff\xfe"))), "no graph|ir_version"),
        (BYTES.replace(b"unsqueeze", b"unsqueez\xff"), "not UTF-8"),
        (BYTES.replace(b"unsqueeze", b"unsqueez\xff", 1)[:40], "beyond its message|cut off"),
    ],
)
def test_broken_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        check(data)


def test_unknown_fields_are_skipped_and_numbers_may_be_packed() -> None:
    dims, values = field(1, b"\x02\x01"), field(7, varint(1) + varint((1 << 64) - 1))
    packed = dims + b"\x10\x07" + values + field(8, b"packed")
    loose = b"\x08\x02\x08\x01\x10\x07\x38\x01\x38" + varint((1 << 64) - 1) + field(8, b"loose")
    graph = GOOD.graph.SerializeToString() + field(5, packed) + field(5, loose) + field(900, b"new")
    check(field(7, graph) + b"\x08\x0a" + field(8, b"\x10\x14") + field(900, b"\xff"))
    for broken in (b"\xff" * 11 + b"\x01", b"\x01\x80", b"\x01"):
        short = field(7, GOOD.graph.SerializeToString() + field(5, dims + b"\x10\x07" + field(7, broken)))
        with pytest.raises(IntegrityError, match=r"too long|cut off|has 2 elements"):
            check(short + b"\x08\x0a" + field(8, b"\x10\x14"))


HEAD = b"\x08\x0a" + field(8, b"\x10\x14")


def deep() -> bytes:
    """A hundred thousand loops, each in the other's body."""
    pieces, size = [], 0
    for _ in range(100_000):
        for number, rest in (
            (6, field(1, b"body") + b"\xa0\x01\x05"),
            (5, field(4, b"Loop") + field(1, b"trips")),
            (1, b""),
        ):
            head = varint(number << 3 | 2) + varint(size)
            pieces.append(rest + head)
            size += len(head) + len(rest)
    return b"".join(reversed(pieces))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty nodes": (lambda: field(1, b"") * 4_000_000, "200000 nodes"),
    "real nodes": (
        lambda: (
            field(11, field(1, b"a"))
            + b"".join(field(1, field(1, b"a") + field(2, b"%x." % n) + field(4, b"Neg")) for n in range(50_000))
        ),
        "its inputs are",
    ),
    "tensors": (
        lambda: b"".join(field(5, b"\x10\x01\x08\x00" + field(8, b"%x" % n)) for n in range(1_000_000)),
        "50000 tensors",
    ),
    "inputs": (lambda: field(1, field(1, b"") * 4_000_000), "65536 parts"),
    "outputs": (lambda: field(12, b"") * 4_000_000, "65536 inputs"),
    "numbers": (lambda: field(1, field(5, b"\x40\x01" * 4_000_000)), "65536 numbers"),
    "packed numbers": (lambda: field(1, field(5, field(8, b"\x01" * 8_000_000))), "65536 entries"),
    "attributes": (
        lambda: field(1, b"".join(field(5, field(1, b"%x" % n) + b"\xa0\x01\x02") for n in range(500_000))),
        "1000 attributes",
    ),
    "dims": (lambda: field(5, b"\x08\x01" * 4_000_000), "16 entries"),
    "values": (lambda: field(5, b"\x10\x07" + field(7, b"\x01" * 8_000_000)), "8000000"),
    "deep": (deep, "trips"),
}


#: Of each kind of field one: messages, numbers, values, a loop. The others pass through the same counters.
QUICK = {"inputs", "packed numbers", "dims", "deep"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in HOSTILE]
)
def test_hostile_files_cost_little_memory(case: str) -> None:
    make, message = HOSTILE[case]
    data = HEAD + field(7, make())
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match=message):
            check(data)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_a_deep_file_is_refused_for_its_depth() -> None:
    start = field(5, b"\x10\x07" + field(9, bytes(8)) + field(8, b"trips"))
    with pytest.raises(IntegrityError, match="loop within a loop"):
        check(HEAD + field(7, start + deep()))


# ---------------------------------------------------------------- any bytes


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_altered_graphs_are_refused_or_read(data: st.DataObject) -> None:
    model = bytearray(BYTES)
    for _ in range(data.draw(st.integers(0, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(model))) if data.draw(st.booleans()) else 0
    stop = data.draw(st.integers(start, len(model))) if data.draw(st.booleans()) else len(model)
    with suppress(IntegrityError):
        check(bytes(model[start:stop]))


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", HEAD, HEAD + b"\x3a"]))
def test_random_bytes_are_refused(data: bytes, head: bytes) -> None:
    for content in (
        head + data,
        HEAD + field(7, data),
        HEAD + field(7, field(1, data)),
        HEAD + field(7, field(5, data)),
    ):
        with pytest.raises(IntegrityError):
            check(content)
