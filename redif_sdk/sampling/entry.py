"""Entering a step table in its middle, with an image: the noise levels of its rows, and how many of them are run."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.table import StepTable

__all__ = ["from_row", "levels", "steps_of"]

Floats = NDArray[np.float64]


def levels(table: StepTable) -> Floats:
    """(alpha, sigma) of the state that each row starts from, in the coordinates that the network takes: float64 (K, 2).

    They follow from x0 = p x + q f by the prediction type (`redif_sdk.sampling.coefficients`). A network that predicts
    the clean image itself says nothing of them: there each row's follow from those of the row before, alpha' = r +
    s alpha and sigma'^2 = (s sigma)^2 + c^2, and the first row's from alpha^2 + sigma^2 = 1.
    """
    p, q = table.rows[:, 1].astype(np.float64), table.rows[:, 2].astype(np.float64)
    kind = table.prediction_type
    if kind in ("epsilon", "score"):
        alpha = 1 / p
        sigma = -q / p if kind == "epsilon" else np.sqrt(q / p)
    elif kind == "v_prediction":
        alpha, sigma = p / (p**2 + q**2), -q / (p**2 + q**2)
    elif kind == "flow":
        alpha, sigma = 1 + q, -q
    elif kind == "edm":
        data = np.hypot(p, q)  # sigma_data
        raw = data * np.abs(q) / p
        alpha = 1 / np.hypot(raw, data)
        sigma = alpha * raw
    else:
        alpha, sigma = _from_before(table)
    return np.stack([alpha, sigma], axis=-1)


def _from_before(table: StepTable) -> tuple[Floats, Floats]:
    """Levels by the transitions alone."""
    _, _, _, r, s, c = table.rows.astype(np.float64).T
    first = (1 - r[0] ** 2 - s[0] ** 2 - c[0] ** 2) / (2 * r[0] * s[0]) if r[0] * s[0] else 0.0
    alpha = [first if 0 <= first < 1 else 0.0]
    sigma = [math.sqrt(1 - alpha[0] ** 2) if alpha[0] else table.init_scale]
    for k in range(table.num_inference_steps - 1):
        alpha.append(r[k] + s[k] * alpha[k])
        sigma.append(math.hypot(s[k] * sigma[k], c[k]))
    return np.array(alpha), np.array(sigma)


def steps_of(table: StepTable, strength: float | None, usual: float) -> int:
    """How many of a table's last rows image to image runs: floor(strength x K), as diffusers has it.

    Args:
        table: The sampler, of K rows.
        strength: In (0, 1]; 1: all rows.
        usual: The strength that None stands for; at least one row is run then.

    Raises:
        InvalidRequest: No such strength, or one that leaves no step; the message says what can be had.
    """
    rows = table.num_inference_steps
    if strength is None:
        return max(1, math.floor(usual * rows + 1e-9))
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InvalidRequest(f"strength is {strength!r:.30}; give a number above 0, up to 1")
    count = math.floor(strength * rows + 1e-9)
    if count == 0:
        can = ", ".join(f"{k / rows:.3g}" for k in range(1, min(rows, 8) + 1))
        raise InvalidRequest(
            f"strength {strength:g} of {rows} step{'s' * (rows > 1)} leaves no step to run; strengths that differ are "
            f"{can}: give one of these, or more steps"
        )
    return count


def from_row(table: StepTable, row: int) -> StepTable:
    """The table from ``row`` on, for a state that is at that row's level already."""
    return StepTable(table.rows[row:], table.prediction_type, table.sampler, 1.0)
