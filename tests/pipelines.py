"""diffusers' own pipelines with few random weights: every class is the real one, nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = (
    *("a", "an", "of", "red", "blue", "green", "heart", "circle", "cat", "dog", "in", "the", "style", "and", "with"),
    *("emoji", "house", "tree", "sun", "moon"),
)
PROMPTS = ["red heart", "a blue circle", "the cat and the dog", "an emoji of a house", "sun with moon", "green tree"]
LENGTH = 16  # of CLIP's prompts here


def clip_tokenizer(length: int = LENGTH) -> Any:
    """CLIP's tokenizer over single letters and ``WORDS``."""
    from transformers import CLIPTokenizer

    vocab: dict[str, int] = {}
    merges: list[tuple[str, str]] = []

    def add(token: str) -> None:
        vocab.setdefault(token, len(vocab))

    for code in range(33, 127):
        add(chr(code))
        add(chr(code) + "</w>")
    for word in WORDS:
        left = word[0] if len(word) > 1 else word + "</w>"
        for place in range(1, len(word)):
            right = word[place] + ("</w>" if place == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            add(left)
    add("<|startoftext|>")
    add("<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    tokenizer.model_max_length = length
    return tokenizer


def t5_tokenizer(length: int = 12) -> Any:
    """T5's tokenizer over single letters and ``WORDS``."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    pieces += [(f"▁{word}", -2.0 - index / 100) for index, word in enumerate(WORDS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = length
    return tokenizer


def clip(tokenizer: Any, width: int = 32, projection: int | None = None) -> Any:
    """A CLIP text encoder; with its projection where ``projection`` says how wide."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)).eval()


def t5(tokenizer: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=2 * width, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def vae(channels: int = 4, **more: Any) -> Any:
    """Two pixels a latent on each side."""
    from diffusers import AutoencoderKL

    blocks = 2
    return AutoencoderKL(
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=16,
        **more,
    ).eval()


#: Of a UNet that does not change its size on the way.
ONE_BLOCK: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def unet(cross: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),  # the middle attends to the prompt
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **more}).eval()


def ddim(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return DDIMScheduler(**{**settings, "set_alpha_to_one": False, "steps_offset": 1, **more})


def stable_diffusion(scheduler: Any = None, **network: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return _quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            unet=unet(32, **network),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def latent_consistency() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    torch.manual_seed(1)
    tokenizer = clip_tokenizer()
    return _quiet(
        LatentConsistencyModelPipeline(
            vae=vae(),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            unet=unet(32, time_cond_proj_dim=16, **ONE_BLOCK),
            scheduler=LCMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(scheduler: Any = None) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(2)
    tokenizer = clip_tokenizer()
    network = unet(
        64,
        **ONE_BLOCK,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    usual = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer, projection=24),
            tokenizer_2=clip_tokenizer(),
            unet=network,
            scheduler=scheduler or usual,
            force_zeros_for_empty_prompt=True,
        )
    )


def inpainting(plain: Any, **more: Any) -> Any:
    """``plain``, a pipeline of Stable Diffusion or SDXL, with a UNet that takes a mask and a masked image too."""
    import diffusers
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    known = {name: value for name, value in plain.unet.config.items() if not name.startswith("_")}
    config = {**known, "in_channels": 9, "out_channels": 4}
    parts = {**plain.components, "unet": UNet2DConditionModel.from_config(config).eval()}
    kind = getattr(diffusers, type(plain).__name__.replace("Pipeline", "InpaintPipeline"))
    unused = {} if "requires_safety_checker" not in plain.config else {"requires_safety_checker": False}
    return _quiet(kind(**parts, **unused, **more))


def stable_diffusion_3(shift: float = 3.0, with_t5: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(3)
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        out_channels=16,
        pos_embed_max_size=16,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=network.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(16, scaling_factor=1.5, shift_factor=0.06),
            text_encoder=clip(tokenizer, projection=24),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer, projection=24),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5(long, 64) if with_t5 else None,
            tokenizer_3=long if with_t5 else None,
        )
    )


def flux(guidance_embeds: bool = True, dynamic: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(4)
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic),
        vae=vae(4, scaling_factor=0.36, shift_factor=0.11),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(long),
        tokenizer_2=long,
        transformer=network.eval(),
    )
    return _quiet(pipeline)


def pixart() -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(5)
    long = t5_tokenizer()
    network = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return _quiet(
        PixArtAlphaPipeline(
            tokenizer=long, text_encoder=t5(long), vae=vae(), transformer=network.eval(), scheduler=ddim()
        )
    )


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(6)
    network = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return _quiet(DiTPipeline(transformer=network.eval(), vae=vae(), scheduler=ddim()))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd(folder: Path) -> Path:
    """``folder``, with a guided Stable Diffusion of four steps in it that asks for ``PROMPTS``."""
    stable_diffusion().save_pretrained(folder)
    about = {"name": "tiny-sd", "prompts": PROMPTS, "num_inference_steps": 4, "guidance_scale": 3.0}
    (folder / "redif_teacher.json").write_text(json.dumps(about))
    return folder


def pixels(**more: Any) -> Any:
    """A DDIMPipeline of 8 x 8 latents without classes."""
    from diffusers import DDIMPipeline, UNet2DModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 8}
    unet = UNet2DModel(**{**settings, "layers_per_block": 1, "add_attention": False, **ONE_BLOCK, **more})
    return DDIMPipeline(unet.eval(), ddim())


UNET_LAYERS = ["to_q", "to_k", "to_v", "conv1", "time_emb_proj"]


def lora(network: Any, layers: list[str], name: str = "one", seed: int = 0) -> None:
    """An active adapter that changes what the network computes."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False), name)
    torch.manual_seed(seed)
    for key, weight in network.named_parameters():
        if f"lora_B.{name}" in key:
            torch.nn.init.normal_(weight, std=0.1)
