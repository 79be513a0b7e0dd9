"""The schedule policy: policy gradient on the step table's times, the network frozen.

Times are stick-breaking fractions, t_{k+1} = t_k sigmoid(m_k), with a Gaussian policy on m; every candidate table is
judged on the same pairs. It costs seconds, and plain samplers can run its result (integer times).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.advantage import Advantage
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.sampling.table import NoiseSchedule, StepTable

GROUP, BATCH, SPREAD, RATE = 8, 24, 0.35, 0.12


def images_an_update() -> int:
    """Images that :func:`learn_times` samples for one update."""
    return GROUP * BATCH


def times_of(first: int, m: Tensor) -> list[int]:
    """first = t_0 > t_1 > ... >= 0, integers; ``m`` (K - 1,)."""
    times, t = [first], float(first)
    for k, fraction in enumerate(torch.sigmoid(m).tolist()):
        left = len(m) - 1 - k  # rows that still need a time below this one
        t = min(max(t * fraction, left), times[-1] - 1)
        times.append(max(round(t), left))
    return times


def table_at(schedule: NoiseSchedule, times: Sequence[float], prediction_type: str) -> StepTable:
    """The deterministic table whose rows are at falling ``times``; of a discrete schedule they are rounded."""
    if schedule.edm is not None:
        levels = np.exp(4.0 * np.asarray(times))  # t = ln(sigma) / 4
        plain = StepTable.edm_euler(schedule.edm, len(times))
        return StepTable.edm(
            levels,
            sigma_data=schedule.edm.sigma_data,
            v_prediction=schedule.edm.v_prediction,
            init_scale=plain.init_scale,
        )
    if schedule.flow:
        last = len(schedule) - 1
        return StepTable.flow_euler(sigmas=[t / last for t in times], time_scale=last)
    return StepTable.ddim(schedule, timesteps=[round(t) for t in times], prediction_type=prediction_type)


def on_grid(times: Sequence[float], grid: Sequence[float]) -> list[float]:
    """Of falling ``grid``, as many distinct times as there are ``times``, each the nearest that is left to its row.

    Raises:
        InvalidRequest: the grid has fewer times.
    """
    if len(grid) < len(times):
        raise InvalidRequest(
            f"the teacher's path has {len(grid)} steps, too few for {len(times)} segments; set segments to 0"
        )
    chosen: list[int] = []
    for k, wanted in enumerate(times):
        free = range(chosen[-1] + 1 if chosen else 0, len(grid) - (len(times) - 1 - k))
        chosen.append(min(free, key=lambda place: abs(grid[place] - wanted)))
    return [grid[place] for place in chosen]


def teacher_as_policy(teacher: Teacher, table: StepTable) -> StudentPolicy:
    """The teacher itself, guided, sampling by ``table``. It is never trained, so it need not be a module."""
    return StudentPolicy(cast("torch.nn.Module", teacher), table, teacher.schedule, exact=True)


def learn_times(
    policy: StudentPolicy,
    pairs: Pairs,
    advantage: Advantage,
    updates: int,
    seed: int,
    seconds: float = math.inf,
    *,
    together: bool = False,
) -> StepTable:
    """REINFORCE with antithetic candidates and a group baseline; returns the table at the mean of the policy.

    Args:
        policy: whose table's times are learnt; its own table stays.
        pairs: what candidates are judged on.
        advantage: the rewards.
        updates: at most.
        seed: of the candidates.
        seconds: what it may take; the first update, which is made in any case, says how many fit.
        together: every process learns at once, and the first one's clock counts.

    Raises:
        UnsupportedModel: the table has no integer times of a discrete schedule to start from.
    """
    schedule = policy.schedule
    if schedule is None or schedule.edm is not None:
        raise UnsupportedModel("learnt times need a discrete noise schedule; set schedule_updates to 0")
    start, prediction_type = [round(float(t)) for t in policy.table.timesteps], policy.table.prediction_type
    fractions = torch.tensor([(b + 0.5) / (a + 0.5) for a, b in itertools.pairwise(start)])
    mean, momentum, original = torch.logit(fractions.clamp(0.02, 0.98)), torch.zeros(len(fractions)), policy.table
    update, began = 0, time.monotonic()
    try:
        while update < updates:
            draw = torch.Generator().manual_seed(seed * 7_919 + 104_729 + update)
            batch = pairs[torch.randint(0, len(pairs), (BATCH,), generator=draw)]
            half = torch.randn(GROUP // 2, len(mean), generator=draw)
            xi = torch.cat([half, -half])
            rewards = torch.zeros(GROUP)
            for g, m in enumerate(mean + SPREAD * xi):
                policy.table = table_at(schedule, times_of(start[0], m), prediction_type)
                with torch.no_grad():
                    output = policy.sample(batch.noise, batch.condition)
                rewards[g] = advantage.score(output, batch.target, batch.condition)
            std = rewards.std()
            if std > 0:
                gradient = (((rewards - rewards.mean()) / std)[:, None] * xi).mean(0)
                momentum = 0.7 * momentum + gradient
                mean = mean + RATE * (1 - 0.7) / (1 - 0.7 ** (update + 1)) * momentum * math.sqrt(1 - update / updates)
            update += 1
            if update == 1:
                took = time.monotonic() - began
                if together:
                    (took,) = draws.agreed(took)
                updates = int(min(updates, max(1.0, seconds / max(took, 1e-9))))
    finally:
        policy.table = original
    return table_at(schedule, times_of(start[0], mean), prediction_type)
