"""Graphs without their weights: none of them is in the graph, what is folded is right, they are written singly."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import build_student
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.export import store
from redif_sdk.export.onnx import GraphDenoiser, denoiser_model, load_network
from redif_sdk.export.weights import LazyModel, Weight, lazy_model


def model_of(nodes: list[tuple[str, list[str], str, dict[str, Any]]], weights: dict[str, Tensor]) -> onnx.ModelProto:
    """x (2, 4) -> y, with weights as inputs."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in weights.items()]
    graph = helper.make_graph(
        [helper.make_node(kind, given, [output], **attributes) for kind, given, output, attributes in nodes],
        "small",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=[numpy_helper.from_array(np.array([4, 8]), "shape")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_what_depends_on_weights_alone_is_computed_when_it_is_written() -> None:
    weights = {"w": torch.randn(8, 4), "b": torch.randn(8), "idle": torch.randn(3)}
    nodes = [
        ("Transpose", ["w"], "wt", {"perm": [1, 0]}),
        ("MatMul", ["x", "wt"], "xw", {}),
        ("Neg", ["b"], "minus", {}),
        ("Sub", ["xw", "minus"], "y", {}),
    ]
    lazy = lazy_model(model_of(nodes, weights), weights)
    assert [node.op_type for node in lazy.proto.graph.node] == ["MatMul", "Sub"]
    assert [value.name for value in lazy.proto.graph.input] == ["x"]
    assert sorted(lazy.weights) == ["minus", "wt"]
    assert not any(tensor.raw_data for tensor in lazy.proto.graph.initializer)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(
        run(lazy.filled(), x=x), (torch.from_numpy(x) @ weights["w"].T + weights["b"]).numpy(), rtol=1e-5, atol=1e-6
    )


def test_what_would_be_larger_than_its_weights_stays_in_the_graph() -> None:
    weights = {"row": torch.randn(8), "w": torch.randn(4, 8)}
    nodes = [
        ("Expand", ["row", "shape"], "wide", {}),
        ("Add", ["wide", "w"], "sum", {}),
        ("MatMul", ["x", "sum"], "y", {}),
    ]
    lazy = lazy_model(model_of(nodes, weights), weights)
    assert [node.op_type for node in lazy.proto.graph.node] == ["Expand", "Add", "MatMul"]
    assert lazy.size == 4 * (8 + 32) + 16
    x = np.ones((2, 4), np.float32)
    expected = torch.from_numpy(x) @ (weights["row"] + weights["w"])
    np.testing.assert_allclose(run(lazy.filled(), x=x), expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(narrow, marks=pytest.mark.slow) for narrow in ("fp16", "bf16"))]
)
def test_a_denoiser_s_graph_holds_no_weights(tmp_path: Path, precision: str) -> None:
    student = StudentFolder(build_student(tmp_path / "tiny"))
    network = load_network(student)
    lazy = denoiser_model(GraphDenoiser.of(network, student.manifest), student.manifest, precision)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert lazy.size > 0.99 * count * (4 if precision == "fp32" else 2)
    assert lazy.proto.ByteSize() < 0.1 * lazy.size
    filled = lazy.filled()
    assert filled.ByteSize() > lazy.size
    onnx.checker.check_model(filled, full_check=True)
    assert "CastLike" not in {node.op_type for node in filled.graph.node}
    for tensor in filled.graph.initializer:
        plain = (
            network.get_parameter(name)
            if (name := tensor.name.removeprefix("network.")) in {name for name, _ in network.named_parameters()}
            else None
        )
        if plain is not None:
            wanted = {"fp32": plain, "fp16": plain.half(), "bf16": plain.bfloat16()}[precision]
            np.testing.assert_array_equal(
                numpy_helper.to_array(tensor).astype(np.float32), wanted.float().detach().numpy()
            )


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST_FILE", 0)
    side, count = 1024, 8  # 4 MiB each
    weights = {f"w{index}": torch.randn(side, side) / side**0.5 for index in range(count)}
    names = ["x", *weights]
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "x", f"t{i}"], [f"x{i + 1}"]) for i in range(count)]
    turned = [helper.make_node("Transpose", [f"w{i}"], [f"t{i}"], perm=[1, 0]) for i in range(count)]
    shapes = {"x": [1, side], **{name: list(value.shape) for name, value in weights.items()}}
    graph = helper.make_graph(
        [*turned, *nodes],
        "wide",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, [1, side])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    lazy = lazy_model(model, weights)
    tracemalloc.start()
    written = store.write_graph(tmp_path, "denoiser", "fp32", lazy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / written.data[0]).stat().st_size == lazy.size == count * side * side * 4
    assert peak < 5 * side * side * 4
    x = np.ones((1, side), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / written.file, providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(x)
    for weight in weights.values():
        expected = expected @ weight.T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected.numpy(), rtol=1e-3, atol=1e-3)


def test_a_model_with_all_its_data_is_a_lazy_one_too() -> None:
    weights = {"w": torch.randn(4, 8)}
    filled = lazy_model(model_of([("MatMul", ["x", "w"], "y", {})], weights), weights).filled()
    assert LazyModel(filled).filled().SerializeToString() == filled.SerializeToString()
    assert (
        Weight({"w": weights["w"].bfloat16()}).content() == weights["w"].bfloat16().view(torch.int16).numpy().tobytes()
    )
