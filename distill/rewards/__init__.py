"""Rewards by name, and how several become one advantage.

A reward is a black box ``(images, targets, condition) -> (B,)``: higher is better, no gradient is asked. Each reward
has a file of its own; this one holds the protocol, the registry and the advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from redif_sdk.distill.pairs import Pairs
from redif_sdk.distill.rewards.feature import FeatureReward
from redif_sdk.distill.rewards.pixel import PixelReward
from redif_sdk.distill.teacher import Teacher
from redif_sdk.errors import InvalidRequest, TrainingDiverged

__all__ = ["REWARDS", "Advantage", "FeatureReward", "PixelReward", "Reward", "make_rewards", "reward_names"]


class Reward(Protocol):
    """``images`` and ``targets`` (B, C, H, W) float32 in [-1, 1], ``condition`` (B,) int64 or None -> (B,) float32."""

    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor: ...


Factory = Callable[[Teacher, Pairs, int], Reward]
REWARDS: dict[str, Factory] = {
    "pixel": lambda teacher, pairs, seed: PixelReward(),
    "feature": FeatureReward.fit,
}

RewardSpec = str | Reward | Sequence["str | Reward"] | Mapping["str | Reward", float]


def _weighted(spec: RewardSpec) -> list[tuple[str | Reward, float]]:
    if isinstance(spec, Mapping):
        return [(reward, float(weight)) for reward, weight in spec.items()]
    if isinstance(spec, str):
        parts = [part.strip() for part in spec.split("+")]
        return [(part, 1.0) for part in parts]
    if callable(spec):
        return [(spec, 1.0)]
    return [(reward, 1.0) for reward in spec]


def name_of(reward: Reward) -> str:
    """What a reward is called in logs and manifests."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def reward_names(spec: RewardSpec) -> list[str]:
    """The rewards' names in ``spec``, checked: "feature", "feature+pixel", a callable, a list or {reward: weight}.

    Raises:
        InvalidRequest: an unknown name, or no reward at all.
    """
    names = []
    for reward, _ in _weighted(spec):
        if isinstance(reward, str) and reward not in REWARDS:
            raise InvalidRequest(f"unknown reward {reward!r}; known: {', '.join(sorted(REWARDS))}, or any callable")
        names.append(reward if isinstance(reward, str) else name_of(reward))
    if not names:
        raise InvalidRequest("no reward is given; name at least one, e.g. 'feature'")
    return names


def make_rewards(spec: RewardSpec, teacher: Teacher, pairs: Pairs, seed: int) -> list[tuple[Reward, float]]:
    reward_names(spec)
    return [
        (REWARDS[reward](teacher, pairs, seed) if isinstance(reward, str) else reward, weight)
        for reward, weight in _weighted(spec)
    ]


@dataclass
class Advantage:
    """Rewards of a group of G outputs for each of B states -> advantages (G, B).

    Each reward is normalised over its group before the weighted sum (a raw sum lets one dominate), the sum again, and
    clipped to +-``clip``. A group without spread says nothing: its advantage is 0, and it is counted in ``dropped``.
    """

    rewards: list[tuple[Reward, float]]
    to_images: Callable[[Tensor], Tensor]
    clip: float = 5.0
    dropped: int = 0
    groups: int = 0

    def images(self, latents: Tensor) -> Tensor:
        """What a user would see, in [-1, 1]."""
        return self.to_images(latents).clamp(-1, 1)

    @torch.no_grad()
    def values(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> list[Tensor]:
        """Each reward's values for ``outputs`` (N, C, H, W) against ``targets``: (N,) each."""
        images, wanted = self.images(outputs), self.images(targets)
        values = [reward(images, wanted, condition).float() for reward, _ in self.rewards]
        for value, (reward, _) in zip(values, self.rewards, strict=True):
            name = name_of(reward)
            if value.shape != (len(outputs),):
                raise InvalidRequest(f"the reward {name} gave shape {tuple(value.shape)} for {len(outputs)} images")
            if not torch.isfinite(value).all():
                raise TrainingDiverged(f"the reward {name} gave a value that is not finite")
        return values

    def score(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> float:
        """The weighted mean reward of a batch: what the log shows."""
        values = self.values(outputs, targets, condition)
        return float(sum(w * v.mean().item() for v, (_, w) in zip(values, self.rewards, strict=True)))

    def __call__(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        """``outputs`` (G, B, C, H, W), ``targets`` (B, C, H, W) -> (G, B)."""
        group, batch = outputs.shape[:2]
        wanted = targets.expand(group, *targets.shape).flatten(0, 1)
        labels = None if condition is None else condition.repeat(group)
        total = torch.zeros(group, batch)
        for value, (_, weight) in zip(self.values(outputs.flatten(0, 1), wanted, labels), self.rewards, strict=True):
            total += weight * _normalise(value.view(group, batch))
        advantage = _normalise(total) if len(self.rewards) > 1 else total
        flat = (advantage == 0).all(0)
        self.dropped += int(flat.sum())
        self.groups += batch
        if flat.all():
            raise TrainingDiverged(
                "every group's rewards are equal: the reward cannot tell the actions apart; explore more or change it"
            )
        return advantage.clamp(-self.clip, self.clip)


def _normalise(values: Tensor) -> Tensor:
    """(G, B): minus the group's mean, over its std; groups without spread become 0."""
    centred = values - values.mean(0)
    std = centred.std(0)
    spread = std > 1e-6 * values.abs().amax(0).clamp_min(1e-12)
    return torch.where(spread, centred / std.clamp_min(1e-30), torch.zeros_like(centred))
