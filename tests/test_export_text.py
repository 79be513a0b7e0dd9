"""Text-to-image students, exported: real classes of diffusers and transformers with few random weights, against torch.

The pipelines are those of `pipelines.py`, imported as students; nothing is fetched.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pipelines
import pytest
import torch
from made_once import made
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from torch import Tensor

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.records import TextCondition
from redif_sdk.distill import import_pipeline
from redif_sdk.errors import ExportError, IntegrityError, InvalidRequest, ManifestError, UnsupportedModel
from redif_sdk.export import build, export, store, verify
from redif_sdk.export.conditions import ExampleConditions
from redif_sdk.export.networks import load_decoder, load_encoders, load_network
from redif_sdk.export.onnx import GraphDenoiser, denoiser_model, part_precision, text_encoder_model
from redif_sdk.export.verify import summary
from redif_sdk.runtimes import runnable
from redif_sdk.runtimes.guided import GuidedInputs
from redif_sdk.sampling.noise import noise as draw

Copy = Callable[[Path], Path]
PROMPTS = pipelines.PROMPTS
PARTS = ("text_encoder", "denoiser", "decoder", "encoder", "generator")
PRECISIONS = ("fp32", "int8")
#: Of every export here that can be of free sizes, so that parts which are alike are traced once.
SIZES = [(16, 16), (24, 20)]


def imported(folder: Path, pipeline: Any, **options: Any) -> Path:
    import_pipeline(pipeline, folder, **{"steps": [2], "prompts": PROMPTS, "guidance_scale": 1.0, **options})
    return folder


def changed(folder: Path, **fields: Any) -> Path:
    """The student with other fields in its manifest."""
    write_manifest(folder, StudentFolder(folder).manifest.model_copy(update=fields))
    return folder


def session(student: Path, component: str, precision: str = "fp32") -> onnxruntime.InferenceSession:
    file = student / f"onnx/{component}.{precision}.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def relative(value: np.ndarray, reference: Tensor) -> float:
    expected = reference.numpy()
    assert value.shape == expected.shape
    return float(np.sqrt(np.mean((value - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def bare(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the shape of Stable Diffusion, without graphs. Read only."""
    return imported(tmp_path_factory.mktemp("bare") / "sd", pipeline, steps=[2, 3])


def export_sd(folder: Path) -> None:
    imported(folder, pipelines.stable_diffusion())
    export(folder, precisions=PRECISIONS, batches=(1, 3), sizes=SIZES)


def export_sd_in_fp16(folder: Path) -> None:
    """In half precision each part is traced once more, which takes a minute."""
    imported(folder, pipelines.stable_diffusion())
    export(folder, precisions=("fp32", "fp16"), batches=(1, 3), sizes=SIZES)


@pytest.fixture(scope="module")
def student() -> Path:
    """The same, exported with free sizes. Read only."""
    return made("sd", export_sd)


@pytest.fixture(scope="module")
def half_student() -> Path:
    """The same with fp16, for slow tests. Read only."""
    return made("sd-fp16", export_sd_in_fp16)


# ---------------------------------------------------------------- the graphs


def test_every_part_is_a_valid_graph_that_passed_its_gate(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    assert [(g.component, g.precision) for g in manifest.graphs] == [(c, p) for p in PRECISIONS for c in PARTS]
    for graph in manifest.graphs:
        onnx.checker.check_model(onnx.load(student / graph.file), full_check=True)
        assert {spec.dtype for spec in (*graph.inputs, *graph.outputs)} <= {"float32", "int64", "uint8"}
    rows = verify(student, precisions=["fp32"])
    assert summary(rows) == ""
    checked = {(row["component"], row["precision"]) for row in rows if row["passed"]}
    assert checked == {(name, "fp32") for name in (*PARTS, "loop", "noise", "tokenizer")}
    assert {(row["batch"], row["size"]) for row in rows if row["passed"]} == {
        (batch, size) for batch in (1, 3) for size in ("16x16", "24x20")
    }
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row for row in manifest.verification if not row["passed"]] == []


def test_names_and_shapes_are_the_agreed_ones(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    shapes = {
        graph.component: [{spec.name: spec.shape for spec in side} for side in (graph.inputs, graph.outputs)]
        for graph in manifest.graphs
        if graph.precision == "fp32"
    }
    hidden = {"encoder_hidden_states": ["batch", pipelines.LENGTH, 32]}
    rows = {"encoder_hidden_states": ["rows", pipelines.LENGTH, 32], "guidance_rows": ["rows"]}
    rows |= {"null_rows": ["batch"], "guidance_scale": ["batch"]}
    state = ["batch", 4, "height", "width"]
    assert shapes == {
        "text_encoder": [{"input_ids": ["batch", pipelines.LENGTH]}, hidden],
        "denoiser": [{"sample": state, "timestep": ["batch"], **rows}, {"f": state}],
        "decoder": [{"latents": state}, {"sample": ["batch", 3, "image_height", "image_width"]}],
        "encoder": [{"image": ["batch", 3, "image_height", "image_width"]}, {"latents": state}],
        "generator": [
            {"noise": ["slices", *state], "table": ["steps", 6], "init_scale": [], **rows},
            {"images": ["batch", "image_height", "image_width", 3]},
        ],
    }


@pytest.mark.slow
def test_fp16_is_in_the_weights_of_every_part(half_student: Path) -> None:
    for component in ("text_encoder", "denoiser", "decoder", "encoder"):
        sizes = [(half_student / f"onnx/{component}.{kind}.onnx").stat().st_size for kind in ("fp32", "fp16")]
        assert sizes[1] < 0.65 * sizes[0], component


@pytest.mark.parametrize("size", [(8, 8), (14, 6)])
def test_each_graph_is_what_the_pipelines_own_part_computes(
    student: Path, pipeline: Any, size: tuple[int, int]
) -> None:
    prompts = [PROMPTS[3], "something else", PROMPTS[0]]
    ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    x, t = torch.randn(3, 4, *size), torch.tensor([700.0, 20.0, 300.0])
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids)[0]
        f = pipeline.unet(x, t, encoder_hidden_states=hidden).sample
        decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    given = hidden.numpy()
    assert relative(session(student, "text_encoder").run(None, {"input_ids": ids.numpy()})[0], hidden) < 1e-5
    feed = {"sample": x.numpy(), "timestep": t.numpy(), "encoder_hidden_states": given}
    feed = GuidedInputs(StudentFolder(student).manifest.graph_conditions)({**feed, "guidance_scale": np.ones(3, "f4")})
    assert relative(session(student, "denoiser").run(None, feed)[0], f) < 1e-5
    assert relative(session(student, "decoder").run(None, {"latents": x.numpy()})[0], decoded) < 1e-5


def in_torch(pipeline: Any, student: Path, prompts: list[str], seed: int, size: tuple[int, int]) -> np.ndarray:
    """The pictures of two steps, by the pipeline's own parts, as uint8."""
    table = StudentFolder(student).manifest.step_table(2)
    seeds = [(seed, index) for index in range(len(prompts))]
    x = torch.from_numpy(draw(seeds, (4, *size), slices=1))[0] * table.init_scale
    with torch.no_grad():
        hidden = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        for k in range(2):
            f = pipeline.unet(x, torch.tensor(float(table.timesteps[k])), encoder_hidden_states=hidden).sample
            x = table.advance(k, x, table.clean(k, x, f))
        pictures = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return (pictures * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_prompt_becomes_the_picture_that_torch_makes_of_it(student: Path, pipeline: Any, runtime: str) -> None:
    pytest.importorskip(runtime)
    pipe = FastPipeline.from_pretrained(student, runtime=runtime, precision="fp32", num_threads=1)
    asked = ["red heart", "green tree"]
    for height, width in ((16, 16), (20, 28)):
        out = pipe(asked, seed=5, num_inference_steps=2, height=height, width=width, output_type="uint8")
        expected = in_torch(pipeline, student, asked, 5, (height // 2, width // 2))
        assert np.abs(out.images.astype(int) - expected).max() <= 1
        assert out.images.std() > 10
        assert np.abs(out.images[0].astype(int) - out.images[1]).max() > 1


# ---------------------------------------------------------------- the gate notices


def test_a_tokenizer_that_was_altered_is_refused_and_one_that_is_another_fails(student: Path, copy_of: Copy) -> None:
    folder = copy_of(student)
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    for read in (verify, lambda folder: FastPipeline.from_pretrained(folder)(PROMPTS[0])):
        with pytest.raises(IntegrityError, match=r"tokenizer/tokenizer\.json"):
            read(folder)
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["red</w>"], vocab["heart</w>"] = vocab["heart</w>"], vocab["red</w>"]
    path.write_text(json.dumps(tokenizer))
    write_manifest(folder, StudentFolder(folder).manifest)  # its maker signs it
    failed = [row for row in verify(folder, ["onnxruntime"], precisions=["fp32"]) if not row["passed"]]
    assert {row["component"] for row in failed} == {"tokenizer"}
    assert "tokenizer fp32 on tokenizers" in summary(failed)


@pytest.mark.parametrize(
    ("component", "noticed"),
    [("text_encoder", {"text_encoder"}), ("decoder", {"decoder", "loop"}), ("encoder", {"encoder"})],
)
def test_a_part_of_other_weights_fails_although_its_hash_is_right(
    student: Path, copy_of: Copy, component: str, noticed: set[str]
) -> None:
    folder = copy_of(student)
    path = folder / f"onnx/{component}.fp32.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.5), largest.name))
    onnx.save(model, path)
    write_manifest(folder, StudentFolder(folder).manifest)
    rows = verify(folder, ["onnxruntime"], precisions=["fp32"])
    assert {row["component"] for row in rows if not row["passed"]} == noticed


def test_values_of_a_decoder_that_are_not_finite_fail(student: Path, copy_of: Copy) -> None:
    folder = copy_of(student)
    path = folder / "onnx/decoder.fp32.onnx"
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(model, path)
    write_manifest(folder, StudentFolder(folder).manifest)
    failed = [row for row in verify(folder, ["onnxruntime"], precisions=["fp32"]) if not row["passed"]]
    assert {row["component"] for row in failed} == {"decoder", "loop"}
    assert all(row["nonfinite"] > 0 for row in failed)


@pytest.mark.parametrize("gone", ["prompts", "tokens.input_ids", "conditions.encoder_hidden_states", "latents"])
def test_golden_files_without_a_part_cannot_be_used(student: Path, copy_of: Copy, gone: str) -> None:
    folder = copy_of(student)
    path = folder / "golden/steps-2-batch-3.npz"
    with np.load(path) as arrays:
        good = dict(arrays)
    for bad in ({n: v for n, v in good.items() if n != gone}, good | {gone: good[gone][:1]}):
        np.savez(path, **bad)
        write_manifest(folder, StudentFolder(folder).manifest)
        with pytest.raises(ManifestError, match=r"golden/steps-2-batch-3\.npz"):
            verify(folder)


# ---------------------------------------------------------------- precisions


@pytest.mark.parametrize(
    ("name", "kind", "parts"),  # of the parts beside the network int8 has the fp32 graphs
    [("student", "int8", "fp32"), pytest.param("half_student", "fp16", "fp16", marks=pytest.mark.slow)],
)
def test_every_part_in_a_precision(name: str, kind: str, parts: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    manifest = StudentFolder(folder).manifest
    assert summary(manifest.verification) == ""
    files = {(graph.component, graph.precision): graph.file for graph in manifest.graphs}
    for component in ("text_encoder", "decoder", "encoder"):
        assert files[component, kind] == f"onnx/{component}.{parts}.onnx"
    assert files["denoiser", kind] == f"onnx/denoiser.{kind}.onnx"
    network = onnx.load(folder / f"onnx/denoiser.{kind}.onnx")
    assert any(node.op_type == "DequantizeLinear" for node in network.graph.node) == (kind == "int8")
    seen = {(row["component"], row["precision"]) for row in manifest.verification if row["runtime"] != "numpy"}
    assert seen >= {(part, kind) for part in (*PARTS, "loop")}
    pipe = FastPipeline.from_pretrained(folder, precision=kind)
    assert pipe(PROMPTS[0], seed=0, output_type="uint8").images.std() > 10


@pytest.mark.slow
def test_bfloat16_of_every_part(bare: Path, copy_of: Copy) -> None:
    manifest = export(copy_of(bare), precisions=["bf16"], batches=(1,), sizes=SIZES)
    assert [graph.file for graph in manifest.graphs] == [f"onnx/{part}.bf16.onnx" for part in PARTS]
    seen = {row["component"] for row in manifest.verification if row["precision"] == "bf16"}
    assert seen >= {*PARTS, "loop"}
    assert summary(manifest.verification) == ""


def test_a_decoder_that_overflows_in_half_precision_stays_whole(tmp_path: Path) -> None:
    pipeline = pipelines.stable_diffusion_xl()
    for upcast, fp16 in ((False, "fp16"), (True, "fp32")):
        pipeline.vae.register_to_config(force_upcast=upcast)
        student = StudentFolder(imported(tmp_path / str(upcast), pipeline))
        decoder = load_decoder(student)
        kinds = ("fp32", "fp16", "bf16", "int8")
        found = [part_precision("decoder", kind, student.manifest, decoder) for kind in kinds]
        assert found == ["fp32", fp16, "bf16", "fp32"]
        assert part_precision("text_encoder", "fp16", student.manifest, decoder) == "fp16"


@pytest.mark.slow
def test_a_decoder_that_stays_whole_is_beside_a_network_in_half_precision(
    bare: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SDXL's is; here Stable Diffusion's is said to overflow, whose parts are traced already."""
    folder = copy_of(bare)
    monkeypatch.setattr(build, "part_precision", lambda part, kind, *_: "fp32" if part == "decoder" else kind)
    manifest = export(folder, precisions=["fp16"], batches=(1,), sizes=SIZES)
    assert [graph.file for graph in manifest.graphs if graph.component == "decoder"] == ["onnx/decoder.fp32.onnx"]
    assert summary(manifest.verification) == ""
    onnx.checker.check_model(onnx.load(folder / "onnx/generator.fp16.onnx"), full_check=True)


def test_what_t5_keeps_in_float32_stays_so_beside_float16(tmp_path: Path) -> None:
    student = StudentFolder(imported(tmp_path / "pixart", pipelines.pixart()))
    encoders = load_encoders(student)
    assert encoders is not None
    model = text_encoder_model(encoders, student.manifest, "fp16").filled()
    kinds: dict[bool, set[int]] = {True: set(), False: set()}
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            kinds[tensor.dims[0] == 64 or tensor.dims[1] == 64].add(tensor.data_type)  # the feed-forward layers
    assert kinds[False] == {TensorProto.FLOAT16}
    assert kinds[True] == {TensorProto.FLOAT, TensorProto.FLOAT16}  # wo, and wi


# ---------------------------------------------------------------- the other families

FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lcm": (pipelines.latent_consistency, {"guidance_scale": 3.0}),
    "sdxl": (pipelines.stable_diffusion_xl, {"guidance_scale": 2.0}),
    "sd3": (pipelines.stable_diffusion_3, {}),
    "sd3-without-t5": (lambda: pipelines.stable_diffusion_3(with_t5=False), {}),
    "flux-dev": (pipelines.flux, {"height": 16, "width": 16, "guidance_scale": 3.5}),
    "flux-schnell": (
        lambda: pipelines.flux(guidance_embeds=False, dynamic=False),
        {"height": 16, "width": 16, "guidance_scale": None},
    ),
    "pixart": (pipelines.pixart, {}),
    "dit": (pipelines.dit, {"prompts": None}),
}
FREE = {"lcm", "sdxl", "sd3", "sd3-without-t5", "flux-dev", "flux-schnell"}


#: Others pass through the same code; what is their own is held to their pipelines in test_adapters.py, without a graph.
SLOW = set(FAMILIES) - {"pixart"}


@pytest.mark.parametrize("family", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES])
def test_a_family_is_exported_and_passes_its_gate(tmp_path: Path, family: str) -> None:
    make, options = FAMILIES[family]
    folder = imported(tmp_path / family, make(), **options)
    manifest = export(folder, batches=(2,), sizes=SIZES[1:] if family in FREE else [])
    assert summary(manifest.verification) == ""
    engines = {(row["component"], row["runtime"]) for row in manifest.verification}
    assert engines >= {(graph.component, engine) for graph in manifest.graphs for engine in runnable()}
    components = [graph.component for graph in manifest.graphs]
    assert components == [part for part in PARTS if part != "text_encoder" or family != "dit"]
    if family == "dit":
        out = FastPipeline.from_pretrained(folder)(class_labels=[3, 5], seed=0, output_type="uint8")
    else:
        out = FastPipeline.from_pretrained(folder)(PROMPTS[:2], seed=0, output_type="uint8")
    assert out.images.shape == (2, 16, 16, 3)
    assert out.images.std() > 5


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_families_whose_places_are_of_one_size_refuse_others(tmp_path: Path, family: str) -> None:
    make, options = FAMILIES[family]
    folder = imported(tmp_path / family, make(), **options)
    with pytest.raises(UnsupportedModel, match=r"has patch positions for one size only"):
        export(folder, sizes=[(24, 16)])


def test_sizes_beyond_a_table_of_places_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = imported(tmp_path / "sd3", pipelines.stable_diffusion_3(with_t5=False))  # 16 patches of 2 x 2 latents
    with pytest.raises(InvalidRequest, match="height=68 is not supported; give a multiple of 4 up to 64"):
        export(folder, sizes=[(68, 16)])
    latents = StudentFolder(folder).manifest.latents
    free = latents.model_copy(update={"dynamic": ["height", "width"], "multiple": 2, "largest": 32})
    assert free.size(64, 24, 2) == (32, 12)
    with pytest.raises(InvalidRequest, match="width=68 is not supported; give a multiple of 4 up to 64"):
        free.size(None, 68, 2)


def test_a_network_of_ones_own_is_given_what_prompts_become_by_name(bare: Path, copy_of: Copy) -> None:
    class Own(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
            shift = encoder_hidden_states.mean((1, 2)) + timestep / 1000
            return (torch.tanh(sample + shift[:, None, None, None]),)

    folder = copy_of(bare)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()  # those of another network
    latents = StudentFolder(folder).manifest.latents
    changed(folder, latents=latents.model_copy(update={"dynamic": ["height", "width"], "multiple": 2}))
    manifest = export(folder, batches=(1, 2), network=Own())
    assert summary(manifest.verification) == ""


# ---------------------------------------------------------------- weights beside the graphs


def test_weights_that_fit_in_no_protobuf_lie_beside_every_part(
    bare: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LARGEST_FILE", 0)
    folder = copy_of(bare)
    manifest = export(folder, batches=(1,), sizes=SIZES, runtimes=["onnxruntime"])
    assert {graph.component: graph.data for graph in manifest.graphs} == {
        component: [f"onnx/{component}.fp32.onnx.data"]
        for component in ("text_encoder", "denoiser", "decoder", "encoder")
    }
    listed = {entry.path: entry.bytes for entry in manifest.files}
    for graph in manifest.graphs:
        path = folder / graph.data[0]
        assert listed[graph.data[0]] == path.stat().st_size > 4 * (folder / graph.file).stat().st_size / 100
        onnx.checker.check_model(str(folder / graph.file), full_check=True)
    images = FastPipeline.from_pretrained(folder, runtime="onnxruntime")(PROMPTS[0], seed=0, output_type="uint8").images
    assert images.std() > 10
    path = folder / "onnx/text_encoder.fp32.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"text_encoder\.fp32\.onnx\.data"):
        FastPipeline.from_pretrained(folder)(PROMPTS[0])


class Large(torch.nn.Module):
    """A network with two tables of weights, above 2 GiB together, of which it takes one row each."""

    ROWS = (1 << 18) + 4096

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(self.ROWS, 1024, _weight=self.table()) for _ in range(2))

    def table(self) -> Tensor:
        table = torch.empty(self.ROWS, 1024)
        table[-1] = torch.linspace(-1.0, 1.0, 1024)
        return table

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        row = (timestep * 0).long() + self.ROWS - 1
        shift = self.tables[0](row) - 0.5 * self.tables[1](row)
        return 128 + 40 * sample + 40 * shift[:, :192].reshape(-1, 12, 4, 4)


@pytest.mark.slow
def test_a_network_of_more_than_two_gib(tmp_path: Path) -> None:
    from test_export import custom_student

    folder = custom_student(tmp_path / "large")
    try:
        manifest = export(folder, network=Large(), batches=(1,), runtimes=["onnxruntime"])
        assert [graph.component for graph in manifest.graphs] == ["denoiser"]
        [data] = manifest.graphs[0].data
        assert (folder / data).stat().st_size > 1 << 31
        assert next(entry.bytes for entry in manifest.files if entry.path == data) > 1 << 31
        assert FastPipeline.from_pretrained(folder, runtime="onnxruntime")(seed=0, output_type="uint8").images.std() > 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- parts from the checked bytes


def test_parts_are_loaded_as_transformers_and_diffusers_load_them(bare: Path, pipeline: Any) -> None:
    student = StudentFolder(bare)
    encoders, decoder, network = load_encoders(student), load_decoder(student), load_network(student)
    assert encoders is not None
    assert decoder is not None
    pairs = [
        (encoders.encoders[0], pipeline.text_encoder),
        (decoder.autoencoder, pipeline.vae),
        (network, pipeline.unet),
    ]
    for loaded, original in pairs:
        assert not loaded.training
        theirs = dict(original.named_buffers()) | original.state_dict()
        ours = dict(loaded.named_buffers()) | loaded.state_dict()  # also buffers that are not saved: position ids
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value.float() if value.is_floating_point() else value), name
    conditions = ExampleConditions(student, encoders)
    with torch.no_grad():
        expected = pipeline.encode_prompt([PROMPTS[1], PROMPTS[2]], "cpu", 1, False)[0]
    assert torch.allclose(conditions.of([1, 2])["encoder_hidden_states"], expected, atol=1e-6)
    assert conditions.prompts([0, len(PROMPTS)]) == [PROMPTS[0], PROMPTS[0]]


def test_shards_are_one_file_and_variants_are_not(bare: Path, copy_of: Copy) -> None:
    folder = copy_of(bare)
    path = folder / "text_encoder/model.safetensors"
    weights = load_file(path)
    names = sorted(weights)
    path.unlink()
    for index, part in enumerate((names[::2], names[1::2]), 1):
        save_file(
            {name: weights[name] for name in part}, folder / f"text_encoder/model-0000{index}-of-00002.safetensors"
        )
    write_manifest(folder, StudentFolder(folder).manifest)
    assert load_encoders(StudentFolder(folder)) is not None
    save_file({names[0]: weights[names[0]].half()}, folder / "text_encoder/model.fp16.safetensors")
    write_manifest(folder, StudentFolder(folder).manifest)
    with pytest.raises(ExportError, match="in two files; keep one variant of the weights"):
        load_encoders(StudentFolder(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"text_encoder make no CLIPTextModel: missing keys: .*encoder\.layers\.2"),
        ({"num_hidden_layers": 1}, r"text_encoder make no CLIPTextModel: unexpected keys: .*encoder\.layers\.1"),
        ({"hidden_size": 64, "vocab_size": 10}, r"text_encoder make no CLIPTextModel"),
        ({"vocab_size": 5_000_000}, r"config\.json asks for \d+ weights, and the files hold \d+"),
        ({"hidden_act": "telnet"}, r"text_encoder make no CLIPTextModel"),
        ({"hidden_size": "wide"}, r"text_encoder make no CLIPTextModel"),
    ],
)
def test_weights_that_are_not_of_the_configuration(
    bare: Path, copy_of: Copy, change: dict[str, Any], message: str
) -> None:
    folder = copy_of(bare)
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_manifest(folder, StudentFolder(folder).manifest)
    with pytest.raises(ExportError, match=message):
        load_encoders(StudentFolder(folder))


def test_a_configuration_chooses_no_code(bare: Path, copy_of: Copy) -> None:
    folder = copy_of(bare)
    path = folder / "text_encoder/config.json"
    chosen = {
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "auto_map": {"AutoModel": "theirs.Model"},
        "fusion_config": {"patch_embeddings": True},
        "transformers_weights": "theirs.bin",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | chosen))
    write_manifest(folder, StudentFolder(folder).manifest)
    encoders = load_encoders(StudentFolder(folder))
    assert encoders is not None
    assert encoders.encoders[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("path", ["os.system", "transformers.GPT2Model", "somebody.CLIPTextModel"])
def test_text_encoders_that_are_not_known(bare: Path, copy_of: Copy, path: str) -> None:
    folder = copy_of(bare)
    text = StudentFolder(folder).manifest.text
    assert text is not None
    parts = [text.encoders[0].model_copy(update={"class_path": path})]
    changed(folder, condition=TextCondition.model_validate(text.model_dump() | {"encoders": parts}))
    with pytest.raises(
        UnsupportedModel, match=f"the text encoder {path} is not supported; use transformers' CLIPTextModel"
    ):
        export(folder)


def test_parts_that_the_manifest_does_not_describe(bare: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(bare, tmp_path / f"sd-{index}")) for index in range(4)]
    manifest = StudentFolder(bare).manifest
    text, network, decoder = manifest.text, manifest.network, manifest.postprocess.decoder
    assert text is not None
    assert decoder is not None
    changed(folders[0], network=network.model_copy(update={"pipeline": None}))
    with pytest.raises(UnsupportedModel, match=r"does not name the pipeline .*; set network\.pipeline"):
        load_encoders(StudentFolder(folders[0]))
    changed(folders[1], network=network.model_copy(update={"pipeline": "StableDiffusionXLPipeline"}))
    with pytest.raises(
        UnsupportedModel, match=r"give encoder_hidden_states, pooled_projections, and .* takes encoder_h"
    ):
        load_encoders(StudentFolder(folders[1]))
    other = decoder.model_copy(update={"class_path": "diffusers.UNet2DModel", "folder": "unet"})
    changed(folders[2], postprocess=manifest.postprocess.model_copy(update={"decoder": other}))
    with pytest.raises((UnsupportedModel, ExportError), match="UNet2DModel"):
        load_decoder(StudentFolder(folders[2]))
    short = copy.deepcopy(text.model_dump())
    short["tensors"][0]["shape"][2] = 31
    changed(folders[3], condition=TextCondition.model_validate(short))
    student = StudentFolder(folders[3])
    with pytest.raises(ExportError, match=r"make encoder_hidden_states of shape \(1, 16, 32\), and its manifest says"):
        ExampleConditions(student, load_encoders(student)).of([0])


def test_a_student_of_the_same_kind_is_traced_once(bare: Path, tmp_path: Path) -> None:
    from redif_sdk.export import trace

    folder = Path(shutil.copytree(bare, tmp_path / "sd"))
    latents = StudentFolder(folder).manifest.latents
    changed(folder, latents=latents.model_copy(update={"dynamic": ["height", "width"], "multiple": 2}))
    student = StudentFolder(folder)  # of free sizes, as others here: it may be traced already
    network = load_network(student)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    known = len(trace._traced)
    models = [denoiser_model(GraphDenoiser.of(unet, student.manifest), student.manifest) for unet in (network, other)]
    assert len(trace._traced) <= known + 1
    first, second = (
        onnxruntime.InferenceSession(m.filled().SerializeToString(), providers=["CPUExecutionProvider"]) for m in models
    )
    feed = {
        "sample": np.zeros((1, 4, 8, 8), np.float32),
        "timestep": np.zeros(1, np.float32),
        "encoder_hidden_states": np.ones((1, 16, 32), np.float32),
    }
    assert np.abs(first.run(None, feed)[0] - second.run(None, feed)[0]).max() > 1e-3
