"""A paired reward for texture: does every place hold as much detail, whatever its exact form, as the teacher's image?

Few-step students blur, and a squared error forgives it. Detail is counted here as local energy: the root of the local
mean of squared differences between neighbours, in four directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.rewards.feature import period

WINDOW = 5  # pixels of the local mean
AT_ONCE = 64  # images whose differences stay in the processor's cache
FLOOR = 1e-3  # added under the root: an energy of less is no detail that is seen


def energy(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> local energies (B, 4, h, w), h about H / 2; channels are averaged.

    Of differences along x, along y, to the four neighbours' mean, and along x of that along y.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")  # shifted views: several times as fast as a convolution
    up, down, left, right = padded[..., :-2, :], padded[..., 2:, :], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    above, below = up[..., 1:-1], down[..., 1:-1]
    slope = down - up
    differences = (
        right - left,
        slope[..., 1:-1],
        4 * images - above - below - left - right,
        slope[..., 2:] - slope[..., :-2],
    )
    squares = torch.stack([difference.square().mean(1) for difference in differences], 1) / 4
    return (F.avg_pool2d(squares, WINDOW, 2) + FLOOR).sqrt()


class TextureReward:
    """Minus the squared difference of local energies, as a map (B, h, w): each place is credited by itself."""

    name = "texture"
    reach = 1 + WINDOW // 2

    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        repeats = period(targets)
        wanted = energy(targets[:repeats]).repeat(len(images) // repeats, 1, 1, 1)
        found = torch.cat([energy(part) for part in images.split(AT_ONCE)])
        return -((found - wanted) ** 2).mean(1)
