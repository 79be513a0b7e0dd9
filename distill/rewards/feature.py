"""A perceptual paired reward in the features of a small convolutional network.

The network is trained in seconds on the teacher's own labelled outputs (no data set is needed); without classes its
random, seeded weights serve. It is never a judge: evaluation uses other networks (``distill/evaluate.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.distill.pairs import Pairs
from redif_sdk.distill.teacher import Teacher


class FeatureNetwork(nn.Module):
    """Three convolutions; ``features`` gives the maps that are compared, ``forward`` the class logits."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Conv2d(channels, 24, 5, stride=2, padding=2),
                nn.Conv2d(24, 48, 3, stride=2, padding=1),
                nn.Conv2d(48, 96, 3, stride=1, padding=1),
            ]
        )
        self.head = nn.Linear(96, num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        maps, x = [], F.avg_pool2d(images, 2) if images.shape[-1] > 64 else images
        for block in self.blocks:
            x = F.relu(block(x))
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images)[-1].mean((2, 3)))
        return logits


def train_on(network: FeatureNetwork, images: Tensor, labels: Tensor, seed: int, updates: int, size: int) -> None:
    """A short classification training: AdamW, a little noise on the images."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    for _ in range(updates):
        index = torch.randint(0, len(images), (size,), generator=draw)
        batch = images[index]
        batch = batch + 0.1 * torch.randn(batch.shape, generator=draw).to(batch.device)
        loss = F.cross_entropy(network(batch), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class FeatureReward:
    """Minus the LPIPS-style distance (Zhang et al. 2018): channels unit-normalised at each place, squared differences
    averaged over places, summed over layers; plus ``pixel_weight`` times the mean squared error."""

    name = "feature"

    def __init__(self, network: FeatureNetwork, pixel_weight: float = 0.0) -> None:
        self.network = network.eval().requires_grad_(False)
        self.pixel_weight = pixel_weight

    @classmethod
    def fit(cls, teacher: Teacher, pairs: Pairs, seed: int, updates: int = 150, batch: int = 128) -> FeatureReward:
        """Train the features on the pool's outputs and labels (or keep the random ones where there are no labels)."""
        images = teacher.images(pairs.target).clamp(*teacher.postprocess.value_range)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = FeatureNetwork(images.shape[1], teacher.num_conditions or 1)
        network = network.to(images.device)
        if pairs.condition is not None and updates:
            train_on(network, images, pairs.condition, seed, updates, batch)
        return cls(network)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 96) pooled features, for the recall that training logs."""
        return self.network.features(images)[-1].mean((2, 3))

    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        distance = self.pixel_weight * ((images - targets) ** 2).mean((1, 2, 3))
        repeats = period(targets)  # in a group the targets repeat: their features are computed once
        for ours, theirs in zip(self.network.features(images), self.network.features(targets[:repeats]), strict=True):
            wanted = F.normalize(theirs, dim=1, eps=1e-6).repeat(len(images) // repeats, 1, 1, 1)
            distance = distance + ((F.normalize(ours, dim=1, eps=1e-6) - wanted) ** 2).sum(1).mean((1, 2))
        return -distance


def period(images: Tensor) -> int:
    """The smallest p such that the batch repeats its first p images (a group's targets do), else its length."""
    again = (images == images[0]).flatten(1).all(1).nonzero().flatten()
    period = int(again[1]) if len(again) > 1 else len(images)
    groups = images.unflatten(0, (-1, period)) if len(images) % period == 0 else None
    return period if groups is not None and torch.equal(groups, groups[:1].expand_as(groups)) else len(images)
