"""A perceptual paired reward in the features of a small convolutional network.

The network is trained in seconds on the teacher's own outputs (no data set is needed): to tell their classes, or which
prompt each belongs to; without either its random, seeded weights serve. It is never a judge: evaluation uses other
networks (``distill/measures/distances.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.models.prompts import ENCODE_BATCH, Prompts

TEMPERATURE = 0.1  # of matching images with prompts


class FeatureNetwork(nn.Module):
    """Three convolutions; ``features`` gives the maps that are compared, ``forward`` class logits, or of prompts what
    is compared with their vectors: (B, outputs)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Conv2d(channels, 24, 5, stride=2, padding=2),
                nn.Conv2d(24, 48, 3, stride=2, padding=1),
                nn.Conv2d(48, 96, 3, stride=1, padding=1),
            ]
        )
        self.head = nn.Linear(96, outputs)

    def features(self, images: Tensor) -> list[Tensor]:
        """The three layers' maps for images (B, C, H, W) in [-1, 1]; those above 64 pixels wide are halved first."""
        maps, x = [], F.avg_pool2d(images, 2) if images.shape[-1] > 64 else images
        for block in self.blocks:
            x = F.relu(block(x))
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Of images (B, C, H, W): (B, outputs) float32."""
        logits: Tensor = self.head(self.features(images)[-1].mean((2, 3)))
        return logits


def train_on(network: FeatureNetwork, images: Tensor, labels: Tensor, seed: int, updates: int, size: int) -> None:
    """A short training: AdamW, a little noise on the images. ``labels`` are classes (N,), or vectors of prompts (N, D):
    these are matched as CLIP's are (Radford et al. 2021, figure 3), each against those of the batch."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    for _ in range(updates):
        index = torch.randint(0, len(images), (size,), generator=draw)
        batch = images[index]
        batch = batch + 0.1 * torch.randn(batch.shape, generator=draw).to(batch.device)
        logits, wanted = network(batch), labels[index]
        if labels.dim() == 2:
            logits = F.normalize(logits, dim=1) @ F.normalize(wanted, dim=1).T / TEMPERATURE
            wanted = (index[:, None] == index).int().argmax(1).to(batch.device)
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def prompt_vectors(prompts: Prompts, condition: Tensor) -> Tensor:
    """What a text encoder makes of each prompt, averaged over its places: (N, D), each number of deviation 1."""
    vectors = []
    for part in condition.split(ENCODE_BATCH):
        tensors = [tensor.float() for tensor in prompts(part).values() if tensor.is_floating_point()]
        vectors.append(
            torch.cat([tensor.flatten(1, -2).mean(1) if tensor.dim() > 2 else tensor for tensor in tensors], 1)
        )
    found = torch.cat(vectors)
    return (found - found.mean(0)) / (found.std(0) + 1e-6)


class FeatureReward:
    """Minus the LPIPS-style distance (Zhang et al. 2018): channels unit-normalised at each place, squared differences
    averaged over places, summed over layers; plus ``pixel_weight`` times the mean squared error."""

    name = "feature"
    paired = True

    def __init__(self, network: FeatureNetwork, pixel_weight: float = 0.0) -> None:
        self.network = network.eval().requires_grad_(False)
        self.pixel_weight = pixel_weight

    @classmethod
    def fit(cls, teacher: Teacher, pairs: Pairs, seed: int, updates: int = 150, batch: int = 128) -> FeatureReward:
        """Train the features on the pool's outputs and their classes or prompts; without either they stay random."""
        images = teacher.seen(pairs.target)
        labels, outputs = pairs.places, teacher.num_conditions or 1
        if labels is not None and teacher.prompts is not None:
            labels = prompt_vectors(teacher.prompts, labels).to(images.device)
            outputs = labels.shape[1]
        if teacher.data is not None:  # its rows are no classes: the features stay random
            labels, outputs = None, 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = FeatureNetwork(images.shape[1], outputs)
        network = network.to(images.device)
        if labels is not None and updates:
            train_on(network, images, labels, seed, updates, batch)
        return cls(network)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Pooled features of ``images`` (B, C, H, W), for the recall that training logs: (B, 96) float32."""
        return self.network.features(images)[-1].mean((2, 3))

    def __call__(self, batch: Batch) -> Tensor:
        images, targets = batch.images, batch.targets
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
