"""A function as a teacher, with a student of a few hundred weights, and the settings of a run of one update."""

from __future__ import annotations

from typing import Any

from networks import Tiny
from torch import nn

from redif_sdk.distill import DistillConfig, Teacher
from redif_sdk.sampling.noise_schedule import NoiseSchedule

SETTINGS: dict[str, Any] = {"num_inference_steps": 1, "updates": 1, "pool_size": 16, "batch_size": 8}
CONFIG = DistillConfig.checked(**SETTINGS, method="regression")


def black_box(student: nn.Module | None = None, **more: Any) -> Teacher:
    schedule = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    settings = {"schedule": schedule, "prediction_type": "sample", "num_inference_steps": 4, **more}
    network = Tiny() if student is None else student
    return Teacher.from_callable(lambda x, t, c: x.tanh(), shape=(1, 4, 4), student=network, **settings)
