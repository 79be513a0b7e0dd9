"""Pipelines of real models' shapes with random weights: Stable Diffusion 1.5, SDXL, SD3 medium and Flux schnell.

    python -m benchmarks.real_shapes sd15 build/sd15

Configurations are those of the published models; weights are random, in half precision, written shard by shard, so that
12 billion parameters take no more memory than one shard. Tokenizers have a small vocabulary of their own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.pipelines import clip_tokenizer, t5_tokenizer

SHARD = 2 << 30  # bytes
DTYPES = {"sd15": torch.float16, "sdxl": torch.float16, "sd3": torch.float16, "flux": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder)


def make(shape: str, folder: Path) -> None:
    """Write the pipeline of a shape into a new folder, as diffusers saves one."""
    import diffusers

    pipeline, parts = SHAPES[shape]()
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__]
        if not isinstance(part, nn.Module):
            part.save_pretrained(folder / name)
            continue
        config = part.config
        config.save_pretrained(folder / name) if library == "transformers" else part.save_config(folder / name)
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        _write_weights(part, folder / name, stem, DTYPES[shape])
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def tiny_decoder(folder: Path) -> Path:
    """A network of TAESD's shape, for Stable Diffusion's latents, in a folder that may be there already."""
    from diffusers import AutoencoderTiny

    if not folder.is_dir():
        torch.manual_seed(0)
        AutoencoderTiny().half().save_pretrained(folder)
    return folder


def _write_weights(network: nn.Module, folder: Path, stem: str, dtype: torch.dtype) -> None:
    shards: list[list[str]] = [[]]
    sizes = {name: value.numel() * 2 for name, value in network.state_dict().items()}
    filled = 0
    for name, size in sizes.items():
        if filled + size > SHARD and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    norms = {f"{name}.weight" for name, module in network.named_modules() if "Norm" in type(module).__name__}
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, shapes[name], name in norms, dtype, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


def _random(name: str, shape: torch.Size, norm: bool, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights with which activations keep their scale."""
    if norm:
        return torch.ones(shape, dtype=dtype)
    if len(shape) < 2:
        return torch.zeros(shape, dtype=dtype)
    scale = 0.02 if "embed" in name else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.float32).normal_(0, scale, generator=generator).to(dtype)


Parts = Iterator[tuple[str, Any]]


def _sd15() -> tuple[str, dict[str, Any]]:
    from diffusers import LCMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        parts = {"vae": _vae(4, 512, 0.18215), "text_encoder": _clip_l(), "unet": unet}
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return "StableDiffusionPipeline", {**parts, "tokenizer": clip_tokenizer(77), "scheduler": scheduler}


def _sdxl() -> tuple[str, dict[str, Any]]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        parts = {
            "vae": _vae(4, 1024, 0.13025),
            "text_encoder": _clip_l(),
            "text_encoder_2": _clip_g(),
            "unet": unet,
        }
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    tokenizers = {"tokenizer": clip_tokenizer(77), "tokenizer_2": clip_tokenizer(77)}
    return "StableDiffusionXLPipeline", {**parts, **tokenizers, "scheduler": scheduler}


def _sd3() -> tuple[str, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )
        parts = {
            "vae": _vae(16, 1024, 1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            "text_encoder": _clip_l(projected=True),
            "text_encoder_2": _clip_g(),
            "text_encoder_3": _t5_xxl(),
            "transformer": transformer,
        }
    tokenizers = {"tokenizer": clip_tokenizer(77), "tokenizer_2": clip_tokenizer(77), "tokenizer_3": t5_tokenizer(512)}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return "StableDiffusion3Pipeline", {**parts, **tokenizers, "scheduler": scheduler}


def _flux() -> tuple[str, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    with torch.device("meta"):
        parts = {
            "vae": _vae(16, 1024, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            "text_encoder": _clip_l(),
            "text_encoder_2": _t5_xxl(),
            "transformer": FluxTransformer2DModel(guidance_embeds=False),
        }
    tokenizers = {"tokenizer": clip_tokenizer(77), "tokenizer_2": t5_tokenizer(512)}
    return "FluxPipeline", {**parts, **tokenizers, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)}


def _vae(channels: int, size: int, scaling: float, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=size,
        scaling_factor=scaling,
        **more,
    )


def _clip_l(*, projected: bool = False) -> Any:
    return _clip(projected, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


def _clip_g() -> Any:
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return _clip(True, projection_dim=1280, hidden_act="gelu", **sizes)


def _clip(projected: bool, **sizes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(77)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(**{"projection_dim": 768, **sizes, **ids})
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _t5_xxl() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


SHAPES: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}

if __name__ == "__main__":
    main()
