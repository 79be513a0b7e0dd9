"""Normalised attention guidance (NAG, arXiv 2505.21179): negative prompts for networks that make one call a step.

Where an image attends to its prompt, it attends to the negative prompt too, with the same queries. From the two outputs
z and z-, each token gets (equations 5 to 8 of the paper)::

    g = s z - (s - 1) z-
    g = g min(r, tau) / r,   r = |g|_1 / |z|_1
    z' = alpha g + (1 - alpha) z

At s = 1 that is z itself. In a UNet only cross attention costs more, a few percent of a call. In SD3 and Flux image and
text attend to each other: the negative prompt is a second text beside the first, through all blocks, with its own
pooled embedding; the image's tokens attend with either text, and their two outputs become one. Flux's last blocks,
which have one stream for text and image, are computed for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.families import HIDDEN, POOLED

__all__ = ["ALPHA", "TAU", "Negatives", "negated", "negatives", "normalised_guidance"]

TAU = 2.5
#: The authors', by the network's class.
ALPHA = {"UNet2DConditionModel": 0.5, "SD3Transformer2DModel": 0.125, "FluxTransformer2DModel": 0.25}

#: Of attention layers; Stable Diffusion's have none of them.
_UNLIKE = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim", "residual_connection")

_Named = dict[str, Any]
_Changed = tuple[tuple[Any, ...], _Named]


def normalised_guidance(z: Tensor, negative: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """The attention's output (B, N, D) under guidance.

    Args:
        z: (B, N, D), of the prompt.
        negative: (B, N, D), of the negative prompt.
        scale: (B,), s of each image; 1 leaves z as it is.
        alpha: The share of the guided output.
    """
    s = scale.to(z.dtype)[:, None, None]
    guided = z * s - negative * (s - 1)
    ratio = guided.abs().sum(-1, keepdim=True) / (z.abs().sum(-1, keepdim=True) + 1e-7)
    guided = guided * (ratio.clamp(max=TAU) / (ratio + 1e-7))
    return torch.where(s == 1, z, alpha * guided + (1 - alpha) * z)


class Negatives:
    """What the guided attention layers of a network share.

    Attributes:
        scale: (B,), set before each call of the network.
        alpha: Of the network's class.
    """

    def __init__(self, alpha: float) -> None:
        self.scale, self.alpha = torch.ones(1), alpha

    def mixed(self, z: Tensor, negative: Tensor) -> Tensor:
        """The guided output (B, N, D) of an attention layer."""
        return normalised_guidance(z, negative, self.scale, self.alpha)


@contextmanager
def negatives(network: nn.Module) -> Iterator[Negatives]:
    """While it lasts, a network takes negative prompts; its weights and their names stay.

    Each of the conditions that are `negated` has the prompt's values and then the negative prompt's along its second
    axis: ``encoder_hidden_states`` (B, 2 L, D), ``pooled_projections`` (B, 2 P).

    Yields:
        What its layers share.

    Raises:
        UnsupportedModel: The network is of a family without NAG, or has other attention than its family's.
    """
    family = _family(network)
    shared = Negatives(ALPHA[family])
    within: Callable[[Any, Negatives], AbstractContextManager[None]]
    within = _in_unet if family == "UNet2DConditionModel" else _in_joint
    with within(network, shared):
        yield shared


def negated(network: nn.Module) -> tuple[str, ...]:
    """The names of the conditions that a negative prompt has too, in a network that takes them by NAG.

    Raises:
        UnsupportedModel: Its family has no NAG.
    """
    return (HIDDEN,) if _family(network) == "UNet2DConditionModel" else (HIDDEN, POOLED)


def _family(network: nn.Module) -> str:
    name = type(network).__name__
    if name not in ALPHA:
        raise UnsupportedModel(
            f"{name} cannot take negative prompts by NAG; UNet2DConditionModel (Stable Diffusion, SDXL, LCM), "
            "SD3Transformer2DModel and FluxTransformer2DModel can"
        )
    return name


# ---------------------------------------------------------------------- cross attention


class _CrossAttention:
    """An attention processor of diffusers for cross attention: `encoder_hidden_states` (B, 2 L, D) are the prompt's
    and, after them, the negative prompt's."""

    def __init__(self, shared: Negatives) -> None:
        self._shared = shared

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' ``AttnProcessor2_0``; returns (B, N, D)."""
        query = attn.to_q(hidden_states)
        both = encoder_hidden_states.unflatten(1, (2, -1))
        asked, negative = (self._attend(attn, query, both[:, place]) for place in (0, 1))
        z = self._shared.mixed(asked, negative)
        projected: Tensor = attn.to_out[1](attn.to_out[0](z))
        return projected / attn.rescale_output_factor

    @staticmethod
    def _attend(attn: Any, query: Tensor, states: Tensor) -> Tensor:
        """What the queries (B, N, H d) read from the states (B, L, D): (B, N, H d)."""
        batch, _, width = query.shape
        q, k, v = (
            value.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2)
            for value in (query, attn.to_k(states), attn.to_v(states))
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v)
        return read.transpose(1, 2).reshape(batch, -1, width)


@contextmanager
def _in_unet(network: Any, shared: Negatives) -> Iterator[None]:
    """Cross attention by `_CrossAttention`."""
    processors = dict(network.attn_processors)
    crossing = [name for name in processors if name.endswith("attn2.processor")]
    if not crossing:
        raise UnsupportedModel("the UNet has no cross attention, so it cannot take negative prompts by NAG")
    for name in crossing:
        attention: Any = network.get_submodule(name.removesuffix(".processor"))
        unlike = [part for part in _UNLIKE if getattr(attention, part, None)]
        if unlike:
            raise UnsupportedModel(
                f"{name.removesuffix('.processor')} has {', '.join(unlike)}, which NAG does not support"
            )
    own = _CrossAttention(shared)
    network.set_attn_processor({name: own if name in crossing else found for name, found in processors.items()})
    try:
        yield
    finally:
        network.set_attn_processor(processors)


# ---------------------------------------------------------------------- joint attention


@contextmanager
def _in_joint(network: Any, shared: Negatives) -> Iterator[None]:
    """Joint attention, by hooks around diffusers' own layers and processors.

    The texts are a batch of 2 B, prompts and then negative prompts. The image is a batch of B, except inside attention
    and in Flux's blocks of one stream, which see it beside either text.
    """
    handles = [
        network.register_forward_pre_hook(_texts_apart, with_kwargs=True),
        network.norm_out.register_forward_pre_hook(_first_lane),
    ]
    for block in network.transformer_blocks:
        handles += [
            block.norm1.register_forward_pre_hook(_of_the_prompt, with_kwargs=True),
            block.attn.register_forward_pre_hook(_image_twice, with_kwargs=True),
            block.attn.to_out[0].register_forward_pre_hook(lambda _, given: shared.mixed(*_lanes(given[0]))),
        ]
    single = list(getattr(network, "single_transformer_blocks", ()))
    if single:
        handles.append(single[0].register_forward_pre_hook(_image_twice, with_kwargs=True))
    for block in single:
        image = _ImageOfOneStream(shared)
        handles += [
            block.register_forward_pre_hook(image.note, with_kwargs=True),
            block.attn.register_forward_hook(image.mix),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lanes(both: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a batch: of the prompts, and of the negative ones."""
    half = both.shape[0] // 2
    return both[:half], both[half:]


def _texts_apart(network: Any, given: tuple[Any, ...], named: _Named) -> _Changed:
    """Before the network: conditions (B, 2 L, ...) become (2 B, L, ...), times and guidance scales (2 B,)."""
    changed = {name: torch.cat(named[name].chunk(2, dim=1)) for name in (HIDDEN, POOLED)}
    changed |= {name: torch.cat([named[name]] * 2) for name in ("timestep", "guidance") if named.get(name) is not None}
    if "txt_ids" in named:
        changed["txt_ids"] = named["txt_ids"].chunk(2)[0]
    return given, {**named, **changed}


def _of_the_prompt(norm: Any, given: tuple[Any, ...], named: _Named) -> _Changed:
    """Before the image's norm: of the embedding (2 B, D) that of the prompts."""
    return given, {**named, "emb": _lanes(named["emb"])[0]}


def _image_twice(part: Any, given: tuple[Any, ...], named: _Named) -> _Changed:
    """Before attention: the image's tokens (B, N, D) beside either text."""
    return given, {**named, "hidden_states": torch.cat([named["hidden_states"]] * 2)}


def _first_lane(norm: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Before the last norm: the image (B, N, D), and the embedding of the prompts."""
    embedding = _lanes(given[1])[0]
    return given[0][: embedding.shape[0]], embedding


class _ImageOfOneStream:
    """Hooks of a block that has one stream for text and image: the image's tokens get the guided output, in both lanes.

    The block knows how long its text is, its attention does not.
    """

    def __init__(self, shared: Negatives) -> None:
        self._shared, self._length = shared, 0

    def note(self, block: Any, given: tuple[Any, ...], named: _Named) -> None:
        """Before the block."""
        self._length = named[HIDDEN].shape[1]

    def mix(self, attention: Any, given: tuple[Any, ...], out: Tensor) -> Tensor:
        """After its attention, (2 B, L + N, D)."""
        text, image = out[:, : self._length], out[:, self._length :]
        return torch.cat([text, torch.cat([self._shared.mixed(*_lanes(image))] * 2)], 1)
