"""Folders and pipelines as people have them: taken whole and equal to diffusers', or refused by name, never halfway."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

from redif_sdk import hub
from redif_sdk.distill import Teacher, import_pipeline, load_student
from redif_sdk.distill.teachers import folders
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = pipelines.PROMPTS


def pixels(**more: Any) -> Any:
    """A DDPM pipeline of few random weights."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(8)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "add_attention": False,
    }
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    return DDIMPipeline(UNet2DModel(**{**settings, **more}).eval(), scheduler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    made = {"sd": pipelines.stable_diffusion, "sd3": pipelines.stable_diffusion_3, "pixels": pixels}
    for name, make in made.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


def load(folder: Path, **options: Any) -> Teacher:
    index = folder / "model_index.json"
    text = index.is_file() and "text_encoder" in index.read_text()
    return Teacher.load(folder, **({"prompts": PROMPTS} if text else {}), **options)


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rename(folder: Path) -> str:
    """One tensor of a component gets another name, and its name is returned."""
    file = weights_of(folder)
    tensors = load_file(file)
    name = sorted(tensors)[2]
    tensors[f"{name}_old"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def images(teacher: Teacher, steps: int = 2) -> torch.Tensor:
    noise = SAMPLE[:, : teacher.shape[0]] if teacher.shape[0] <= 4 else torch.cat([SAMPLE] * 4, 1)
    return teacher.images(teacher.sample(noise, teacher.labels(np.arange(2)), steps))


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("pipeline", "part"),
    [
        ("pixels", "unet"),
        ("sd", "unet"),
        ("sd", "vae"),
        ("sd", "text_encoder"),
        ("sd3", "transformer"),
        ("sd3", "vae"),
        ("sd3", "text_encoder"),
        ("sd3", "text_encoder_2"),
        ("sd3", "text_encoder_3"),
    ],
)
def test_a_tensor_of_another_name_is_refused_by_name(copy: Callable[[str], Path], pipeline: str, part: str) -> None:
    folder = copy(pipeline)
    name = rename(folder / part)
    with pytest.raises(InvalidRequest, match=rf"{part}.*missing: .*{name}.*unexpected: .*{name}_old"):
        load(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_named(copy: Callable[[str], Path], part: str, fault: str) -> None:
    folder = copy("sd")
    file = weights_of(folder / part)
    tensors = load_file(file)
    name = sorted(tensors)[2]
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        name = "a.new.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(*(side + 1 for side in tensors[name].shape))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=name):
        load(folder)


def test_a_buffer_of_older_releases_is_no_fault(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    file = weights_of(folder / "text_encoder")
    save_file({**load_file(file), "text_model.embeddings.position_ids": torch.arange(16)[None]}, file, {"format": "pt"})
    load(folder)


def test_a_text_encoder_is_not_drawn_larger_than_its_file(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    edit(folder / "text_encoder/config.json", hidden_size=1 << 14, intermediate_size=1 << 16)
    with pytest.raises(InvalidRequest, match=r"config\.json asks for .* weights"):
        load(folder)


def test_a_pipeline_object_without_values_is_refused() -> None:
    pipeline = pixels()
    pipeline.unet.conv_in.to("meta")
    with pytest.raises(InvalidRequest, match=r"tensors without values: conv_in\.bias, conv_in\.weight"):
        Teacher.load(pipeline)
    pipeline = pipelines.stable_diffusion()
    pipeline.text_encoder.to("meta")
    with pytest.raises(InvalidRequest, match="text_encoder has tensors without values"):
        Teacher.load(pipeline, prompts=PROMPTS)


# ----------------------------------------------------------------------------------------------------- variants


def vary(folder: Path, variant: str = "fp16") -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def test_a_variant_is_found_by_itself(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    expected = images(load(folder))
    for part in ("unet", "vae", "text_encoder"):
        vary(folder / part)
    assert torch.equal(images(load(folder)), expected)
    assert torch.equal(images(load(folder, variant="fp16")), expected)
    with pytest.raises(InvalidRequest, match="no weights of the variant 'fp8'; it has fp16"):
        load(folder, variant="fp8")


def test_a_variant_that_is_asked_for_is_taken_where_it_is(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    file = weights_of(folder / "unet")
    other = {name: tensor * 0.5 for name, tensor in load_file(file).items()}
    save_file(other, file.with_name(f"{file.stem}.ema.safetensors"), metadata={"format": "pt"})
    plain, ema = images(load(folder)), images(load(folder, variant="ema"))
    assert not torch.allclose(plain, ema)
    shutil.move(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    with pytest.raises(InvalidRequest, match=r"variants ema, fp16 .*--variant"):
        load(folder)
    assert torch.equal(images(load(folder, variant="ema")), ema)


@pytest.mark.parametrize("pipeline", ["sd", "pixels"])
def test_pickled_weights_are_refused_with_what_to_do(copy: Callable[[str], Path], pipeline: str) -> None:
    folder = copy(pipeline)
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(InvalidRequest, match=r"holds diffusion_pytorch_model\.bin .*convert it: .*save_pretrained"):
        load(folder)
    (folder / "unet/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(InvalidRequest, match="unet holds no weights"):
        load(folder)


# ------------------------------------------------------------------------------------------- parts of a pipeline


@pytest.mark.parametrize("there", [True, False])
def test_a_safety_checker_is_left_out_with_one_line(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    folder = copy("sd")
    expected = images(load(folder))
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    if there:
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker/pytorch_model.bin").write_bytes(b"never read")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images(load(folder)), expected)
    assert [record.message for record in caplog.records] == [
        "the safety_checker of sd is left out: students do not filter their images"
    ]


def test_nothing_is_left_out_for_somebody_elses_adapter(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    assert folders.load_pipeline(folder)[0].feature_extractor is None
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        folders.load_pipeline(folder, whole=True)


def latent_diffusion() -> Any:
    from diffusers import LDMPipeline, VQModel

    torch.manual_seed(9)
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    decoder = VQModel(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(8, 8),
        norm_num_groups=8,
        latent_channels=3,
        num_vq_embeddings=8,
    )
    pipeline = pixels()
    return LDMPipeline(decoder, pipeline.unet, pipeline.scheduler)


def test_a_pipeline_with_a_part_that_is_not_used_is_refused(tmp_path: Path) -> None:
    pipeline = latent_diffusion()
    with pytest.raises(UnsupportedModel, match=r"LDMPipeline also has vqvae \(VQModel\)"):
        Teacher.load(pipeline)
    pipeline.save_pretrained(tmp_path / "ldm")
    with pytest.raises(UnsupportedModel, match=r"also has vqvae \(VQModel\)"):
        Teacher.load(tmp_path / "ldm")
    with pytest.raises(UnsupportedModel, match="vqvae"):
        import_pipeline(tmp_path / "ldm", tmp_path / "student", [2])
    assert not (tmp_path / "student").exists()
    (tmp_path / "ldm/model_index.json").unlink()  # the decoder is still beside the network
    with pytest.raises(UnsupportedModel, match=r"also has vqvae \(VQModel\)"):
        Teacher.load(tmp_path / "ldm")


def test_another_autoencoder_is_refused() -> None:
    from diffusers import AsymmetricAutoencoderKL

    pipeline = pipelines.stable_diffusion()
    pipeline.vae = AsymmetricAutoencoderKL(
        norm_num_groups=8, down_block_out_channels=(16,), up_block_out_channels=(16,)
    )
    with pytest.raises(
        UnsupportedModel, match=r"vae is a AsymmetricAutoencoderKL.*use AutoencoderKL or AutoencoderTiny"
    ):
        Teacher.load(pipeline, prompts=PROMPTS)


def test_a_text_encoder_of_another_class_is_refused() -> None:
    from transformers import BertConfig, BertModel

    pipeline = pipelines.stable_diffusion()
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    pipeline.text_encoder = BertModel(config).eval()
    with pytest.raises(UnsupportedModel, match=r"text_encoder is a BertModel.*CLIPTextModel"):
        Teacher.load(pipeline, prompts=PROMPTS)


@pytest.mark.parametrize(("pipeline", "part"), [("pixels", "unet"), ("sd", "unet"), ("sd", "text_encoder")])
def test_a_quantised_folder_is_refused(copy: Callable[[str], Path], pipeline: str, part: str) -> None:
    folder = copy(pipeline)
    quantiser = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(folder / part / "config.json", quantization_config=quantiser)
    with pytest.raises(UnsupportedModel, match=f"{part} is quantised.*dequantise it first"):
        load(folder)


def test_a_quantised_pipeline_is_refused() -> None:
    pipeline = pixels()
    layer = pipeline.unet.time_embedding.linear_1
    layer.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="unet is quantised"):
        Teacher.load(pipeline)


# -------------------------------------------------------------------------------------------------- flat folders


def flatten(folder: Path) -> Path:
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_a_flat_folder_is_taken(copy: Callable[[str], Path], tmp_path: Path, index: bool) -> None:
    folder = copy("pixels")
    expected = images(load(folder))
    flatten(folder)
    if not index:
        (folder / "model_index.json").unlink()
    assert torch.equal(images(load(folder)), expected)
    assert import_pipeline(folder, tmp_path / "student", [2]).supported_steps == [2]


def test_the_hub_is_asked_for_flat_folders(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    folder = flatten(copy("pixels"))
    for file in folder.iterdir():
        assert any(fnmatch(file.name, pattern) for pattern in folders.HUB_FILES), file.name
    assert not any(fnmatch("sd-v1-4.safetensors", pattern) for pattern in folders.HUB_FILES)
    monkeypatch.setattr(folders, "fetch", lambda name, files: folder)
    assert Teacher.load("someone/pixels").name == "someone/pixels"
    assert hub.is_hub_id("someone/pixels")


# ---------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_without_a_limit_takes_the_text_encoders(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    expected = images(load(folder))
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=None)
    teacher = load(folder)
    assert teacher.condition is not None
    assert teacher.condition.tokenizers[0].max_length == pipelines.LENGTH
    assert torch.equal(images(teacher), expected)
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=4 * pipelines.LENGTH)
    assert torch.equal(images(load(folder)), expected)


@pytest.mark.parametrize("setting", [{"padding_side": "left"}, {"truncation_side": "left"}])
def test_a_tokenizer_that_deployment_would_read_otherwise_is_refused(
    copy: Callable[[str], Path], setting: dict[str, str]
) -> None:
    folder = copy("sd")
    edit(folder / "tokenizer/tokenizer_config.json", **setting)
    with pytest.raises(UnsupportedModel, match=f"{next(iter(setting))} (is )?left.*set both to right"):
        load(folder)


def test_a_token_without_an_embedding_is_refused() -> None:
    pipeline = pipelines.stable_diffusion()
    pipeline.tokenizer.add_tokens(["<cat>"])
    with pytest.raises(UnsupportedModel, match=r"tokenizer has token ids up to .* embeddings"):
        Teacher.load(pipeline, prompts=PROMPTS)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    Teacher.load(pipeline, prompts=["a <cat>"])


def test_a_sentencepiece_model_alone_names_the_package(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("sd3")
    (folder / "tokenizer_3/tokenizer.json").unlink()
    (folder / "tokenizer_3/spiece.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r'spiece\.model.*sentencepiece; pip install "redif-sdk\[distill\]"'):
        load(folder)


# --------------------------------------------------------------------------------------------- sizes and channels


FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
}


def test_a_size_that_a_network_cannot_take_is_refused_with_one_that_it_can(tmp_path: Path) -> None:
    pipeline = pixels(sample_size=28, **FOUR_LEVELS)
    with pytest.raises(InvalidRequest, match=r"no images of 28 x 28: .*multiples of 8, .*--height 32 --width 32"):
        import_pipeline(pipeline, tmp_path / "student", [2])
    assert not (tmp_path / "student").exists()
    assert Teacher.load(pipeline, height=32, width=24).shape == (3, 32, 24)
    with pytest.raises(InvalidRequest, match=r"no images of 32 x 18.*--height 32 --width 24"):
        Teacher.load(pipeline, height=32, width=18)
    import_pipeline(pipeline, tmp_path / "student", [2], height=32, width=24)
    assert load_student(tmp_path / "student").teacher.shape == (3, 32, 24)


def test_a_text_to_image_network_takes_every_size_that_its_pipeline_takes() -> None:
    pipeline = pipelines.stable_diffusion_3()
    with pytest.raises(InvalidRequest, match=r"height and width must be multiples of 4, .*--height 20 --width 16"):
        Teacher.load(pipeline, prompts=PROMPTS, height=18, width=16)
    with pytest.raises(UnsupportedModel, match="cannot be called as its pipeline calls it at 256 x 256"):
        Teacher.load(pipeline, prompts=PROMPTS, height=256, width=256)  # beyond its table of positions
    odd = Teacher.load(pipelines.stable_diffusion(), prompts=PROMPTS, height=10, width=14)
    assert odd.shape == (4, 5, 7)  # this UNet pads what it halves


@pytest.mark.parametrize(("given", "made"), [(6, 3), (3, 4), (4, 3)])
def test_a_network_with_other_channels_out_than_in_is_refused(given: int, made: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"takes {given} channels and makes {made}: it (takes an image|draws)"):
        Teacher.load(pixels(in_channels=given, out_channels=made))


def test_a_learned_variance_is_left_out() -> None:
    assert Teacher.load(pixels(in_channels=3, out_channels=6)).shape == (3, 8, 8)


# --------------------------------------------------------------------------------------------------- settings


def test_a_text_encoder_that_masks_its_prompts_is_refused(copy: Callable[[str], Path]) -> None:
    """diffusers' pipelines read this key, which is none of CLIP's own."""
    folder = copy("sd")
    edit(folder / "text_encoder/config.json", use_attention_mask=True)
    with pytest.raises(UnsupportedModel, match="use_attention_mask"):
        load(folder)


def test_a_setting_of_a_later_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from redif_sdk.distill.teachers import config_keys

    pipeline = pixels(act_fn="gelu")
    Teacher.load(pipeline)
    less = {**config_keys.HONOURED, "UNet2DModel": config_keys.HONOURED["UNet2DModel"] - {"act_fn"}}
    monkeypatch.setattr(config_keys, "HONOURED", less)
    with pytest.raises(UnsupportedModel, match="unet has act_fn='gelu', a setting of UNet2DModel that this release"):
        Teacher.load(pipeline)
    Teacher.load(pixels())  # the default is what older releases do


def test_a_key_that_nobody_reads_is_said_in_one_line(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("pixels")
    edit(folder / "unet/config.json", colour="blue")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [record.message for record in caplog.records] == [
        "unet: UNet2DModel does not know the key colour; it is ignored, as in diffusers"
    ]


def test_what_no_file_holds_is_refused() -> None:
    pipeline = pipelines.stable_diffusion()
    pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(UnsupportedModel, match=r"FreeU is on.*disable_freeu"):
        Teacher.load(pipeline, prompts=PROMPTS)
    pipeline.disable_freeu()
    Teacher.load(pipeline, prompts=PROMPTS)


def test_an_lcm_whose_network_takes_no_guidance_scale_is_refused() -> None:
    pipeline = pipelines.latent_consistency()
    pipeline.unet = pipelines.unet(32, **pipelines.ONE_BLOCK)
    with pytest.raises(UnsupportedModel, match="time_cond_proj_dim is not set"):
        Teacher.load(pipeline, prompts=PROMPTS)


@pytest.mark.parametrize("value", [None, 0, "large", float("nan")])
def test_a_scaling_factor_must_be_a_number(value: Any) -> None:
    pipeline = pipelines.stable_diffusion()
    pipeline.vae.register_to_config(scaling_factor=value)
    with pytest.raises(UnsupportedModel, match="scaling_factor is"):
        Teacher.load(pipeline, prompts=PROMPTS)


@pytest.mark.parametrize("change", [{"sample_size": -1}, {"sample_size": {"a": 1}}, {"block_out_channels": "wide"}])
def test_a_strange_configuration_is_one_clear_line(copy: Callable[[str], Path], change: dict[str, Any]) -> None:
    folder = copy("pixels")
    edit(folder / "unet/config.json", **change)
    with pytest.raises(RedifError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
