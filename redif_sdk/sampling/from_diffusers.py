"""Reads diffusers' scheduler configurations as step tables, without diffusers.

There is one reader for each scheduler class. It follows that class's rule for times and next noise levels, so that the
table samples as the scheduler does. A sampler that uses several network outputs in one update is not a step table and
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel
from redif_sdk.sampling import samplers
from redif_sdk.sampling.coefficients import to_float32, update_rows
from redif_sdk.sampling.noise_schedule import (
    NoiseSchedule,
    Preconditioning,
    falling_times,
    inference_times,
    karras_sigmas,
    times_like,
    whole_number,
)
from redif_sdk.sampling.samplers import TableFields
from redif_sdk.sampling.scheduler_keys import HARMLESS, READ, check_keys

__all__ = ["read_preconditioning", "read_scheduler"]

Floats = NDArray[np.float64]

# diffusers' stand-in for alphas_cumprod = 0 in samplers that divide by alpha
_NEARLY_NO_SIGNAL = 2.0**-24
_CONSISTENCY_SIGMA_DATA = 0.5


class _Wanted(NamedTuple):
    """A scheduler's class and configuration, and the wanted steps: their number or their times."""

    name: str
    config: Mapping[str, Any]
    num_inference_steps: int | None
    timesteps: Sequence[Any] | None
    eta: float

    @property
    def prediction_type(self) -> str:
        kind = self.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise UnsupportedModel(
                f"{self.name} has prediction_type {kind!r}; use one with epsilon, sample or v_prediction"
            )
        return str(kind)

    def refuse(self, *keys: str) -> None:
        """Raise UnsupportedModel if any of these options is switched on."""
        for key in keys:
            if self.config.get(key):
                raise UnsupportedModel(
                    f"{self.name} has {key}={self.config[key]!r}, which is not supported; switch it off"
                )


def read_scheduler(
    scheduler: Any,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[Any] | None = None,
    eta: float = 0.0,
) -> TableFields:
    """The fields of a diffusers scheduler's step table, with the scheduler's own times and next noise levels.

    Supported:

    - DDIMScheduler; DDPMScheduler and PNDMScheduler in their DDIM reading (DDPM's own noise is ``eta=1``)
    - LCMScheduler, its boundary scaling included; TCDScheduler with its ``eta`` of 0
    - DPMSolverMultistepScheduler of order 1
    - EulerDiscreteScheduler, with Karras' noise levels if it has them; EulerAncestralDiscreteScheduler
    - FlowMatchEulerDiscreteScheduler
    - EDMEulerScheduler, with Karras' noise levels

    ``clip_sample`` and ``thresholding`` are not affine and are ignored: a table describes the unclipped sampler.

    Args:
        scheduler: A scheduler object, or its ``scheduler_config.json`` read into a dict.
        num_inference_steps: Steps at the scheduler's own times. Give either this or ``timesteps``.
        timesteps: Custom times: falling integers for the discrete schedulers (each step ends at the next time),
            sigma * num_train_timesteps *after* any shift for the flow scheduler.
        eta: The sampler's noise in [0, 1], for schedulers that leave it open.

    Raises:
        UnsupportedModel: Another scheduler, an unsupported option, or an unknown key.
        InvalidRequest: Times or a number of steps that the scheduler does not have.
    """
    name, config = _name_and_config(scheduler)
    reader = _READERS.get(name)
    if reader is None:
        raise UnsupportedModel(f"scheduler {name} cannot be read as a step table; use one of {', '.join(_READERS)}")
    if (num_inference_steps is None) == (timesteps is None):
        raise InvalidRequest(f"{name} needs either num_inference_steps or timesteps; give exactly one")
    check_keys(name, config)
    own = {key: value for key, value in config.items() if key in READ[name] or key in HARMLESS[name]}
    try:
        return reader(_Wanted(name, own, num_inference_steps, timesteps, eta))
    except RedifError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a value of the wrong kind
        raise UnsupportedModel(
            f"the configuration of {name} cannot be read: {error!s:.200}; check its values"
        ) from error


def _name_and_config(scheduler: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(scheduler, Mapping):
        return str(scheduler.get("_class_name")), scheduler
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise InvalidRequest(f"{name} is not a scheduler; give a diffusers scheduler or its configuration as a dict")
    return name, config


def _read_ddim(wanted: _Wanted) -> TableFields:
    config = wanted.config
    return samplers.ddim(
        NoiseSchedule.from_config({**config, "_class_name": wanted.name}),
        num_inference_steps=wanted.num_inference_steps,
        timesteps=wanted.timesteps,
        prediction_type=wanted.prediction_type,
        eta=wanted.eta,
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        # PNDM's default differs from DDIM's
        set_alpha_to_one=config.get("set_alpha_to_one", wanted.name != "PNDMScheduler"),
    )


def _read_ddpm(wanted: _Wanted) -> TableFields:
    config = wanted.config
    schedule = NoiseSchedule.from_config(config)
    times = wanted.timesteps
    if times is None:
        times = _grid(wanted, schedule, "leading").tolist()
    # DDPM's previous time is the next step's, and the last step ends at the clean image
    fields = samplers.ddim(schedule, timesteps=times, prediction_type=wanted.prediction_type, eta=wanted.eta)
    variance = config.get("variance_type", "fixed_small")
    if wanted.eta != 1.0 or variance in ("fixed_small", "fixed_small_log"):
        return fields
    if variance != "fixed_large":
        raise UnsupportedModel(f"{wanted.name} has variance_type={variance!r}; use fixed_small or fixed_large")
    rows, at = fields.rows.copy(), falling_times(times, len(schedule))
    signal = schedule.alphas[at] ** 2
    betas = 1.0 - signal / np.append(signal[1:], 1.0)
    rows[:, 5] = to_float32(np.where(at > 0, np.sqrt(betas), 0.0))
    return fields._replace(rows=rows)


def _read_lcm(wanted: _Wanted) -> TableFields:
    config = wanted.config
    if wanted.eta != 0.0:
        raise InvalidRequest(f"eta is {wanted.eta}, but {wanted.name} prescribes its own noise; leave eta at 0")
    schedule = NoiseSchedule.from_config({**config, "_class_name": wanted.name})
    if wanted.timesteps is None:
        times = _consistency_times(wanted, len(schedule))
    else:
        times = falling_times(wanted.timesteps, len(schedule))
    next_sigmas = np.append(schedule.sigmas[times[1:]], 0.0)
    rows = update_rows(
        t=times,
        alphas=schedule.alphas[times],
        sigmas=schedule.sigmas[times],
        next_alphas=np.append(schedule.alphas[times[1:]], 1.0),
        next_sigmas=next_sigmas,
        noise=next_sigmas,
        prediction_type=wanted.prediction_type,
    )
    # The estimate that goes on is c_skip x + c_out x0 (Eq. 9 of the LCM paper). As s = 0, r needs no correction.
    scaled = times * float(config.get("timestep_scaling", 10.0))
    total = scaled**2 + _CONSISTENCY_SIGMA_DATA**2
    c_skip, c_out = _CONSISTENCY_SIGMA_DATA**2 / total, scaled / np.sqrt(total)
    rows[:, 1] = c_skip + c_out * rows[:, 1]
    rows[:, 2] = c_out * rows[:, 2]
    return TableFields(to_float32(rows), wanted.prediction_type, "consistency")


def _read_tcd(wanted: _Wanted) -> TableFields:
    if wanted.eta != 0.0:
        raise InvalidRequest(f"eta is {wanted.eta}, but {wanted.name} has a step table at eta = 0 alone")
    schedule = NoiseSchedule.from_config({**wanted.config, "_class_name": wanted.name})
    if wanted.timesteps is None:
        times = _consistency_times(wanted, len(schedule))
    else:
        times = falling_times(wanted.timesteps, len(schedule))
    after = np.append(times[1:], 0)  # the last step ends at the schedule's first level
    return samplers.table_fields(
        t=times,
        alphas=schedule.alphas[times],
        sigmas=schedule.sigmas[times],
        next_alphas=schedule.alphas[after],
        next_sigmas=schedule.sigmas[after],
        prediction_type=wanted.prediction_type,
        sampler="ddim",
    )


def _consistency_times(wanted: _Wanted, total: int) -> NDArray[np.int64]:
    """K of the times that the consistency model was distilled at, evenly spaced by index."""
    steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
    original = whole_number("original_inference_steps", wanted.config.get("original_inference_steps", 50), minimum=1)
    if steps > original or original > total:
        raise InvalidRequest(
            f"num_inference_steps is {steps}, but {wanted.name} was distilled at {original} of {total} times; "
            "ask for at most that many"
        )
    distilled = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    return distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]


def _read_dpm_solver(wanted: _Wanted) -> TableFields:
    config = wanted.config
    order, algorithm = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    if order != 1:
        raise UnsupportedModel(
            f"{wanted.name} has solver_order={order}: its update uses several network outputs and is no step table; "
            "set solver_order=1, or use DDIMScheduler"
        )
    if algorithm not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"):
        raise UnsupportedModel(f"{wanted.name} has algorithm_type={algorithm!r}; use dpmsolver++ or sde-dpmsolver++")
    wanted.refuse("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    wanted.refuse("variance_type")
    schedule = _schedule_with_signal(config)
    times = wanted.timesteps
    if times is None:
        times = _dpm_solver_times(wanted, schedule).tolist()
    return samplers.ddim(
        schedule,
        timesteps=times,
        prediction_type=wanted.prediction_type,
        eta=1.0 if algorithm == "sde-dpmsolver++" else wanted.eta,
        set_alpha_to_one=config.get("final_sigmas_type", "zero") == "zero",
    )


def _dpm_solver_times(wanted: _Wanted, schedule: NoiseSchedule) -> NDArray[np.int64]:
    """DPMSolverMultistepScheduler's grids: K + 1 times less the last, below a highest one that may be clipped."""
    config, total = wanted.config, len(schedule)
    steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
    if steps > total:
        raise InvalidRequest(f"num_inference_steps is {steps}, but the schedule has {total} steps; ask for fewer")
    with np.errstate(divide="ignore"):  # no signal, or no noise: an infinite ratio, which sorts as it should
        log_ratio = np.log(schedule.alphas) - np.log(schedule.sigmas)
    highest = total - int(np.searchsorted(log_ratio[::-1], config.get("lambda_min_clipped", -np.inf)))
    spacing = config.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        return np.linspace(0, highest - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        grid = (np.arange(0, steps + 1) * (highest // (steps + 1)))[::-1][:-1]
        return np.asarray(grid + config.get("steps_offset", 0), dtype=np.int64)
    if spacing == "trailing":
        # a highest time that is clipped makes diffusers' grid shorter than K: kept, as it is the scheduler's own
        return np.arange(highest, 0, -(total / steps)).round()[:steps].astype(np.int64) - 1
    raise InvalidRequest(f"timestep spacing {spacing!r} is unknown; use trailing, leading or linspace")


def _read_euler(wanted: _Wanted) -> TableFields:
    config = wanted.config
    wanted.refuse("use_exponential_sigmas", "use_beta_sigmas")
    if config.get("interpolation_type", "linear") != "linear":
        raise UnsupportedModel(f"{wanted.name} has interpolation_type={config['interpolation_type']!r}; use linear")
    schedule = _schedule_with_signal(config)
    # float32, as the scheduler has them: the times that it finds for Karras' levels hang on their last bits
    with np.errstate(divide="ignore"):  # no signal is an infinite level, refused where a step visits it
        levels = to_float32(schedule.sigmas / schedule.alphas)
    times = _euler_times(wanted, schedule)
    sigmas = np.interp(times, np.arange(len(schedule)), levels)
    if config.get("use_karras_sigmas"):
        if wanted.timesteps is not None:
            raise InvalidRequest(
                f"{wanted.name} has Karras noise levels and takes no timesteps; give a number of steps"
            )
        low, high = config.get("sigma_min"), config.get("sigma_max")
        sigmas = karras_sigmas(
            len(times), sigma_min=sigmas[-1] if low is None else low, sigma_max=sigmas[0] if high is None else high
        )
        times = _times_of_levels(sigmas, np.log(levels))
    if config.get("timestep_type") == "continuous" and wanted.prediction_type == "v_prediction":
        times = 0.25 * np.log(sigmas)
    spacing = config.get("timestep_spacing", "linspace")
    return samplers.euler(
        sigmas,
        timesteps=times,
        prediction_type=wanted.prediction_type,
        eta=wanted.eta,
        final_sigma=float(levels[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0,
        # on these grids the start is sqrt(sigma_max^2 + 1) times noise, which the network takes as plain noise
        init_scale=None if spacing in ("linspace", "trailing") else 1.0,
    )


def _euler_times(wanted: _Wanted, schedule: NoiseSchedule) -> Floats:
    """EulerDiscreteScheduler's times, float64 (K,), not all of them whole."""
    last = len(schedule) - 1
    if wanted.timesteps is not None:
        times = np.array(wanted.timesteps, dtype=np.float64)
        if times.ndim != 1 or times.size == 0 or not np.all((times >= 0.0) & (times <= last)):
            raise InvalidRequest(f"timesteps are {wanted.timesteps!r:.200}; give falling numbers from {last} to 0")
        return times
    if wanted.config.get("timestep_spacing", "linspace") == "linspace":
        steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
        return np.linspace(0, last, steps, dtype=np.float32)[::-1].astype(np.float64)
    return _grid(wanted, schedule, "linspace").astype(np.float64)


def _read_euler_ancestral(wanted: _Wanted) -> TableFields:
    """The noise of eta = 1 is the ancestral sampler's."""
    return _read_euler(wanted._replace(eta=1.0))


def _times_of_levels(sigmas: Floats, log_levels: NDArray[np.float32]) -> Floats:
    """The times of these noise levels, by interpolating between the schedule's log levels."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_levels, wanted, side="right") - 1, 0, len(log_levels) - 2)
    weight = (log_levels[low] - wanted) / (log_levels[low] - log_levels[low + 1])
    return times_like(low + np.clip(weight, 0.0, 1.0), sigmas)


def _read_flow(wanted: _Wanted) -> TableFields:
    config = wanted.config
    if config.get("use_dynamic_shifting"):
        raise UnsupportedModel(
            f"{wanted.name} has use_dynamic_shifting, so its shift depends on the image size; "
            "use StepTable.flow_euler with shift=exp(mu)"
        )
    wanted.refuse("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    total = whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000), minimum=1)
    shift, eta = float(config.get("shift", 1.0)), 1.0 if config.get("stochastic_sampling") else wanted.eta
    if wanted.timesteps is not None:
        sigmas = np.array(wanted.timesteps, dtype=np.float64) / total
        return samplers.flow_euler(sigmas=sigmas.tolist(), time_scale=total, eta=eta)
    steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
    # the scheduler's grid ends at its shifted smallest sigma, and is then shifted again
    smallest = shift / total / (1.0 + (shift - 1.0) / total)
    return samplers.flow_euler(
        sigmas=np.linspace(1.0, smallest, steps).tolist(), shift=shift, time_scale=total, eta=eta
    )


def read_preconditioning(config: Mapping[str, Any]) -> Preconditioning:
    """EDM's preconditioning from a diffusers scheduler's configuration, with diffusers' defaults for missing keys.

    Raises:
        UnsupportedModel: Other noise levels than Karras' down to 0, or another prediction type.
    """
    kind, name = config.get("prediction_type", "epsilon"), config.get("_class_name", "an EDM scheduler")
    if config.get("sigma_schedule", "karras") != "karras" or config.get("final_sigmas_type", "zero") != "zero":
        raise UnsupportedModel(f"{name} has other noise levels than Karras' down to 0; set sigma_schedule to karras")
    if kind not in ("epsilon", "v_prediction"):
        raise UnsupportedModel(f"{name} has prediction_type {kind!r}; use one with epsilon or v_prediction")
    return Preconditioning(
        sigma_min=float(config.get("sigma_min", 0.002)),
        sigma_max=float(config.get("sigma_max", 80.0)),
        sigma_data=float(config.get("sigma_data", 0.5)),
        rho=float(config.get("rho", 7.0)),
        v_prediction=kind == "v_prediction",
    )


def _read_edm(wanted: _Wanted) -> TableFields:
    if wanted.timesteps is not None:
        raise InvalidRequest(f"{wanted.name} has Karras noise levels and takes no timesteps; give a number of steps")
    steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
    return samplers.edm_euler(read_preconditioning({"_class_name": wanted.name, **wanted.config}), steps, wanted.eta)


def _grid(wanted: _Wanted, schedule: NoiseSchedule, default_spacing: str) -> NDArray[np.int64]:
    """The DDIM grid by the configuration's spacing and offset."""
    steps = whole_number("num_inference_steps", wanted.num_inference_steps, minimum=1)
    spacing = wanted.config.get("timestep_spacing", default_spacing)
    return inference_times(len(schedule), steps, spacing, wanted.config.get("steps_offset", 0))


def _schedule_with_signal(config: Mapping[str, Any]) -> NoiseSchedule:
    """The configuration's schedule; where it ends without signal, with the small one that diffusers puts there."""
    schedule = NoiseSchedule.from_config(config)
    if not config.get("rescale_betas_zero_snr"):
        return schedule
    return NoiseSchedule.from_alphas_cumprod(np.append(schedule.alphas[:-1] ** 2, _NEARLY_NO_SIGNAL))


_READERS: dict[str, Callable[[_Wanted], TableFields]] = {
    "DDIMScheduler": _read_ddim,
    "DDIMParallelScheduler": _read_ddim,
    "DDPMScheduler": _read_ddpm,
    "DDPMParallelScheduler": _read_ddpm,
    "PNDMScheduler": _read_ddim,
    "LCMScheduler": _read_lcm,
    "TCDScheduler": _read_tcd,
    "DPMSolverMultistepScheduler": _read_dpm_solver,
    "EulerDiscreteScheduler": _read_euler,
    "EulerAncestralDiscreteScheduler": _read_euler_ancestral,
    "FlowMatchEulerDiscreteScheduler": _read_flow,
    "EDMEulerScheduler": _read_edm,
}
