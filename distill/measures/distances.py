"""How good a student is: Frechet and kernel distances, paired and unpaired, paired error, and two controls.

The judge's features (``features.py``) give no reward. Two controls go with every distance, since few-step students lose
contrast and a cheap filter would win it back: the *gain* (the best scalar on the output) and the *std match* (each
sample's mean and standard deviation set to its paired teacher output's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redif_sdk.distill.measures.neighbours import neighbours, spread
from redif_sdk.distill.measures.spectrum import Spectrum

GAINS = (0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.45)
GAIN_SAMPLES = 500  # the gain is chosen on the first ones, the distance is taken on all

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (N, D): their mean and covariance, in float64 on the CPU."""
        values = features.double().cpu().numpy()
        return cls(values.mean(0), np.cov(values, rowvar=False))

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, eq. 6), through symmetric eigenvalues."""
    cross = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross.clip(0)).sum()
    return max(0.0, float(((a.mean - b.mean) ** 2).sum() + trace))  # rounding can make it negative


def frechet_distance_of(features: Tensor, reference: Tensor) -> float:
    """The same distance from samples, through the N x N cross-product: N < D makes it cheap. (N1, D), (N2, D)."""
    a, b = features.double(), reference.double()
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    a, b = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    nuclear = torch.linalg.svdvals(a @ b.T).sum()  # tr (C1 C2)^(1/2) is the nuclear norm of A B'
    return max(0.0, float(mean + (a**2).sum() + (b**2).sum() - 2 * nuclear))


def frechet_distance_to(features: Tensor, reference: Statistics) -> float:
    """The same distance from features (N, D) to statistics: N < D needs eigenvalues of an N x N matrix only."""
    if len(features) >= features.shape[1]:
        return frechet_distance(Statistics.of(features), reference)
    values = features.double().cpu().numpy()
    mean = values.mean(0)
    a = (values - mean) / np.sqrt(len(values) - 1)  # C1 = A' A, and C1 C2 has the eigenvalues of A C2 A'
    cross = np.linalg.eigvalsh(a @ reference.covariance @ a.T)
    trace = (a**2).sum() + np.trace(reference.covariance) - 2 * np.sqrt(cross.clip(0)).sum()
    return max(0.0, float(((mean - reference.mean) ** 2).sum() + trace))


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), on all samples."""
    x, y = features.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy, n, m = kernel(x, x), kernel(y, y), len(x), len(y)
    own = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(own - 2 * kernel(x, y).mean())


def std_match(images: Tensor, target: Tensor) -> Tensor:
    """Each image with the mean and standard deviation of its paired target."""
    std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
    wanted_std, wanted_mean = torch.std_mean(target, (1, 2, 3), keepdim=True)
    return (images - mean) / std.clamp_min(1e-6) * wanted_std + wanted_mean


@dataclass(frozen=True)
class Quality:
    """One contender against the teacher. Distances in the judge's features; ``mse`` paired, images in [-1, 1].

    ``*_teacher`` are to the teacher's images for the same noises; ``*_unpaired``, precision, recall, density and
    coverage to those for other noises, None where there are none. ``spread`` is that in a condition over the teacher's;
    ``nyquist_*`` and ``grid`` as in `Spectrum`; ``fine_energy`` over the teacher's.
    """

    fd_teacher: float
    fd_teacher_gain: float
    gain: float
    fd_teacher_std: float
    fd_real: float | None
    kd_teacher: float
    fd_unpaired: float | None
    kd_unpaired: float | None
    mse: float
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    spread: float | None
    nyquist_rows: float | None
    nyquist_columns: float | None
    nyquist_both: float | None
    grid: float | None
    fine_energy: float

    def row(self) -> dict[str, Any]:
        """The figures by name, as a row of a results file holds them."""
        return asdict(self)


@dataclass
class Judge:
    """The teacher's held-out images (N, C, H, W) in [-1, 1], embedded once; ``real``: statistics of real data.

    The reference is the teacher's output for the *same* noises as the contender's, so a perfect student is at 0.
    ``known``: the target's features (N, D), where they were computed before. ``others`` gives the teacher's images for
    other noises (M, C, H, W), when they are wanted. ``conditions`` (N,): of the target.
    """

    target: Tensor
    embed: Embed
    real: Statistics | None = None
    known: Tensor | None = None
    others: Callable[[], Tensor] | None = None
    conditions: Tensor | None = None

    @cached_property
    def reference(self) -> Tensor:
        """Features of the target, (N, D)."""
        return self.embed(self.target) if self.known is None else self.known

    @cached_property
    def statistics(self) -> Statistics:
        """Of the reference's features."""
        return Statistics.of(self.reference)

    @cached_property
    def _others(self) -> Tensor:
        assert self.others is not None
        return self.embed(self.others())

    @cached_property
    def _statistics_of_others(self) -> Statistics:
        return Statistics.of(self._others)

    @cached_property
    def _spread(self) -> float | None:
        return spread(self.reference, self.conditions)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the target."""
        return Spectrum.of(self.target)

    def seen(self, images: Tensor | None = None) -> dict[str, Any]:
        """The figures of the spectrum of ``images`` (N, C, H, W), as in `Quality.row`; None: of the target."""
        found = self.spectrum if images is None else Spectrum.of(images)
        fine = found.fine_energy / max(self.spectrum.fine_energy, 1e-12)
        return found.row() | {"fine_energy": fine, "grid": found.grid}

    def distance(self, features: Tensor) -> float:
        """To the reference of the same noises: through covariances, or through the samples where those are fewer."""
        if len(features) < max(len(self.reference), features.shape[1]):
            return frechet_distance_of(features, self.reference[: len(features)])
        return frechet_distance(Statistics.of(features), self.statistics)

    def unpaired(self, features: Tensor) -> dict[str, Any]:
        """The figures of features (N, D) against those of the teacher's images for other noises; None without any."""
        if self.others is None:
            names = ("fd_unpaired", "kd_unpaired", "precision", "recall", "density", "coverage")
            return dict.fromkeys(names)
        return {
            "fd_unpaired": self.to_others(features),
            "kd_unpaired": kernel_distance(features, self._others),
            **asdict(neighbours(features, self._others)),
        }

    def to_others(self, features: Tensor) -> float:
        """Frechet distance from features (N, D) to those of the teacher's images for other noises."""
        if min(len(features), len(self._others)) < features.shape[1]:
            return frechet_distance_of(features, self._others)
        return frechet_distance(Statistics.of(features), self._statistics_of_others)

    def _best_gain(self, images: Tensor, features: Tensor, gains: Sequence[float]) -> float:
        """The gain of least distance on the first ``GAIN_SAMPLES``: from 1 up, or else down, while it falls."""
        few = min(GAIN_SAMPLES, len(images))
        best = start = self.distance(features[:few])
        found = 1.0
        for ladder in ([g for g in gains if g > 1], [g for g in reversed(gains) if g < 1]):
            for gain in ladder:
                distance = self.distance(self.embed(images[:few] * gain))
                if distance >= best:
                    break
                best, found = distance, gain
            if best < start:
                break
        return found

    def quality(self, images: Tensor, gains: Sequence[float] = GAINS, fresh: Tensor | None = None) -> Quality:
        """All figures for a contender's images (N, C, H, W), paired with ``target``, before clamping.

        ``fresh`` (M, C, H, W): the contender's images for more noises, of which unpaired figures are too.
        """
        features = self.embed(images)
        fd = self.distance(features)
        gain = self._best_gain(images, features, sorted(gains))
        own, theirs = spread(features, self.conditions), self._spread
        seen, wanted = images.clamp(-1, 1), self.target.clamp(-1, 1)
        return Quality(
            fd_teacher=fd,
            fd_teacher_gain=fd if gain == 1.0 else min(fd, self.distance(self.embed(images * gain))),
            gain=gain,
            fd_teacher_std=self.distance(self.embed(std_match(images, self.target))),
            fd_real=None if self.real is None else frechet_distance_to(features, self.real),
            kd_teacher=kernel_distance(features, self.reference),
            mse=float(((seen - wanted) ** 2).mean()),
            spread=own / max(theirs, 1e-12) if own is not None and theirs is not None else None,
            **self.unpaired(features if fresh is None else torch.cat([features, self.embed(fresh)])),
            **self.seen(images),
        )
