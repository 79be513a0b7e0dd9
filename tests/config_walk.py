"""Every key of every supported class's configuration: do our images equal diffusers', or is it refused?

A case is one value of one key. Its network is built with it, saved in a whole pipeline's folder, and that folder is
loaded twice: by diffusers, and as a teacher. ``python -m tests.config_walk`` walks all of them and writes the table of
``docs/config-keys.md``; it takes about ten minutes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redif_sdk.distill import Teacher
from redif_sdk.distill.teachers.config_keys import HARMLESS
from redif_sdk.errors import RedifError
from tests import pipelines

PAGE = Path(__file__).resolve().parent.parent / "docs/config-keys.md"
START, END = "<!-- table start -->\n", "<!-- table end -->\n"
PROMPTS = pipelines.PROMPTS
STEPS, LEVELS = 2, 1.0


def tiny_decoder() -> Any:
    from diffusers import AutoencoderTiny

    pipeline = pipelines.stable_diffusion()
    blocks: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipeline.vae = AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks).eval()
    return pipeline


def pixels() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(8)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return DDIMPipeline(network.eval(), DDIMScheduler(timestep_spacing="trailing", clip_sample=False))


@dataclass(frozen=True)
class Kind:
    """Where a class stands in a pipeline, and values other than the base's for its keys."""

    make: Callable[[], Any]
    part: str
    values: dict[str, list[Any]]
    size: int | None = None


_UNET: dict[str, list[Any]] = {
    "act_fn": ["gelu", "no_such"],
    "attention_head_dim": [4],
    "block_out_channels": [[8, 16], [16]],
    "center_input_sample": [True],
    "class_embed_type": ["timestep", "identity"],
    "down_block_types": [["ResnetDownsampleBlock2D", "DownBlock2D"]],
    "downsample_padding": [0],
    "dropout": [0.5],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "in_channels": [6],
    "layers_per_block": [2],
    "mid_block_scale_factor": [2.0],
    "mid_block_type": [None],
    "norm_eps": [0.01],
    "norm_num_groups": [4],
    "num_class_embeds": [3],
    "out_channels": [6, 5],
    "resnet_time_scale_shift": ["scale_shift"],
    "sample_size": [6, 7, [8, 4], None, -1],
    "time_embedding_dim": [32],
    "time_embedding_type": ["fourier", "learned"],
    "up_block_types": [["UpBlock2D", "ResnetUpsampleBlock2D"]],
}
_TEXT: dict[str, list[Any]] = {"return_dict": [False], "use_attention_mask": [True], "vocab_size": [60]}

KINDS: dict[str, Kind] = {
    "UNet2DModel": Kind(
        pixels,
        "unet",
        _UNET
        | {
            "add_attention": [False],
            "attn_norm_num_groups": [4],
            "downsample_type": ["resnet"],
            "num_train_timesteps": [1000],
            "upsample_type": ["resnet"],
        },
    ),
    "UNet2DConditionModel": Kind(
        pipelines.stable_diffusion,
        "unet",
        _UNET
        | {
            "addition_embed_type": ["text", "image", "text_time"],
            "addition_embed_type_num_heads": [2],
            "addition_time_embed_dim": [8],
            "attention_type": ["gated"],
            "class_embeddings_concat": [True],
            "conv_in_kernel": [1],
            "conv_out_kernel": [1],
            "cross_attention_dim": [24],
            "cross_attention_norm": ["layer_norm"],
            "dual_cross_attention": [True],
            "encoder_hid_dim": [32],
            "encoder_hid_dim_type": ["text_proj", "image_proj", "ip_image_proj"],
            "mid_block_only_cross_attention": [True],
            "num_attention_heads": [2],
            "only_cross_attention": [True],
            "projection_class_embeddings_input_dim": [8],
            "resnet_out_scale_factor": [2.0],
            "resnet_skip_time_act": [True],
            "reverse_transformer_layers_per_block": [[1, 1]],
            "time_cond_proj_dim": [8],
            "time_embedding_act_fn": ["silu"],
            "timestep_post_act": ["silu"],
            "transformer_layers_per_block": [2],
            "upcast_attention": [True],
            "use_linear_projection": [True],
        },
    ),
    "SD3Transformer2DModel": Kind(
        pipelines.stable_diffusion_3,
        "transformer",
        {
            "attention_head_dim": [16],
            "caption_projection_dim": [48],
            "dual_attention_layers": [[0]],
            "in_channels": [8],
            "joint_attention_dim": [48],
            "num_attention_heads": [2],
            "num_layers": [1],
            "out_channels": [8],
            "patch_size": [4],
            "pooled_projection_dim": [24],
            "pos_embed_max_size": [8, 2],
            "qk_norm": ["rms_norm"],
            "sample_size": [4],
        },
    ),
    "FluxTransformer2DModel": Kind(
        pipelines.flux,
        "transformer",
        {
            "attention_head_dim": [32],
            "axes_dims_rope": [[8, 4, 4]],
            "guidance_embeds": [False],
            "in_channels": [12],
            "joint_attention_dim": [24],
            "num_attention_heads": [4],
            "num_layers": [2],
            "num_single_layers": [2],
            "out_channels": [8],
            "patch_size": [2],
            "pooled_projection_dim": [24],
        },
        size=16,
    ),
    "PixArtTransformer2DModel": Kind(
        pipelines.pixart,
        "transformer",
        {
            "activation_fn": ["geglu"],
            "attention_bias": [False],
            "attention_head_dim": [16],
            "attention_type": ["gated"],
            "caption_channels": [24],
            "cross_attention_dim": [48],
            "dropout": [0.5],
            "in_channels": [8],
            "interpolation_scale": [2],
            "norm_elementwise_affine": [True],
            "norm_eps": [0.01],
            "norm_num_groups": [8],
            "norm_type": ["ada_norm"],
            "num_attention_heads": [6],
            "num_embeds_ada_norm": [10],
            "num_layers": [2],
            "out_channels": [4, 12],
            "patch_size": [4],
            "sample_size": [4],
            "upcast_attention": [True],
            "use_additional_conditions": [True],
        },
    ),
    "DiTTransformer2DModel": Kind(
        pipelines.dit,
        "transformer",
        {
            "activation_fn": ["geglu"],
            "attention_bias": [False],
            "attention_head_dim": [16],
            "dropout": [0.5],
            "in_channels": [8],
            "norm_elementwise_affine": [True],
            "norm_eps": [0.01],
            "norm_num_groups": [8],
            "norm_type": ["ada_norm"],
            "num_attention_heads": [6],
            "num_embeds_ada_norm": [1200],
            "num_layers": [2],
            "out_channels": [4, 12],
            "patch_size": [4],
            "sample_size": [4],
            "upcast_attention": [True],
        },
    ),
    "AutoencoderKL": Kind(
        pipelines.stable_diffusion,
        "vae",
        {
            "act_fn": ["gelu"],
            "block_out_channels": [[8, 16], [16]],
            "down_block_types": [["DownEncoderBlock2D"] * 2],
            "force_upcast": [False],
            "in_channels": [1],
            "latent_channels": [8],
            "latents_mean": [[0.1] * 4],
            "latents_std": [[0.5] * 4],
            "layers_per_block": [2],
            "mid_block_add_attention": [False],
            "norm_num_groups": [4],
            "out_channels": [1],
            "sample_size": [64],
            "scaling_factor": [0.5, 0, "x"],
            "shift_factor": [0.3],
            "up_block_types": [["UpDecoderBlock2D"] * 3],
            "use_post_quant_conv": [False],
            "use_quant_conv": [False],
        },
    ),
    "AutoencoderTiny": Kind(
        tiny_decoder,
        "vae",
        {
            "act_fn": ["silu"],
            "block_out_channels": [[8, 8, 8]],
            "decoder_block_out_channels": [[8, 8, 8]],
            "encoder_block_out_channels": [[8, 8, 8]],
            "force_upcast": [True],
            "in_channels": [1],
            "latent_channels": [8],
            "latent_magnitude": [1],
            "latent_shift": [0.1],
            "latents_mean": [[0.1] * 4],
            "latents_std": [[0.5] * 4],
            "num_decoder_blocks": [[2, 1]],
            "num_encoder_blocks": [[2, 1]],
            "out_channels": [1],
            "scaling_factor": [0.5],
            "shift_factor": [0.3],
            "upsample_fn": ["bilinear"],
            "upsampling_scaling_factor": [4],
        },
    ),
    "CLIPTextConfig": Kind(
        pipelines.stable_diffusion,
        "text_encoder",
        _TEXT
        | {
            "eos_token_id": [2, 5],
            "hidden_act": ["gelu", "no_such"],
            "hidden_size": [16],
            "intermediate_size": [48],
            "layer_norm_eps": [0.01],
            "max_position_embeddings": [32],
            "num_attention_heads": [4],
            "num_hidden_layers": [1],
            "projection_dim": [16],
        },
    ),
    "T5Config": Kind(
        pipelines.pixart,
        "text_encoder",
        _TEXT
        | {
            "d_ff": [48],
            "d_kv": [8],
            "d_model": [16],
            "feed_forward_proj": ["gated-gelu"],
            "is_decoder": [True],
            "layer_norm_epsilon": [0.01],
            "num_heads": [4],
            "num_layers": [2],
            "relative_attention_max_distance": [4],
            "relative_attention_num_buckets": [8],
        },
    ),
    "CLIPTokenizer": Kind(
        pipelines.stable_diffusion,
        "tokenizer",
        {
            "add_prefix_space": [True],
            "additional_special_tokens": [["red", "<cat>"]],
            "bos_token": ["red"],
            "clean_up_tokenization_spaces": [False],
            "do_lower_case": [False],
            "eos_token": ["red"],
            "errors": ["ignore"],
            "model_input_names": [["input_ids"]],
            "model_max_length": [8, 64],
            "pad_token": ["!", None],
            "padding_side": ["left"],
            "split_special_tokens": [True],
            "truncation_side": ["left"],
            "unk_token": ["red"],
        },
    ),
    "T5Tokenizer": Kind(
        pipelines.pixart,
        "tokenizer",
        {
            "add_prefix_space": [False],
            "additional_special_tokens": [["red", "<cat>"]],
            "clean_up_tokenization_spaces": [False],
            "eos_token": ["<unk>"],
            "extra_ids": [4],
            "legacy": [False, True],
            "model_input_names": [["input_ids"]],
            "model_max_length": [8, 64],
            "pad_token": ["<unk>"],
            "padding_side": ["left"],
            "sp_model_kwargs": [{"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}],
            "split_special_tokens": [True],
            "truncation_side": ["left"],
            "unk_token": ["</s>"],
        },
    ),
}

#: What is taken here and not by diffusers' own pipeline, and why.
WIDER = {
    ("UNet2DModel", "num_class_embeds"): "taken: class-conditional, which DDIMPipeline is not",
    ("UNet2DModel", "out_channels"): "taken: a learned variance, which DDIMPipeline does not read",
    ("CLIPTokenizer", "model_max_length"): "taken: the text encoder's limit where that is lower",
    ("T5Tokenizer", "model_input_names"): "taken: the mask is asked for",
    ("UNet2DConditionModel", "sample_size"): "taken: diffusers wants multiples of 8 pixels",
}


def cases() -> Iterator[tuple[str, str, Any]]:
    """Every (class, key, value)."""
    for name, kind in KINDS.items():
        for key, values in kind.values.items():
            for value in values:
                yield name, key, value


@cache
def base(name: str) -> Path:
    """The folder of a class's pipeline as it is."""
    folder = Path(tempfile.mkdtemp(prefix="walk-"))
    KINDS[name].make().save_pretrained(folder)
    return folder


def changed(name: str, key: str, value: Any, folder: Path) -> Path:
    """The class's pipeline with one other value: built anew where the class takes it, else by its configuration."""
    part = KINDS[name].part
    shutil.copytree(base(name), folder)
    file = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    config = json.loads(file.read_text())
    if part != "tokenizer":
        try:
            rebuilt = _rebuilt(name, config | {key: value})
        except Exception:  # a value that the class refuses is left to the loaders
            rebuilt = None
        if rebuilt is not None:
            shutil.rmtree(folder / part)
            rebuilt.save_pretrained(folder / part)
            config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: value}))
    return folder


def _rebuilt(name: str, config: dict[str, Any]) -> Any:
    """The part with other weights, or with the base's where all of them fit."""
    import diffusers
    import transformers

    torch.manual_seed(11)
    original = getattr(KINDS[name].make(), KINDS[name].part)
    if name.endswith("Config"):
        made = type(original)(getattr(transformers, name)(**config))
    else:
        made = getattr(diffusers, name).from_config(config)
    with contextlib.suppress(RuntimeError):
        made.load_state_dict(original.state_dict())
    return made.eval()


def theirs(folder: Path, teacher: Teacher, noise: torch.Tensor) -> np.ndarray[Any, Any]:
    """diffusers' own images (B, H, W, C) in 0..255 from this noise."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    name = type(pipeline).__name__
    height, width = (side * teacher.postprocess.scale for side in teacher.shape[1:])
    scale = teacher.embedded_guidance or (teacher.guidance.scale if teacher.guidance else 1.0)
    more: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    if name in ("DDIMPipeline", "DiTPipeline"):
        home = {"DDIMPipeline": "ddim.pipeline_ddim", "DiTPipeline": "dit.pipeline_dit"}[name]
        first = (
            {"batch_size": len(noise)} if name == "DDIMPipeline" else {"class_labels": [0, 1], "guidance_scale": scale}
        )
        with unittest.mock.patch(f"diffusers.pipelines.{home}.randn_tensor", return_value=noise.clone()):
            return np.asarray(pipeline(**first, **more).images) * 255
    more |= {"height": height, "width": width, "guidance_scale": scale, "latents": noise.clone()}
    if name == "FluxPipeline":
        more["latents"] = pipeline._pack_latents(noise, len(noise), noise.shape[1], *noise.shape[2:])
    if name.startswith("PixArt"):
        more |= {"use_resolution_binning": False, "clean_caption": False}
    return np.asarray(pipeline(PROMPTS[:2], **more).images) * 255


def outcome(name: str, key: str, value: Any) -> str:
    """What comes of a case: equal, refused, wider (diffusers itself fails), or what is wrong."""
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = changed(name, key, value, Path(place) / "pipeline")
        options: dict[str, Any] = {"prompts": PROMPTS} if (folder / "tokenizer").is_dir() else {}
        if kind.size:
            options |= {"height": kind.size, "width": kind.size}
        try:
            teacher = Teacher.load(folder, **options)
            noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
            images = teacher.images(teacher.sample(noise, teacher.labels(np.arange(2)), STEPS))
        except RedifError:
            return "refused"
        except Exception as error:  # any that is not ours is a finding
            return f"WRONG: {type(error).__name__} escapes: {error!s:.200}"
        ours = ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        try:
            expected = theirs(folder, teacher, noise)
        except Exception as error:  # diffusers raises what it likes
            return "wider" if (name, key) in WIDER else f"WRONG: taken, and diffusers says {error!s:.200}"
        if ours.shape != expected.shape:
            expected = expected.reshape(ours.shape) if ours.size == expected.size else expected[..., :1]
        apart = float(np.abs(ours - expected).max()) if ours.shape == expected.shape else float("inf")
        return "equal" if apart <= LEVELS else f"WRONG: {apart:.1f} levels from diffusers"


def static_rows() -> list[tuple[str, str, str]]:
    """(class, key, values) of every row of the table."""
    rows = [
        (name, key, ", ".join(_shown(value) for value in kind.values[key]))
        for name, kind in KINDS.items()
        for key in sorted(kind.values)
    ]
    for name in ("CLIPTextConfig", "T5Config"):
        rows += [(name, key, "") for key in sorted(HARMLESS[name])]
    return sorted(rows)


def _shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def walk() -> dict[tuple[str, str], list[str]]:
    """What comes of every value of every key."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, key, value in cases():
        said = outcome(name, key, value)
        found.setdefault((name, key), []).append(said)
        print(f"{name}.{key} = {value!r}: {said}", file=sys.stderr, flush=True)
    return found


def table(found: dict[tuple[str, str], list[str]]) -> str:
    """The table of what was found."""
    lines = ["| class | key | values that were tried | result |", "|---|---|---|---|"]
    for name, key, values in static_rows():
        results = [_result(name, key, said) for said in found.get((name, key), ["harmless"])]
        lines.append(f"| `{name}` | `{key}` | {values} | {', '.join(_once(results))} |")
    return "\n".join(lines) + "\n"


def _once(results: list[str]) -> list[str]:
    """The results in the order of the values; one for all where they agree."""
    return results[:1] if len(set(results)) == 1 else results


def _result(name: str, key: str, said: str) -> str:
    if said == "wider":
        return WIDER[name, key]
    return "harmless" if said == "equal" and key in HARMLESS.get(name, ()) else said


def write(found: dict[tuple[str, str], list[str]]) -> None:
    """Write the table into the page."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(head + START + table(found) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write(walk())
