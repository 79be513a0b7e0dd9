"""Noise levels and times, from which step tables are built.

The discrete noise schedules of diffusion models (:class:`NoiseSchedule`), the grids of times that samplers visit, and
Karras' noise levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel

__all__ = [
    "NoiseSchedule",
    "Preconditioning",
    "falling_sigmas",
    "falling_times",
    "inference_times",
    "karras_sigmas",
    "times_like",
    "whole_number",
]

Floats = NDArray[np.float64]

# beta_start, beta_end and beta_schedule that diffusers assumes where a configuration is silent
_BETA_DEFAULTS: dict[str, tuple[float, float, str]] = {
    "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
    "TCDScheduler": (0.00085, 0.012, "scaled_linear"),
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2DiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
}
_GENERAL_BETA_DEFAULTS = (0.0001, 0.02, "linear")


@dataclass(frozen=True)
class Preconditioning:
    """EDM's noise levels and preconditioning (Karras et al. 2022, table 1).

    ``v_prediction``: c_out has the other sign, as in diffusers' schedulers.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    v_prediction: bool = False

    def levels(self, num_inference_steps: int) -> NDArray[np.float64]:
        """The K falling noise levels of EDM's own grid."""
        return karras_sigmas(num_inference_steps, self.sigma_min, self.sigma_max, self.rho)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule: x_t = alphas[t] x0 + sigmas[t] noise.

    ``alphas`` and ``sigmas`` are float64 arrays of shape (T,), read-only: sqrt(alphas_cumprod) and
    sqrt(1 - alphas_cumprod), with ``flow`` the levels of :meth:`linear_flow`, with ``edm`` those of :meth:`of_edm`.
    Raises InvalidRequest where they are not finite, or alpha^2 + sigma^2 (with ``flow`` alpha + sigma) is not 1.
    """

    alphas: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    flow: bool = False
    edm: Preconditioning | None = None

    def __post_init__(self) -> None:
        for name in ("alphas", "sigmas"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.alphas.ndim != 1 or self.alphas.shape != self.sigmas.shape or self.alphas.size == 0:
            raise InvalidRequest(
                f"a noise schedule has {self.alphas.shape} alphas and {self.sigmas.shape} sigmas; "
                "give one of each per training step"
            )
        # `not (... <=)` rather than `>`, so that NaN is refused too
        if self.flow:
            if not np.all(np.abs(self.alphas + self.sigmas - 1.0) <= 1e-5):
                raise InvalidRequest("a flow's noise schedule has steps with alpha + sigma != 1")
            return
        if self.edm is not None:
            return  # its levels are of the scaled input: c_in and c_in sigma
        if not np.all(np.abs(self.alphas**2 + self.sigmas**2 - 1.0) <= 1e-5):
            raise InvalidRequest(
                "a noise schedule has steps with alpha^2 + sigma^2 != 1; it must preserve the variance"
            )

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike) -> NoiseSchedule:
        """The schedule with these cumulated signal variances, shape (T,), each in [0, 1]."""
        signal = np.asarray(alphas_cumprod, dtype=np.float64)
        if not np.all((signal >= 0.0) & (signal <= 1.0)):
            raise InvalidRequest("alphas_cumprod has values outside [0, 1]; give cumulated products of 1 - beta")
        return cls(alphas=np.sqrt(signal), sigmas=np.sqrt(1.0 - signal))

    @classmethod
    def linear_flow(cls, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Flow matching's levels: sigma = t / T for t = 0 ... T, which is what the network is fed (SD3's scale).

        A scheduler's ``shift`` is no part of it: that says which of the levels are visited.
        """
        sigmas = np.arange(num_train_timesteps + 1) / num_train_timesteps
        return cls(alphas=1.0 - sigmas, sigmas=sigmas, flow=True)

    @classmethod
    def of_edm(cls, preconditioning: Preconditioning, levels: int = 1000) -> NoiseSchedule:
        """EDM's levels, rising, in the coordinates that the network takes: alpha = c_in and sigma = c_in sigma_VE.

        The network is fed ln(sigma_VE) / 4 as time, which is no index of the schedule.
        """
        noise = preconditioning.levels(levels)[::-1]
        c_in = 1.0 / np.sqrt(noise**2 + preconditioning.sigma_data**2)
        return cls(alphas=c_in, sigmas=c_in * noise, edm=preconditioning)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler configuration describes.

        Reads ``num_train_timesteps``, ``trained_betas``, ``beta_schedule`` (linear, scaled_linear, squaredcos_cap_v2,
        sigmoid), ``beta_start``, ``beta_end`` and ``rescale_betas_zero_snr``; a key that is missing has diffusers'
        default. Raises UnsupportedModel for any other ``beta_schedule``, InvalidRequest for values that are no betas.
        """
        # float32 with a float64 accumulator, as in torch: near t = 0, sigma^2 = 1 - alphas_cumprod is a difference of
        # nearly equal numbers, where the last bit of alphas_cumprod is up to 1e-3 of sigma.
        try:
            betas = _betas(config)
        except RedifError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # null, text, a list
            raise InvalidRequest(
                f"the scheduler's betas cannot be read ({error}); check beta_start, beta_end, trained_betas and "
                f"num_train_timesteps"
            ) from error
        if not np.all((betas >= 0.0) & (betas <= 1.0)):
            raise InvalidRequest(
                "the scheduler's betas are not all in [0, 1]; check beta_start, beta_end, trained_betas"
            )
        if config.get("rescale_betas_zero_snr"):
            betas = _zero_terminal_snr(betas)
        return cls.from_alphas_cumprod(_cumulated(np.float32(1.0) - betas))

    def __len__(self) -> int:
        return len(self.alphas)


def karras_sigmas(
    num_inference_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> NDArray[np.float64]:
    """Karras' K noise levels from ``sigma_max`` down to ``sigma_min``, without the final 0 (Eq. 5 of EDM)."""
    steps = whole_number("num_inference_steps", num_inference_steps, minimum=1)
    if not 0.0 < sigma_min <= sigma_max < math.inf or not rho > 0.0:
        raise InvalidRequest(
            f"Karras noise levels need 0 < sigma_min <= sigma_max and rho > 0, "
            f"not sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    ramp = np.linspace(0.0, 1.0, steps)
    largest, smallest = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    return np.asarray((largest + ramp * (smallest - largest)) ** rho, dtype=np.float64)


def inference_times(
    num_train_steps: int, num_inference_steps: int, spacing: str, steps_offset: int = 0
) -> NDArray[np.int64]:
    """diffusers' DDIM grid: K falling integer times, int64 (K,), each in [0, num_train_steps).

    ``spacing`` is trailing, leading or linspace; ``steps_offset`` shifts the leading grid. Raises InvalidRequest for
    an unknown spacing, more steps than the schedule has, or an offset that leaves it.
    """
    steps = whole_number("num_inference_steps", num_inference_steps, minimum=1)
    if steps > num_train_steps:
        raise InvalidRequest(
            f"num_inference_steps is {steps}, but the schedule has only {num_train_steps} steps; ask for fewer"
        )
    if spacing == "trailing":
        # diffusers' arange has a (K+1)th element, time -1, where T / (T / K) rounds above K: left out
        times = np.round(np.arange(num_train_steps, 0, -(num_train_steps / steps)))[:steps] - 1
    elif spacing == "leading":
        times = (np.arange(0, steps) * (num_train_steps // steps))[::-1] + steps_offset
    elif spacing == "linspace":
        times = np.linspace(0, num_train_steps - 1, steps).round()[::-1]
    else:
        raise InvalidRequest(f"timestep spacing {spacing!r} is unknown; use trailing, leading or linspace")
    grid = times.astype(np.int64)
    if grid.min() < 0 or grid.max() >= num_train_steps:
        raise InvalidRequest(
            f"steps_offset={steps_offset} moves the times {grid.tolist()} out of the schedule of {num_train_steps} "
            "steps; use a smaller offset or fewer steps"
        )
    return grid


def whole_number(name: str, value: object, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; InvalidRequest, naming ``name``, where it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or int(value) < minimum:
        raise InvalidRequest(f"{name} is {value!r}; give a whole number of at least {minimum}")
    return int(value)


def falling_times(timesteps: Sequence[int], total: int) -> NDArray[np.int64]:
    """Custom times as int64 (K,); InvalidRequest unless they are integers that fall strictly within the schedule."""
    values = [whole_number("a timestep", time, minimum=0) for time in timesteps]
    falling = all(later < earlier for earlier, later in itertools.pairwise(values))
    if not values or not falling or values[0] >= total:
        raise InvalidRequest(f"timesteps are {values!r:.200}; give falling, distinct integers from {total - 1} to 0")
    return np.array(values, dtype=np.int64)


def falling_sigmas(sigmas: Sequence[float] | Floats) -> Floats:
    """Noise levels as float64 (K,); InvalidRequest unless they are positive and fall strictly."""
    levels = np.array(sigmas, dtype=np.float64)
    if levels.ndim != 1 or levels.size == 0 or not np.all(levels > 0.0) or not np.all(np.isfinite(levels)):
        raise InvalidRequest("sigmas must be a list of positive, finite noise levels, without the final 0")
    if np.any(np.diff(levels) >= 0.0):
        raise InvalidRequest(f"sigmas are {levels.tolist()!r:.200}; they must fall from step to step")
    return levels


def times_like(timesteps: Sequence[float] | Floats, levels: Floats) -> Floats:
    """The times that the network is fed, float64 (K,); InvalidRequest unless there is one for each of ``levels``."""
    times = np.array(timesteps, dtype=np.float64)
    if times.shape != levels.shape:
        raise InvalidRequest(f"there are {levels.size} sigmas and {times.size} timesteps; give one time per sigma")
    return times


def _betas(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Betas as diffusers makes them, float32 (T,)."""
    trained: Sequence[float] | None = config.get("trained_betas")
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float32)
        if betas.ndim != 1 or betas.size == 0:
            raise InvalidRequest(f"trained_betas has shape {betas.shape}; give one beta per training step")
        return betas
    defaults = _BETA_DEFAULTS.get(str(config.get("_class_name")), _GENERAL_BETA_DEFAULTS)
    start, end = float(config.get("beta_start", defaults[0])), float(config.get("beta_end", defaults[1]))
    kind = config.get("beta_schedule", defaults[2])
    steps = whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000), minimum=1)
    if kind == "linear":
        return _linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.square(_linspace(start**0.5, end**0.5, steps))
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    if kind == "sigmoid":
        ramp = _linspace(-6.0, 6.0, steps)
        sigmoid = np.float32(1.0) / (np.float32(1.0) + np.exp(-ramp))
        return np.asarray(sigmoid * np.float32(end - start) + np.float32(start), dtype=np.float32)
    raise UnsupportedModel(
        f"beta_schedule {kind!r} is not supported; "
        "use linear, scaled_linear, squaredcos_cap_v2 or sigmoid, or give trained_betas"
    )


def _linspace(start: float, end: float, steps: int) -> NDArray[np.float32]:
    """torch.linspace in float32, to the last bit: from the nearer end, each value rounded once."""
    first, last = np.float32(start), np.float32(end)
    if steps == 1:
        return np.array([first], dtype=np.float32)
    step = np.float64(np.float32((last - first) / np.float32(steps - 1)))
    index = np.arange(steps)
    rising = np.float64(first) + step * index
    falling = np.float64(last) - step * (steps - 1 - index)
    return np.where(index < steps // 2, rising, falling).astype(np.float32)


def _cosine_betas(steps: int) -> NDArray[np.float32]:
    """Nichol and Dhariwal's cosine schedule, capped at .999."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1.0 - signal((i + 1) / steps) / signal(i / steps), 0.999) for i in range(steps)]
    return np.array(betas, dtype=np.float32)


def _cumulated(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas whose last step has no signal left (Algorithm 1 of Lin et al. 2023), in float32 as diffusers does it."""
    root = np.sqrt(_cumulated(np.float32(1.0) - betas))
    first, last = root[0], root[-1]
    if not first > last:
        raise InvalidRequest("rescale_betas_zero_snr needs a schedule whose signal falls; these betas are constant 0")
    root = (root - last) * (first / (first - last))
    signal = np.square(root)
    alphas = np.concatenate([signal[:1], signal[1:] / signal[:-1]])
    return np.asarray(np.float32(1.0) - alphas, dtype=np.float32)
