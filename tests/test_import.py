"""Importing a folder: files are moved, not models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export_text import SIZES
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli.main import app
from redif_sdk.distill import Teacher, import_pipeline, load_student
from redif_sdk.distill.student.importing import EXAMPLES
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.export import export

UNET = "unet/diffusion_pytorch_model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a component's folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_weights(ours: Path, theirs: Path) -> bool:
    first, second = tensors(ours), tensors(theirs)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Stable Diffusion in half precision, in plain files."""
    pipelines.stable_diffusion(pipelines.ddim()).to(torch.float16).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_weights_keep_their_dtype(saved: Path, tmp_path: Path) -> None:
    manifest = import_pipeline(saved, tmp_path / "student", [2], guidance_scale=1.0)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(tmp_path / "student" / part, saved / part), part
    assert manifest.text is not None
    assert manifest.text.examples == list(EXAMPLES)


def test_shards_and_variants_are_read(tmp_path: Path) -> None:
    half = pipelines.stable_diffusion(pipelines.ddim()).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="40KB")
    assert len(list((tmp_path / "half/unet").glob("*.safetensors"))) > 1
    import_pipeline(tmp_path / "half", tmp_path / "student", [2], guidance_scale=1.0)
    assert same_weights(tmp_path / "student/unet", tmp_path / "half/unet")


def test_linked_weights_are_the_files_of_the_pipeline(tmp_path: Path) -> None:
    half = pipelines.stable_diffusion(pipelines.ddim()).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="40KB")
    assert len(list((tmp_path / "half/unet").glob("*.safetensors"))) > 2
    options = ["--steps", "2", "--guidance-scale", "1", "--quiet"]
    for name, more in (("copied", []), ("linked", ["--link"])):
        command = ["import", str(tmp_path / "half"), "-o", str(tmp_path / name), *options, *more]
        assert CliRunner().invoke(app, command).exit_code == 0
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(tmp_path / "linked" / part, tmp_path / "copied" / part), part
        sources = {file.stat().st_ino for file in (tmp_path / "half" / part).glob("*.safetensors")}
        files = list((tmp_path / "linked" / part).glob("*.safetensors"))
        assert {file.stat().st_ino for file in files} == sources
        assert not any("fp16" in file.name for file in files)
    names = [
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.json")}
        for name in ("linked", "copied")
    ]
    assert names[0] >= names[1]  # the copy has fewer shards
    assert load_student(tmp_path / "linked").teacher.name == load_student(tmp_path / "copied").teacher.name
    images = [load_student(tmp_path / name).images(0, 2) for name in ("linked", "copied")]
    assert np.array_equal(*images)


def test_what_a_lora_changed_is_no_link(saved: Path, tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion(pipelines.ddim())
    layers = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": pipe.unet.config["cross_attention_dim"]}
    (name,) = layers
    width = dict(pipe.unet.named_modules())[name.removeprefix("unet.")].weight.shape
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, width[1]), f"{name}.lora_B.weight": torch.ones(width[0], 2)},
        tmp_path / "lora.safetensors",
    )
    import_pipeline(
        saved, tmp_path / "student", [2], guidance_scale=1.0, loras=[f"{tmp_path}/lora.safetensors"], link=True
    )
    linked = {
        part: (tmp_path / "student" / part).joinpath(file).samefile(saved / part / file)
        for part, file in (
            ("unet", "diffusion_pytorch_model.safetensors"),
            ("vae", "diffusion_pytorch_model.safetensors"),
            ("text_encoder", "model.safetensors"),
        )
    }
    assert linked == {"unet": False, "vae": True, "text_encoder": True}
    assert not same_weights(tmp_path / "student/unet", saved / "unet")


def test_a_file_system_without_links_is_said(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_link)
    with pytest.raises(InvalidRequest, match=r"cannot be linked to .*; leave out --link"):
        import_pipeline(saved, tmp_path / "student", [2], guidance_scale=1.0, link=True)
    assert not (tmp_path / "student").exists()


def test_a_student_in_half_precision_is_exported_as_one_in_float32(saved: Path, tmp_path: Path) -> None:
    import_pipeline(saved, tmp_path / "half-student", [2], guidance_scale=1.0)
    pipelines.stable_diffusion(pipelines.ddim()).to(torch.float16).to(torch.float32).save_pretrained(tmp_path / "full")
    import_pipeline(tmp_path / "full", tmp_path / "full-student", [2], guidance_scale=1.0)
    graphs = []
    for name in ("half-student", "full-student"):
        export(tmp_path / name, runtimes=["onnxruntime"], batches=(1,), sizes=SIZES)
        graphs.append({path.name: path.read_bytes() for path in (tmp_path / name / "onnx").iterdir()})
    assert graphs[0] == graphs[1]
    teachers = [
        json.loads((tmp_path / f"{name}-student/redif.json").read_text())["teacher"] for name in ("half", "full")
    ]
    loaded = Teacher.load(tmp_path / "full", prompts=EXAMPLES)
    assert teachers[0]["hash"] == teachers[1]["hash"] == loaded.fingerprint  # one teacher, whatever its files are in


# ---------------------------------------------------------------------- LoRA


def with_lora(pipeline: Any, folder: Path, *, conv: bool = False) -> Path:
    """A LoRA of rank 2 with random weights, as diffusers saves one; its alpha is not its rank."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_out.0", *(["conv1"] if conv else [])]
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    from peft.utils import get_peft_model_state_dict

    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    # without the configuration, as most published files are: then alpha is the rank, as diffusers has it
    (path,) = folder.glob("*.safetensors")
    save_file(load_file(path), folder / "lora.safetensors")
    return folder / "lora.safetensors"


def fused(loras: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """The UNet's weights as diffusers fuses LoRAs into them."""
    pipeline = pipelines.stable_diffusion(pipelines.ddim())
    for path, scale in loras:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return dict(pipeline.unet.state_dict())


def close(ours: Path, theirs: dict[str, torch.Tensor]) -> bool:
    found = load_file(ours)
    return found.keys() == theirs.keys() and all(
        torch.allclose(found[name], theirs[name], rtol=1e-5, atol=1e-6) for name in found
    )


def kohya(path: Path) -> Path:
    """The same LoRA under kohya's names, with an alpha of its own for each layer."""
    renamed = {}
    for name, value in load_file(path).items():
        layer, _, part = name.removeprefix("unet.").partition(".lora_")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{stem}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        renamed[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(renamed, path.with_name("kohya.safetensors"))
    return path.with_name("kohya.safetensors")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    pipelines.stable_diffusion(pipelines.ddim()).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_a_lora_is_merged_as_diffusers_merges_it(plain: Path, tmp_path: Path, names: str) -> None:
    path = with_lora(pipelines.stable_diffusion(pipelines.ddim()), tmp_path / "lora", conv=names == "diffusers")
    path = kohya(path) if names == "kohya" else path
    before = tensors(plain / "unet")
    import_pipeline(plain, tmp_path / "student", [2], guidance_scale=1.0, loras=[f"{path}:0.5"])
    assert close(tmp_path / "student" / UNET, fused([(path, 0.5)]))
    assert not close(tmp_path / "student" / UNET, before)
    assert all(torch.equal(value, before[name]) for name, value in tensors(plain / "unet").items())


def test_two_loras_of_the_command_line_are_added(plain: Path, tmp_path: Path) -> None:
    first = with_lora(pipelines.stable_diffusion(pipelines.ddim()), tmp_path / "a")
    second = with_lora(pipelines.stable_diffusion(pipelines.ddim()), tmp_path / "b", conv=True)
    options = ["-o", str(tmp_path / "student"), "--steps", "2", "--lora", str(first), "--lora", f"{second}:-2"]
    ran = CliRunner().invoke(app, ["import", str(plain), *options])
    assert ran.exit_code == 0, ran.output
    assert close(tmp_path / "student" / UNET, fused([(first, 1.0), (second, -2.0)]))


def test_a_lora_that_would_be_used_in_part_or_not_at_all_is_refused(plain: Path, tmp_path: Path) -> None:
    path = with_lora(pipelines.stable_diffusion(pipelines.ddim()), tmp_path / "lora")
    held = load_file(path)
    name = next(name for name in held if "lora_A" in name)
    layer = name.partition(".lora_A")[0]
    stray = {
        f"unet.no_such_block.to_q{key.removeprefix(layer)}": held[key].clone() for key in held if key.startswith(layer)
    }
    save_file(held | stray, tmp_path / "stray.safetensors")
    save_file({"x.weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04.")
    for given, said in (
        ("stray.safetensors", "stray"),
        ("none.safetensors", "holds no LoRA"),
        ("lora.bin", "no safetensors file"),
        ("absent.safetensors", "there is no LoRA"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            import_pipeline(plain, tmp_path / "student", [2], guidance_scale=1.0, loras=[str(tmp_path / given)])
        assert not (tmp_path / "student").exists()


def test_a_pipeline_that_takes_no_lora_says_so(teacher_folder: Path, tmp_path: Path) -> None:
    path = with_lora(pipelines.stable_diffusion(pipelines.ddim()), tmp_path / "lora")
    with pytest.raises(UnsupportedModel, match="takes no LoRA"):
        import_pipeline(teacher_folder, tmp_path / "student", [2], loras=[str(path)])


# ---------------------------------------------------------------------- another decoder


def tiny_decoder(channels: int = 4, blocks: int = 2) -> Any:
    """TAESD's class, two pixels a latent for two blocks."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        latent_channels=channels,
    )


def test_a_tiny_decoder_takes_the_place_of_the_pipelines_own(plain: Path, tmp_path: Path) -> None:
    tiny_decoder().half().save_pretrained(tmp_path / "taesd")
    student = tmp_path / "student"
    options = ["-o", str(student), "--steps", "2", "--guidance-scale", "1", "--decoder", str(tmp_path / "taesd")]
    ran = CliRunner().invoke(app, ["import", str(plain), *options])
    assert ran.exit_code == 0, ran.output
    assert same_weights(student / "vae", tmp_path / "taesd")
    pipe = pipelines.stable_diffusion(pipelines.ddim())
    pipe.vae = tiny_decoder().half().float()
    manifest = export(student, runtimes=["onnxruntime"])
    assert manifest.postprocess.decoder is not None
    assert manifest.postprocess.decoder.class_path == "diffusers.AutoencoderTiny"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = FastPipeline.from_pretrained(student, runtime="onnxruntime")("a", latents=latents.numpy(), output_type="np")
    theirs = pipe(
        "a", latents=latents, num_inference_steps=2, guidance_scale=1.0, output_type="np", height=16, width=16
    )
    assert np.abs(ours.images - theirs.images).max() < 2 / 255


def test_an_export_puts_another_decoder_in_place_and_says_how_far_its_images_are(plain: Path, tmp_path: Path) -> None:
    tiny_decoder().half().save_pretrained(tmp_path / "taesd", variant="fp16")
    for name, given in (("one", {"decoder": tmp_path / "taesd"}), ("two", {})):
        import_pipeline(plain, tmp_path / name, [2], guidance_scale=1.0, **given)
    other = str(tmp_path / "taesd")
    ran = CliRunner().invoke(app, ["export", str(tmp_path / "two"), "--decoder", other])
    assert ran.exit_code == 0, ran.output
    assert "diffusers.AutoencoderTiny: " in ran.output
    assert "dB to diffusers.AutoencoderKL" in ran.output
    export(tmp_path / "one", runtimes=["onnxruntime"])
    ours, theirs = (
        FastPipeline.from_pretrained(tmp_path / name, runtime="onnxruntime")("a", seed=0, output_type="np").images
        for name in ("two", "one")
    )
    assert np.array_equal(ours, theirs)
    manifest = StudentFolder(tmp_path / "two").manifest
    assert manifest.postprocess == StudentFolder(tmp_path / "one").manifest.postprocess
    (row,) = [row for row in manifest.metrics if "decoder" in row]
    assert row["num_samples"] == 9
    assert 0 < row["psnr"] < 40
    assert "put in place of `diffusers.AutoencoderKL`" in (tmp_path / "two/README.md").read_text()
    again = load_student(tmp_path / "two")
    assert type(again.teacher.pipeline.vae).__name__ == "AutoencoderTiny"
    tiny_decoder(blocks=3).save_pretrained(tmp_path / "larger")
    before = (tmp_path / "two/redif.json").read_bytes()
    with pytest.raises(InvalidRequest, match="has 4 pixels a latent on each side, and two 2"):
        export(tmp_path / "two", decoder=tmp_path / "larger")
    assert (tmp_path / "two/redif.json").read_bytes() == before
    with pytest.raises(InvalidRequest, match="needs new graphs"):
        export(tmp_path / "two", targets=["tensorrt-rtx"], decoder=other)


def test_a_decoder_that_does_not_fit_is_refused(plain: Path, teacher_folder: Path, tmp_path: Path) -> None:
    tiny_decoder(blocks=3).save_pretrained(tmp_path / "larger")  # four pixels a latent
    tiny_decoder(channels=8).save_pretrained(tmp_path / "deeper")
    for given, kind, said in (
        (tmp_path / "larger", UnsupportedModel, "makes images of"),
        (tmp_path / "deeper", UnsupportedModel, "channels"),
        (plain / "unet", UnsupportedModel, "is a UNet2DConditionModel; use"),
        (tmp_path / "absent", InvalidRequest, "config.json is missing"),
    ):
        with pytest.raises(kind, match=said):
            import_pipeline(plain, tmp_path / "student", [2], guidance_scale=1.0, decoder=given)
        assert not (tmp_path / "student").exists()
    with pytest.raises(UnsupportedModel, match="has no autoencoder"):
        import_pipeline(teacher_folder, tmp_path / "student", [2], decoder=tmp_path / "larger")


# ---------------------------------------------------------------------- memory

#: Imports and exports a folder, and prints by how many MiB its own memory grew at most.
WATCH = """
import sys, threading, pathlib
import torch, diffusers, transformers, onnx, onnxscript, onnxslim
from diffusers import DDIMPipeline, UNet2DModel
import redif_sdk.export.build as build, redif_sdk.export.networks as networks, redif_sdk.export.store as store
from redif_sdk.distill import Teacher, import_pipeline
networks.LARGE, store.LARGEST_FILE = 1_000_000, 1 << 20
source, student = sys.argv[1:]

def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
import_pipeline(source, student, [1])
print("import", (peak[0] - before) >> 10)
passed, build._pass_gate = build._pass_gate, lambda *given: print("export", (peak[0] - before) >> 10) or passed(*given)
build.build_graphs(student, ["fp32"], runtimes=["onnxruntime"])
print("gate", (peak[0] - before) >> 10)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_weights_are_streamed_through_import_and_export(tmp_path: Path) -> None:
    """136 MB of weights in half precision, 272 in float32: they are in no memory of ours, or of ONNX Runtime's."""
    from diffusers import DDIMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(512, 512),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).half()
    size = 4 * sum(value.numel() for value in unet.parameters()) >> 20  # MiB in float32
    assert size > 250, size
    DDIMPipeline(unet, pipelines.ddim()).save_pretrained(tmp_path / "wide")
    del unet
    command = [sys.executable, "-c", WATCH, str(tmp_path / "wide"), str(tmp_path / "student")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    growth = {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}
    assert growth["import"] < size / 3, growth
    assert growth["export"] < 0.75 * size, growth
    assert growth["gate"] < 0.75 * size, growth
    assert (tmp_path / "student/onnx/denoiser.fp32.onnx.data").stat().st_size > 0.9 * (size << 20)
    with safe_open(tmp_path / "student" / UNET, framework="pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == torch.float16
