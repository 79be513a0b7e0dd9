"""Graphs: ONNX that asks for too much or is none, and weights in files beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from .student import ALL, GRAPH, MIB, WHOLE, Student, case, each


def _node(operator: str, *inputs: Any, **attributes: Any) -> Callable[[Any], None]:
    """Appends a node named "bad" to a graph. An input that is no name becomes an initializer."""

    def change(model: Any) -> None:
        from onnx import helper, numpy_helper

        names = []
        for index, value in enumerate(inputs):
            names.append(value if isinstance(value, str) else f"given_{index}")
            if not isinstance(value, str):
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), names[-1]))
        model.graph.node.append(helper.make_node(operator, names, ["bad_out"], name="bad", **attributes))

    return change


def loop_body(model: Any) -> Any:
    """The body of the graph's loop."""
    return next(
        attribute.g
        for node in model.graph.node
        if node.op_type == "Loop"
        for attribute in node.attribute
        if attribute.name == "body"
    )


def _declared(model: Any) -> None:
    from onnx import TensorProto, helper

    model.graph.value_info.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [1 << 30, 1 << 30]))


def _no_data(model: Any) -> None:
    import onnx

    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=1, dims=[1 << 20, 1 << 10]))


def _sub(model: Any, operator: str, attribute: str) -> None:
    from onnx import helper

    body = helper.make_graph([], "g", [], [])
    model.graph.node.append(helper.make_node(operator, [], ["bad_out"], name="bad", **{attribute: body}))


def _nested(model: Any) -> None:
    from onnx import helper

    body = helper.make_graph([], "g", [], [])
    for _ in range(16):
        body = helper.make_graph([helper.make_node("Loop", ["", ""], [], body=body)], "g", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], name="bad", body=body))


def _trips(model: Any) -> None:
    from onnx import numpy_helper

    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    model.graph.initializer.append(numpy_helper.from_array(np.int64(1 << 60), "trips"))
    loop.input[0] = "trips"


def _computed(model: Any) -> None:
    from onnx import helper, numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20]), "few"))
    model.graph.node.append(helper.make_node("Mul", ["few", "few"], ["much"]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["much"], ["bad_out"], name="bad"))


def _functions(model: Any) -> None:
    model.functions.add(name="f", domain="local").opset_import.add(version=20)


def _outputs(model: Any) -> None:
    from onnx import TensorProto, helper

    model.graph.output.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, ["steps", 6]))


ONNX: dict[str, Callable[[Any], object]] = {
    "shape_without_data": _no_data,
    "declared_shape": _declared,
    "custom_domain": lambda model: model.graph.node.add(
        op_type="Evil", domain="com.evil", name="bad", output=["bad_out"]
    ),
    "custom_domain_imported": lambda model: model.opset_import.add(domain="com.evil", version=1),
    "microsoft_domain": lambda model: setattr(model.opset_import[0], "domain", "com.microsoft"),
    "constant_of_shape": _node("ConstantOfShape", np.array([1 << 40])),
    "computed_shape": _computed,
    "expand": _node("Expand", "table", np.array([1 << 20, 1 << 20])),
    "tile": _node("Tile", "noise", np.array([1 << 20, 1 << 20, 1, 1, 1])),
    "resize": _node("Resize", "table", "", np.array([1e9, 1e9], np.float32)),
    "pad": _node("Pad", "table", np.array([0, 0, 1 << 40, 0])),
    "range": _node("Range", np.int64(0), np.int64(1 << 50), np.int64(1)),
    "loop_2_60": _trips,
    "if": lambda model: _sub(model, "If", "then_branch"),
    "scan": lambda model: _sub(model, "Scan", "body"),
    "random": _node("RandomNormal", shape=[1 << 20]),
    "random_like": _node("RandomUniformLike", "noise"),
    "strings": _node("StringNormalizer", "noise"),
    "sequence": _node("SequenceEmpty"),
    "nested_loops": _nested,
    "function": _functions,
    "training": lambda model: model.training_info.add(),
    "other_outputs": _outputs,
    "other_opset": lambda model: setattr(model.opset_import[0], "version", 1 << 40),
    "no_graph": lambda model: model.ClearField("graph"),
    "cast_to_string": _node("Cast", "noise", to=8),
    "long_name": lambda model: setattr(model.graph.node[0], "name", "n" * (1 << 20)),
    "escape_in_name": lambda model: model.graph.node.add(op_type="\x1b[31m\n", name="\x9b\u202e", output=["bad_out"]),
}


@each("onnx", ALL, GRAPH, ONNX)
def onnx_graph(student: Student, change: Callable[[Any], object]) -> None:
    student.model(change)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _span(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _deep_protobuf() -> bytes:
    """Attributes with graphs with nodes with attributes, 30,000 deep."""
    content = b""
    for _ in range(10_000):
        content = _span(1, _span(5, _span(1, b"body") + _span(6, content) + b"\xa0\x01\x05") + _span(4, b"Loop"))
        if len(content) > 8 * MIB:
            break
    return b"\x08\x0a" + _span(7, content) + _span(8, _span(1, b"") + b"\x10\x14")


RAW_ONNX: dict[str, Callable[[], bytes]] = {
    "deep_protobuf": _deep_protobuf,
    "deep_groups": lambda: b"\x0b" * MIB,
    "empty": lambda: b"",
    "zeros": lambda: bytes(MIB),
    "length_beyond": lambda: b"\x08\x0a" + _varint(7 << 3 | 2) + _varint(1 << 62) + bytes(16),
    "endless_varint": lambda: b"\x08" + b"\xff" * MIB,
    "million_nodes": lambda: b"\x08\x0a" + _span(7, _span(1, b"") * MIB) + _span(8, b"\x10\x14"),
    "million_initializers": lambda: b"\x08\x0a" + _span(7, _span(5, b"\x10\x01\x08\x00") * MIB) + _span(8, b"\x10\x14"),
    "html": lambda: b"<html><script>alert(1)</script></html>",
}


@each("onnx", ALL, GRAPH, RAW_ONNX)
def onnx_bytes(student: Student, make: Callable[[], bytes]) -> None:
    student.put(GRAPH, make())


@case("onnx", WHOLE, "belongs to no graph")
def onnx_of_no_graph(student: Student) -> None:
    student.put("onnx/more.onnx", (student.folder / GRAPH).read_bytes())


@case("onnx", ALL, r"used as a \.onnx file")
def graph_is_no_onnx(student: Student) -> None:
    student.put("onnx/graph.json", (student.folder / GRAPH).read_bytes())
    student.graph_set("file", "onnx/graph.json")


@case("onnx", ALL, "used by .* not in its list")
def graph_unlisted(student: Student) -> None:
    student.drop(GRAPH)


@case("onnx", ALL, "its outputs are")
def manifest_says_other_outputs(student: Student) -> None:
    outputs = student.graph()["outputs"]
    student.graph_set("outputs", [*outputs, *outputs])


@case("onnx", ALL, "at most|bytes")
def onnx_of_3_gb(student: Student) -> None:
    student.sparse(GRAPH, 3 << 30)


# ---------------------------------------------------------------- ONNX's external data


def put_external(student: Student, *, listed: bool = True, where: str = "main", **place: str) -> None:
    """A weight of 64 bytes in a file beside the graph, which is whole, listed and holds them; `place` says where."""
    import onnx
    from onnx import helper

    student.put("onnx/w.data", bytes(4096), listed=listed)
    if listed:
        student.graph_set("data", ["onnx/w.data"])
    tensor = onnx.TensorProto(name="outer", data_type=1, dims=[16], data_location=1)
    for key, value in ({"location": "w.data", "offset": "0", "length": "64"} | place).items():
        tensor.external_data.add(key=key, value=value)

    def change(model: Any) -> None:
        if where == "main":
            model.graph.initializer.append(tensor)
        elif where == "loop":
            loop_body(model).initializer.append(tensor)
        else:
            model.graph.node.append(helper.make_node("Constant", [], ["bad_out"], name="bad", value=tensor))

    student.model(change)


PLACES: dict[str, dict[str, Any]] = {
    "parent": {"location": "../../outside/secret.json"},
    "absolute": {"location": "/etc/passwd"},
    "other_listed": {"location": "../unet/diffusion_pytorch_model.safetensors"},
    "other_beside": {"location": "denoiser.fp32.onnx"},
    "nested": {"location": "sub/../w.data"},
    "here": {"location": "./w.data"},
    "windows": {"location": "..\\..\\outside\\secret.json"},
    "drive": {"location": "C:\\x"},
    "empty": {"location": ""},
    "nul": {"location": "w.data\0"},
    "memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"},
    "unlisted": {"listed": False},
    "in_loop": {"where": "loop"},
    "in_loop_parent": {"where": "loop", "location": "../../outside/secret.json"},
    "in_constant": {"where": "constant", "location": "../../outside/secret.json"},
    "offset_beyond": {"offset": "4096"},
    "offset_huge": {"offset": str(1 << 63)},
    "offset_negative": {"offset": "-64"},
    "offset_text": {"offset": "0x10"},
    "length_short": {"length": "1"},
    "length_huge": {"length": str(1 << 40)},
    "more_keys": {"basepath": "/etc"},
}


@each("external data", ALL, rf"{GRAPH}|w\.data", PLACES)
def external(student: Student, place: dict[str, Any]) -> None:
    put_external(student, **place)


@case("external data", ALL, r"w\.data.*leaves the folder")
def external_through_link(student: Student) -> None:
    put_external(student)
    shutil.move(student.folder / "onnx/w.data", student.outside / "w.data")
    (student.folder / "onnx/w.data").symlink_to("../../outside/w.data")


@case("external data", ALL, "manifest lists|w\\.data")
def external_data_unused(student: Student) -> None:
    student.put("onnx/w.data", bytes(4096))
    student.graph_set("data", ["onnx/w.data"])
