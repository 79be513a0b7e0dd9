"""How several rewards become one advantage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import counted, flops
from redif_sdk.distill.compute.device import autocast
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch, asked_of
from redif_sdk.distill.rewards.protocol import LearningReward, Reward, RewardContext, name_of
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest, TrainingDiverged
from redif_sdk.models.scales import places_of, scales_of

__all__ = ["Advantage", "Score"]

_log = logging.getLogger(__name__)
UNJUDGED_WARN, UNJUDGED_STOP = 0.01, 0.2  # shares of the images
COUNTED = 2  # calls of a reward whose operations are counted
UNJUDGED_LEAST = 100  # images, before a run is stopped


@dataclass(frozen=True)
class Score:
    """What ``reward`` says of a batch: a ``value`` (N,) or (N, h, w), one of several where it gives many."""

    value: Tensor
    weight: float
    reward: Reward
    reach: int = 0  # of a map: how far from a changed pixel it can change, in pixels


def decoder(teacher: Teacher, precision: str) -> Callable[[Tensor], Tensor]:
    """Latents -> ``teacher``'s images (B, C, H, W) float32, unclamped.

    An autoencoder computes in ``precision``: decoding is most of what an update costs.
    """

    def to_images(latents: Tensor) -> Tensor:
        with nullcontext() if teacher.decode is None else autocast(latents.device.type, precision):
            return teacher.unit_images(latents).float()

    return to_images


@dataclass
class Advantage:
    """Rewards of a group of G outputs for each of B states -> advantages (G, B), or (G, B, h, w) by place.

    Each reward is normalised over its group before the weighted sum (a raw sum lets one dominate), the sum again, and
    clipped to +-``clip``. A group without spread says nothing: its advantage is 0, and it is counted in ``dropped``.
    """

    rewards: list[tuple[Reward, float]]
    to_images: Callable[[Tensor], Tensor]
    clip: float = 5.0
    clamped: bool = True  # off: the rewards see latents, which have no range
    teacher: Teacher | None = None  # whose prompts or classes the conditions are
    dropped: int = 0
    groups: int = 0
    charge: Callable[[float], None] = lambda operations: None  # is told what decoding and the rewards' networks cost
    count: Callable[[int], None] = lambda images: None  # is told how many images a reward judged

    def __post_init__(self) -> None:
        self._costs: dict[tuple[int, int], list[float]] = {}  # operations of a reward's first calls at a batch size
        self._asked: dict[str, int] = {}  # images, of each reward that counts those it could not judge
        self._unjudged: dict[str, int] = {}
        self._warned: set[str] = set()
        self._decoding: float | None = None  # operations to make an image of latents: 0 where they are pixels

    def learn(
        self, context: RewardContext, outputs: Tensor, batch: Pairs, generator: torch.Generator
    ) -> dict[str, float]:
        """Let the rewards that learn see the student's ``outputs`` (B, C, H, W) for this batch; figures for the log."""
        figures: dict[str, float] = {}
        for reward, _ in self.rewards:
            if isinstance(reward, LearningReward):
                figures |= reward.learn(context, outputs.detach(), batch, generator)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Of the rewards that learn, by their place in the list."""
        learning = [(place, r) for place, (r, _) in enumerate(self.rewards) if isinstance(r, LearningReward)]
        return {str(place): reward.state_dict() for place, reward in learning}

    def load_state_dict(self, state: dict[str, Any], context: RewardContext) -> None:
        """Take :meth:`state_dict` back."""
        for place, kept in state.items():
            reward = self.rewards[int(place)][0]
            assert isinstance(reward, LearningReward)
            reward.load_state_dict(kept, context)

    def decoding(self, latents: Tensor) -> float:
        """Floating-point operations to make an image of one of ``latents``; 0 where they are pixels."""
        if self._decoding is None:
            self._decoding = flops(self.to_images, latents[:1].detach())
        return self._decoding

    def images(self, latents: Tensor) -> Tensor:
        """What a user would see, in [-1, 1]; or what the rewards see in its place."""
        self.charge((3 if latents.requires_grad else 1) * len(latents) * self.decoding(latents))
        images = self.to_images(latents)
        return images.clamp(-1, 1) if self.clamped else images

    @torch.no_grad()
    def values(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> list[Score]:
        """The rewards' scores of ``outputs`` (N, C, H, W) against ``targets``.

        Targets may be fewer, where outputs are groups of them one after the other.
        """
        return self._judged(self.rewards, outputs, self.images(outputs), targets, condition, 1)

    def _judged(
        self,
        rewards: list[tuple[Reward, float]],
        outputs: Tensor,
        images: Tensor,
        targets: Tensor,
        condition: Tensor | None,
        passes: int,
        wanted: Tensor | None = None,
    ) -> list[Score]:
        """The scores of ``rewards``.

        Args:
            passes: what a call costs in forward ones: 3 where its gradient is taken.
            wanted: the targets' images, where they are decoded already.
        """
        repeats, scores = (len(outputs) // len(targets), 1, 1, 1), []
        wanted = self.images(targets) if wanted is None else wanted
        teacher, places, scales = self.teacher, None, None
        if condition is not None:
            places = places_of(condition)
            if teacher is not None and teacher.guidance_range is not None:
                scales = scales_of(condition, teacher.guidance_scale)
        for index, (reward, weight) in enumerate(rewards):
            in_latents = getattr(reward, "space", "images") == "latents"
            given = (outputs, targets) if in_latents else (images, wanted)
            if not getattr(reward, "grouped", False):
                given = (given[0], given[1].repeat(repeats))
            batch = Batch(*given, places, teacher, scales)
            before = getattr(reward, "unjudged", 0)
            answer = self._asked_and_charged(reward, batch, (index, len(images)), passes)
            self.count(len(images))
            if hasattr(reward, "unjudged"):
                self._look_at_unjudged(name_of(reward), len(images), reward.unjudged - before)
            scores += _scores(answer, reward, weight, images)
        return scores

    def _asked_and_charged(self, reward: Reward, batch: Batch, kind: tuple[int, int], passes: int) -> Any:
        """The reward's answer; ``passes`` of what the call costs are charged.

        It is counted in the first two calls of a ``kind``, and taken from the second after them: the first may read
        texts or models that are kept. Not in a trial call, since a reward may be anything and its calls are the user's.
        """
        known = self._costs.setdefault(kind, [])
        if len(known) == COUNTED:
            answer = asked_of(reward, batch)
        else:
            answer, cost = counted(asked_of, reward, batch)
            known.append(cost)
        self.charge(passes * known[-1])
        return answer

    def _look_at_unjudged(self, name: str, count: int, unjudged: int) -> None:
        """Of ``count`` images a reward could not judge some: a warning above 1 %, the end of the run above 20 %."""
        asked = self._asked[name] = self._asked.get(name, 0) + count
        missed = self._unjudged[name] = self._unjudged.get(name, 0) + unjudged
        said = f"the reward {name} could not judge {missed} of {asked} images ({missed / asked:.0%})"
        if missed > UNJUDGED_STOP * asked and asked >= UNJUDGED_LEAST:
            raise TrainingDiverged(f"{said}; look at its log, and go on with --resume")
        if missed > UNJUDGED_WARN * asked and name not in self._warned:
            self._warned.add(name)
            _log.warning("%s; each was given the lowest reward of its batch", said)

    def unjudged(self) -> dict[str, int]:
        """For the log: images that rewards could not judge in this run, where a reward counts them."""
        return {"unjudged": sum(self._unjudged.values())} if self._unjudged else {}

    @property
    def steady(self) -> bool:
        """Whether the rewards stay the same through the run, and judge any images: then checks can be compared."""
        return not any(isinstance(r, LearningReward) or getattr(r, "local", False) for r, _ in self.rewards)

    def score(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> float:
        """The weighted mean reward of a batch: what the log shows. Rewards that judge locally are left out."""
        return float(sum(s.weight * s.value.mean().item() for s in self.each(outputs, targets, condition)))

    @torch.no_grad()
    def each(
        self,
        outputs: Tensor,
        targets: Tensor,
        condition: Tensor | None,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> list[Score]:
        """The rewards' scores of a batch, without those of rewards that judge locally.

        ``images``: of outputs and targets, where they are decoded already.
        """
        able = [(reward, weight) for reward, weight in self.rewards if not getattr(reward, "local", False)]
        seen, wanted = images or (self.images(outputs), None)
        return self._judged(able, outputs, seen, targets, condition, 1, wanted)

    def __call__(self, outputs: Tensor, targets: Tensor, condition: Tensor | None, *, by_place: bool = False) -> Tensor:
        """``outputs`` (G, B, C, H, W), ``targets`` (B, C, H, W) -> (G, B).

        ``by_place``: (G, B, H, W) where a reward gives a map, each place's advantage being that of the map around it.
        """
        group, batch = outputs.shape[:2]
        labels = None if condition is None else condition.repeat(group)
        scores = self.values(outputs.flatten(0, 1), targets, labels)
        by_place = by_place and any(score.value.dim() == 3 for score in scores)
        total = torch.zeros(group, batch, *(outputs.shape[3:] if by_place else ()), device=outputs.device)
        pixels = self.images(targets[:1]).shape[-2] if by_place else 0
        for score in scores:
            value = score.value
            if value.dim() == 3:
                value = _around(value, outputs, pixels, score.reach) if by_place else value.mean((1, 2))
            advantage = _normalise(value.unflatten(0, (group, batch)))
            advantage = advantage[..., None, None] if by_place and advantage.dim() == 2 else advantage
            total = total + score.weight * advantage
        advantage = _normalise(total) if len(scores) > 1 else total
        flat = (advantage == 0).transpose(0, 1).flatten(1).all(1)
        self.dropped += int(flat.sum())
        self.groups += batch
        if draws.mean(flat.float()) == 1:
            raise TrainingDiverged(
                "every group's rewards are equal: the reward cannot tell the actions apart; explore more or change it"
            )
        return advantage.clamp(-self.clip, self.clip)

    def gradient(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        """The rewards' gradient at ``outputs`` (B, C, H, W), each at an rms of 1 over the batch, and then weighted.

        A clamp at the range of the images passes gradients, so that a pixel beyond it can come back.

        Raises:
            InvalidRequest: a reward that is not differentiable.
        """
        variable = outputs.detach().requires_grad_()
        with torch.enable_grad():
            images = self.to_images(variable)
            if self.clamped:
                images = images + (images.clamp(-1, 1) - images).detach()
            scores = self._judged(self.rewards, variable, images, targets, condition, 3)
            total = torch.zeros_like(outputs)
            for score in scores:
                if not score.value.requires_grad:
                    raise InvalidRequest(
                        f"the reward {name_of(score.reward)} has no gradient; use the estimator same-state, which "
                        "needs none"
                    )
                (gradient,) = torch.autograd.grad(score.value.sum(), variable, retain_graph=True)
                total += score.weight * gradient / draws.mean(gradient.pow(2)).sqrt().clamp_min(1e-12)
        return total


def _scores(answer: Any, reward: Reward, weight: float, images: Tensor) -> list[Score]:
    """The scores in a reward's ``answer``: one tensor, or several by name; of weight 0: none.

    Raises:
        InvalidRequest: not a number an image.
        TrainingDiverged: a value is not finite.
    """
    own, reach = getattr(reward, "weights", {}), getattr(reward, "reach", 0)
    parts = answer if isinstance(answer, Mapping) else {"": answer}
    scores = []
    for part, value in parts.items():
        name = f"{name_of(reward)}, {part}," if part else name_of(reward)
        if not isinstance(value, Tensor) or value.dim() not in (1, 3) or len(value) != len(images):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidRequest(f"the reward {name} gave {given} for {len(images)} images")
        if not torch.isfinite(value).all():
            raise TrainingDiverged(f"the reward {name} gave a value that is not finite")
        if share := own.get(part, 1.0):
            reaches = reach.get(part, 0) if isinstance(reach, Mapping) else reach
            scores.append(Score(value.float().to(images.device), weight * share, reward, reaches))
    if not scores:
        raise InvalidRequest(f"the reward {name_of(reward)} gave no score that has a weight; it gave {sorted(parts)}")
    return scores


def _around(maps: Tensor, outputs: Tensor, pixels: int, reach: int) -> Tensor:
    """Maps (N, h', w') at the places of the latents (N, h, w): the mean of what lies within ``reach`` pixels."""
    height, width = outputs.shape[-2:]
    placed = F.interpolate(maps[:, None], size=(height, width), mode="area")
    radius = math.ceil(reach * height / pixels)
    return F.avg_pool2d(placed, 2 * radius + 1, 1, radius)[:, 0]


def _normalise(values: Tensor) -> Tensor:
    """(G, B, ...): minus the group's mean at each place, over the group's std; groups without spread become 0."""
    centred = values - values.mean(0)
    dims = (0, *range(2, values.dim()))
    degrees = (len(values) - 1) * centred[0, 0].numel()
    std = (centred.pow(2).sum(dims, keepdim=True) / degrees).sqrt()
    spread = std > 1e-6 * values.abs().amax(dims, keepdim=True).clamp_min(1e-12)
    return torch.where(spread, centred / std.clamp_min(1e-30), torch.zeros_like(centred))
