"""A teacher whose answer is known, of data that are normal at every place, and small runs of it to test methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig, applicable
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.models.denoiser import Predict
from redif_sdk.sampling.table import NoiseSchedule

SHAPE = (1, 4, 4)
MEAN, STD = 0.5, 0.2
SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})


class Small(nn.Module):
    """A network of a few hundred weights, called as (x, t, condition)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        out: Tensor = self.body(torch.cat([x.flatten(1), t[:, None] / 1000], 1))
        return out.view_as(x)


def exact(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """v of data that are N(MEAN, STD^2) at every place: what a perfect teacher of them gives."""
    at = t.long()
    alpha = torch.from_numpy(SCHEDULE.alphas.copy()).float()[at].view(-1, 1, 1, 1)
    sigma = torch.from_numpy(SCHEDULE.sigmas.copy()).float()[at].view(-1, 1, 1, 1)
    variance = alpha**2 * STD**2 + sigma**2
    clean = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
    return (alpha * x - clean) / sigma


def make_teacher(predict: Predict = exact, *, num_inference_steps: int = 16, **more: Any) -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_callable(
        predict,
        schedule=SCHEDULE,
        prediction_type="v_prediction",
        shape=SHAPE,
        student=Small(),
        num_inference_steps=num_inference_steps,
        **more,
    )


def exact_flow(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """noise - data of data that are N(MEAN, STD^2) at every place."""
    sigma = (t / 1000).view(-1, 1, 1, 1)
    alpha = 1 - sigma
    clean = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
    return (x - clean) / sigma.clamp_min(1e-6)


def make_flow_teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_callable(
        exact_flow,
        schedule=NoiseSchedule.linear_flow(),
        prediction_type="flow",
        shape=SHAPE,
        student=Small(),
        shift=3.0,
        num_inference_steps=16,
    )


def trainer(teacher: Teacher, method: str, folder: Path | None = None, **settings: object) -> Trainer:
    defaults = {"num_inference_steps": 2, "updates": 6, "reward": "pixel", "batch_size": 16, "pool_size": 64}
    defaults |= {"warm_start": 0.0, "group_size": 4, "exploration_rank": 0, "schedule_updates": 1}
    config = DistillConfig.checked(**(applicable(defaults | {"method": method} | settings) | settings))
    pairs, _ = pool.get(teacher, config.pool_size, "train")
    return Trainer(teacher, config, pairs, folder)


def weights(run: Trainer) -> Tensor:
    return torch.cat([value.flatten() for value in run.context.policy.network.state_dict().values()])
