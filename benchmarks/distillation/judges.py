"""The evaluation of the benchmark: feature networks, protocols and controls. No network here gives a reward.

Test protocol: ImageNet's EfficientNet-Lite0, and a classifier trained on the real images (seed 2). Validation protocol,
on other noises, on which settings are tuned: another classifier (seed 3), and EfficientNet-Lite1, which has its own
weights but the same training data as Lite0. Lite1 was added when it was clear that a classifier alone does not see
texture. The primary control, fixed beforehand, is the gain: the scalar on the output, out of a grid of 2 %, with the
lowest distance. Further controls: gain and unsharp mask, and the std match.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill.evaluation.datasets import load
from redif_sdk.distill.measures import features
from redif_sdk.distill.measures.distances import (
    Embed,
    Judge,
    Statistics,
)

GAINS = tuple(round(0.9 + 0.02 * k, 2) for k in range(21))  # .90 to 1.30
UNSHARP = (0.1, 0.2, 0.3)
SEEDS = {"test": 2, "validation": 3}
#: Figures of the images themselves, which are no feature network's.
OF_IMAGES = {"mse", "nyquist_rows", "nyquist_columns", "nyquist_both", "grid", "fine_energy"}


class Classifier(nn.Module):
    """A small residual network; its pooled last feature maps (128) are the features."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 32, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in ((32, 64), (64, 128)):
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                    nn.Conv2d(b, b, 3, padding=1),
                    nn.BatchNorm2d(b),
                )
            )
        self.skips = nn.ModuleList(nn.Conv2d(a, b, 1, stride=2) for a, b in ((32, 64), (64, 128)))
        self.head = nn.Linear(128, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        for block, skip in zip(self.blocks, self.skips, strict=True):
            x = F.relu(block(x) + skip(x))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images))
        return logits


def classifier(data: str, seed: int, cache: Path, updates: int = 1000) -> Classifier:
    """The classifier of ``data``'s real training images with ``seed``; trained once and kept in ``cache``."""
    split = load(data, "train")
    network = Classifier(split.images.shape[1], len(split.class_names))
    path = cache / f"judge-{data}-{seed}-{updates}.pt"
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval().requires_grad_(False)
    torch.manual_seed(seed)
    network = Classifier(split.images.shape[1], len(split.class_names))
    images, labels = torch.tensor(split.images).float() / 127.5 - 1, torch.tensor(split.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in range(updates):
        index = torch.randint(0, len(images), (128,))
        loss = F.cross_entropy(network(images[index]), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    cache.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return network.eval().requires_grad_(False)


def embedder(network: Classifier) -> Embed:
    """A function like `features.embed`: it rounds images to the 256 levels of a file first."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        return torch.cat([network.embed(part) for part in levels.split(250)])

    return embed


def unsharp(images: Tensor, amount: float) -> Tensor:
    """images + amount (images - their 3 x 3 binomial blur)."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row[None]).expand(images.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
    return images + amount * (images - blurred)


def high_frequency(images: Tensor) -> float:
    """Mean squared Laplacian of images in [-1, 1], which blur lowers first."""
    seen = images.clamp(-1, 1)
    laplacian = 4 * seen[..., 1:-1, 1:-1] - seen[..., :-2, 1:-1] - seen[..., 2:, 1:-1]
    laplacian = laplacian - seen[..., 1:-1, :-2] - seen[..., 1:-1, 2:]
    return float(laplacian.pow(2).mean())


@dataclass
class Reference:
    """One feature network's judge, with the benchmark's own controls."""

    name: str
    judge: Judge

    def row(self, images: Tensor, fresh: Tensor | None = None) -> dict[str, Any]:
        """The figures of one contender's images (N, C, H, W), paired with the teacher's; unpaired, of ``fresh`` too."""
        quality = self.judge.quality(images, GAINS, fresh)
        found = {name: value for name, value in quality.row().items() if name not in OF_IMAGES}
        corrected = images * quality.gain
        sharpened = [(self.judge.distance(self.judge.embed(unsharp(corrected, a))), a) for a in UNSHARP]
        found["fd_teacher_unsharp"], found["unsharp"] = min([*sharpened, (quality.fd_teacher_gain, 0.0)])
        return {"features": self.name, **found}


@dataclass
class Panel:
    """All references of a protocol; tables lead with the first.

    ``target``: the teacher's images for the noises of the contenders (N, C, H, W); ``conditions`` (N,): theirs;
    ``others``: the teacher's images for other noises.
    """

    target: Tensor
    references: list[Reference]

    @classmethod
    def of(
        cls,
        protocol: str,
        data: str,
        target: Tensor,
        cache: Path,
        *,
        others: Tensor,
        conditions: Tensor | None,
        judge_updates: int = 1000,
    ) -> Panel:
        own = embedder(classifier(data, SEEDS[protocol], cache, judge_updates))
        if protocol == "validation":
            networks = {"classifier-3": own, "efficientnet-lite1-32px": partial(features.embed, size=1)}
        else:
            networks = {features.name_of(target): features.embed, "classifier-2": own}
        real = torch.tensor(load(data, "test").images[: 4 * len(target)]).float() / 127.5 - 1
        return cls(
            target,
            [
                Reference(
                    name,
                    Judge(
                        target,
                        embed,
                        real=None if protocol == "validation" else Statistics.of(embed(real)),
                        others=lambda: others,
                        conditions=conditions,
                    ),
                )
                for name, embed in networks.items()
            ],
        )

    def judge(self, images: Tensor, fresh: Tensor | None = None) -> dict[str, Any]:
        """mse, high_frequency (ratio to the teacher's), the spectrum, and a row of figures for each feature network.

        ``fresh``: the contender's images for more noises (M, C, H, W); figures of unpaired images are then of all.
        """
        seen, wanted = images.clamp(-1, 1), self.target.clamp(-1, 1)
        return {
            "mse": float((seen - wanted).pow(2).mean()),
            "high_frequency": high_frequency(images) / high_frequency(self.target),
            **self.references[0].judge.seen(images),
            "judged": [reference.row(images, fresh) for reference in self.references],
        }


def sheet(images: Tensor, count: int = 40, columns: int = 20) -> np.ndarray:
    """The first ``count`` images, in whole rows, as one uint8 image (H, W, 3)."""
    count = max(columns, min(count, len(images)) // columns * columns)  # whole rows
    levels = ((images[:count].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    rows = [torch.cat(list(levels[low : low + columns]), 2) for low in range(0, count, columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).numpy()
