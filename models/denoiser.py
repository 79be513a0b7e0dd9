"""A network behind one signature: ``(x, t, condition) -> f``, guided or not, whatever family it is of.

What a condition is to the network (a class, a prompt's embeddings) ends here; adapters make these, methods call them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from redif_sdk.artifact.records import Guidance
from redif_sdk.models.families import call_network
from redif_sdk.models.prompts import Prompts

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(predict: Predict, guidance: Guidance | None, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """``predict``'s output (B, C, H, W) under ``guidance``: one call on a doubled batch."""
    if guidance is None or condition is None:
        return predict(x, t, condition)
    null = torch.full_like(condition, guidance.null_class)
    asked, unasked = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null])).chunk(2)
    mixed: Tensor = guidance.mix(asked, unasked)
    return mixed


class Denoiser(nn.Module):
    """A network behind one signature: ``(x (B, C, H, W), t (B,) float32, condition (B,) int64 or None) -> f``.

    ``f`` is the first C channels of what the network gives (learned-variance networks give 2C). ``guidance``: it is
    the guided output, at two calls of the network. ``prompts``: the condition is a prompt's place among these.

    Args:
        diffusers_call: the network is one of diffusers'; otherwise it is called with the very arguments of this one.
        embedded_guidance: the guidance scale that the network takes as an input (Flux dev, LCM).
        scale: pixels a latent on each side.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        diffusers_call: bool,
        guidance: Guidance | None = None,
        prompts: Prompts | None = None,
        embedded_guidance: float | None = None,
        scale: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.diffusers_call = diffusers_call
        self.guidance = guidance
        self.prompts = prompts
        self.embedded_guidance = embedded_guidance
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return guided(self._call, self.guidance, x, t, condition)

    def _call(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if not self.diffusers_call:
            out: Tensor = self.network(x, t, condition)
            return out[:, : x.shape[1]]
        if condition is None:
            conditions = {}
        else:
            conditions = {"class_labels": condition} if self.prompts is None else self.prompts(condition)
        return call_network(self.network, x, t, conditions, self.embedded_guidance, self.scale)
