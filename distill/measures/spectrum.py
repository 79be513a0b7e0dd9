"""Patterns that a distance in features hardly sees and an eye does: a lattice of pixels, too much or too little detail.

A network that makes its image in blocks of 2 x 2 can leave a grid. In the power spectrum that is a peak at the Nyquist
frequency, of which natural images have none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Spectrum"]

RING = 2  # bins from a peak to what it is compared with
FINE = 0.35  # cycles a pixel, from which on detail is fine


@dataclass(frozen=True)
class Spectrum:
    """Figures of the mean power spectrum of images (N, C, H, W).

    Attributes:
        nyquist_rows, nyquist_columns, nyquist_both: power at half a cycle a pixel down a column of the image, along a
            row, and along both (a chequerboard), over the mean of the bins around it. About 1 in natural images; from 3
            on a grid is seen. None: that side is odd, and has no such frequency.
        fine_energy: power above `FINE` cycles a pixel, of images in [-1, 1].
    """

    nyquist_rows: float | None
    nyquist_columns: float | None
    nyquist_both: float | None
    fine_energy: float

    @classmethod
    def of(cls, images: Tensor) -> Spectrum:
        """Of images (N, C, H, W) in [-1, 1], which are clamped."""
        seen = images.clamp(-1, 1).double()
        seen = seen - seen.mean((2, 3), keepdim=True)
        height, width = seen.shape[-2:]
        power = torch.zeros(height, width, dtype=torch.float64, device=seen.device)
        for part in seen.split(256):
            power += torch.fft.fft2(part).abs().square().sum((0, 1)) / (height * width)
        power = power / (len(seen) * seen.shape[1])
        rows, columns = (torch.fft.fftfreq(side, device=seen.device).abs() for side in (height, width))
        fine = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt() > FINE
        return cls(
            nyquist_rows=_peak(power, height // 2, 0) if height % 2 == 0 else None,
            nyquist_columns=_peak(power, 0, width // 2) if width % 2 == 0 else None,
            nyquist_both=_peak(power, height // 2, width // 2) if (height | width) % 2 == 0 else None,
            fine_energy=float(power[fine].sum() / (height * width)),
        )

    @property
    def grid(self) -> float | None:
        """The largest of the three peaks; None: both sides are odd."""
        peaks = [peak for peak in (self.nyquist_rows, self.nyquist_columns, self.nyquist_both) if peak is not None]
        return max(peaks, default=None)

    def row(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def _peak(power: Tensor, row: int, column: int) -> float:
    """Power at a bin over the mean of those two bins around it; the spectrum is periodic."""
    around = torch.arange(-RING, RING + 1, device=power.device)
    box = power[(row + around) % len(power)][:, (column + around) % power.shape[1]]
    inner = box[1:-1, 1:-1]
    ring = (box.sum() - inner.sum()) / (box.numel() - inner.numel())
    return float(power[row, column] / ring.clamp_min(1e-30))
