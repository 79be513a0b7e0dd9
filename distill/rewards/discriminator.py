"""A reward that is learnt beside the student: how sure a small network is that an image is the teacher's.

It compares distributions, not pairs (Goodfellow et al. 2014): in the optimum its logit is the log density ratio of the
teacher's images to the student's. Without a regression term it runs away: keep `regression_weight` above 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.distill.teachers.base import Teacher

NOISE = 0.1  # added to both sides in training: what cannot be told apart under it is let pass
LEARNING_RATE = 1e-3


class PatchNetwork(nn.Module):
    """(B, C, H, W) in [-1, 1] and classes (B,) or None -> logits (B, H / 2, W / 2), each of the 12 x 12 pixels around.

    The class enters as a projection (Miyato and Koyama 2018). ``num_classes`` 0: the condition is not looked at.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.head = nn.Conv2d(64, 1, 1)
        self.classes = nn.Embedding(max(num_classes, 1), 64)
        nn.init.zeros_(self.classes.weight)
        self.conditional = num_classes > 0

    def forward(self, images: Tensor, condition: Tensor | None) -> Tensor:
        """Logits (B, H / 2, W / 2) float32."""
        maps = self.body(images)
        logits: Tensor = self.head(maps)[:, 0]
        if condition is not None and self.conditional:
            logits = logits + torch.einsum("bchw,bc->bhw", maps, self.classes(condition)) / 8
        return logits


class Discriminator:
    """log D as a map (B, h, w). It learns from every update's outputs before it judges their actions."""

    name = "discriminator"
    reach = 6

    def __init__(self, network: PatchNetwork) -> None:
        self.network = network.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.99), weight_decay=1e-2)
        self.cost = 0.0  # of one image, in floating-point operations

    @classmethod
    def make(cls, teacher: Teacher, seed: int, device: torch.device) -> Discriminator:
        """An untrained one for ``teacher``'s images, on ``device``; ``seed`` fixes its weights."""
        images = teacher.images(torch.zeros(1, *teacher.shape, device=device))
        classes = 0 if teacher.data is not None else teacher.num_conditions  # rows of arrays are no classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 77)
            made = cls(PatchNetwork(images.shape[1], classes).to(device))
        made.cost = flops(made.network, images, None)
        return made

    def learn(
        self, context: RewardContext, outputs: Tensor, batch: Pairs, generator: torch.Generator
    ) -> dict[str, float]:
        """One update of the logistic loss on the teacher's images against the student's ``outputs`` (latents)."""
        real, made = context.judged(batch.target), context.judged(outputs)
        both = torch.stack([real, made])
        both = (both + NOISE * draws.normal(both.shape, generator, both.device, dim=1)).flatten(0, 1)
        labels = None if batch.places is None else batch.places.repeat(2)
        context.charge(3 * len(both) * self.cost)
        self.network.requires_grad_(True)
        try:
            with torch.enable_grad():
                of_real, of_made = self.network(both, labels).chunk(2)
                loss = F.softplus(-of_real).mean() + F.softplus(of_made).mean()
                self.optimizer.zero_grad()
                loss.backward()
            draws.average_gradients(self.network.parameters())
            self.optimizer.step()
        finally:
            self.network.requires_grad_(False)
        return {"discriminator_loss": loss.item()}

    def __call__(self, batch: Batch) -> Tensor:
        return -F.softplus(-self.network(batch.images, batch.condition))

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any], context: RewardContext) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
