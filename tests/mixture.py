"""A problem with modes and conditions: images of two classes, each a mixture of two Gaussians; its teacher is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.sampling.noise_schedule import NoiseSchedule

SHAPE, STD, CLASSES = (1, 4, 4), 0.1, 2
SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})

_HALVES = torch.ones(4, 4), torch.ones(4, 4)
_HALVES[0][:, 2:] = -1.0  # light on the left, or on the right
_HALVES[1][2:] = -1.0  # light at the top, or at the bottom
#: (class, mode, C, H, W): class 0 is light on one side, class 1 at the top or the bottom.
MODES = 0.6 * torch.stack([torch.stack([half, -half]) for half in _HALVES])[:, :, None]


def clean(x: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
    """E[x0 | x, class] where x = alpha x0 + sigma noise and x0 is of the mixture: (B, 1, 4, 4)."""
    variance = alpha**2 * STD**2 + sigma**2
    modes = MODES[classes]  # (B, 2, 1, 4, 4)
    residual = x[:, None] - alpha[:, None] * modes
    weights = (-residual.pow(2).sum((2, 3, 4)) / (2 * variance.flatten(1))).softmax(1)
    means = modes + (alpha * STD**2 / variance)[:, None] * residual
    return (weights[:, :, None, None, None] * means).sum(1)


def exact(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """v of the mixture: what a perfect class-conditional teacher of it gives."""
    assert condition is not None
    alpha, sigma = (
        torch.from_numpy(values.copy()).float()[t.long()].view(-1, 1, 1, 1)
        for values in (SCHEDULE.alphas, SCHEDULE.sigmas)
    )
    return (alpha * x - clean(x, alpha, sigma, condition)) / sigma


class Conditional(nn.Module):
    """A network of some thousand weights, called as (x, t, condition)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.classes = nn.Embedding(CLASSES, 8)
        self.body = nn.Sequential(
            nn.Linear(16 + 1 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 16)
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        out: Tensor = self.body(torch.cat([x.flatten(1), t[:, None] / 1000, self.classes(condition)], 1))
        return out.view_as(x)


def make_teacher() -> Teacher:
    """Of 16 DDIM steps; its student begins with random weights."""
    torch.manual_seed(0)
    return Teacher.from_callable(
        exact,
        schedule=SCHEDULE,
        prediction_type="v_prediction",
        shape=SHAPE,
        student=Conditional(),
        num_classes=CLASSES,
        num_inference_steps=16,
        fingerprint="mixture",
    )


@dataclass(frozen=True)
class Fit:
    """How samples stand to the mixture.

    Attributes:
        distance: rms distance of an image to the nearest mode of its class.
        obeyed: share of the images whose nearest mode, of all four, is of their class.
        least: the smaller mode's share of its class's images, in the worse class: 0.5 at best, 0 where one is lost.
    """

    distance: float
    obeyed: float
    least: float

    @classmethod
    def of(cls, images: Tensor, classes: Tensor) -> Fit:
        distances = (images[:, None, None] - MODES).pow(2).mean((3, 4, 5)).sqrt()  # (N, class, mode)
        own = distances[torch.arange(len(images)), classes]
        second = own.argmin(1).float()
        shares = [float(second[classes == label].mean()) for label in range(CLASSES)]
        obeyed = (distances.flatten(1).argmin(1) // 2 == classes).float().mean()
        return cls(float(own.min(1).values.mean()), float(obeyed), min(min(s, 1 - s) for s in shares))


def denoiser(updates: int = 400) -> Conditional:
    """A network that has learnt, roughly, what the teacher computes: a student begins with its teacher's weights."""
    torch.manual_seed(0)
    network, draw = Conditional(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    alphas, sigmas = (torch.from_numpy(values.copy()).float() for values in (SCHEDULE.alphas, SCHEDULE.sigmas))
    for _ in range(updates):
        classes, modes = (torch.randint(0, 2, (128,), generator=draw) for _ in range(2))
        images = MODES[classes, modes] + STD * torch.randn((128, *SHAPE), generator=draw)
        t = torch.randint(0, len(SCHEDULE), (128,), generator=draw)
        alpha, sigma = (values[t].view(-1, 1, 1, 1) for values in (alphas, sigmas))
        x = alpha * images + sigma * torch.randn(images.shape, generator=draw)
        loss = (network(x, t.float(), classes) - exact(x, t.float(), classes)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network
