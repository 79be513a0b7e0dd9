"""A paired reward for detail of the right kind: does every place hold as much of each frequency as the teacher's image?

The texture reward counts local energy as such, and energy can be paid in any form: in dots as well as in cloth. Here
each place's 3 x 3 neighbourhood is taken apart into its eight cosine patterns (all but the mean), at two scales, at
every pixel, so that no phase is preferred; the local energy of each pattern is compared with the teacher's. A lattice
of dots has the one pattern that alternates along both sides, and too much of it is as wrong as too little.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.texture import FLOOR, column_means, pooled_rows

__all__ = ["BandsReward", "bands"]

PIXELS_AT_ONCE = 150_000  # of images whose patterns are computed at once: they stay in the processor's cache
SCALES = {"fine": 1, "coarse": 2}  # name -> pixels between the neighbours
LENGTHS = (3, 2, 6)  # squared, of the cosines (1, 1, 1), (-1, 0, 1) and (1, -2, 1)


def bands(images: Tensor) -> dict[str, Tensor]:
    """(B, C, H, W) in [-1, 1] -> logarithms of local energies (B, 8, h, w) of each scale, h about H / 2.

    Channels are averaged. The patterns are the orthonormal cosines of three points, along columns times along rows:
    (1, 1, 1) / sqrt 3, (-1, 0, 1) / sqrt 2 and (1, -2, 1) / sqrt 6. The coarse scale takes every second pixel of the
    mean over 3 x 3.
    """
    found, level, squared = {}, images, [along * across for along in LENGTHS for across in LENGTHS]
    for name, gap in SCALES.items():
        padded = F.pad(level, (gap,) * 4, mode="replicate")
        parts = [part for along in _cosines(padded, gap, -2) for part in _cosines(along, gap, -1)]
        level = parts[0] / squared[0]
        means = column_means(level)
        energies = [
            _mean(part.square()) @ means / length for part, length in zip(parts[1:], squared[1:], strict=True)
        ]  # divided here, where there is half as much of it
        found[name] = (pooled_rows(torch.stack(energies, 1)) + FLOOR).log() / 2
    return found


def _mean(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W)."""
    return maps.mean(1) if maps.shape[1] > 1 else maps[:, 0]


def _cosines(maps: Tensor, gap: int, dim: int) -> list[Tensor]:
    """Sum, slope and curvature of each pixel and its two neighbours along ``dim``, which becomes 2 ``gap`` shorter."""
    inner = maps.shape[dim] - 2 * gap
    before, here, after = (maps.narrow(dim, k * gap, inner) for k in range(3))
    ends = before + after
    return [ends + here, after - before, ends.sub(here, alpha=2)]


class BandsReward:
    """Minus the squared differences of the logarithms of local energies, as a map (B, h, w) for each scale.

    Logarithms, so that a fine pattern, of which an image has little, counts as much as a coarse one.
    """

    name = "bands"
    paired = True
    grouped = True
    #: Pixels: half of the pooled window, the neighbours, and the mean below them.
    reach: ClassVar[dict[str, int]] = {"fine": 3, "coarse": 5}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        wanted = bands(batch.targets)
        height, width = batch.images.shape[-2:]
        count = max(1, PIXELS_AT_ONCE // (height * width * len(batch.targets))) * len(batch.targets)
        parts = [self._compare(part, wanted) for part in batch.images.split(count)]
        return {name: torch.cat([part[name] for part in parts]) for name in wanted}

    @staticmethod
    def _compare(images: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        found = bands(images)
        return {
            name: -(found[name].unflatten(0, (-1, len(energies))) - energies).square().mean(2).flatten(0, 1)
            for name, energies in wanted.items()
        }
