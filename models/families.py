"""How each family of diffusers' networks, text encoders and autoencoders is called.

One signature for all networks: latents (B, C, H, W), times and conditions in; f, the first C channels of the output,
out. Packing, position ids, micro-conditioning and embedded guidance are handled here. Training and export both call
networks through this module, so that they compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from redif_sdk.artifact.manifest import MASK_LATENTS, MASKED_LATENTS
from redif_sdk.errors import UnsupportedModel

__all__ = [
    "AUTOENCODERS",
    "ENCODERS",
    "LAYOUTS",
    "PAINTING",
    "LatentDecoder",
    "LatentEncoder",
    "TextEncoders",
    "all_anew",
    "call_network",
    "guidance_embedding",
    "is_supported",
]

HIDDEN, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"

#: What an inpainting network takes after the latents, as further channels.
PAINTING = (MASK_LATENTS, MASKED_LATENTS)

#: The text encoders that `TextEncoders` knows how to call, classes of transformers.
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")

#: Autoencoders whose decoder a student may have, classes of diffusers.
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")

#: By a pipeline's class: (layout of its text encoders, names of the encoded prompts' tensors).
LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": ("sd", (HIDDEN,)),
    "LatentConsistencyModelPipeline": ("sd", (HIDDEN,)),
    "StableDiffusionInpaintPipeline": ("sd", (HIDDEN,)),
    "StableDiffusionXLPipeline": ("sdxl", (HIDDEN, POOLED)),
    "StableDiffusionXLInpaintPipeline": ("sdxl", (HIDDEN, POOLED)),
    "StableDiffusion3Pipeline": ("sd3", (HIDDEN, POOLED)),
    "FluxPipeline": ("flux", (HIDDEN, POOLED)),
    "PixArtAlphaPipeline": ("pixart", (HIDDEN, MASK)),
    "PixArtSigmaPipeline": ("pixart", (HIDDEN, MASK)),
}


class Call(NamedTuple):
    """The arguments of one call of a network."""

    x: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    conditions: Mapping[str, Tensor]
    embedded_guidance: float | Tensor | None
    scale: int  # pixels a latent

    @property
    def scales(self) -> Tensor:
        """The embedded guidance scale of each image, (B,) float32; 1 where none is given."""
        given = self.embedded_guidance
        if isinstance(given, Tensor):
            return given.float()
        return torch.full((len(self.x),), 1.0 if given is None else given, device=self.x.device)

    @property
    def labels(self) -> dict[str, Tensor]:
        """The class labels as keyword arguments, if there are any."""
        return {"class_labels": self.conditions["class_labels"]} if "class_labels" in self.conditions else {}


def call_network(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Tensor],
    embedded_guidance: float | Tensor | None = None,
    scale: int = 8,
) -> Tensor:
    """Call a diffusers network.

    Args:
        network: The network.
        x: (B, C, H, W), in the network's own dtype.
        t: (B,) float32, time in the units of the pipeline's scheduler; for a flow 1000 times the noise level.
        conditions: By name: ``class_labels`` (B,) int64, or ``encoder_hidden_states`` (B, L, D),
            ``pooled_projections`` (B, P), ``encoder_attention_mask`` (B, L); of an inpainting network ``mask_latents``
            (B, 1, H, W) and ``masked_image_latents`` (B, C, H, W). Floats are cast to x's dtype.
        embedded_guidance: The guidance scale that the network takes as an input (Flux dev, LCM); one for all, or
            (B,) float32.
        scale: Pixels a latent on each side, from which SDXL and PixArt get the image's size.

    Returns:
        f (B, C, H, W).

    Raises:
        UnsupportedModel: The network is of an unknown family and takes prompts.
    """
    caller = _caller(network)
    if caller is None and HIDDEN not in conditions:
        caller = _unet  # any network of diffusers' that is called as most are
    if caller is None:
        raise UnsupportedModel(
            f"the network {type(network).__name__} is not supported; use one of {', '.join(_CALLERS)}, "
            "or write an adapter (docs/adapters.md)"
        )
    given = {name: v.to(x.dtype) if v.is_floating_point() else v for name, v in conditions.items()}
    seen = torch.cat([x, *(given.pop(name) for name in PAINTING if name in given)], 1)
    return caller(network, Call(seen, t, given, embedded_guidance, scale))[:, : x.shape[1]]


def all_anew(x: Tensor) -> dict[str, Tensor]:
    """What an inpainting network takes besides latents x (B, C, H, W) where the whole image is painted anew: a mask of
    ones, and zeros for the image."""
    return {MASK_LATENTS: torch.ones_like(x[:, :1]), MASKED_LATENTS: torch.zeros_like(x)}


def is_supported(network: nn.Module) -> bool:
    """Whether :func:`call_network` knows the network's family."""
    return _caller(network) is not None


def _caller(network: nn.Module) -> Callable[[Any, Call], Tensor] | None:
    """The caller by the names of the class and its bases: FSDP makes a subclass of each network's class."""
    names = (base.__name__ for base in type(network).__mro__)
    return next((_CALLERS[name] for name in names if name in _CALLERS), None)


def _unet(network: Any, call: Call) -> Tensor:
    out: Tensor = network(call.x, call.t, **call.labels, return_dict=False)[0]
    return out


def _unet_with_text(network: Any, call: Call) -> Tensor:
    """Stable Diffusion's UNet; SDXL's also takes pooled embeddings and the image's size, LCM's the guidance scale."""
    config, batch = network.config, call.x.shape[0]
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        sides = [side * call.scale for side in call.x.shape[2:]]
        # original size, crop, target size: the micro-conditioning of SDXL (arXiv 2307.01952, section 2.2)
        ids = [call.x.new_ones(batch) * side for side in (*sides, 0, 0, *sides)]
        more["added_cond_kwargs"] = {"text_embeds": call.conditions[POOLED].float(), "time_ids": torch.stack(ids, 1)}
    elif config.addition_embed_type is not None:
        raise UnsupportedModel(f"addition_embed_type {config.addition_embed_type!r} is not supported; text_time is")
    if config.time_cond_proj_dim is not None:
        more["timestep_cond"] = guidance_embedding(call.scales, config.time_cond_proj_dim).to(call.x)
    out: Tensor = network(
        call.x, call.t, encoder_hidden_states=call.conditions[HIDDEN], **call.labels, **more, return_dict=False
    )[0]
    return out


def guidance_embedding(scales: Tensor, width: int) -> Tensor:
    """Guidance scales (B,) as LCM's network takes them (arXiv 2310.04378, section 4.3): (B, width) float32."""
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=scales.device)
    frequencies = torch.exp(places * -(math.log(10000.0) / (half - 1)))
    angles = ((scales.float() - 1.0) * 1000.0)[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def _sd3(network: Any, call: Call) -> Tensor:
    out: Tensor = network(
        hidden_states=call.x,
        timestep=call.t,
        encoder_hidden_states=call.conditions[HIDDEN],
        pooled_projections=call.conditions[POOLED],
        return_dict=False,
    )[0]
    return out


def _flux(network: Any, call: Call) -> Tensor:
    """Flux sees 2 x 2 latents as one token, with the token's row and column as its position."""
    x = call.x
    batch, channels, rows, columns = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    down = torch.arange(rows, device=x.device, dtype=x.dtype)[:, None].expand(rows, columns)
    across = torch.arange(columns, device=x.device, dtype=x.dtype)[None, :].expand(rows, columns)
    places = torch.stack([torch.zeros_like(down), down, across], -1).reshape(rows * columns, 3)
    hidden = call.conditions[HIDDEN]
    guidance = None
    if network.config.guidance_embeds:
        guidance = call.scales
    out: Tensor = network(
        hidden_states=tokens.reshape(batch, rows * columns, channels * 4),
        timestep=call.t / 1000,
        guidance=guidance,
        pooled_projections=call.conditions[POOLED],
        encoder_hidden_states=hidden,
        txt_ids=x.new_zeros(hidden.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
    patches = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, rows * 2, columns * 2)


def _pixart(network: Any, call: Call) -> Tensor:
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.config.sample_size == 128:  # PixArt's rule for the model that takes its image's size
        height, width = (side * call.scale for side in call.x.shape[2:])
        ones = call.x.new_ones(call.x.shape[0], 1)
        size = {"resolution": torch.cat([ones * height, ones * width], 1), "aspect_ratio": ones * (height / width)}
    out: Tensor = network(
        call.x,
        encoder_hidden_states=call.conditions[HIDDEN],
        encoder_attention_mask=call.conditions[MASK],
        timestep=call.t,
        added_cond_kwargs=size,
        return_dict=False,
    )[0]
    return out


def _dit(network: Any, call: Call) -> Tensor:
    out: Tensor = network(call.x, timestep=call.t, **call.labels, return_dict=False)[0]
    return out


_CALLERS: dict[str, Callable[[Any, Call], Tensor]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_with_text,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
}


class TextEncoders(nn.Module):
    """A pipeline's text encoders as one function of token ids, combined as in its ``encode_prompt``.

    Args:
        encoders: Transformers' CLIP and T5 models, in the pipeline's order.
        pipeline: The name of the pipeline's class, one of ``LAYOUTS``.
        shape: Of the first tensor without its batch axis, (L, D): SD3 pads CLIP's states to it, and fills it with zeros
            if the third encoder was left out.

    Raises:
        UnsupportedModel: Another pipeline.
    """

    def __init__(self, encoders: Sequence[nn.Module], pipeline: str, shape: Sequence[int] = ()) -> None:
        super().__init__()
        if pipeline not in LAYOUTS:
            raise UnsupportedModel(
                f"the text encoders of {pipeline} are not supported; use those of {', '.join(LAYOUTS)}"
            )
        self.encoders = nn.ModuleList(encoders)
        self.layout, self.names = LAYOUTS[pipeline]
        self.shape = tuple(shape)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode token ids (B, L) int64, one tensor for each encoder (for PixArt also a mask); returns the tensors
        ``names``."""
        outputs: tuple[Tensor, ...] = getattr(self, f"_{self.layout}")(*inputs)
        return outputs

    def _sd(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.encoders[0](ids)[0],)

    def _sdxl(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        states, _ = self._penultimate(0, first)
        more, pooled = self._penultimate(1, second)
        return torch.cat([states, more], -1), pooled

    def _sd3(self, first: Tensor, second: Tensor, third: Tensor | None = None) -> tuple[Tensor, ...]:
        (states, pooled), (more, more_pooled) = self._penultimate(0, first), self._penultimate(1, second)
        clip = torch.cat([states, more], -1)
        if third is None:
            length, width = self.shape
            long = clip.new_zeros(clip.shape[0], length - clip.shape[1], width)
        else:
            long = self.encoders[2](third)[0]
        clip = nn.functional.pad(clip, (0, long.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, long], 1), torch.cat([pooled, more_pooled], -1)

    def _flux(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        pooled = self.encoders[0](first, output_hidden_states=False).pooler_output
        return self.encoders[1](second, output_hidden_states=False)[0], pooled

    def _pixart(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        states = self.encoders[0](ids, attention_mask=mask)[0]
        return states, mask.to(states.dtype)

    def _penultimate(self, index: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's states before the last layer, and its projection of the end's state."""
        out = self.encoders[index](ids, output_hidden_states=True)
        return out.hidden_states[-2], out[0]


class _Autoencoded(nn.Module):
    """An autoencoder, with the scale and the shift of its latents."""

    def __init__(self, autoencoder: nn.Module, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor


class LatentEncoder(_Autoencoded):
    """An autoencoder's encoder: images (B, C', H, W) in about [-1, 1] -> latents (B, C, H / scale, W / scale).

    Of a variational one (`AutoencoderKL`) the mean of its distribution, which is what diffusers draws from.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Encode images (B, C', H, W); returns (B, C, H / scale, W / scale)."""
        autoencoder: Any = self.autoencoder
        found = autoencoder.encode(image, return_dict=False)[0]
        latents: Tensor = found.mode() if hasattr(found, "mode") and not isinstance(found, Tensor) else found
        return (latents - self.shift_factor) * self.scaling_factor


class LatentDecoder(_Autoencoded):
    """An autoencoder's decoder: latents (B, C, H, W) -> images (B, C', H scale, W scale), in about [-1, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W); returns (B, C', H scale, W scale)."""
        autoencoder: Any = self.autoencoder
        out: Tensor = autoencoder.decode(latents / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        return out
