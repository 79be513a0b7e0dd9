"""CDM, continuous-time distribution matching (arXiv 2605.06376): scores are matched on schedules of random lengths and
times, and off their trajectories, so that one student serves any number of steps.

An update rolls the student out on a schedule that is drawn for it, and picks a row of each sample. There the estimate
is moved along the difference of the fake score and the teacher's, as in DMD; and the estimate at another time, to which
the row's own estimate leads in one step, likewise. A guided teacher's guidance is a term of its own (CA), at levels
below the row's, to which the estimate is noised anew.

Otherwise than the authors' code: times are drawn for each sample, not for a batch; a warm start by regression
(``warm_start``) may come first; the fake score's loss has this project's weight, min(SNR, 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.lora import apart
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.regression import to_target
from redif_sdk.distill.methods.score import ScoreMethod
from redif_sdk.distill.options import CdmOptions
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.denoising import clean_at, estimated, levels, random_times
from redif_sdk.sampling.table import StepTable

SHIPPED = (1, 2, 4)  # steps for which a student has tables, besides its own


@dataclass(frozen=True)
class Anchor:
    """A row of each sample's trajectory: its time t (B,), state x and clean estimate (B, C, H, W), detached."""

    t: Tensor
    x: Tensor
    clean: Tensor

    def jump(self, teacher: Teacher, t: Tensor) -> Tensor:
        """The state at times t (B,) to which the row's own estimate leads, in either direction: (B, C, H, W)."""
        alpha, sigma = levels(teacher, self.t)
        noise = (self.x - alpha * self.clean) / sigma.clamp_min(1e-6)
        alpha, sigma = levels(teacher, t)
        return alpha * self.clean + sigma * noise


class Cdm(ScoreMethod):
    """Continuous-time distribution matching."""

    name = "cdm"

    def matched(self, context: Context, fake: FakeScore, batch: Pairs, generator: torch.Generator) -> Iterator[Loss]:
        """step_delta (<g, y> + cdm_weight <g', y'>) + regression_weight |x - teacher|^2: y the estimate at the row, y'
        the one off the trajectory, g and g' the directions there (L_DM + L_CA and L_CDM of section 4)."""
        options = context.config.options_as(CdmOptions)
        teacher, network = context.teacher, context.policy.network
        anchor = self.rollout(context, batch, generator)
        learnt = [self._learn(context, fake, anchor, batch, generator) for _ in range(options.fake_updates)]
        plain, floor = teacher.guided(1), options.norm_floor
        other = random_times(teacher, len(batch), generator, batch.noise.device)
        context.meter.gradient_samples += 2 * len(batch)
        loss = batch.noise.new_zeros(())
        for t, x, weight in (
            (anchor.t, anchor.x, 1.0),
            (other, anchor.jump(teacher, other), options.cdm_weight),
        ):
            clean = _clean(network, context, t, x, batch.condition)
            seen = clean.detach()
            direction = fake.difference(seen, batch.condition, generator, teacher=plain, floor=floor)
            if t is anchor.t and teacher.guidance is not None:
                direction = direction - self._augment(context, seen, anchor.t, batch.condition, generator)
            loss = loss + weight * (direction * clean).mean() / context.amplitude
        loss, figures = options.step_delta * loss, {"fake_loss": sum(learnt) / len(learnt)}
        if options.regression_weight:
            output = context.policy.sample(batch.noise, batch.condition, options.backprop_last_k)
            residual, figures["mse"] = to_target(context, output, batch.target, options.huber)
            loss = loss + options.regression_weight * residual
        yield loss, figures

    @torch.no_grad()
    def rollout(self, context: Context, batch: Pairs, generator: torch.Generator) -> Anchor:
        """A row, drawn for each sample, of its trajectory on a schedule of 1 to ``schedule_steps`` times.

        The first time is the table's, the others are uniform and fall; between them the sampler is DDIM (Euler).
        """
        options, policy = context.config.options_as(CdmOptions), context.policy
        most = options.schedule_steps or 2 * policy.num_inference_steps
        rows, count, device = int(torch.randint(1, most + 1, (), generator=generator)), len(batch), batch.noise.device
        first = torch.full((count,), round(float(policy.table.timesteps[0])), device=device)
        inner = [random_times(context.teacher, count, generator, device) for _ in range(rows - 1)]
        later = torch.stack(inner, 1).sort(1, descending=True).values if inner else first.new_empty(count, 0)
        chosen = draws.integers(0, rows, count, generator, device)
        kept: Anchor | None = None
        t, x = first, policy.start(batch.noise)
        for row in range(rows):
            context.meter.student_calls += count
            now = Anchor(t, x, _clean(policy.network, context, t, x, batch.condition))
            kept = now if kept is None else _choose(chosen == row, now, kept)
            if row < rows - 1:
                t = torch.minimum(later[:, row], t)
                x = now.jump(context.teacher, t)
        assert kept is not None
        return kept

    def _learn(
        self, context: Context, fake: FakeScore, anchor: Anchor, batch: Pairs, generator: torch.Generator
    ) -> float:
        """One update of the fake score on the row's own estimates, and a little of the student merged into it."""
        loss = fake.learn(anchor.clean, batch.condition, generator)
        slow, fast = apart(fake.network, context.policy.network)
        with torch.no_grad():
            torch._foreach_lerp_(
                slow, [weight.data for weight in fast], context.config.options_as(CdmOptions).fake_pull
            )
        return loss

    @torch.no_grad()
    def _augment(
        self, context: Context, clean: Tensor, upper: Tensor, condition: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """(w - 1) (x0 with the condition - x0 without) / mean |x0 - clean|, at levels up to the row's: (B, C, H, W)."""
        teacher, options = context.teacher, context.config.options_as(CdmOptions)
        assert teacher.guidance is not None
        assert condition is not None
        t = random_times(teacher, len(clean), generator, clean.device, upper=upper)
        alpha, sigma = levels(teacher, t)
        x = alpha * clean + sigma * draws.normal(clean.shape, generator, clean.device)
        plain, null = teacher.guided(1), torch.full_like(condition, teacher.guidance.null_class)
        context.meter.teacher_calls += 2 * len(clean)
        with_, without = (clean_at(teacher, t, x, plain(x, t.float(), asked)) for asked in (condition, null))
        scale = (with_ - clean).abs().flatten(1).mean(1).clamp_min(options.norm_floor * context.amplitude)
        augmented: Tensor = (teacher.guidance.scale - 1) * (with_ - without) / scale.view(-1, 1, 1, 1)
        return augmented

    def tables(self, context: Context, student: StudentPolicy) -> list[StepTable]:
        """Its own, and those of the teacher's spacing for `SHIPPED` steps: the network takes any time."""
        own = student.table
        return [own, *(context.teacher.table(steps) for steps in SHIPPED if steps != own.num_inference_steps)]


def _choose(where: Tensor, now: Anchor, kept: Anchor) -> Anchor:
    """The rows of ``now`` where it says so, else of ``kept``."""
    wide = where.view(-1, 1, 1, 1)
    return Anchor(
        torch.where(where, now.t, kept.t), torch.where(wide, now.x, kept.x), torch.where(wide, now.clean, kept.clean)
    )


def _clean(network: nn.Module, context: Context, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
    return estimated(network, context.teacher, t, x, condition, context.config.precision)
