"""Rewards by name, and how several become one advantage.

A reward is a black box ``(images, targets, condition) -> (B,)``: higher is better, no gradient is asked. Each reward
has a file of its own; this one holds the protocol, the registry and the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.discriminator import Discriminator
from redif_sdk.distill.rewards.distribution import DistributionReward
from redif_sdk.distill.rewards.endpoint import EndpointReward, is_endpoint
from redif_sdk.distill.rewards.feature import FeatureReward
from redif_sdk.distill.rewards.mmd import MmdReward
from redif_sdk.distill.rewards.perceptual import LpipsReward, pretrained
from redif_sdk.distill.rewards.pixel import PixelReward
from redif_sdk.distill.rewards.texture import TextureReward
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest, TrainingDiverged

__all__ = [
    "REWARDS",
    "Advantage",
    "EndpointReward",
    "FeatureReward",
    "PixelReward",
    "Reward",
    "TextureReward",
    "make_rewards",
    "reward_names",
]


class Reward(Protocol):
    """``images`` and ``targets`` (B, C, H, W) float32 in [-1, 1], ``condition`` (B,) int64 or None -> (B,) float32.

    It may give a map (B, h, w) of any size instead, whose mean is the reward: then same-state groups credit each place
    for the actions around it, which is a far better estimate. Its attribute ``reach`` (0 if absent) says how far from a
    changed pixel the map can change, in pixels.

    A reward that is learnt beside the student also has ``learn(context, outputs, batch, generator)``, called once an
    update before it judges, ``state_dict()`` and ``load_state_dict(state, context)``. With the attribute ``space`` =
    "latents" it is given latents, unclamped, in place of images. With ``local`` it judges around the outputs that it
    learnt from in this update, and nothing else. With ``grouped`` it is given each target once, where images are groups
    of as many, one after the other.
    """

    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor: ...


Factory = Callable[[Teacher, Pairs, int], Reward]
REWARDS: dict[str, Factory] = {
    "pixel": lambda teacher, pairs, seed: PixelReward(),
    "feature": FeatureReward.fit,
    "texture": lambda teacher, pairs, seed: TextureReward(),
    "lpips": lambda teacher, pairs, seed: LpipsReward(),
    "discriminator": lambda teacher, pairs, seed: Discriminator.make(teacher, seed, pairs.noise.device),
    "mmd": MmdReward.fit,
    "distribution": lambda teacher, pairs, seed: DistributionReward(),
}
PRETRAINED = ("clip:", "dino:")

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
        if isinstance(reward, str) and is_endpoint(reward):
            reward = EndpointReward(reward)
        if isinstance(reward, str) and reward not in REWARDS and not reward.startswith(PRETRAINED):
            known = ", ".join([*sorted(REWARDS), *(f"{kind}FOLDER" for kind in PRETRAINED)])
            raise InvalidRequest(f"unknown reward {reward!r}; known: {known}, the address of one, or any callable")
        names.append(reward if isinstance(reward, str) else name_of(reward))
    if not names:
        raise InvalidRequest("no reward is given; name at least one, e.g. 'feature'")
    return names


def make_rewards(spec: RewardSpec, teacher: Teacher, pairs: Pairs, seed: int) -> list[tuple[Reward, float]]:
    reward_names(spec)

    def make(reward: str | Reward) -> Reward:
        if not isinstance(reward, str):
            return reward
        if reward.startswith(PRETRAINED):
            return pretrained(reward)
        return EndpointReward(reward) if is_endpoint(reward) else REWARDS[reward](teacher, pairs, seed)

    return [(make(reward), weight) for reward, weight in _weighted(spec)]


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
    dropped: int = 0
    groups: int = 0
    charge: Callable[[float], None] = lambda operations: None  # is told what decoding and the rewards' networks cost

    def __post_init__(self) -> None:
        self._costs: dict[tuple[int, int], float] = {}
        self._decoding: float | None = None  # operations to make a picture of latents: 0 where they are pixels

    def learn(self, context: Any, outputs: Tensor, batch: Pairs, generator: torch.Generator) -> dict[str, float]:
        """Let the rewards that learn see the student's ``outputs`` (B, C, H, W) for this batch; figures for the log."""
        figures: dict[str, float] = {}
        for reward, _ in self.rewards:
            if hasattr(reward, "learn"):
                figures |= reward.learn(context, outputs.detach(), batch, generator)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Of the rewards that learn, by their place in the list."""
        learning: list[tuple[int, Any]] = [(i, r) for i, (r, _) in enumerate(self.rewards) if hasattr(r, "learn")]
        return {str(place): reward.state_dict() for place, reward in learning}

    def load_state_dict(self, state: dict[str, Any], context: Any) -> None:
        for place, kept in state.items():
            self.rewards[int(place)][0].load_state_dict(kept, context)  # type: ignore[attr-defined]

    def images(self, latents: Tensor) -> Tensor:
        """What a user would see, in [-1, 1]; or what the rewards see in its place."""
        if self._decoding is None:
            self._decoding = flops(self.to_images, latents[:1].detach())
        self.charge((3 if latents.requires_grad else 1) * len(latents) * self._decoding)
        images = self.to_images(latents)
        return images.clamp(-1, 1) if self.clamped else images

    @torch.no_grad()
    def values(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> list[Tensor]:
        """Each reward's values for ``outputs`` (N, C, H, W) against ``targets``: (N,) or (N, h, w) each.

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
    ) -> list[Tensor]:
        """``passes``: what a call costs in forward ones: 3 where its gradient is taken."""
        repeats, values = (len(outputs) // len(targets), 1, 1, 1), []
        wanted = self.images(targets)
        for index, (reward, _) in enumerate(rewards):
            in_latents = getattr(reward, "space", "images") == "latents"
            given = (outputs, targets) if in_latents else (images, wanted)
            if not getattr(reward, "grouped", False):
                given = (given[0], given[1].repeat(repeats))
            value = reward(*given, condition).float().to(images.device)
            if (index, len(images)) not in self._costs:
                self._costs[index, len(images)] = flops(reward, given[0].detach(), given[1], condition)
            self.charge(passes * self._costs[index, len(images)])
            values.append(value)
            name = name_of(reward)
            if value.dim() not in (1, 3) or len(value) != len(images):
                raise InvalidRequest(f"the reward {name} gave shape {tuple(value.shape)} for {len(images)} images")
            if not torch.isfinite(value).all():
                raise TrainingDiverged(f"the reward {name} gave a value that is not finite")
        return values

    def score(self, outputs: Tensor, targets: Tensor, condition: Tensor | None) -> float:
        """The weighted mean reward of a batch: what the log shows. Rewards that judge locally are left out."""
        able = [(reward, weight) for reward, weight in self.rewards if not getattr(reward, "local", False)]
        with torch.no_grad():
            values = self._judged(able, outputs, self.images(outputs), targets, condition, 1)
        return float(sum(w * v.mean().item() for v, (_, w) in zip(values, able, strict=True)))

    def __call__(self, outputs: Tensor, targets: Tensor, condition: Tensor | None, *, by_place: bool = False) -> Tensor:
        """``outputs`` (G, B, C, H, W), ``targets`` (B, C, H, W) -> (G, B).

        ``by_place``: (G, B, H, W) where a reward gives a map, each place's advantage being that of the map around it.
        """
        group, batch = outputs.shape[:2]
        labels = None if condition is None else condition.repeat(group)
        values = self.values(outputs.flatten(0, 1), targets, labels)
        by_place = by_place and any(value.dim() == 3 for value in values)
        total = torch.zeros(group, batch, *(outputs.shape[3:] if by_place else ()), device=outputs.device)
        pixels = self.images(targets[:1]).shape[-2] if by_place else 0
        for value, (reward, weight) in zip(values, self.rewards, strict=True):
            if value.dim() == 3:
                value = _around(value, outputs, pixels, getattr(reward, "reach", 0)) if by_place else value.mean((1, 2))
            advantage = _normalise(value.unflatten(0, (group, batch)))
            total = total + weight * (advantage[..., None, None] if by_place and advantage.dim() == 2 else advantage)
        advantage = _normalise(total) if len(self.rewards) > 1 else total
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
            values = self._judged(self.rewards, variable, images, targets, condition, 3)
            total = torch.zeros_like(outputs)
            for value, (reward, weight) in zip(values, self.rewards, strict=True):
                if not value.requires_grad:
                    raise InvalidRequest(
                        f"the reward {name_of(reward)} has no gradient; use the estimator same-state, which needs none"
                    )
                (gradient,) = torch.autograd.grad(value.sum(), variable, retain_graph=True)
                total += weight * gradient / draws.mean(gradient.pow(2)).sqrt().clamp_min(1e-12)
        return total


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
