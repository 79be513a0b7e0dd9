"""A critic: a network that learns which images a reward without a gradient prefers, so that its own can be followed.

It is the teacher's network with a head on its middle block, so it understands noised latents and their prompts from the
start; it compares images of one group, never images of different prompts. As in TDM-R1 (arXiv 2603.07700) the reward
itself is only asked, and what is learnt of it is followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.compute.device import autocast
from redif_sdk.distill.compute.lora import load_trained, trained
from redif_sdk.distill.options import CriticOptions
from redif_sdk.distill.rewards.classifier import Classifier
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.distill.teachers.denoising import levels, random_times
from redif_sdk.distill.teachers.large import network_to_train

__all__ = ["Critic", "Judged"]

KEPT = 0.9  # of the agreement, from update to update


@dataclass
class Judged:
    """Groups that the rewards have judged: ``latents`` (N, G, C, H, W), ``advantages`` (N, G), ``condition`` (N,)."""

    latents: Tensor
    advantages: Tensor
    condition: Tensor | None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Tensor | slice) -> Judged:
        condition = None if self.condition is None else self.condition[index]
        return Judged(self.latents[index], self.advantages[index], condition)

    def followed_by(self, other: Judged, most: int) -> Judged:
        """These and then ``other``: the last ``most`` of them."""
        condition = None
        if self.condition is not None and other.condition is not None:
            condition = torch.cat([self.condition, other.condition])[-most:]
        pairs = ((self.latents, other.latents), (self.advantages, other.advantages))
        latents, advantages = (torch.cat(both)[-most:] for both in pairs)
        return Judged(latents, advantages, condition)


@dataclass
class Critic:
    """One run's critic, on noised latents.

    Attributes:
        memory: the groups that were judged last.
        agreement: the correlation of its own advantages with the rewards', on groups that it had not seen: a moving
            average, from -1 to 1.
    """

    context: RewardContext
    network: nn.Module = field(init=False)
    head: Classifier = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    memory: Judged | None = field(init=False, default=None)
    agreement: float = field(init=False, default=0.0)
    cost: float = field(init=False)  # of one image, in floating-point operations

    def __post_init__(self) -> None:
        context = self.context
        self.network = network_to_train(context.teacher, context.config).to(context.device).eval()
        self.head = Classifier.on(self.network, context.teacher, context.config.seed + 1, context.device)
        nn.init.zeros_(self.head.head.weight)  # it prefers nothing yet
        first, device = torch.zeros(1, *context.teacher.shape), context.device
        condition = context.teacher.labels(np.arange(1))
        condition = None if condition is None else condition.to(device)
        self.cost = flops(self._judge, first.to(device), torch.zeros(1, device=device), condition)
        self.optimizer = torch.optim.AdamW(self._weights(), lr=self.options.critic_learning_rate, weight_decay=1e-2)

    @property
    def options(self) -> CriticOptions:
        """The settings of the estimator."""
        return self.context.config.options_as(CriticOptions)

    def _weights(self) -> list[nn.Parameter]:
        own = [weight for weight in self.network.parameters() if weight.requires_grad]
        return [*own, *self.head.parameters()]

    def see(self, judged: Judged, generator: torch.Generator) -> dict[str, float]:
        """Take in groups that were judged now: first how well it would have judged them, then ``critic_updates``
        updates on them and on those of the memory, half of each."""
        with torch.no_grad():
            before = self._centred(judged, generator)
        now = _correlation(before, judged.advantages)
        self.agreement = KEPT * self.agreement + (1 - KEPT) * now
        self.memory = judged if self.memory is None else self.memory.followed_by(judged, self._most(judged))
        losses = []
        for _ in range(self.options.critic_updates):
            known = draws.integers(0, len(self.memory), len(judged), generator, torch.device("cpu"))
            both = self.memory[known.to(judged.latents.device)].followed_by(judged, 2 * len(judged))
            losses.append(self._learn(both, generator))
        return {"critic_loss": sum(losses) / len(losses), "critic_agreement": self.agreement}

    def _most(self, judged: Judged) -> int:
        """Groups that the memory holds; each process has its own part."""
        return max(len(judged), self.options.critic_memory // judged.latents.shape[1] // draws.world())

    def _learn(self, judged: Judged, generator: torch.Generator) -> float:
        """One update: the squared error of the advantages."""
        with torch.enable_grad():
            loss = (self._centred(judged, generator) - judged.advantages).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
        draws.average_gradients(self._weights())
        torch.nn.utils.clip_grad_norm_(self._weights(), self.context.config.grad_clip)
        self.optimizer.step()
        return loss.item()

    def _centred(self, judged: Judged, generator: torch.Generator) -> Tensor:
        """What it gives each image beyond its group's mean: (N, G). A group has one time and one noise."""
        group = judged.latents.shape[1]
        condition = None if judged.condition is None else judged.condition.repeat_interleave(group)
        t = self._times(len(judged), generator).repeat_interleave(group)
        noise = draws.normal(judged.latents[:, 0].shape, generator, t.device).repeat_interleave(group, 0)
        values = self._values(judged.latents.flatten(0, 1), t, noise, condition).unflatten(0, (-1, group))
        return values - values.mean(1, keepdim=True)

    def _times(self, count: int, generator: torch.Generator) -> Tensor:
        last = int(self.options.critic_noise * len(self.context.teacher.schedule))
        upper = torch.full((count,), last, device=self.context.device)
        return random_times(self.context.teacher, count, generator, self.context.device, upper=upper)

    def _values(self, latents: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        """(N,) of latents (N, C, H, W), noised to the times t (N,)."""
        alpha, sigma = levels(self.context.teacher, t)
        x = alpha * latents + sigma * noise
        self.context.charge((3 if torch.is_grad_enabled() else 1) * len(x) * self.cost)
        return self._judge(x, t.float(), condition)

    def _judge(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """(N,) of x (N, C, H, W) at the times t (N,)."""
        cut = not self.context.config.micro_batch_size
        with autocast(x.device.type, self.context.config.precision):
            return self.head(lambda: self.network(x, t, condition), cut=cut).mean(1)

    def gradient(self, latents: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """Where its value of ``latents`` (B, C, H, W) rises: (B, C, H, W)."""
        seen, weights = latents.detach().requires_grad_(), self._weights()
        t = self._times(len(seen), generator)
        noise = draws.normal(seen.shape, generator, seen.device)
        for weight in weights:
            weight.requires_grad_(False)
        try:
            with torch.enable_grad():
                (along,) = torch.autograd.grad(self._values(seen, t, noise, condition).sum(), seen)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        return along

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        memory = self.memory
        return {
            "network": trained(self.network),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "agreement": self.agreement,
            "memory": None if memory is None else (memory.latents, memory.advantages, memory.condition),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
        load_trained(self.network, state["network"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.agreement = state["agreement"]
        self.memory = None if state["memory"] is None else Judged(*state["memory"])


def _correlation(found: Tensor, wanted: Tensor) -> float:
    """Of values (N, G) whose groups have mean 0; 0 where one of them has no spread."""
    products = (found * wanted, found.square(), wanted.square())
    both, own, other = (float(draws.mean(product)) for product in products)
    return both / math.sqrt(own * other) if own > 0 and other > 0 else 0.0
