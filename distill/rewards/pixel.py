"""The plainest paired reward: minus the mean squared error to the teacher's image."""

from __future__ import annotations

from torch import Tensor


class PixelReward:
    """-mean((student - teacher)^2) over C, H, W; images in [-1, 1]."""

    name = "pixel"

    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return -((images - targets) ** 2).mean((1, 2, 3))
