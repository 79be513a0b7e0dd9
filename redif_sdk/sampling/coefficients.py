"""The equations of the step table: from noise levels to the coefficients of each row.

Float64 arithmetic on arrays of shape (K,): the clean-image estimate by prediction type, the transition to the next
noise level, and the noise that a stochastic sampler adds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.errors import InvalidRequest, UnsupportedModel

__all__ = ["PREDICTION_TYPES", "ancestral_noise", "checked_eta", "to_float32", "update_rows"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "score", "flow", "edm")

Floats = NDArray[np.float64]
Scalings = tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None]


def update_rows(
    *,
    t: ArrayLike,
    alphas: ArrayLike,
    sigmas: ArrayLike,
    next_alphas: ArrayLike,
    next_sigmas: ArrayLike,
    noise: ArrayLike,
    prediction_type: str,
    preconditioning: Scalings = (None, None, None),
) -> Floats:
    """The rows (t, p, q, r, s, c) that go from each (alpha, sigma) to (alpha', sigma') with sampler noise c.

    The equations are::

        x0 = p x + q f                                      by the prediction type
        x' = alpha' x0 + sqrt(sigma'^2 - c^2) eps + c z,    eps = (x - alpha x0) / sigma
        =>  s = sqrt(sigma'^2 - c^2) / sigma,   r = alpha' - s alpha                  # Eq. 12, DDIM

    Args:
        t: The times that the network is fed; like all levels, of shape (K,) or a scalar.
        alphas: alpha of each step's start.
        sigmas: sigma of each step's start.
        next_alphas: alpha' of each step's end.
        next_sigmas: sigma' of each step's end.
        noise: c.
        prediction_type: One of `PREDICTION_TYPES`.
        preconditioning: EDM's (c_skip, c_out, c_in).

    Returns:
        The rows, float64 (K, 6).

    Raises:
        UnsupportedModel: The clean image does not follow from the output (epsilon or score at alpha = 0).
        InvalidRequest: Noise levels that contradict the prediction type, sigma <= 0, or c outside [0, sigma'].
    """
    levels = (np.atleast_1d(np.asarray(a, np.float64)) for a in (t, alphas, sigmas, next_alphas, next_sigmas, noise))
    time, alpha, sigma, next_alpha, next_sigma, c = _aligned(*levels)
    if not np.all(sigma > 0.0):
        raise InvalidRequest("a step starts from sigma = 0: there is no noise left to remove; drop this time")
    # a tolerance for callers whose c was itself rounded to float32
    if not np.all((c >= 0.0) & (c <= next_sigma * (1.0 + 1e-6))):
        raise InvalidRequest("a step's noise c is not in [0, sigma']: it exceeds the noise of the next level")
    p, q = _clean_coefficients(prediction_type, alpha, sigma, preconditioning)
    s = np.sqrt(np.maximum(next_sigma**2 - c**2, 0.0)) / sigma
    return np.stack(_aligned(time, p, q, next_alpha - s * alpha, s, c), axis=-1)


def ancestral_noise(
    alphas: ArrayLike, sigmas: ArrayLike, next_alphas: ArrayLike, next_sigmas: ArrayLike, eta: float
) -> Floats:
    """DDIM's eta (Eq. 16), which is EDM's ancestral step too: c = eta sigma' sqrt(1 - (sigma' alpha / alpha' sigma)^2).

    Written with the noise-to-signal ratios, it holds in any input scaling.
    """
    alpha, sigma, next_alpha, next_sigma = (
        np.asarray(a, dtype=np.float64) for a in (alphas, sigmas, next_alphas, next_sigmas)
    )
    scale = checked_eta(eta)
    if scale == 0.0:
        return np.zeros_like(next_sigma)
    if not np.all((next_alpha > 0.0) & (sigma > 0.0)):
        raise InvalidRequest("a step starts without noise, or ends at a level without signal; eta must be 0 there")
    ratio = (next_sigma * alpha) / (next_alpha * sigma)
    return np.asarray(scale * next_sigma * np.sqrt(np.maximum(1.0 - ratio**2, 0.0)), dtype=np.float64)


def _clean_coefficients(
    prediction_type: str, alpha: Floats, sigma: Floats, preconditioning: Scalings
) -> tuple[Floats, Floats]:
    """(p, q) of x0 = p x + q f, by the prediction type; float64 (K,)."""
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    if prediction_type in ("epsilon", "score"):
        if np.any(alpha == 0.0):
            raise UnsupportedModel(
                f"the schedule has no signal at a visited time (alpha = 0), so a network of prediction type "
                f"{prediction_type} does not give the clean image there; use v_prediction or sample, or start earlier"
            )
        if not np.all(alpha > 0.0):
            raise InvalidRequest("a step has alpha < 0 or NaN; give its signal level, in (0, 1]")
        return 1.0 / alpha, (-sigma if prediction_type == "epsilon" else sigma**2) / alpha
    if prediction_type == "v_prediction":
        if not np.all(np.abs(alpha**2 + sigma**2 - 1.0) <= 1e-5):
            raise InvalidRequest("v_prediction needs alpha^2 + sigma^2 = 1 at every step; use another prediction type")
        return alpha, -sigma
    if prediction_type == "sample":
        return zero, one
    if prediction_type == "flow":
        if not np.all(np.abs(alpha + sigma - 1.0) <= 1e-5):
            raise InvalidRequest("flow needs alpha + sigma = 1 at every step; use another prediction type")
        return one, -sigma
    if prediction_type == "edm":
        c_skip, c_out, c_in = preconditioning
        if c_skip is None or c_out is None or c_in is None:
            raise InvalidRequest("the prediction type edm needs its preconditioning; give c_skip, c_out and c_in")
        return np.asarray(c_skip, np.float64) / np.asarray(c_in, np.float64), np.asarray(c_out, np.float64)
    raise InvalidRequest(f"prediction type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def checked_eta(eta: float) -> float:
    """``eta`` as a float; InvalidRequest unless it lies in [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise InvalidRequest(f"eta is {eta}; it must lie between 0 (deterministic) and 1")
    return float(eta)


def _aligned(*arrays: Floats) -> tuple[Floats, ...]:
    try:
        return np.broadcast_arrays(*arrays)
    except ValueError as error:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise InvalidRequest(f"a table's arrays have the shapes {shapes}; give one value for each step") from error


def to_float32(values: ArrayLike) -> NDArray[np.float32]:
    """``values`` rounded to float32. Values that are too large become infinite, without a warning."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32)
