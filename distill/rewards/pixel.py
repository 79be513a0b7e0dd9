"""The plainest paired reward: minus the mean squared error to the teacher's image."""

from __future__ import annotations

from torch import Tensor

from redif_sdk.distill.rewards.batch import Batch


class PixelReward:
    """-mean((student - teacher)^2) over C, H, W; images in [-1, 1]."""

    name = "pixel"
    paired = True

    def __call__(self, batch: Batch) -> Tensor:
        return -((batch.images - batch.targets) ** 2).mean((1, 2, 3))
