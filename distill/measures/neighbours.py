"""How well two sets of images cover each other: shares inside nearest-neighbour balls, and variety in a condition.

All of it is of features (N, D). Two sets should be of other noises: paired outputs lie in each other's balls whatever
they look like, so that precision and recall of them are 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Neighbours", "neighbours", "spread"]

IMPROVED = 3  # neighbours that make the balls of precision and recall (Kynkaanniemi et al. 2019)
RELIABLE = 5  # those of density and coverage (Naeem et al. 2020, section 3.2)


@dataclass(frozen=True)
class Neighbours:
    """Shares of two sets that lie in each other's balls, each in [0, 1]; ``density`` may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(features: Tensor, reference: Tensor) -> Neighbours:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 2), density and coverage (Naeem et al. 2020, eq. 3 and 4).

    Args:
        features: of the images that are judged, (N, D).
        reference: of the teacher's, (M, D).
    """
    own, theirs = _radii(features), _radii(reference)
    between = torch.cdist(features, reference)
    inside = between <= theirs[RELIABLE][None]
    return Neighbours(
        precision=float((between <= theirs[IMPROVED][None]).any(1).float().mean()),
        recall=float((between <= own[IMPROVED][:, None]).any(0).float().mean()),
        density=float(inside.float().sum(1).mean() / RELIABLE),
        coverage=float(inside.any(0).float().mean()),
    )


def _radii(points: Tensor) -> dict[int, Tensor]:
    """The distance from each point to its k-th neighbour, for both k."""
    most = min(max(IMPROVED, RELIABLE) + 1, len(points))
    nearest = torch.cdist(points, points).topk(most, dim=1, largest=False).values
    return {k: nearest[:, min(k, most - 1)] for k in (IMPROVED, RELIABLE)}


def spread(features: Tensor, conditions: Tensor | None) -> float | None:
    """The mean distance between two images of one condition, averaged over conditions; None: none has two images.

    Args:
        features: (N, D).
        conditions: (N,) classes or places among prompts; None: all images are of one.
    """
    places = torch.zeros(len(features), dtype=torch.long) if conditions is None else conditions.cpu()
    found = []
    for place in places.unique():
        group = features[(places == place).to(features.device)]
        if len(group) > 1:
            found.append(torch.pdist(group).mean())
    return float(torch.stack(found).mean()) if found else None
