"""Weight-only int8 and int4: the integers stand for the weights, and every engine computes them in float32."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_student
from hypothesis import given
from hypothesis import strategies as st
from made_once import made
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import ExportError
from redif_sdk.export import export, store
from redif_sdk.export.verify import summary
from redif_sdk.export.weight_only import BLOCK, WEIGHT_ONLY, weight_only
from redif_sdk.export.weights import LazyModel
from redif_sdk.runtimes import RuntimeOptions, load

#: (weight's shape, operator, attributes, input's shape, axis of the inputs)
CASES: dict[str, tuple[tuple[int, ...], str, dict[str, Any], tuple[int, ...], int]] = {
    "matrix": ((64, 96), "MatMul", {}, (2, 5, 64), 0),
    "transposed": ((96, 64), "Gemm", {"transB": 1}, (2, 64), 1),
    "gemm": ((64, 96), "Gemm", {}, (2, 64), 0),
    "convolution": ((32, 64, 3, 3), "Conv", {"pads": [1, 1, 1, 1]}, (1, 64, 6, 6), 1),
    "odd": ((48, 100), "MatMul", {}, (2, 48), 0),
}


class Given:
    """A weight that is there already."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def content(self) -> bytes:
        return self.value.tobytes()


def one_layer(case: str, weight: np.ndarray) -> LazyModel:
    """A layer between two small ones of the same kind, which stay as they are."""
    _, operator, attributes, x, _ = CASES[case]
    inputs = {"Conv": x[1]}.get(operator, x[-1])
    first = np.eye(inputs, dtype=np.float32)
    outputs = {"Conv": weight.shape[0]}.get(operator, weight.shape[1 - CASES[case][4]])
    last = np.eye(outputs, dtype=np.float32)
    names = {"first": first, "weight": weight, "last": last}
    if operator == "Conv":
        names |= {name: names[name][:, :, None, None] for name in ("first", "last")}
    nodes = []
    for value, name in zip("xab", names, strict=True):
        own = attributes if name == "weight" or operator != "Conv" else {}
        nodes.append(helper.make_node(operator, [value, name], [{"x": "a", "a": "b", "b": "y"}[value]], **own))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"y{side}" for side in range(len(x))])],
    )
    for name, value in names.items():
        graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return LazyModel(model, {name: Given(value) for name, value in names.items()})


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_with_its_rounded_weights(case: str, precision: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(CASES[case][0], np.float32)
    x = rng.standard_normal(CASES[case][3], np.float32)
    expected = ReferenceEvaluator(one_layer(case, weight).filled()).run(None, {"x": x})[0]
    model = weight_only(one_layer(case, weight), precision).filled()
    onnx.checker.check_model(model, full_check=True)
    found = ReferenceEvaluator(model).run(None, {"x": x})[0]
    bits = 8 if case == "odd" else WEIGHT_ONLY[precision]  # its inputs are no multiple of a block
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < {8: 0.01, 4: 0.12}[bits]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds[f"weight_int{bits}"] == {8: TensorProto.INT8, 4: TensorProto.INT4}[bits]
    assert kinds["first"] == kinds["last"] == TensorProto.FLOAT
    assert model.opset_import[0].version == (21 if precision == "int4wo" else 20)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_no_weight_is_further_off_than_half_a_step(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((64, 96)) * size * rng.choice([0, 1, 100], (64, 96))).astype(np.float32)
    weight[:, 0] = 0  # a channel of zeros
    model = weight_only(one_layer("matrix", weight), "int8wo").filled()
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scale = held["weight_scale"]
    assert np.isfinite(scale).all()
    assert (np.abs(held["weight_int8"] * scale - weight) <= 0.5001 * scale).all()


def test_clipping_is_never_worse_than_the_whole_range() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 96), np.float32)
    model = weight_only(one_layer("matrix", weight), "int4wo").filled()
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    back = held["weight_int4"].astype(np.float32).reshape(2, BLOCK, 96) * held["weight_scale"][:, None]
    blocks = weight.reshape(2, BLOCK, 96)
    scale = np.abs(blocks).max(1, keepdims=True) / 7
    plain = np.rint(blocks / scale) * scale
    better, worse = (np.square(blocks - value).sum(1) for value in (back, plain))
    assert (better <= worse * 1.0001).all()
    assert better.sum() < 0.97 * worse.sum()


def export_integers(folder: Path) -> None:
    export(build_student(folder), precisions=["fp32", *WEIGHT_ONLY], batches=(3,))  # traced as tiny_student is


@pytest.fixture(scope="module")
def student() -> Path:
    return made("integers", export_integers)


def test_a_student_passes_its_gate_in_integers_and_is_smaller(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    assert summary(manifest.verification) == ""
    sizes = {graph.precision: (student / graph.file).stat().st_size for graph in manifest.graphs}
    assert sizes["int4wo"] < sizes["int8wo"] < sizes["fp32"]


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_engines_compute_integer_weights_alike(student: Path, precision: str) -> None:
    """ONNX Runtime would round activations too, and OpenVINO's streams compute such graphs wrongly."""
    images = [
        FastPipeline.from_pretrained(student, runtime=engine, precision=precision)(
            class_labels=[0, 1, 2, 3, 0, 1], seed=0, output_type="uint8"
        ).images.astype(int)
        for engine in ("onnxruntime", "openvino")
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    folder = StudentFolder(student)
    graph = folder.manifest.graph("denoiser", precision)
    assert graph is not None
    rng = np.random.default_rng(0)
    shapes = {spec.name: [3 if side == "batch" else side for side in spec.shape] for spec in graph.inputs}
    feed = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    feed = {name: value.astype(np.int64) if name == "class_labels" else value for name, value in feed.items()}
    model = onnx.load(student / graph.file)
    expected = ReferenceEvaluator(model).run(None, feed)[0]
    for engine in ("onnxruntime", "openvino"):
        found = load(engine, folder, graph, RuntimeOptions()).run(feed)["f"]
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 1e-4


def test_integers_lie_beside_large_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST_FILE", 0)
    folder = build_student(tmp_path / "student")
    manifest = export(folder, precisions=list(WEIGHT_ONLY), batches=(1,))
    assert [(graph.component, graph.data) for graph in manifest.graphs] == [
        ("denoiser", [f"onnx/denoiser.{precision}.onnx.data"]) for precision in WEIGHT_ONLY
    ]
    pipe = FastPipeline.from_pretrained(folder)  # the gate chose what may run without being asked
    assert pipe.runtime_info["precision"] == "int8wo"


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_tensorrt_rtx_builds_int8_without_the_loop_and_refuses_int4(student: Path, tmp_path: Path) -> None:
    from redif_sdk.export.tensorrt import build_engines

    rows = build_engines(student, precisions=["int8wo"], sm=[89], engine_dir=tmp_path)
    assert [row["component"] for row in rows] == ["denoiser"]
    for precision, component, message in (
        ("int8wo", "generator", r"Loop\) is a loop around weights that are rounded"),
        ("int4wo", "denoiser", r"DequantizeLinear\) rounds .* in blocks of channels, .* use int8wo"),
    ):
        with pytest.raises(ExportError, match=message):
            build_engines(student, precisions=[precision], components=[component], sm=[89], engine_dir=tmp_path)
