"""A classifier on the features of a diffusion network's middle block: is a noised image real, or a student's?

That is DMD2's discriminator (Yin et al. 2024, arXiv 2405.14867, section 4.3): the features are the fake score's own, so
it costs a head of few weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.denoiser import inner_of

__all__ = ["Classifier"]

WIDTH = 128


class Classifier(nn.Module):
    """Features (B, C, h, w), (B, L, C) or (B, C) of a network's middle block -> logits (B, L), one a place."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that its weights are not the classifier's
        self.body = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.head = nn.Linear(WIDTH, 1)

    @classmethod
    def on(cls, network: nn.Module, teacher: Teacher, seed: int, device: torch.device) -> Classifier:
        """One on the middle of ``network``, whose own weights depend on ``seed``.

        Raises:
            UnsupportedModel: no block is known to be the middle one.
        """
        block = _middle(network)
        x, t = torch.zeros(1, *teacher.shape, device=device), torch.zeros(1, device=device)
        condition = torch.zeros(1, dtype=torch.int64, device=device) if teacher.num_conditions else None
        with torch.no_grad():
            channels = _as_tokens(_caught(block, lambda: network(x, t, condition))).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2405)
            return cls(block, channels).to(device)

    def forward(self, call: Callable[[], object], *, cut: bool = False) -> Tensor:
        """Logits of what the network's middle block gives in ``call()``; ``cut``: it calls it once, and ends there."""
        logits: Tensor = self.head(self.body(_as_tokens(_caught(self._block[0], call, cut=cut))))[..., 0].float()
        return logits


class _ReachedError(Exception):
    """No error: the middle block has answered, and what comes after it is not wanted."""


def _middle(network: nn.Module) -> nn.Module:
    """The middle block of a UNet, or of the longest list of blocks."""
    inner: Any = inner_of(getattr(network, "get_base_model", lambda: network)())
    if isinstance(getattr(inner, "mid_block", None), nn.Module):
        found: nn.Module = inner.mid_block
        return found
    lists = [part for part in inner.modules() if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1]
    if not lists:
        raise UnsupportedModel(
            f"{type(inner).__name__} has no middle block on which dmd2 could classify; set gan_weight to 0"
        )
    blocks = max(lists, key=len)
    return blocks[len(blocks) // 2]


def _caught(block: nn.Module, call: Callable[[], object], *, cut: bool = False) -> Tensor:
    """The tensor that ``block`` gives in ``call()``, of all micro-batches; ``cut``: of one, and the call ends there."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        if cut:
            raise _ReachedError

    handle = block.register_forward_hook(keep)
    try:
        with suppress(_ReachedError):
            call()
    finally:
        handle.remove()
    return torch.cat(found)


def _as_tokens(features: Tensor) -> Tensor:
    """(B, L, C) of (B, C, h, w), (B, L, C) or (B, C)."""
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    return features if features.dim() == 3 else features[:, None]
