"""What a run would cost, before it is started: a few updates are made on throw-away weights, and nothing is written."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace

import torch

from redif_sdk.distill import pool
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer

POINTS = (0.0, 0.5, 0.99)  # of the run: its phases cost differently


@dataclass(frozen=True)
class Estimate:
    """Seconds and mebibytes on this machine, as it is now.

    ``pool_seconds`` is 0 where the pool is at hand already. ``forward_equivalents`` is of the training alone.
    """

    pool_pairs: int
    pool_seconds: float
    updates: int | None
    training_seconds: float
    forward_equivalents: float
    peak_memory_mb: float


def estimate(teacher: Teacher, config: DistillConfig, pool_size: int, *, pool_is_there: bool) -> Estimate:
    """Time one batch of the teacher, and an update in every phase, on the device of the settings.

    ``config.seconds`` is believed as it stands.
    """
    small = max(config.batch_size, 8)
    began = time.monotonic()
    device = chosen_device(config.device)
    pairs = pool.compute(teacher, small, "train", seed=config.seed, device=device)
    pool_seconds = 0.0 if pool_is_there else (time.monotonic() - began) * pool_size / small
    alone = {"schedule_updates": 0} if config.get("schedule_updates") else {}
    trial = config.replaced(early_stop=0, tracker=None, **alone)
    trainer = Trainer(teacher, trial, pairs)
    trainer.method.prepare(trainer.context)
    if config.get("segments"):
        trainer.pairs = replace(trainer.pairs, index=None)  # entries that are not named are not kept on disk
        pool_seconds = max(pool_seconds, trainer.follow() * pool_size / small)
    spent, seconds = [], []
    for progress in POINTS:
        trainer.step(progress)  # the first of a phase makes its networks
        meter = replace(trainer.meter)
        began = time.monotonic()
        trainer.step(progress)
        seconds.append(time.monotonic() - began)
        spent.append(trainer.meter.forward_equivalents - meter.forward_equivalents)
    each, cost = sum(seconds) / len(seconds), sum(spent) / len(spent)
    updates = config.updates
    if updates is None and config.forward_equivalents:
        updates = round(config.forward_equivalents / cost)
    training = each * updates if updates else float("inf")
    if config.seconds and config.seconds < training:
        training, updates = config.seconds, None
    return Estimate(
        pool_pairs=pool_size,
        pool_seconds=round(pool_seconds, 3),
        updates=updates,
        training_seconds=round(training, 1),
        forward_equivalents=round(cost * (training / each if updates is None else updates)),
        peak_memory_mb=round(_peak_memory(device), 1),
    )


def _peak_memory(device: torch.device) -> float:
    """The most that this process has held so far, in MiB: of the GPU that trains, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)
