"""The student's trajectory as a policy: rollouts, exploration, log-probabilities.

At row k the action is the clean-image estimate, a ~ N(x0, e^2 Sigma), and x' is computed from it, so every row has a
likelihood, the last one and K = 1 included; at deployment e = 0. No reward and no estimator lives here.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import autocast
from redif_sdk.errors import UnsupportedModel
from redif_sdk.sampling.loop import iterate_steps, run_steps
from redif_sdk.sampling.table import NoiseSchedule, StepTable


@dataclass
class Meter:
    """What a run has spent, in network calls on one image; of several processes each counts its own.

    ``forward_equivalents`` weighs a gradient sample as 3, and is that of all ``processes``.
    """

    teacher_calls: int = 0
    student_calls: int = 0
    gradient_samples: int = 0
    updates: int = 0
    seconds: float = 0.0
    reward_calls: int = 0  # images that rewards judged, each reward by itself
    auxiliary_calls: float = 0.0  # of other networks (rewards, a discriminator), by their cost
    check_calls: float = 0.0  # of checks, all they cost; no part of the training's forward-equivalents
    processes: int = 1

    @property
    def forward_equivalents(self) -> float:
        """What all processes spent, in forward calls of the student on one image."""
        own = self.teacher_calls + self.student_calls + 3 * self.gradient_samples + self.auxiliary_calls
        return float(own * self.processes)

    def since(self, before: Meter) -> Meter:
        """What was spent since the copy ``before`` was made."""
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in _COUNTERS})

    def charge_share(self, before: Meter, spent: Meter, share: int) -> None:
        """Stand at ``before`` and one of ``share`` equal parts of ``spent``; calls are rounded up to whole ones."""
        for name in _COUNTERS:
            part = getattr(spent, name) / share
            setattr(self, name, getattr(before, name) + (part if name == "auxiliary_calls" else math.ceil(part)))


_COUNTERS = ("teacher_calls", "student_calls", "gradient_samples", "reward_calls", "auxiliary_calls")


@dataclass
class StudentPolicy:
    """A network, called as ``(x, t, condition) -> f``, and a step table; ``schedule`` is where its times live.

    ``exact``: in float32, as it is exported and served. Training computes in ``precision``: "auto" is bfloat16 where
    the hardware has it.
    """

    network: nn.Module
    table: StepTable
    schedule: NoiseSchedule | None = None
    meter: Meter = field(default_factory=Meter)
    exact: bool = False
    precision: str = "auto"

    @property
    def num_inference_steps(self) -> int:
        """K, the network calls for one image."""
        return self.table.num_inference_steps

    def start(self, noise: Tensor) -> Tensor:
        """x_0 (B, C, H, W) of standard normal ``noise`` of that shape."""
        start: Tensor = self.table.start(noise)
        return start

    def estimate(self, k: int, x: Tensor, condition: Tensor | None) -> Tensor:
        """The mean of row k's action, x0 = p x + q f: (B, C, H, W) float32."""
        if torch.is_grad_enabled():
            self.meter.gradient_samples += len(x)
        else:
            self.meter.student_calls += len(x)
        t = torch.full((len(x),), float(self.table.timesteps[k]), device=x.device)
        with nullcontext() if self.exact else autocast(x.device.type, self.precision):
            f = self.network(x, t, condition)
        mean: Tensor = self.table.clean(k, x, f.float())
        return mean

    def advance(self, rows: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        """The next states x' (B, C, H, W) of samples that stand each at its own row, ``rows`` (B,) int64; e = 0."""
        table = torch.from_numpy(self.table.rows.copy()).to(x.device)[rows]
        t, p, q, r, s = (column.view(-1, 1, 1, 1) for column in table.T[:5])
        self.meter.gradient_samples += len(x)
        with nullcontext() if self.exact else autocast(x.device.type, self.precision):
            f = self.network(x, t.flatten(), condition)
        return r * (p * x + q * f.float()) + s * x

    def simulated(self, row: int, noise: Tensor, condition: Tensor | None) -> Tensor:
        """The clean estimate (B, C, H, W) of ``row`` at the state to which the rows before it led: with a gradient
        through this row alone (DMD2's backward simulation)."""
        with torch.no_grad():
            x = run_steps(
                self.table, self.start(noise), None, lambda k, x: self.estimate(k, x, condition), steps=range(row)
            )
        return self.estimate(row, x, condition)

    def finish(
        self, k: int, x: Tensor, action: Tensor, condition: Tensor | None, noise: Tensor | None = None
    ) -> Tensor:
        """The final output when row k's action at state ``x`` was ``action`` and the rest is deterministic.

        ``noise`` (N, B, C, H, W): for a table that draws; row k takes slice min(k + 1, N - 1).
        """

        def act(row: int, x: Tensor) -> Tensor:
            return action if row == k else self.estimate(row, x, condition)

        return run_steps(self.table, x, noise, act, steps=range(k, self.num_inference_steps))

    def sample(self, noise: Tensor, condition: Tensor | None, backprop_last_k: int = 0) -> Tensor:
        """The output without exploration (e = 0); differentiable when gradients are on.

        ``noise`` is (B, C, H, W); for a table that draws between its rows (N, B, C, H, W), `Pairs.slices`.
        ``backprop_last_k``: gradients flow through the last so many rows alone (DRaFT-K's truncation); 0: all.

        Raises:
            UnsupportedModel: the table draws noise, and none is given for it.
        """
        if self.table.stochastic and noise.dim() != 5:
            raise UnsupportedModel(
                f"the step table {self.table.sampler!r} draws noise: the method must train with a deterministic one"
            )
        slices = noise if noise.dim() == 5 else noise[None]
        first = max(0, self.num_inference_steps - backprop_last_k) if backprop_last_k else 0

        def predict(k: int, x: Tensor) -> Tensor:
            return self.estimate(k, x, condition)

        with torch.no_grad():
            x = run_steps(self.table, self.start(slices[0]), slices, predict, steps=range(first))
        return run_steps(self.table, x, slices, predict, steps=range(first, self.num_inference_steps))

    def states(self, noise: Tensor, condition: Tensor | None) -> list[Tensor]:
        """x_0 ... x_{K-1}: what each row sees on the deterministic path."""

        def predict(k: int, x: Tensor) -> Tensor:
            return self.estimate(k, x, condition)

        start, inner = self.start(noise), range(self.num_inference_steps - 1)
        return [start, *(x for _, x, _ in iterate_steps(self.table, start, None, predict, steps=inner))]


@dataclass(frozen=True)
class Exploration:
    """Sigma = tau^2 I + B' diag(s^2) B, with the rows of B orthonormal; its mean diagonal is 1.

    Rank 0 and tau = 1 is white noise. tau = 0 draws in the span of B alone and has no density.

    Attributes:
        basis: (R, D) float32, D = C H W.
        scales: (R,) float32, the standard deviations along the basis.
    """

    basis: Tensor
    scales: Tensor
    tau: float

    def to(self, device: torch.device | str) -> Exploration:
        """The same exploration on ``device``."""
        return Exploration(self.basis.to(device), self.scales.to(device), self.tau)

    @classmethod
    def white(cls, elements: int, device: torch.device | str = "cpu") -> Exploration:
        """Independent noise of variance 1 in each of ``elements`` = C H W places."""
        return cls(torch.zeros(0, elements, device=device), torch.zeros(0, device=device), 1.0)

    @classmethod
    def structured(cls, residuals: Tensor, rank: int = 40, white_part: float = 0.0) -> Exploration:
        """From residuals teacher - student (N, C, H, W): their leading principal components; white where all are equal.

        ``white_part`` in [0, 1] is the share of the variance that stays white: the regulariser that ratios need.
        """
        flat = residuals.flatten(1).double()
        rank = min(rank, *flat.shape)
        _, singular, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        variance = singular[:rank] ** 2
        if not variance.sum():
            return cls.white(flat.shape[1], residuals.device)
        variance = variance / variance.sum() * flat.shape[1] * (1 - white_part)
        return cls(components[:rank].float(), variance.sqrt().float(), math.sqrt(white_part))

    def draw(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(count, *shape): ``count`` independent draws for a batch of ``shape`` = (B, C, H, W)."""
        device = self.scales.device
        xi = torch.zeros(count, shape[0], math.prod(shape[1:]), device=device)
        if len(self.scales):
            weights = draws.normal((count, shape[0], len(self.scales)), generator, device, dim=1)
            xi = (weights * self.scales) @ self.basis
        if self.tau:
            xi = xi + self.tau * draws.normal(xi.shape, generator, device, dim=1)
        return xi.view(count, *shape)

    def antithetic(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """``count`` (even) draws in pairs +xi, -xi: (count, *shape)."""
        half = self.draw(count // 2, shape, generator)
        return torch.cat([half, -half])

    def log_prob(self, action: Tensor, mean: Tensor, scale: float) -> Tensor:
        """log N(action; mean, scale^2 Sigma) up to a constant, averaged over elements, float32: (B,).

        Averaged, since a sum over D elements makes every clip range a function of D.
        """
        if not self.tau:
            raise UnsupportedModel("a low-rank exploration has no density; give it a white part to use ratios or KL")
        delta = (action.float() - mean.float()).flatten(1) / scale
        quadratic = (delta**2).sum(1) / self.tau**2
        if len(self.scales):
            shrink = 1 / self.tau**2 - 1 / (self.tau**2 + self.scales**2)
            quadratic = quadratic - ((delta @ self.basis.T) ** 2 * shrink).sum(1)
        return -0.5 * quadratic / delta.shape[1]
