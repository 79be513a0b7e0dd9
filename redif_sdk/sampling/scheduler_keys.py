"""The keys of diffusers' scheduler configurations: which of them change what a scheduler computes.

`READ` has, for each scheduler that has a step table, the keys that its reader honours or refuses. `HARMLESS` has the
others of its class. A key that belongs to other classes only is ignored by diffusers, so it is harmless too; these keys
are common in files, as ``from_config`` keeps them. Any other key is refused: nobody knows what it should do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redif_sdk.errors import UnsupportedModel

__all__ = ["CLIPPING", "HARMLESS", "READ", "STRAY", "check_keys"]

_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_GRID = ("timestep_spacing", "steps_offset", "prediction_type")
_OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_EDM = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "prediction_type", "final_sigmas_type")

#: A table describes the unclipped sampler. `redif import` measures what these change, and says it.
CLIPPING = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")

READ: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": (*_BETAS, *_GRID, "set_alpha_to_one"),
    "DDIMParallelScheduler": (*_BETAS, *_GRID, "set_alpha_to_one"),
    "DDPMScheduler": (*_BETAS, *_GRID, "variance_type"),
    "DDPMParallelScheduler": (*_BETAS, *_GRID, "variance_type"),
    "PNDMScheduler": (*_BETAS[:-1], *_GRID, "set_alpha_to_one"),
    "LCMScheduler": (*_BETAS, "prediction_type", "original_inference_steps", "timestep_scaling"),
    "TCDScheduler": (*_BETAS, "prediction_type", "original_inference_steps"),
    "DPMSolverMultistepScheduler": (
        *_BETAS,
        *_GRID,
        *_OTHER_LEVELS,
        *("solver_order", "algorithm_type", "use_lu_lambdas", "use_flow_sigmas", "final_sigmas_type"),
        *("lambda_min_clipped", "variance_type"),
    ),
    "EulerDiscreteScheduler": (
        *_BETAS,
        *_GRID,
        *_OTHER_LEVELS,
        *("interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type"),
    ),
    "EulerAncestralDiscreteScheduler": (*_BETAS, *_GRID),
    "FlowMatchEulerDiscreteScheduler": (
        *("num_train_timesteps", "shift", "use_dynamic_shifting", "stochastic_sampling"),
        *("invert_sigmas", "shift_terminal", *_OTHER_LEVELS),
    ),
    "EDMEulerScheduler": _EDM,
}

HARMLESS: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": CLIPPING,
    "DDIMParallelScheduler": CLIPPING,
    "DDPMScheduler": CLIPPING,
    "DDPMParallelScheduler": CLIPPING,
    # which of its several outputs PNDM mixes: its DDIM reading mixes none
    "PNDMScheduler": ("skip_prk_steps",),
    # read from files of another class, and without a use in these two
    "LCMScheduler": (*CLIPPING, "set_alpha_to_one", "steps_offset", "timestep_spacing"),
    "TCDScheduler": (*CLIPPING, "set_alpha_to_one", "steps_offset", "timestep_spacing", "timestep_scaling"),
    # of orders above 1, of flow sigmas, or of clipping
    "DPMSolverMultistepScheduler": (
        *CLIPPING[2:],
        *("solver_type", "lower_order_final", "euler_at_final"),
        *("flow_shift", "use_dynamic_shifting", "time_shift_type"),
    ),
    "EulerDiscreteScheduler": (),
    "EulerAncestralDiscreteScheduler": (),
    # how the shift follows the image's size, where it does
    "FlowMatchEulerDiscreteScheduler": (
        *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
    ),
    "EDMEulerScheduler": ("num_train_timesteps",),
}

MOST_TIMES = 100_000
_ALL_KEYS = """
algorithm_type base_image_seq_len base_shift beta_end beta_max beta_min beta_schedule beta_start clip_denoised
clip_sample clip_sample_range correct_steps corrector_order disable_corrector dynamic_thresholding_ratio eta
euler_at_final final_sigmas_type flow_shift interpolation_type invert_sigmas lambda_min_clipped lower_order_final
max_image_seq_len max_shift num_train_timesteps original_inference_steps predict_x0 prediction_type predictor_order
rescale_betas_zero_snr rho s_churn s_max s_min s_noise sample_max_value sampling_eps set_alpha_to_one shift
shift_terminal sigma_data sigma_max sigma_min sigma_schedule skip_prk_steps snr snr_shift_scale solver_order
solver_p solver_type steps_offset stochastic_sampling tau_func thresholding time_shift_type timestep_scaling
timestep_spacing timestep_type trained_betas use_beta_sigmas use_dynamic_shifting use_exponential_sigmas
use_flow_sigmas use_karras_sigmas use_lu_lambdas variance_type tensor_format timestep_values scale_factors
upscale_mode
"""
#: Every key of diffusers' image schedulers, and some of its first releases (tensor_format, timestep_values).
STRAY = frozenset(_ALL_KEYS.split())


def check_keys(name: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a key that no scheduler of diffusers has, or an impossible number of times.

    Names with a leading _ are diffusers' own, and say nothing of the result.
    """
    for key in config:
        if str(key).startswith("_") or key in STRAY:
            continue
        raise UnsupportedModel(
            f"{name} has the key {key!r:.100}, which no supported scheduler knows; remove it, if it changes nothing"
        )
    total = config.get("num_train_timesteps", 1000)
    if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= MOST_TIMES:
        raise UnsupportedModel(
            f"{name} has num_train_timesteps={total!r:.100}; give a whole number from 1 to {MOST_TIMES}"
        )
