"""GRPO as Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) has it: whole noisy trajectories, cold start, KL. No
regression term, unless one is asked for.

G trajectories from one start; the reward of each, less the group's mean and over its std, weighs the clipped ratio of
every noisy row (PPO, Schulman et al. 2017). A window of noisy rows that moves from update to update, the others being
deterministic, is MixGRPO's (Li et al. 2025). The clip is given as `clip_mean_shift`, since its meaning depends on D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from redif_sdk.distill.compute.lora import load_trained, trained, twin
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.estimators import TrajectoryGroups
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.options import GrpoOptions
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.pool import Pairs


class Grpo(Method):
    """Flow-GRPO with MixGRPO's window. ``reference``: the network of the KL, the student as it began."""

    name = "grpo"
    rewarded = True

    def __init__(self) -> None:
        self.reference: nn.Module | None = None
        self._checked = False

    def prepare(self, context: Context) -> None:
        """The reference of the KL is the student as it begins."""
        if context.config.options_as(GrpoOptions).kl:
            self.reference = twin(context.policy.network)

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """PPO's clipped surrogate over the rows of a window whose place the update's generator draws."""
        options, rows = context.config.options_as(GrpoOptions), context.policy.num_inference_steps
        white = Exploration.white(batch.noise[0].numel(), context.device)
        size = min(options.sde_window or rows, rows)
        first = int(torch.randint(0, rows - size + 1, (), generator=generator))
        groups = TrajectoryGroups(context, white, self.reference, range(first, first + size))
        check, self._checked = not self._checked, True
        yield from groups.losses(batch, generator, check=check)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": None if self.reference is None else trained(self.reference)}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["reference"] is not None:
            self.reference = twin(context.policy.network)
            load_trained(self.reference, state["reference"])
