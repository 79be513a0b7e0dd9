"""TensorRT engines are really built here, by TensorRT-RTX, which needs no GPU for that. What runs them: test_trt.py."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_student
from made_once import made
from onnx import TensorProto, helper, numpy_helper

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.errors import ExportError, IntegrityError, InvalidRequest, RuntimeUnavailable
from redif_sdk.export import tensorrt as builder
from redif_sdk.export.tensorrt import build_engines
from redif_sdk.runtimes.protocol import nvidia_driver
from redif_sdk.runtimes.tensorrt import runtime as trt
from redif_sdk.runtimes.tensorrt.cuda import Gpu

ROOT = Path(__file__).resolve().parent.parent
L4 = Gpu(0, "NVIDIA L4", 89)
MINI = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
needs_no_gpu = pytest.mark.skipif(nvidia_driver() is not None, reason="there is a GPU here")
needs_no_tensorrt = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")

Copy = Callable[[Path], Path]


def add_graph(folder: Path, component: str, precision: str, model: onnx.ModelProto, split: bool = False) -> None:
    """Write a graph into a student, as `export` does; `split`: its weights in a file beside it."""
    file = f"onnx/{component}.{precision}.onnx"
    (folder / "onnx").mkdir(exist_ok=True)
    if split:
        location = f"{component}.{precision}.onnx.data"
        onnx.external_data_helper.convert_model_to_external_data(model, location=location, size_threshold=0)
        onnx.save_model(model, folder / file)
    else:
        (folder / file).write_bytes(model.SerializeToString())

    def specs(values: Any) -> list[TensorSpec]:
        names = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}
        names |= {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
        return [
            TensorSpec(
                name=value.name,
                dtype=names[value.type.tensor_type.elem_type],
                shape=[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]

    graph = Graph(
        component=component,
        precision=precision,
        file=file,
        data=[f"{file}.data"] if split else [],
        opset=model.opset_import[0].version,
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output),
    )
    manifest = StudentFolder(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"graphs": [*manifest.graphs, graph]}))


def compile_student(folder: Path, precisions: list[str], free: tuple[str, ...] = ()) -> None:
    """All graphs in every precision, without the parity gate: not every engine here runs every precision."""
    from redif_sdk.export.conditions import ExampleConditions
    from redif_sdk.export.fuse import generator_model
    from redif_sdk.export.networks import load_decoder, load_encoders, load_network
    from redif_sdk.export.onnx import GraphDenoiser, decoder_model, denoiser_model, size_multiple, text_encoder_model

    student = StudentFolder(folder)
    network, encoders, decoder = load_network(student), load_encoders(student), load_decoder(student)
    latents = student.manifest.latents
    if free:
        latents = latents.model_copy(update={"dynamic": list(free), "multiple": size_multiple(network)})
    manifest = write_manifest(folder, student.manifest.model_copy(update={"latents": latents}))
    conditions = ExampleConditions(student, encoders)
    denoiser = GraphDenoiser.of(network, manifest)
    for precision in precisions:
        model = denoiser_model(denoiser, manifest, precision, conditions)
        decoded = decoder_model(decoder, manifest, precision) if decoder is not None else None
        if encoders is not None:
            add_graph(folder, "text_encoder", precision, text_encoder_model(encoders, manifest, precision).filled())
        add_graph(folder, "denoiser", precision, model.filled())
        if decoded is not None:
            add_graph(folder, "decoder", precision, decoded.filled())
        add_graph(folder, "generator", precision, generator_model(model, manifest, decoded).filled())


def make_classes(folder: Path) -> None:
    compile_student(build_student(folder, classes=4, **MINI), ["fp32", "fp16", "bf16", "int8"])


def make_free(folder: Path) -> None:
    compile_student(build_student(folder, classes=None, channels_out=8, **MINI), ["fp32"])


def make_text_in_fp16(folder: Path) -> None:
    make_text(folder, "fp16")


def make_text_in_fp32(folder: Path) -> None:
    make_text(folder, "fp32")


def make_text(folder: Path, precision: str) -> None:
    """Guided and free as a student of test_export_text.py is, whose traces it shares."""
    import pipelines

    from redif_sdk.distill import import_pipeline

    import_pipeline(pipelines.stable_diffusion(), folder, steps=[2], prompts=pipelines.PROMPTS, guidance_scale=4.0)
    compile_student(folder, [precision], free=("height", "width"))


@pytest.fixture(scope="session")
def classes_student() -> Path:
    """A class-conditional student with graphs in every precision, the smallest UNet that there is. Read only."""
    return made("classes", make_classes)


@pytest.fixture(scope="session")
def free_student() -> Path:
    """An unconditional one whose network returns 2C channels. Read only."""
    return made("free", make_free)


@pytest.fixture(scope="session")
def text_students() -> dict[str, Callable[[], Path]]:
    """By precision: makes a student of the shape of Stable Diffusion, guided and of free sizes. Read only."""
    return {
        "fp16": lambda: made("sd-engines", make_text_in_fp16),
        "fp32": lambda: made("sd-engines-fp32", make_text_in_fp32),
    }


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines") / "rtx"


def with_graph(folder: Path, nodes: list[Any], dtype: int, shape: list[Any], opset: int = 20, **initial: Any) -> Path:
    """A student whose denoiser is `nodes`, from the inputs x, y, z of one dtype and shape to f."""
    folder.mkdir(exist_ok=True)
    (folder / "unet").mkdir()
    used = {name for node in nodes for name in node.input}
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in "xyz" if name in used]
    weights = [numpy_helper.from_array(value, name) for name, value in initial.items()]
    output = helper.make_tensor_value_info("f", dtype, shape)
    graph = helper.make_graph(nodes, "denoiser", inputs, [output], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    from conftest import build_scheduler

    from redif_sdk.artifact.manifest import Manifest
    from redif_sdk.artifact.records import Latents, Network
    from redif_sdk.sampling.table import StepTable

    manifest = Manifest(
        name="odd",
        licence="mit",
        task="unconditional",
        step_tables=[StepTable.from_scheduler(build_scheduler(), num_inference_steps=2).to_dict()],
        latents=Latents(channels=4, height=4, width=4),
        network=Network(class_path="diffusers.UNet2DModel", folder="unet"),
    )
    write_manifest(folder, manifest)
    add_graph(folder, "denoiser", "fp32", model)
    return folder


# ---------------------------------------------------------------------- what is really built


@needs_rtx
@pytest.mark.parametrize(
    ("component", "precision", "sm"),
    [
        *(("denoiser", "fp32", [89]), ("generator", "fp16", [75, 89])),
        *(("denoiser", "bf16", [80, 120]), ("generator", "int8", [86, 89])),
        pytest.param("generator", "fp32", [89], marks=pytest.mark.slow),
        pytest.param("denoiser", "fp16", [75, 89], marks=pytest.mark.slow),
        pytest.param("generator", "bf16", [80, 120], marks=pytest.mark.slow),
        pytest.param("denoiser", "int8", [86, 89], marks=pytest.mark.slow),
    ],
)
def test_every_precision_builds(
    classes_student: Path, engines: Path, component: str, precision: str, sm: list[int]
) -> None:
    [row] = build_engines(classes_student, precisions=[precision], components=[component], sm=sm, engine_dir=engines)
    data = Path(row["file"]).read_bytes()
    assert len(data) == row["bytes"] > 100_000
    assert data[:4] == b"vtrt"  # a plan of TensorRT-RTX
    assert (row["component"], row["precision"], row["targets"], row["device"]) == (component, precision, sm, None)
    assert row["cache"].startswith("miss: ")
    described = {spec["name"]: (spec["dtype"], spec["shape"]) for spec in row["inputs"]}
    batch = {"denoiser": "sample", "generator": "noise"}[component]
    assert described["class_labels"] == ("int64", ["batch"])
    assert row["profile"][batch][2] == {"denoiser": [8, 4, 14, 14], "generator": [4, 8, 4, 14, 14]}[component]
    [output] = row["outputs"]
    assert output["dtype"] == {"denoiser": "float32", "generator": "uint8"}[component]
    print(f"{component} {precision} {sm}: {row['seconds']} s")


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_part_of_a_text_to_image_student_builds(
    text_students: dict[str, Callable[[], Path]], engines: Path, precision: str
) -> None:
    text_student = text_students[precision]()
    sizes = ((16, 16), (24, 16), (32, 16))
    rows = build_engines(
        text_student, precisions=[precision], sm=[89], engine_dir=engines, batches=(1, 2, 4), sizes=sizes
    )
    profiles = {row["component"]: row["profile"] for row in rows}
    hidden, state = [[1, 16, 32], [2, 16, 32], [4, 16, 32]], [[1, 4, 8, 8], [2, 4, 12, 8], [4, 4, 16, 8]]
    assert profiles == {
        "text_encoder": {"input_ids": [[1, 16], [2, 16], [4, 16]]},
        "denoiser": {"sample": state, "timestep": [[1], [2], [4]], "encoder_hidden_states": hidden},
        "decoder": {"latents": state},
        "generator": {
            "noise": [[1, *shape] for shape in state],
            "table": [[1, 6], [2, 6], [2, 6]],
            "encoder_hidden_states": hidden,
        },
    }
    assert all(Path(row["file"]).read_bytes()[:4] == b"vtrt" for row in rows)
    assert [row["cache"].partition(":")[0] for row in rows] == ["miss"] * 4
    again = build_engines(
        text_student, precisions=[precision], sm=[89], engine_dir=engines, batches=(1, 2, 4), sizes=sizes
    )
    assert [row["cache"] for row in again] == ["hit"] * 4


@needs_rtx
def test_an_unconditional_student_for_every_target(free_student: Path, engines: Path) -> None:
    rows = build_engines(free_student, sm=[121, 120, 89, 86, 80, 80], engine_dir=engines)
    assert [row["targets"] for row in rows] == [[80, 86, 89, 120, 121]] * 2
    assert set(rows[1]["profile"]) == {"noise", "table"}
    again = build_engines(free_student, sm=[80, 86, 89, 120, 121], engine_dir=engines)
    assert [row["cache"] for row in again] == ["hit", "hit"]
    assert again[0] | {"cache": ""} == rows[0] | {"cache": ""}


@needs_rtx
def test_other_shapes_and_settings_are_other_engines(free_student: Path, engines: Path) -> None:
    fixed: dict[str, Any] = {"components": ["generator"], "sm": [86], "engine_dir": engines}
    [first] = build_engines(free_student, **fixed)
    [second] = build_engines(free_student, batches=(2, 2, 2), max_steps=6, **fixed)
    assert second["profile"] == {
        "noise": [[1, 2, 4, 14, 14], [1, 2, 4, 14, 14], [7, 2, 4, 14, 14]],
        "table": [[1, 6], [2, 6], [6, 6]],
    }
    assert second["cache"].startswith("miss: built for noise of 1x1x4x14x14")
    [third] = build_engines(free_student, level="fast", workspace_mb=64, **fixed)
    assert third["cache"] == "miss: built with level default, asked for fast"
    assert len({row["file"] for row in (first, second, third)}) == 3


@needs_rtx
def test_a_table_without_noise_needs_one_slice(free_student: Path, engines: Path, copy_of: Copy) -> None:
    folder = copy_of(free_student)
    manifest = StudentFolder(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"step_tables": manifest.step_tables[:1]}))
    [row] = build_engines(folder, components=["generator"], sm=[89], engine_dir=engines, max_steps=4)
    assert row["profile"]["noise"] == [[1, 1, 4, 14, 14], [1, 4, 4, 14, 14], [1, 8, 4, 14, 14]]
    assert row["profile"]["table"] == [[1, 6], [2, 6], [4, 6]]


@needs_rtx
def test_free_sizes(tmp_path: Path, engines: Path) -> None:
    weight = np.ones((4, 4, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["f"], name="conv", pads=[1, 1, 1, 1])
    folder = with_graph(tmp_path / "odd", [node], TensorProto.FLOAT, ["batch", 4, "height", "width"], w=weight)
    manifest = StudentFolder(folder).manifest
    free = manifest.latents.model_copy(update={"dynamic": ["height", "width"]})
    write_manifest(folder, manifest.model_copy(update={"latents": free}))
    [row] = build_engines(folder, sm=[75], engine_dir=engines, sizes=((4, 4), (8, 8), (16, 32)))
    assert row["profile"] == {"x": [[1, 4, 4, 4], [4, 4, 8, 8], [8, 4, 16, 32]]}
    [row] = build_engines(folder, sm=[75], engine_dir=engines)
    assert row["profile"] == {"x": [[1, 4, 4, 4], [4, 4, 4, 4], [8, 4, 4, 4]]}


@needs_rtx
def test_weights_in_a_file_beside_the_graph(free_student: Path, engines: Path, copy_of: Copy) -> None:
    folder = copy_of(free_student)
    model = onnx.load(folder / "onnx/denoiser.fp32.onnx")
    manifest = StudentFolder(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"graphs": []}))
    add_graph(folder, "denoiser", "fp32", model, split=True)
    [row] = build_engines(folder, sm=[89], engine_dir=engines)
    assert row["bytes"] > 100_000
    data = bytearray((folder / "onnx/denoiser.fp32.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "onnx/denoiser.fp32.onnx.data").write_bytes(data)
    with pytest.raises(Exception, match=r"denoiser\.fp32\.onnx\.data .* was altered"):
        build_engines(folder, sm=[86], engine_dir=engines)


@needs_rtx
@pytest.mark.slow  # that an engine is built once is in the tests above
def test_two_processes_build_one_engine(free_student: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from redif_sdk.export.tensorrt import build_engines; "
        "print([r['cache'] for r in build_engines(sys.argv[1], sm=[89], engine_dir=sys.argv[2])])"
    )
    command = [sys.executable, "-c", script, str(free_student), str(tmp_path / "engines")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    reasons = [reason for line in said for reason in json.loads(line.replace("'", '"'))]
    assert sorted(reasons) == ["hit", "hit", *["miss: no engine for this student"] * 2]
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 2


@needs_rtx
def test_what_tensorrt_says_goes_to_the_log(
    free_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "redif_sdk"):
        build_engines(free_student, components=["denoiser"], sm=[89], engine_dir=tmp_path / "engines")
    assert any(record.name == "redif_sdk.runtimes.tensorrt.runtime" for record in caplog.records)


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_the_enterprise_builder_with_rtx_in_its_place(
    free_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself cannot be had here. The API is the same, so its branch builds with RTX's library."""
    library, logger = trt.library("tensorrt-rtx"), trt.logger("tensorrt-rtx")
    monkeypatch.setattr(builder, "library", lambda flavour: library)
    monkeypatch.setattr(builder, "logger", lambda flavour: logger)
    monkeypatch.setattr(builder, "find_gpu", lambda: L4)
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    asked: dict[str, Any] = {"flavour": "tensorrt", "components": ["denoiser"]}
    [row] = build_engines(free_student, hardware_compatibility="ampere-plus", **asked)
    assert (row["targets"], row["device"], row["flavour"]) == ([89], "NVIDIA L4", "tensorrt")
    assert Path(row["file"]).parent == tmp_path / "engines"
    [timings] = (tmp_path / "engines").glob("*.timings")
    assert timings.name == f"tensorrt-{library.__version__}.NVIDIA-L4.timings"
    [other] = build_engines(free_student, timing_cache=False, **asked)
    assert other["cache"] == "miss: built with hardware compatibility ampere-plus, asked for none"


# ---------------------------------------------------------------------- what is refused


@needs_rtx
@needs_no_gpu
@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, RuntimeUnavailable, r"no GPU was found \(.*\), so the targets have to be named: --sm 89, of 75, 80, 86, "),
        ({"sm": [89]}, InvalidRequest, "without a GPU cannot enter the cache, .*: --engine-dir"),
        ({"sm": [90], "engine_dir": "e"}, InvalidRequest, "sm 90 is not a target of tensorrt-rtx .*; use 75, 80, "),
        ({"sm": [75], "engine_dir": "e"}, ExportError, r"\(Gemm\) multiplies matrices in fp32 and sm 75 cannot"),
        ({"strip_weights": True, "sm": [89], "engine_dir": "e"}, RuntimeUnavailable, "can be built on a GPU only"),
        ({"hardware_compatibility": "same-cc", "sm": [89]}, InvalidRequest, "hardware_compatibility is for tensorrt;"),
    ],
)
def test_what_rtx_does_not_build(
    free_student: Path, tmp_path: Path, asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "engine_dir" in asked:
        asked = asked | {"engine_dir": tmp_path / asked["engine_dir"]}
    with pytest.raises(error, match=message):
        build_engines(free_student, **asked)
    assert not list(tmp_path.rglob("*.engine"))


@needs_rtx
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"flavour": "trt"}, "flavour 'trt' is unknown; use tensorrt or tensorrt-rtx"),
        ({"level": "slow"}, "level is 'slow': .*'fast', 'default' or 'best'"),
        ({"workspace_mb": 0}, "workspace_mb is 0"),
        ({"batches": (4, 1, 8)}, r"batches are \(4, 1, 8\); give smallest, best and largest"),
        ({"batches": (0, 1, 8)}, r"batches are \(0, 1, 8\)"),
        ({"max_steps": 2}, "max_steps is 2, and tiny has a table of 3 steps"),
        (
            {"sizes": ((28, 28), (28, 28), (32, 28))},
            "height=32 is not supported; the student makes images of height 28",
        ),
        ({"precisions": ["fp16"]}, r"no graph of precision 'fp16' \(it has fp32\); export it first"),
        ({"components": ["decoder"]}, r"no graph of component 'decoder' \(it has denoiser, generator\)"),
    ],
)
def test_requests_that_mean_nothing(free_student: Path, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_engines(free_student, **{"sm": [89], "engine_dir": tmp_path / "e", **asked})


def test_an_engine_never_goes_into_a_student(free_student: Path) -> None:
    with pytest.raises(InvalidRequest, match="lies inside the student"):
        build_engines(free_student, sm=[89], engine_dir=free_student / "engines")


def test_a_student_that_was_not_exported(bare_student: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no graphs to build engines of; run redif export "):
        build_engines(bare_student, sm=[89], engine_dir=tmp_path)


@needs_no_tensorrt
def test_a_library_that_is_not_installed(free_student: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r'tensorrt cannot be imported .*pip install "redif-sdk\[tensorrt\]"'):
        build_engines(free_student, flavour="tensorrt")


@needs_rtx
def test_enterprise_builds_on_its_own_gpu_only(free_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "library", lambda flavour: SimpleNamespace(__version__="11.4"))
    with pytest.raises(InvalidRequest, match="sm is for tensorrt-rtx"):
        build_engines(free_student, flavour="tensorrt", sm=[89])
    monkeypatch.setattr(builder, "find_gpu", lambda: "no driver")
    with pytest.raises(RuntimeUnavailable, match=r"none was found \(no driver\); use tensorrt-rtx"):
        build_engines(free_student, flavour="tensorrt")


@needs_rtx
def test_the_cache_is_for_the_gpu_that_is_here(
    free_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "find_gpu", lambda: L4)
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    with pytest.raises(InvalidRequest, match="NVIDIA L4, which is sm 89; add that to --sm"):
        build_engines(free_student, sm=[86])
    [row] = build_engines(free_student, components=["denoiser"])
    assert (row["targets"], row["device"], Path(row["file"]).parent) == ([89], "NVIDIA L4", tmp_path / "engines")
    [portable] = build_engines(free_student, components=["denoiser"], sm=[86], engine_dir=tmp_path / "own")
    assert (portable["targets"], portable["device"]) == ([86], None)


ATTENTION = helper.make_node("Attention", ["x", "y", "z"], ["f"], name="attend")
PRODUCT = helper.make_node("MatMul", ["x", "y"], ["f"], name="product")
ODD = helper.make_node("CumSum", ["x", "y"], ["f"], name="the_odd_one")
WRONG = helper.make_node("DynamicQuantizeLinear", ["x"], ["f"], name="half")


@needs_rtx
@pytest.mark.parametrize(
    ("node", "dtype", "last", "opset", "sm", "message"),
    [
        (ATTENTION, TensorProto.FLOAT, 32, 23, 89, r"node attend \(Attention\) is attention in fp32"),
        (ATTENTION, TensorProto.FLOAT16, 8, 23, 89, r"node attend .* heads of fewer than 16 channels"),
        (PRODUCT, TensorProto.FLOAT, 4, 20, 75, r"node product \(MatMul\) multiplies matrices in fp32 and sm 75"),
        (PRODUCT, TensorProto.BFLOAT16, 4, 22, 75, r"node product \(MatMul\) computes in bf16 and sm 75 cannot"),
        (PRODUCT, TensorProto.FLOAT, 4, 26, 89, r"is of opset 26; TensorRT reads 9 to 25"),
        (ODD, TensorProto.FLOAT, 4, 20, 89, r"cannot read onnx/denoiser\.fp32\.onnx: node the_odd_one \(CumSum\): "),
        (WRONG, TensorProto.FLOAT, 4, 20, 89, r"the shapes of .*denoiser\.fp32\.onnx are inconsistent: .* half"),
    ],
)
def test_graphs_that_cannot_be_built_are_refused_by_node(
    tmp_path: Path, node: Any, dtype: int, last: int, opset: int, sm: int, message: str
) -> None:
    folder = with_graph(tmp_path / "odd", [node], dtype, ["batch", 2, last, last], opset)
    with pytest.raises(ExportError, match=message):
        build_engines(folder, sm=[sm], engine_dir=tmp_path / "engines")
    assert not list(tmp_path.rglob("*.engine"))


@needs_rtx
def test_what_the_refusals_let_through_builds(tmp_path: Path) -> None:
    """The same nodes, where the table of refusals says that they work."""
    engines = tmp_path / "engines"
    half = with_graph(tmp_path / "a", [ATTENTION], TensorProto.FLOAT16, ["batch", 2, 16, 16], 23)
    product = with_graph(tmp_path / "b", [PRODUCT], TensorProto.FLOAT16, ["batch", 2, 16, 16])
    assert build_engines(half, sm=[89], engine_dir=engines)
    assert build_engines(product, sm=[75], engine_dir=engines)


@needs_rtx
def test_a_failed_build_gives_the_builders_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "refuse_rtx", lambda *_: None)
    folder = with_graph(tmp_path / "odd", [PRODUCT], TensorProto.FLOAT, ["batch", 2, 4, 4])
    with pytest.raises(ExportError, match=r"cannot build onnx/denoiser\.fp32\.onnx: .*FP32 GEMM is not supported"):
        build_engines(folder, sm=[75], engine_dir=tmp_path / "engines")


@needs_rtx
def test_a_graph_that_is_not_what_the_manifest_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own reader refuses it; and so does the builder, by what TensorRT made of the graph."""
    folder = with_graph(tmp_path / "odd", [PRODUCT], TensorProto.FLOAT, ["batch", 2, 4, 4])
    manifest = StudentFolder(folder).manifest
    graph = manifest.graphs[0]
    for outputs, message in (
        ([graph.outputs[0].model_copy(update={"dtype": "float16"})], r"f of .* is float32 .* and float16"),
        ([graph.outputs[0].model_copy(update={"name": "g"})], "has f for TensorRT, and g in the manifest"),
    ):
        changed = graph.model_copy(update={"outputs": outputs})
        write_manifest(folder, manifest.model_copy(update={"graphs": [changed]}))
        with pytest.raises(IntegrityError, match="not those that the manifest lists"):
            build_engines(folder, sm=[89], engine_dir=tmp_path / "engines")
        with monkeypatch.context() as unchecked:
            unchecked.setattr("redif_sdk.artifact.folder.check_graph", lambda *_: None)
            with pytest.raises(ExportError, match=message):
                build_engines(folder, sm=[89], engine_dir=tmp_path / "engines")


@needs_rtx
@pytest.mark.parametrize("inner", [False, True])
def test_weights_in_a_file_that_nobody_checked_are_not_read(tmp_path: Path, inner: bool) -> None:
    node = helper.make_node("Add", ["x", "w"], ["f"], name="add")
    folder = with_graph(tmp_path / "odd", [node], TensorProto.FLOAT, ["batch", 4], w=np.ones((1, 4), np.float32))
    model = onnx.load(folder / "onnx/denoiser.fp32.onnx")
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="/etc/hostname")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    if inner:
        constant = helper.make_node("Constant", [], ["w"], name="constant", value=tensor)
        model.graph.ClearField("initializer")
        model.graph.node.insert(0, constant)
    (folder / "onnx/denoiser.fp32.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, StudentFolder(folder).manifest)
    with pytest.raises(IntegrityError, match="data file" if inner else "/etc/hostname"):
        build_engines(folder, sm=[89], engine_dir=tmp_path / "engines")


@needs_rtx
def test_a_free_axis_that_nobody_knows(tmp_path: Path) -> None:
    folder = with_graph(tmp_path / "odd", [PRODUCT], TensorProto.FLOAT, ["batch", "frames", 4, 4])
    with pytest.raises(ExportError, match=r"x of onnx/denoiser\.fp32\.onnx has the free axis 'frames'"):
        build_engines(folder, sm=[89], engine_dir=tmp_path / "engines")


@needs_no_gpu
def test_the_gpu_benchmark_stops_where_there_is_no_gpu(free_student: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/run.py", str(free_student), "-o", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("no CUDA device was found (no libcuda.so.1")
    assert not (tmp_path / "out.json").exists()


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmarks_own_loop_makes_the_same_pictures(classes_student: Path) -> None:
    student = StudentFolder(classes_student)
    loop = load_benchmark().torch_loop(student, "fp32", compiled=False, device="cpu")
    pipe = FastPipeline.from_pretrained(classes_student, runtime="onnxruntime", precision="fp32", device="cpu")
    labels = np.array([0, 3])
    for steps in (2, 3):
        slices = student.manifest.step_table(steps).noise_slices
        noise = np.random.default_rng(0).standard_normal((slices, 2, 4, 14, 14)).astype(np.float32)
        ours, theirs = loop(noise, labels, steps), pipe.generate_array(noise, labels, steps)
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_gpu_benchmark_times_in_turns_and_lists_what_fails(classes_student: Path) -> None:
    benchmark = load_benchmark()
    turns: list[str] = []

    def good(noise: Any, labels: Any, steps: int) -> None:
        turns.append("good")

    def bad(noise: Any, labels: Any, steps: int) -> None:
        raise RuntimeError("out of\nmemory")

    contenders = {benchmark.REFERENCE: good, "bad": bad, "other": good}
    rows = benchmark.measure(StudentFolder(classes_student), contenders, batch=2, steps=2, rounds=3)
    assert len(turns) == 2 * (benchmark.WARM_UP + 2 + 3)  # the timing loop itself warms up twice
    assert rows[0] == {"contender": "bad", "num_inference_steps": 2, "batch": 2, "skipped": "out of memory"}
    assert [row["contender"] for row in rows[1:]] == [benchmark.REFERENCE, "other"]
    assert rows[1]["ratio"] == 1.0
    assert {"seconds_p95", "images_per_second", "ratio_to"} < set(rows[2])


@needs_no_gpu
def test_the_gpu_benchmark_says_what_cannot_be_had(classes_student: Path) -> None:
    found = {name: reason for name, reason, _ in load_benchmark().load_all(StudentFolder(classes_student))}
    assert all(isinstance(reason, str) for reason in found.values())
    assert len(found) == 16
    assert "has no CUDA" in found["torch eager fp32"]
    assert "no GPU was found" in found["tensorrt-rtx fp16"] or "pip install" in found["tensorrt-rtx fp16"]
