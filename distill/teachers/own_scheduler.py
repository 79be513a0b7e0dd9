"""A pipeline's own scheduler as the teacher's sampler: its outputs are what the pipeline itself would give.

Deterministic schedulers only, several-step ones included (PNDM, DPM-Solver++(2M), UniPC): a pair is a noise and *the*
output for it. Of any other, the teacher samples by its DDIM or Euler table instead.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.teachers.base import Sampler, Teacher
from redif_sdk.errors import UnsupportedModel
from redif_sdk.sampling.from_diffusers import read_preconditioning
from redif_sdk.sampling.table import NoiseSchedule, StepTable

_log = logging.getLogger(__name__)

DETERMINISTIC = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def noise_process(
    scheduler_config: dict[str, Any], image_tokens: int | None = None
) -> tuple[NoiseSchedule, str, float]:
    """A scheduler's noise schedule, prediction type and, of a flow, its shift.

    ``image_tokens``: how many the transformer sees, which some flows' shift depends on.
    """
    name = str(scheduler_config.get("_class_name", ""))
    if name.startswith("EDM"):
        return NoiseSchedule.of_edm(read_preconditioning(scheduler_config)), "edm", 1.0
    if "FlowMatch" not in name:
        kind = scheduler_config.get("prediction_type", "epsilon")
        return NoiseSchedule.from_config(scheduler_config), kind, 1.0
    schedule = NoiseSchedule.linear_flow(scheduler_config.get("num_train_timesteps", 1000))
    if not scheduler_config.get("use_dynamic_shifting"):
        return schedule, "flow", float(scheduler_config.get("shift", 1.0))
    if image_tokens is None:
        raise UnsupportedModel("the scheduler shifts its times by the image's size; set use_dynamic_shifting to false")
    few, many = (scheduler_config.get(f"{kind}_image_seq_len", n) for kind, n in (("base", 256), ("max", 4096)))
    low, high = (scheduler_config.get(f"{kind}_shift", n) for kind, n in (("base", 0.5), ("max", 1.15)))
    mu = low + (high - low) * (image_tokens - few) / (many - few)
    exponential = scheduler_config.get("time_shift_type", "exponential") == "exponential"
    return schedule, "flow", math.exp(mu) if exponential else mu


def own_sampler(scheduler: Any, *, flux: bool = False, shift: float = 1.0) -> Sampler | None:
    """The sampler that steps with ``scheduler``; None for one that draws noise.

    Args:
        flux: the pipeline asks for K equal noise levels, as Flux' does, not for the scheduler's own.
        shift: of a flow whose scheduler shifts its times by the image's size.
    """
    name, config = type(scheduler).__name__, scheduler.config
    draws_noise = "sde" in str(config.get("algorithm_type", "")) or config.get("stochastic_sampling")
    if name not in DETERMINISTIC or draws_noise:
        return None
    dynamic = bool(config.get("use_dynamic_shifting"))
    mu = math.log(shift) if config.get("time_shift_type", "exponential") == "exponential" else shift

    @torch.no_grad()
    def sample(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
        own = copy.deepcopy(scheduler)  # it keeps the state of one run
        more: dict[str, Any] = {"mu": mu} if dynamic else {}
        if flux:
            levels = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
            own.set_timesteps(sigmas=levels.tolist(), **more)
        else:
            own.set_timesteps(num_inference_steps, **more)
        x = noise * float(getattr(own, "init_noise_sigma", 1.0))
        for t in own.timesteps:
            given = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            f = predict(given, t.to(x.device, torch.float32).expand(len(x)))
            x = own.step(f, t, x, return_dict=False)[0]
        return x.to(noise.dtype)

    return sample


def own_table(teacher: Teacher, num_inference_steps: int) -> StepTable | None:
    """The table of a pipeline's own scheduler at K steps; None, with a note in the log, where no table can say it.

    A teacher that is no whole pipeline has its own table, and so has Flux, whose pipeline asks for K equal levels.
    """
    config = teacher.scheduler_config
    if teacher.pipeline is None or config is None or type(teacher.pipeline).__name__ == "FluxPipeline":
        return teacher.table(num_inference_steps)
    try:
        return StepTable.from_scheduler(config, num_inference_steps=num_inference_steps)
    except UnsupportedModel as error:
        _log.warning("%s; DDIM at %d trailing steps is used instead", error, num_inference_steps)
        return None
