"""Graphs in fp16, bf16 and int8, and graphs of free sizes: what is in them, and that the gate looks at each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SMALL, build_student
from onnx import TensorProto, helper, numpy_helper

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import ExportError, InvalidRequest, ParityError, RuntimeUnavailable
from redif_sdk.export import export, precision, verify
from redif_sdk.export.conditions import ExampleConditions
from redif_sdk.export.emulate import emulate
from redif_sdk.export.onnx import GraphDenoiser, load_network
from redif_sdk.export.verify import absent, summary

Copy = Callable[[Path], Path]
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def model(student: Path, component: str, kind: str) -> onnx.ModelProto:
    return onnx.load(student / f"onnx/{component}.{kind}.onnx")


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sqrt(np.mean((value - reference) ** 2) / np.mean(reference**2)))


def test_every_precision_is_a_valid_pair_of_graphs_that_passed_its_gate(full_student: Path) -> None:
    manifest = StudentFolder(full_student).manifest
    assert [(g.component, g.precision) for g in manifest.graphs] == [
        (component, kind) for kind in PRECISIONS for component in ("denoiser", "generator")
    ]
    for graph in manifest.graphs:
        onnx.checker.check_model(onnx.load(full_student / graph.file), full_check=True)
        assert {spec.dtype for spec in graph.inputs} <= {"float32", "int64"}  # in every precision
    checked = {(row["precision"], row["component"]) for row in manifest.verification if row["passed"]}
    assert checked >= {(kind, name) for kind in PRECISIONS for name in ("denoiser", "loop", "generator")}
    assert summary(manifest.verification) == ""
    assert all(row["reason"] is None for row in manifest.verification)  # what is absent here is not stored


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_the_network_is_in_its_dtype_and_the_sampler_in_fp32(full_student: Path, kind: str, dtype: int) -> None:
    weights = {t.name: t.data_type for t in model(full_student, "denoiser", kind).graph.initializer}
    assert all(weights[name] == dtype for name in weights if name.startswith("network.") and "weight" in name)
    outer = model(full_student, "generator", kind).graph
    assert {t.data_type for t in outer.initializer} <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL}
    body = next(a.g for node in outer.node if node.op_type == "Loop" for a in node.attribute if a.name == "body")
    assert {value.type.tensor_type.elem_type for value in body.output} == {TensorProto.BOOL, TensorProto.FLOAT}
    ours = [node for node in body.node if node.name.startswith("redif.")]
    assert not [node for node in ours if node.op_type == "Cast"]
    sizes = {k: (full_student / f"onnx/denoiser.{k}.onnx").stat().st_size for k in ("fp32", kind)}
    assert sizes[kind] < 0.6 * sizes["fp32"]


def test_int8_is_symmetric_on_all_but_the_outermost_convolutions(full_student: Path) -> None:
    graph = model(full_student, "denoiser", "int8").graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for node in (convolutions[0], convolutions[-1]):
        assert "DequantizeLinear" not in [made_by[name].op_type for name in node.input if name in made_by]
    for node in convolutions[1:-1]:
        data, weight, bias = node.input
        assert made_by[data].op_type == made_by[weight].op_type == "DequantizeLinear"
        assert bias in constants  # in fp32: TensorRT takes no int32
        stored, scale, zero = (constants[name] for name in made_by[weight].input)
        assert stored.dtype == np.int8
        assert scale.shape == (len(stored),)  # one a channel
        assert not zero.any()
        assert np.abs(stored.astype(int)).max() <= 64  # seven bits: sums of two products fit into 16
        assert constants[made_by[data].input[2]] == 0
    assert {node.domain for node in graph.node} == {""}


def test_ranges_are_those_of_noise_that_no_evaluation_uses(full_student: Path) -> None:
    manifest = StudentFolder(full_student).manifest
    conditions = ExampleConditions(StudentFolder(full_student))
    feeds = list(precision.trajectories(model(full_student, "denoiser", "fp32"), manifest, conditions))
    assert len(feeds) == (2 + 3) * precision.CALIBRATION_IMAGES // precision.PIECE
    times = {float(feed["timestep"][0]) for feed in feeds}
    assert times == {float(t) for k in (2, 3) for t in manifest.step_table(k).timesteps}
    assert set(np.concatenate([feed["class_labels"] for feed in feeds])) == set(range(10))
    golden = np.load(full_student / manifest.golden[0].file)["x"][0]
    assert not any(np.allclose(golden[0], x) for feed in feeds for x in feed["sample"])


def test_emulated_bf16_is_as_far_from_fp32_as_torch_in_bf16(full_student: Path) -> None:
    network = load_network(StudentFolder(full_student))
    sample, timestep, labels = torch.randn(4, 4, 14, 14), torch.full((4,), 700.0), torch.arange(4)
    narrow = GraphDenoiser(torch.nn.Module.to(copy.deepcopy(network), torch.bfloat16), 4, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = GraphDenoiser(network, 4)(sample, timestep, labels).numpy()
        in_torch = relative(narrow(sample, timestep, labels).numpy(), exact)
    emulated = emulate(model(full_student, "denoiser", "bf16"))
    onnx.checker.check_model(emulated, full_check=True)
    session = onnxruntime.InferenceSession(emulated.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"sample": sample.numpy(), "timestep": timestep.numpy(), "class_labels": labels.numpy()}
    error = relative(session.run(["f"], feed)[0], exact)
    assert 0.5 * in_torch < error < 2 * in_torch
    assert in_torch > 1e-3  # it is bf16, and no fp32 in disguise


def test_emulation_rounds_after_every_node_also_in_a_loop() -> None:
    """1 + 1/256 is no bfloat16: added four times in a loop, it is rounded away each time."""
    bf16, number = TensorProto.BFLOAT16, helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "small"], ["y"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [number("k", TensorProto.INT64, []), number("go", TensorProto.BOOL, []), number("x", bf16, [1])],
        [number("on", TensorProto.BOOL, []), number("y", bf16, [1])],
        initializer=[helper.make_tensor("small", bf16, [1], [1 / 256])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["start"], ["narrow"], to=bf16),
            helper.make_node("Loop", ["four", "yes", "narrow"], ["end"], body=body),
            helper.make_node("Cast", ["end"], ["out"], to=TensorProto.FLOAT),
        ],
        "rounding",
        [number("start", TensorProto.FLOAT, [1])],
        [number("out", TensorProto.FLOAT, [1])],
        initializer=[
            helper.make_tensor("four", TensorProto.INT64, [], [4]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ],
    )
    emulated = emulate(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    session = onnxruntime.InferenceSession(emulated.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"start": np.array([1.0], np.float32)})[0] == [1.0]
    assert session.run(None, {"start": np.array([0.25], np.float32)})[0] == [0.25 + 4 / 256]


# ---------------------------------------------------------------- the gate


def test_what_cannot_be_checked_here_is_said_and_is_no_pass(full_student: Path) -> None:
    rows = verify(full_student)
    assert summary(rows) == ""
    unchecked = [row for row in rows if row["passed"] is None]
    for row in unchecked:
        assert row["reason"]
        assert f"{row['precision']} on {row['runtime']}" in absent(rows)
    assert {(row["precision"], row["runtime"]) for row in unchecked} >= {("bf16", "onnxruntime")}
    bf16 = {row["runtime"] for row in rows if row["precision"] == "bf16" and row["passed"]}
    assert bf16 in ({"emulated"}, {"openvino", "emulated"})  # OpenVINO is given the network alone
    refused = {row["runtime"] for row in unchecked if row["precision"] == "bf16"}
    assert ("openvino" in refused) == ("openvino" not in bf16)


def test_parts_of_the_gate(full_student: Path) -> None:
    rows = verify(full_student, ["onnxruntime"], precisions=["int8"], batches=[3], sizes=[(36, 28)])
    assert {(row["batch"], row["size"]) for row in rows} == {(3, "36x28")}
    assert {row["precision"] for row in rows if row["component"] != "noise"} == {"int8"}
    for wrong in ({"batches": [8]}, {"sizes": [(1, 1)]}, {"precisions": ["fp7"]}):
        with pytest.raises(InvalidRequest, match="ask for some of these"):
            verify(full_student, **wrong)


def test_a_precision_that_does_not_pass_is_refused_and_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_student(tmp_path / "coarse", **SMALL)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(precision, "PERCENTILE", 50.0)  # half of all activations are clipped
    sizes = [(28, 28), (36, 28)]  # the shared student's, whose trace this is
    with pytest.raises(ParityError, match="denoiser int8 on onnxruntime"):
        export(folder, precisions=["fp32", "int8"], runtimes=["onnxruntime"], batches=(1,), sizes=sizes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_int8_needs_something_to_quantise() -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["sample"], ["f"])], "none", [], [])
    manifest: Any = type("Named", (), {"name": "flat"})
    with pytest.raises(ExportError, match="flat has 0 convolutions"):
        precision.int8_model(helper.make_model(graph), manifest, manifest)


# ---------------------------------------------------------------- asking for a precision


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_a_precision_that_is_asked_for_is_what_computes(full_student: Path, kind: str) -> None:
    pipe = FastPipeline.from_pretrained(full_student, precision=kind)
    exact = FastPipeline.from_pretrained(full_student, precision="fp32")
    out = pipe(class_labels=[1, 2, 3], seed=0, output_type="uint8")
    assert out.runtime_info["precision"] == pipe.runtime_info["precision"] == kind
    assert f".{kind}." in out.runtime_info["file"]
    difference = out.images.astype(int) - exact(class_labels=[1, 2, 3], seed=0, output_type="uint8").images
    assert np.sqrt(np.mean(difference.astype(float) ** 2)) < 8
    assert (np.abs(difference).max() > 0) == (kind != "fp32")


def test_steps_are_in_the_precision_that_was_asked_for(full_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(full_student, precision="int8")
    out = pipe(class_labels=3, seed=0, output_type="uint8", callback_on_step_end=lambda *_: None)
    assert (out.runtime_info["component"], out.runtime_info["precision"]) == ("denoiser", "int8")
    assert np.abs(out.images.astype(int) - pipe(class_labels=3, seed=0, output_type="uint8").images).max() <= 1


def test_a_student_without_fp32_is_run_in_what_it_has(full_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(full_student, folder)
    export(folder, precisions=["fp16"])
    assert FastPipeline.from_pretrained(folder).runtime_info["precision"] == "fp16"
    with pytest.raises(RuntimeUnavailable, match=r"no graph in int8 \(it has fp16\)"):
        FastPipeline.from_pretrained(folder, precision="int8")


# ---------------------------------------------------------------- free sizes


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_sizes_are_what_torch_makes_of_them(full_student: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    manifest = StudentFolder(full_student).manifest
    assert (manifest.latents.dynamic, manifest.latents.multiple) == (["height"], 1)
    pipe = FastPipeline.from_pretrained(full_student, runtime=runtime, precision="fp32")  # auto: bfloat16, if it can
    out = pipe(class_labels=[4, 5], seed=1, height=50, output_type="uint8")
    assert out.images.shape == (2, 50, 28, 1)
    latents = torch.randn(2, 4, 25, 14)
    network, table = GraphDenoiser(load_network(StudentFolder(full_student)), 4), manifest.step_table(2)
    x = latents * table.init_scale
    with torch.no_grad():
        for k in range(2):
            f = network(x, torch.full((2,), float(table.timesteps[k])), torch.tensor([4, 5]))
            x = table.advance(k, x, table.clean(k, x, f), x)
    expected = (torch.nn.functional.pixel_shuffle(x, 2) * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    images = pipe(class_labels=[4, 5], latents=latents, output_type="uint8").images
    assert np.abs(images.astype(int) - expected.numpy()).max() <= 1
    assert len(list(pipe.stream("a", seed=0, height=26))) == 2


def test_sizes_that_cannot_be_had_are_refused(full_student: Path, tiny_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(full_student)
    for wrong, message in (
        ({"height": 51}, "give a multiple of 2"),
        ({"height": 0}, "height is 0"),
        ({"width": 30}, "width=30 is not supported; the student makes images of width 28"),
        ({"latents": np.zeros((1, 4, 14, 15))}, "width=30 is not supported"),
        ({"height": 28, "latents": np.zeros((1, 4, 15, 14))}, r"give \(1, 4, 14, 14\)"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            pipe("a", **wrong)
    with pytest.raises(InvalidRequest, match="height=56 is not supported; the student makes"):
        FastPipeline.from_pretrained(tiny_student)("a", height=56)


def test_a_network_that_halves_its_input_takes_even_sizes_alone(tmp_path: Path) -> None:
    folder = build_student(tmp_path / "halving")
    with pytest.raises(InvalidRequest, match="height=30 is not supported; give a multiple of 4"):
        export(folder, sizes=[(30, 28)])
