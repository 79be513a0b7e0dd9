"""Regression: the squared error of the student's output to the teacher's.

The plain supervised baseline (Luhman and Luhman 2021, "Knowledge distillation in iterative generative models", with K
calls in place of one), and the warm start of ReDiF. Through the rollout only the final output counts, and gradients
flow through all rows. With per-step supervision every row's clean image counts, at the states that the student's own
rollout visits (as in DAgger, Ross et al. 2011), and each row by itself. By segments each row learns to go where the
teacher's own path leads from the row's time to the next row's (progressive distillation's stage, Salimans and Ho 2022,
on paths from noise in place of noised data, and of any length): one call a sample whatever K, and nothing is learnt
through what the other rows get wrong yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.options import Supervised
from redif_sdk.distill.pool import Pairs


def visible_residual(
    output: Tensor, target: Tensor, bounds: tuple[float, float] | None, amplitude: float = 1.0
) -> Tensor:
    """(output - target) / amplitude, as seen: beyond ``bounds`` both are clamped.

    So an overshoot where the target is at the bound is no error.

    (A clamped loss has the same minimum, but no gradient where the output is beyond the wrong bound.)
    """
    if bounds is None:
        return (output - target) / amplitude
    low, high = bounds
    wanted = target.clamp(low, high)
    unseen = ((wanted <= low) & (output < low)) | ((wanted >= high) & (output > high))
    return (output - wanted).masked_fill(unseen, 0.0) / amplitude


def error(residual: Tensor, huber: float) -> Tensor:
    """Mean squared error, or with ``huber`` = c > 0 the pseudo-Huber loss sqrt(r^2 + c^2) - c, scaled to r^2 near 0."""
    if not huber:
        return (residual**2).mean()
    return 2 * huber * ((residual**2 + huber**2).sqrt() - huber).mean()


def to_target(context: Context, output: Tensor, target: Tensor, huber: float) -> tuple[Tensor, float]:
    """The `error` of the residual as seen, and its mean square."""
    residual = visible_residual(output, target, context.bounds, context.amplitude)
    return error(residual, huber), residual.detach().pow(2).mean().item()


class Regression(Method):
    """Squared (or pseudo-Huber) error to the teacher's output; it reads no reward."""

    name = "regression"
    rewarded = False
    paired = True

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """Of the rollout's output, of every step (``supervision`` per_step), or of ``segments``; see above."""
        policy, options = context.policy, context.config.options_as(Supervised)
        if progress < options.segments:
            yield self._segments(context, batch, generator)
            return
        if options.supervision == "per_step":
            with torch.no_grad():
                states = policy.states(batch.noise, batch.condition)
            outputs = [policy.estimate(row, state, batch.condition) for row, state in enumerate(states)]
        else:
            outputs = [policy.sample(batch.noise, batch.condition, options.regression_last_k)]
        found = [to_target(context, output, batch.target, options.huber) for output in outputs]
        yield torch.stack([loss for loss, _ in found]).mean(), {"mse": found[-1][1]}

    def _segments(self, context: Context, batch: Pairs, generator: torch.Generator) -> Loss:
        """|x'_k(x_k) - x_(k+1)|^2 on the teacher's states x_k and x_(k+1), k drawn for each sample."""
        assert batch.states is not None
        steps = context.policy.num_inference_steps
        device = batch.noise.device
        rows = draws.integers(0, steps, len(batch), generator, device)
        ends = torch.cat([batch.states[:, 1:], batch.target[:, None]], 1)
        each = torch.arange(len(batch), device=device)
        reached = context.policy.advance(rows, batch.states[each, rows], batch.condition)
        residual = (reached - ends[each, rows]) / context.amplitude
        huber = context.config.options_as(Supervised).huber
        return error(residual, huber), {"mse": residual.detach().pow(2).mean().item()}
