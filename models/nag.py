"""Normalised attention guidance (NAG, arXiv 2505.21179): negative prompts for networks that make one call a step.

Where an image attends to its prompt, it attends to the negative prompt too, with the same queries. From the two outputs
z and z-, each token gets (equations 5 to 8 of the paper)::

    g = s z - (s - 1) z-
    g = g min(r, tau) / r,   r = |g|_1 / |z|_1
    z' = alpha g + (1 - alpha) z

At s = 1 that is z itself. Only cross attention costs more, a few percent of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.errors import UnsupportedModel

__all__ = ["ALPHA", "TAU", "NegativeAttention", "negatives", "normalised_guidance"]

#: The paper's for SDXL.
TAU, ALPHA = 2.5, 0.5

#: Of attention layers; Stable Diffusion's have none of them.
_UNLIKE = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim", "residual_connection")


def normalised_guidance(z: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """The attention's output (B, N, D) under guidance.

    Args:
        z: (B, N, D), of the prompt.
        negative: (B, N, D), of the negative prompt.
        scale: (B,), s of each image; 1 leaves z as it is.
    """
    s = scale.to(z.dtype)[:, None, None]
    guided = z * s - negative * (s - 1)
    ratio = guided.abs().sum(-1, keepdim=True) / (z.abs().sum(-1, keepdim=True) + 1e-7)
    guided = guided * (ratio.clamp(max=TAU) / (ratio + 1e-7))
    return torch.where(s == 1, z, ALPHA * guided + (1 - ALPHA) * z)


class NegativeAttention:
    """An attention processor of diffusers for cross attention: `encoder_hidden_states` (B, 2 L, D) are the prompt's
    and, after them, the negative prompt's.

    Attributes:
        scale: (B,), set before each call of the network.
    """

    def __init__(self) -> None:
        self.scale = torch.ones(1)

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
        found = [self._attend(attn, query, states) for states in encoder_hidden_states.chunk(2, dim=1)]
        z = normalised_guidance(found[0], found[1], self.scale)
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
def negatives(network: nn.Module) -> Iterator[NegativeAttention]:
    """While it lasts, the cross attention of a UNet takes negative prompts; its weights and their names stay.

    Yields:
        The processor of all its layers.

    Raises:
        UnsupportedModel: The network is no ``UNet2DConditionModel``, or has other attention than Stable Diffusion's.
    """
    processors: Any = dict(getattr(network, "attn_processors", {}))
    crossing = [name for name in processors if name.endswith("attn2.processor")]
    if type(network).__name__ != "UNet2DConditionModel" or not crossing:
        raise UnsupportedModel(
            f"{type(network).__name__} cannot take negative prompts by NAG; UNet2DConditionModel (Stable Diffusion, "
            "SDXL, LCM) can"
        )
    for name in crossing:
        attention: Any = network.get_submodule(name.removesuffix(".processor"))
        unlike = [part for part in _UNLIKE if getattr(attention, part, None)]
        if unlike:
            raise UnsupportedModel(
                f"{name.removesuffix('.processor')} has {', '.join(unlike)}, which NAG does not support"
            )
    shared = NegativeAttention()
    unet: Any = network
    unet.set_attn_processor({name: shared if name in crossing else found for name, found in processors.items()})
    try:
        yield shared
    finally:
        unet.set_attn_processor(processors)
