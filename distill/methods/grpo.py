"""GRPO as Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) has it: whole trajectories of an SDE, cold start, KL. No
regression term, unless one is asked for.

G trajectories from one start; the reward of each, less the group's mean and over its std, weighs the clipped ratio of
every noisy row (PPO, Schulman et al. 2017). The noise is that of an SDE with the sampler's marginals, so the last step,
and the student when it is used, are deterministic. A window of noisy rows that moves from update to update, the others
being deterministic, is MixGRPO's (Li et al. 2025).

Otherwise than the paper: the SDE is DDIM's family (``eta``), which for flows keeps the marginals too; the clip is given
as `clip_mean_shift`, since its meaning depends on D; a student of one step, which has no noise between steps, explores
its output by a tenth of x0's unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from redif_sdk.distill.compute.lora import load_trained, trained, twin
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.estimators import TrajectoryGroups
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.options import GrpoOptions
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.pool import Pairs
from redif_sdk.errors import UnsupportedModel
from redif_sdk.sampling.table import StepTable


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
        sde = None if rows == 1 else _sde(context, options.eta)
        noisy = max(1, rows - 1)
        size = min(options.sde_window or noisy, noisy)
        first = int(torch.randint(0, noisy - size + 1, (), generator=generator))
        groups = TrajectoryGroups(context, white, self.reference, range(first, first + size), sde)
        check, self._checked = not self._checked, True
        yield from groups.losses(batch, generator, check=check)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": None if self.reference is None else trained(self.reference)}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["reference"] is not None:
            self.reference = twin(context.policy.network)
            load_trained(self.reference, state["reference"])


def _sde(context: Context, eta: float) -> StepTable:
    """The student's sampler with noise between its steps.

    Raises:
        UnsupportedModel: its times are not the teacher's spacing.
    """
    own, sde = context.policy.table, context.teacher.table(context.policy.num_inference_steps, eta=eta)
    if not np.allclose(own.timesteps, sde.timesteps):
        raise UnsupportedModel("grpo trains at the teacher's spacing of times; begin with a student of that spacing")
    return sde
