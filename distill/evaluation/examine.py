"""`redif doctor --distill TEACHER`: what would go wrong after hours, found out in a minute, and nothing is trained.

Each finding is a row like the other doctor's. The teacher is only called; the student is a throw-away copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods.estimators import check_drift
from redif_sdk.distill.options import SameStateOptions
from redif_sdk.distill.policy import Exploration, Meter, StudentPolicy
from redif_sdk.distill.pool import Pairs, compute
from redif_sdk.distill.rewards import Advantage, Reward, make_rewards, name_of
from redif_sdk.distill.rewards.registry import RewardSpec
from redif_sdk.distill.student.decision import check_run
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.calling import check_deterministic
from redif_sdk.distill.teachers.denoising import clean_at
from redif_sdk.distill.training.check import check_student
from redif_sdk.errors import RedifError

__all__ = ["examine_teacher"]

TYPES = ("epsilon", "v_prediction", "sample", "score")
LEVELS = (0.1, 0.3, 0.6, 0.9)  # sigma
IMAGES, STEPS = 16, 10
#: A denoiser is nearer to the image than either of two naive guesses; a wrong type is several times as far.
LARGEST_ERROR = 1.5


def examine_teacher(
    teacher: Teacher,
    *,
    num_inference_steps: int = 4,
    reward: RewardSpec = "feature",
    config: DistillConfig | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """One row a finding: subject, status ("ok" or "problem") and detail, which says what to do.

    Args:
        num_inference_steps: steps of the planned student.
        reward: of the planned run.
        config: all settings of the planned run, in place of these two.
        device: cpu, cuda or cuda:N; auto: the device that training takes, a GPU if there is one.

    Raises:
        RuntimeUnavailable: the device is not there.
    """
    place = chosen_device(device)
    config = config or DistillConfig.checked(num_inference_steps=num_inference_steps, reward=reward)
    found = [
        _row(
            "teacher",
            "ok",
            f"{teacher.name}: {teacher.prediction_type}, {teacher.num_inference_steps} steps of "
            f"{teacher.calls_per_step} call{'s' * (teacher.calls_per_step > 1)}, latents {teacher.shape}",
        ),
        _tried("deterministic", lambda: _determinism(teacher, place)),
    ]
    if found[-1]["status"] == "ok":
        found.append(_tried("supported", lambda: _supported(teacher, config.replaced(device=device))))
        if found[-1]["status"] != "ok":
            return found
    begun = time.monotonic()
    pairs = compute(teacher, IMAGES, "train", device=place).to(place)
    per_call = (time.monotonic() - begun) / (IMAGES * teacher.num_inference_steps * teacher.calls_per_step)
    if not torch.isfinite(pairs.target).all():
        return [*found, _row("samples", "problem", "the teacher's samples are not finite; check its schedule")]
    teacher = teacher.ranged_by(pairs.target)
    examination = _Examination(teacher, pairs, config)
    found += [
        _tried("prediction type", examination.prediction_type),
        _tried("pairing", examination.pairing),
        _tried("value range", examination.value_range),
        _tried("student and drift", examination.drift),
        *[_tried(f"reward {name}", check) for name, check in examination.rewards()],
        _tried("gradient", examination.gradient),
    ]
    calls = config.pool_size * teacher.num_inference_steps * teacher.calls_per_step
    seconds = examination.update_seconds
    detail = f"the pool of {config.pool_size} pairs takes {calls:,} teacher calls, some {_time(calls * per_call)}"
    if seconds:
        detail += f"; {config.updates or 600} updates of regression some {_time((config.updates or 600) * seconds)}"
    return [*found, _row("time", "ok", detail + " on this machine")]


def _row(subject: str, status: str, detail: str) -> dict[str, Any]:
    return {"subject": subject, "status": status, "detail": detail}


def _tried(subject: str, check: Callable[[], str]) -> dict[str, Any]:
    """What a check says, or what it raised."""
    try:
        return _row(subject, "ok", check())
    except RedifError as error:
        return _row(subject, "problem", str(error))


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _determinism(teacher: Teacher, device: torch.device) -> str:
    check_deterministic(teacher, device)
    return "one input gives one output"


def _supported(teacher: Teacher, config: DistillConfig) -> str:
    check_run(teacher, config)
    return "it can be distilled, and its students saved and exported"


@dataclass
class _Examination:
    """The checks that need samples of the teacher."""

    teacher: Teacher
    pairs: Pairs
    config: DistillConfig
    update_seconds: float = 0.0

    @property
    def options(self) -> SameStateOptions:
        """How actions are drawn: as the run would, or by default where its method draws none."""
        return self.config.options if isinstance(self.config.options, SameStateOptions) else SameStateOptions()

    def prediction_type(self) -> str:
        """One step must denoise the samples; where it does not, the types by which it would are named."""
        declared = self.teacher.prediction_type
        types = ("flow",) if self.teacher.schedule.flow else TYPES
        if self.teacher.schedule.edm is not None:
            return "edm: its network is fed noise levels, which this check does not draw; not looked at"
        if declared not in types:
            raise RedifError(f"the prediction type {declared} is not one of {', '.join(types)}")
        noise, condition = self.pairs.noise, self.pairs.condition
        alike = float(torch.corrcoef(torch.stack([self.pairs.target.flatten(), noise.flatten()]))[0, 1])
        if alike > 0.9 and 0.5 < float(self.pairs.target.var()) < 2.0:
            raise RedifError("the samples are still the noise that they began with; are the network's weights trained?")
        error = self._error(self.teacher, self.pairs.target)
        if error < LARGEST_ERROR:
            return f"{declared}: one step is {error:.2f} as far off as doing nothing, or the mean, would be at worst"
        fitting = []
        for kind in types:
            other = replace(self.teacher, prediction_type=kind)
            if kind != declared and self._error(other, other.few_steps(noise, condition, STEPS)) < LARGEST_ERROR:
                fitting.append(kind)
        hint = f"it would be consistent as {', '.join(fitting)}" if fitting else "no other type fits either"
        raise RedifError(
            f"declared as {declared}, but one step from noised samples is {error:.3g} times as far off as doing "
            f"nothing, or the mean, would be ({hint}); check prediction_type, the noise schedule and the weights"
        )

    def _error(self, teacher: Teacher, samples: Tensor) -> float:
        """The mean squared error of one step from noised `samples`, over what it may be, at the worst of `LEVELS`.

        It may be the noise's variance (x / alpha is a guess too) or the samples' (so is their mean), the lesser.
        """
        if not torch.isfinite(samples).all():
            return float("inf")
        worst, variance = 0.0, float(samples.var())
        for share in LEVELS:
            at = int(np.abs(teacher.schedule.sigmas - share).argmin())
            alpha, sigma = float(teacher.schedule.alphas[at]), float(teacher.schedule.sigmas[at])
            noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(at)).to(samples.device)
            x = alpha * samples + sigma * noise
            t = torch.full((len(x),), at, device=x.device)
            clean = clean_at(teacher, t, x, teacher(x, t.float(), self.pairs.condition))
            allowed = max(min((sigma / alpha) ** 2, variance), 1e-12)
            worst = max(worst, float((clean - samples).pow(2).mean()) / allowed)
        return worst

    def pairing(self) -> str:
        """The samples must belong to their noise: fewer steps from it come nearer than from another image's."""
        outputs = self.teacher.sample(self.pairs.noise, self.pairs.condition, STEPS)
        own = float((outputs - self.pairs.target).pow(2).mean())
        other = float((outputs - self.pairs.target.roll(1, 0)).pow(2).mean())
        if not own < 0.8 * other:
            raise RedifError(
                f"{STEPS} steps from the same noise come no nearer to the sample ({own:.3g}) than from another noise "
                f"({other:.3g}); does the sampler draw noise of its own, or is the noise schedule wrong?"
            )
        return f"{STEPS} steps from the same noise are {own / other:.0%} as far off as from another noise"

    def value_range(self) -> str:
        low, high = self.teacher.postprocess.value_range
        images = self.teacher.images(self.pairs.target)
        margin = (high - low) / 20
        outside = float(((images < low - margin) | (images > high + margin)).float().mean())
        if outside > 0.05:
            raise RedifError(
                f"{outside:.0%} of the samples' values lie outside {low:g} to {high:g}, where images are cut off; "
                f"is the value range right (--value-range), or has the latent a scale?"
            )
        return f"{outside:.1%} of the values lie outside {low:g} to {high:g}"

    def _policy(self) -> StudentPolicy:
        network = self.teacher.make_student().eval().to(self.pairs.noise.device)
        table = self.teacher.table(self.config.num_inference_steps)
        return StudentPolicy(network, table, self.teacher.schedule, Meter())

    def drift(self) -> str:
        """The mean of the rollout and that of the update are one function before the first update."""
        policy = self._policy()
        check_student(policy.network, self.teacher, self.pairs.noise.device)
        with torch.no_grad():
            before = policy.sample(self.pairs.noise, self.pairs.condition)
        after = policy.sample(self.pairs.noise, self.pairs.condition)
        check_drift(before, after, self.options.step_delta * self.teacher.amplitude)
        return "one input gives one output, and no drift before the first update"

    def rewards(self) -> list[tuple[str, Callable[[], str]]]:
        """A check for each reward: it tells the actions of a group apart."""
        made = make_rewards(self.config.get("reward", "pixel"), self.teacher, self.pairs, self.config.seed)

        def spread(reward: Reward) -> str:
            white = Exploration.white(self.pairs.noise[0].numel(), self.pairs.noise.device)
            generator = torch.Generator().manual_seed(0)
            xi = white.antithetic(self.options.group_size, tuple(self.pairs.target.shape), generator)
            advantage = Advantage([(reward, 1.0)], self.teacher.unit_images, teacher=self.teacher)
            actions = self.pairs.target + self.options.exploration * self.teacher.amplitude * xi
            advantage(actions, self.pairs.target, self.pairs.condition)
            if advantage.dropped:
                raise RedifError(f"{advantage.dropped} of {advantage.groups} groups have no spread; explore more")
            return f"tells {self.options.group_size} actions of each of {advantage.groups} states apart"

        return [(name_of(reward), partial(spread, reward)) for reward, _ in made]

    def gradient(self) -> str:
        policy = self._policy()
        begun = time.monotonic()
        loss = (policy.sample(self.pairs.noise, self.pairs.condition) - self.pairs.target).pow(2).mean()
        loss.backward()
        self.update_seconds = (time.monotonic() - begun) * self.config.batch_size / len(self.pairs)
        total = torch.stack([p.grad.norm() for p in policy.network.parameters() if p.grad is not None]).norm()
        if not torch.isfinite(total) or total == 0:
            raise RedifError(f"the gradient of the first update is {float(total):g}; check the network's outputs")
        return f"finite: a norm of {float(total):.3g} at a squared error of {loss.item():.3g}"
