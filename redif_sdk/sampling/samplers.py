"""Samplers as rows of coefficients: DDIM, consistency, Euler for flows and for noise levels, and EDM.

Each function takes its sampler's times or noise levels and returns the fields of a step table. What the arguments mean
and what is an error stands at the method of :class:`redif_sdk.sampling.table.StepTable` that has the same name; the
equations stand in :mod:`redif_sdk.sampling.coefficients`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.coefficients import ancestral_noise, checked_eta, to_float32, update_rows
from redif_sdk.sampling.noise_schedule import (
    NoiseSchedule,
    Preconditioning,
    falling_sigmas,
    falling_times,
    inference_times,
    times_like,
    whole_number,
)

__all__ = ["TableFields", "consistency", "ddim", "edm", "edm_euler", "euler", "flow_euler", "table_fields"]

Floats = NDArray[np.float64]


class TableFields(NamedTuple):
    """The fields of a step table, in its constructor's order; ``rows`` is float32 (K, 6)."""

    rows: NDArray[np.float32]
    prediction_type: str
    sampler: str = "custom"
    init_scale: float = 1.0


def table_fields(
    *,
    t: ArrayLike,
    alphas: ArrayLike,
    sigmas: ArrayLike,
    next_alphas: ArrayLike,
    next_sigmas: ArrayLike,
    noise: ArrayLike = 0.0,
    prediction_type: str,
    init_scale: float = 1.0,
    sampler: str = "custom",
    c_skip: ArrayLike | None = None,
    c_out: ArrayLike | None = None,
    c_in: ArrayLike | None = None,
) -> TableFields:
    """The fields of :meth:`StepTable.build`."""
    rows = update_rows(
        t=t,
        alphas=alphas,
        sigmas=sigmas,
        next_alphas=next_alphas,
        next_sigmas=next_sigmas,
        noise=noise,
        prediction_type=prediction_type,
        preconditioning=(c_skip, c_out, c_in),
    )
    return TableFields(to_float32(rows), prediction_type, sampler, init_scale)


def ddim(
    schedule: NoiseSchedule,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    prediction_type: str,
    eta: float = 0.0,
    spacing: str = "trailing",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> TableFields:
    """The fields of :meth:`StepTable.ddim`."""
    total = len(schedule)
    if num_inference_steps is not None and timesteps is None:
        times = inference_times(total, num_inference_steps, spacing, steps_offset)
        previous = times - total // int(num_inference_steps)
    elif timesteps is not None and num_inference_steps is None:
        times = falling_times(timesteps, total)
        previous = np.append(times[1:], -1)
    else:
        raise InvalidRequest("a DDIM table needs either num_inference_steps or timesteps; give exactly one")
    last_alpha, last_sigma = (1.0, 0.0) if set_alpha_to_one else (schedule.alphas[0], schedule.sigmas[0])
    alphas, sigmas = schedule.alphas[times], schedule.sigmas[times]
    next_alphas = np.where(previous >= 0, schedule.alphas[previous], last_alpha)
    next_sigmas = np.where(previous >= 0, schedule.sigmas[previous], last_sigma)
    return table_fields(
        t=times,
        alphas=alphas,
        sigmas=sigmas,
        next_alphas=next_alphas,
        next_sigmas=next_sigmas,
        noise=ancestral_noise(alphas, sigmas, next_alphas, next_sigmas, eta),
        prediction_type=prediction_type,
        sampler="ddim",
    )


def consistency(schedule: NoiseSchedule, timesteps: Sequence[int], *, prediction_type: str) -> TableFields:
    """The fields of :meth:`StepTable.consistency`."""
    times = falling_times(timesteps, len(schedule))
    next_sigmas = np.append(schedule.sigmas[times[1:]], 0.0)
    return table_fields(
        t=times,
        alphas=schedule.alphas[times],
        sigmas=schedule.sigmas[times],
        next_alphas=np.append(schedule.alphas[times[1:]], 1.0),
        next_sigmas=next_sigmas,
        noise=next_sigmas,
        prediction_type=prediction_type,
        sampler="consistency",
    )


def flow_euler(
    *,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    shift: float = 1.0,
    time_scale: float = 1000.0,
    eta: float = 0.0,
) -> TableFields:
    """The fields of :meth:`StepTable.flow_euler`."""
    if (num_inference_steps is None) == (sigmas is None):
        raise InvalidRequest("a flow table needs either num_inference_steps or sigmas; give exactly one")
    if sigmas is None:
        steps = whole_number("num_inference_steps", num_inference_steps, minimum=1)
        levels = np.linspace(1.0, 1.0 / steps, steps)
    else:
        levels = falling_sigmas(sigmas)
    if levels[0] > 1.0 + 1e-6 or not shift > 0.0:
        raise InvalidRequest(f"a flow table needs sigmas of at most 1 and shift > 0, not {levels[0]} and {shift}")
    levels = np.minimum(levels, 1.0)  # float32 times over their scale may round to above 1
    levels = shift * levels / (1.0 + (shift - 1.0) * levels)
    next_levels = np.append(levels[1:], 0.0)
    return table_fields(
        t=levels * time_scale,
        alphas=1.0 - levels,
        sigmas=levels,
        next_alphas=1.0 - next_levels,
        next_sigmas=next_levels,
        noise=next_levels * math.sin(checked_eta(eta) * math.pi / 2),
        prediction_type="flow",
        sampler="flow-euler",
    )


def euler(
    sigmas: Sequence[float] | Floats,
    *,
    prediction_type: str,
    timesteps: Sequence[float] | Floats,
    eta: float = 0.0,
    final_sigma: float = 0.0,
    init_scale: float | None = None,
) -> TableFields:
    """The fields of :meth:`StepTable.euler`."""
    levels = falling_sigmas(sigmas)
    if not 0.0 <= final_sigma < math.inf:
        raise InvalidRequest(f"final_sigma is {final_sigma}; give 0, or the noise level to end at")
    c_in = 1.0 / np.sqrt(levels**2 + 1.0)
    alphas, scaled = c_in, c_in * levels
    next_alphas = np.append(alphas[1:], 1.0)
    next_sigmas = np.append(scaled[1:], final_sigma)
    return table_fields(
        t=times_like(timesteps, levels),
        alphas=alphas,
        sigmas=scaled,
        next_alphas=next_alphas,
        next_sigmas=next_sigmas,
        noise=ancestral_noise(alphas, scaled, next_alphas, next_sigmas, eta),
        prediction_type=prediction_type,
        sampler="euler",
        init_scale=float(scaled[0]) if init_scale is None else init_scale,
    )


def edm(
    sigmas: Sequence[float] | Floats,
    *,
    sigma_data: float = 0.5,
    eta: float = 0.0,
    v_prediction: bool = False,
    init_scale: float | None = None,
) -> TableFields:
    """The fields of :meth:`StepTable.edm`."""
    levels = falling_sigmas(sigmas)
    if not sigma_data > 0.0:
        raise InvalidRequest(f"sigma_data is {sigma_data}; give the positive standard deviation of the data")
    total = levels**2 + sigma_data**2
    c_in = 1.0 / np.sqrt(total)
    alphas, scaled = c_in, c_in * levels
    next_alphas, next_sigmas = np.append(alphas[1:], 1.0), np.append(scaled[1:], 0.0)
    return table_fields(
        t=np.log(levels) / 4.0,
        alphas=alphas,
        sigmas=scaled,
        next_alphas=next_alphas,
        next_sigmas=next_sigmas,
        noise=ancestral_noise(alphas, scaled, next_alphas, next_sigmas, eta),
        prediction_type="edm",
        sampler="edm",
        init_scale=float(scaled[0]) if init_scale is None else init_scale,
        c_skip=sigma_data**2 / total,
        c_out=(-1.0 if v_prediction else 1.0) * levels * sigma_data / np.sqrt(total),
        c_in=c_in,
    )


def edm_euler(preconditioning: Preconditioning, num_inference_steps: int, eta: float = 0.0) -> TableFields:
    """The fields of :meth:`StepTable.edm_euler`."""
    largest, data = preconditioning.sigma_max, preconditioning.sigma_data
    start = np.sqrt(largest**2 + 1.0) / np.sqrt(largest**2 + data**2)
    return edm(
        preconditioning.levels(num_inference_steps),
        sigma_data=preconditioning.sigma_data,
        eta=eta,
        v_prediction=preconditioning.v_prediction,
        init_scale=float(start),
    )
