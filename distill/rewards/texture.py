"""A paired reward for texture: does every place hold as much detail, whatever its exact form, as the teacher's image?

Few-step students blur, and a squared error forgives it. Detail is counted here as local energy: the root of the local
mean of squared differences between neighbours, in four directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.rewards.batch import Batch

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
    return (pooled(squares) + FLOOR).sqrt()


def pooled(maps: Tensor) -> Tensor:
    """``avg_pool2d(maps, WINDOW, 2)`` of maps (B, M, H, W), several times as fast: by a product and sums."""
    return pooled_rows(maps @ column_means(maps))


def column_means(maps: Tensor) -> Tensor:
    """(W, w), by which maps (..., H, W) are multiplied: the means of ``WINDOW`` columns, every second of them."""
    side = maps.shape[-1]
    place = torch.arange(side, device=maps.device)[:, None]
    first = 2 * torch.arange((side - WINDOW) // 2 + 1, device=maps.device)
    return ((place >= first) & (place < first + WINDOW)).to(maps.dtype) / WINDOW


def pooled_rows(maps: Tensor) -> Tensor:
    """(..., H, W) -> (..., h, W): the means of ``WINDOW`` rows, every second of them."""
    last = 2 * ((maps.shape[-2] - WINDOW) // 2) + 1
    rows = maps[..., 0:last:2, :]
    for k in range(1, WINDOW):
        rows = rows + maps[..., k : k + last : 2, :]
    return rows / WINDOW


class TextureReward:
    """Minus the squared difference of local energies, as a map (B, h, w): each place is credited by itself."""

    name = "texture"
    paired = True
    reach = 1 + WINDOW // 2
    grouped = True

    def __call__(self, batch: Batch) -> Tensor:
        wanted = energy(batch.targets)
        count = max(1, AT_ONCE // len(wanted)) * len(wanted)
        return torch.cat([self._compare(part, wanted) for part in batch.images.split(count)])

    @staticmethod
    def _compare(images: Tensor, wanted: Tensor) -> Tensor:
        groups = energy(images).unflatten(0, (-1, len(wanted)))
        return -(groups - wanted).square().mean(2).flatten(0, 1)
