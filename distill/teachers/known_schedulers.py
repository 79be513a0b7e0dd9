"""The schedulers that teachers may have: their classes by name, what they are made from, and their noise schedules."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

from redif_sdk.errors import RedifError, UnsupportedModel, first_line
from redif_sdk.sampling.from_diffusers import read_preconditioning
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from redif_sdk.sampling.scheduler_keys import check_keys

__all__ = [
    "KNOWN",
    "check_class",
    "errors_of",
    "full_config",
    "make_scheduler",
    "noise_process",
    "usual_steps",
    "with_scheduler",
]

#: The schedulers that a teacher may have, and how its targets are made: by the scheduler itself (its own name), or,
#: since targets need one output for one noise, by the deterministic one that its noise was added to. None: by DDIM.
KNOWN: dict[str, str | None] = {
    "DDIMScheduler": "DDIMScheduler",
    "DDIMParallelScheduler": "DDIMParallelScheduler",
    "DDPMScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDIMScheduler",
    "PNDMScheduler": "PNDMScheduler",
    "LCMScheduler": None,
    "TCDScheduler": "TCDScheduler",
    "DPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler": "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler": "UniPCMultistepScheduler",
    "DEISMultistepScheduler": "DEISMultistepScheduler",
    "EulerDiscreteScheduler": "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "HeunDiscreteScheduler": "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler": "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler": "LMSDiscreteScheduler",
    "EDMEulerScheduler": "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
}
#: What diffusers, numpy and scipy raise where a configuration makes no sense to them.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _known(name: str) -> None:
    if name not in KNOWN:
        raise UnsupportedModel(
            f"scheduler {name or 'without a _class_name'} is not supported; use one of {', '.join(KNOWN)}"
        )


def check_class(name: str) -> None:
    """Raise UnsupportedModel, with the list of known ones, where diffusers has no scheduler of this name."""
    import diffusers

    if not hasattr(diffusers, name):
        _known(name)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Raise UnsupportedModel, naming the scheduler, where diffusers fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # diffusers' use of numpy
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except RedifError:
        raise
    except _FOREIGN as error:
        raise UnsupportedModel(
            f"{name} cannot be used with this configuration: {first_line(error)}; change that option, or use another "
            "scheduler"
        ) from error


def full_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler object's configuration with its class's name.

    Keys of other classes, which ``from_config`` keeps and the scheduler does not read, are left out.
    """
    taken = inspect.signature(type(scheduler).__init__).parameters
    own = {key: value for key, value in scheduler.config.items() if key in taken or key.startswith("_")}
    return {**own, "_class_name": type(scheduler).__name__}


def make_scheduler(config: Mapping[str, Any], name: str | None = None) -> Any:
    """The scheduler that a ``scheduler_config.json`` describes; with ``name``, one of that class instead.

    Raises:
        UnsupportedModel: an unknown class, or a configuration that it does not take.
    """
    import diffusers

    own = str(config.get("_class_name", ""))
    _known(own)
    _known(name or own)
    check_keys(name or own, config)
    kind = getattr(diffusers, name or own)
    with errors_of(name or own):
        given = dict(config)
        if name is not None and name != own:
            given = full_config(make_scheduler(config))  # the former class's defaults, where the file is silent
            if "flow_shift" in given and name.startswith("FlowMatch"):
                given["shift"] = given["flow_shift"]
        taken = set(inspect.signature(kind.__init__).parameters)  # diffusers ignores the keys of other classes too
        return kind(**{key: value for key, value in given.items() if key in taken})


def with_scheduler(pipeline: Any, name: str) -> Any:
    """A copy of a pipeline (its networks are shared) with another scheduler that has the settings of its own."""
    own = pipeline.scheduler
    config = own if isinstance(own, Mapping) else full_config(own)
    other = make_scheduler(config, name)
    if is_dataclass(pipeline) and not isinstance(pipeline, type):
        return replace(pipeline, scheduler=full_config(other))  # a UNetFolder
    changed = copy.copy(pipeline)
    changed.register_modules(scheduler=other)
    return changed


def _is_flow(config: Mapping[str, Any]) -> bool:
    return "FlowMatch" in str(config.get("_class_name")) or bool(config.get("use_flow_sigmas"))


def noise_process(
    scheduler_config: Mapping[str, Any], image_tokens: int | None = None
) -> tuple[NoiseSchedule, str, float]:
    """A scheduler's noise schedule, prediction type and, of a flow, its shift.

    ``image_tokens``: how many the transformer sees, which some flows' shift depends on.

    Raises:
        UnsupportedModel: the scheduler is not among `KNOWN`, or feeds its network no times of a schedule.
    """
    name = str(scheduler_config.get("_class_name", ""))
    _known(name)
    if name.startswith("EDM"):
        return NoiseSchedule.of_edm(read_preconditioning(scheduler_config)), "edm", 1.0
    kind = scheduler_config.get("prediction_type", "epsilon")
    if not _is_flow(scheduler_config):
        if scheduler_config.get("timestep_type", "discrete") != "discrete":
            raise UnsupportedModel(
                f"{name} has timestep_type={scheduler_config['timestep_type']!r}, which is not supported; use discrete"
            )
        if scheduler_config.get("use_dynamic_shifting"):
            raise UnsupportedModel(
                f"{name} has use_dynamic_shifting without flow sigmas, where nothing is shifted and diffusers' own "
                "pipelines fail; set use_dynamic_shifting to false"
            )
        return NoiseSchedule.from_config(scheduler_config), kind, 1.0
    if "FlowMatch" not in name and kind != "flow_prediction":
        raise UnsupportedModel(
            f"{name} has use_flow_sigmas with prediction_type {kind!r}; flow sigmas need flow_prediction"
        )
    check_keys(name, scheduler_config)
    schedule = NoiseSchedule.linear_flow(scheduler_config.get("num_train_timesteps", 1000))
    if not scheduler_config.get("use_dynamic_shifting"):
        return schedule, "flow", _shift(scheduler_config)
    if image_tokens is None:
        raise UnsupportedModel(
            f"{name} shifts its times by the image's size, and this pipeline does not give it the size; "
            "set use_dynamic_shifting to false"
        )
    few, many = (scheduler_config.get(f"{kind}_image_seq_len", n) for kind, n in (("base", 256), ("max", 4096)))
    low, high = (scheduler_config.get(f"{kind}_shift", n) for kind, n in (("base", 0.5), ("max", 1.15)))
    with errors_of(name):
        mu = low + (high - low) * (image_tokens - few) / (many - few)
        exponential = scheduler_config.get("time_shift_type", "exponential") == "exponential"
        return schedule, "flow", math.exp(mu) if exponential else mu


def _shift(config: Mapping[str, Any]) -> float:
    """A flow's shift, of a scheduler that does not shift by the image's size."""
    shift = config.get("flow_shift" if "flow_shift" in config else "shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise UnsupportedModel(f"{config.get('_class_name')} has a shift of {shift!r}; give a number above 0")
    return float(shift)


def usual_steps(scheduler_config: Mapping[str, Any], usual: int) -> int:
    """``usual`` steps, or as many as the scheduler has, where it has fewer."""
    limits = [scheduler_config.get(name) for name in ("num_train_timesteps", "original_inference_steps")]
    return max(1, min([usual, *(limit for limit in limits if isinstance(limit, int))]))
