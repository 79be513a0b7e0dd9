"""What a run would cost, before it is started: a few updates are made on throw-away weights, and nothing is written.

The pairs of these updates are noise: the teacher is called twice, to time a call, and is not sampled.
"""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.pool.pairs import batch_of, pairs_of, pool_noise
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.large import sized
from redif_sdk.distill.training.check import checked_pairs
from redif_sdk.distill.training.loop import Trainer

SLOW = 5.0  # seconds of an update that is not made a second time
PAIRS = 8  # at least, that are made up; also the prompts, or a user's conditions, that are read to time it


@dataclass(frozen=True)
class Estimate:
    """Seconds and mebibytes on this machine, as it is now.

    Attributes:
        pool_seconds: to sample the pairs, and encode their prompts; 0 where the pool is at hand already.
        check_seconds: for all checks, with the pairs that are sampled for these.
        forward_equivalents: of the training alone.
        peak_memory_mb: of the GPU that trains, else of the process.
    """

    pool_pairs: int
    pool_seconds: float
    updates: int | None
    training_seconds: float
    check_seconds: float
    forward_equivalents: float
    peak_memory_mb: float


def estimate(teacher: Teacher, config: DistillConfig, pool_size: int, *, pool_is_there: bool) -> Estimate:
    """Time calls of the teacher, an update in every phase and a check, on the device of the settings.

    ``config.seconds`` is believed as it stands.
    """
    config, teacher = sized(config, teacher)
    encoding = _encoding_seconds(teacher, pool_size)
    alone = {"schedule_updates": 0} if config.get("schedule_updates") else {}
    pairs = _made_up(teacher, max(config.batch_size, PAIRS))
    trainer = Trainer(teacher, config.replaced(early_stop=0, tracker=None, **alone), pairs)
    trainer.method.prepare(trainer.context)
    if config.get("segments"):
        trainer.move_to_path()
        states = trainer.pairs.noise[:, None].expand(-1, config.num_inference_steps, -1, -1, -1)
        trainer.pairs = trainer.context.pairs = replace(trainer.pairs, states=states)
    pair = _pair_seconds(teacher, trainer.pairs) if config.targets == "teacher" else _own_pair_seconds(trainer)
    pool_seconds = encoding + (0.0 if pool_is_there and not config.get("segments") else pair * pool_size)
    each, cost = _update(trainer)
    updates = config.updates
    if updates is None and config.forward_equivalents:
        updates = max(1, round(config.forward_equivalents / cost))
    training = each * updates if updates else math.inf
    if config.seconds and config.seconds < training:
        training, updates = config.seconds, None
    done = training / each if updates is None else updates
    checked, sampled = checked_pairs(trainer.context, pool_size)
    checks = 2 + done // config.check_every
    return Estimate(
        pool_pairs=pool_size,
        pool_seconds=round(pool_seconds, 3),
        updates=updates,
        training_seconds=round(training, 1),
        check_seconds=round(checks * _check_seconds(trainer, checked) + (checked * pair if sampled else 0.0), 1),
        forward_equivalents=round(cost * done),
        peak_memory_mb=round(_peak_memory(trainer, pool_size) / 2**20, 1),
    )


def _made_up(teacher: Teacher, count: int) -> Pairs:
    """Pairs whose outputs are noise within the value range; the range itself is not measured on them."""
    low, high = teacher.postprocess.value_range
    noise = pool_noise(teacher.shape, count, "train")
    target = noise if teacher.decode is not None else (low + high) / 2 + (high - low) / 2 * noise.tanh()
    return replace(pairs_of(teacher, target, "train", 0), index=None)


def _timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _encoding_seconds(teacher: Teacher, pool_size: int) -> float:
    if (rows := teacher.rows) is None:
        return 0.0
    tried = min(PAIRS, len(rows))
    return _timed(lambda: rows(torch.arange(tried))) * min(len(rows), pool_size) / tried


@torch.no_grad()
def _pair_seconds(teacher: Teacher, pairs: Pairs) -> float:
    """Seconds of the teacher for one pair, by its second call on as many noises as it is given at once."""
    size = min(len(pairs), batch_of(teacher, pairs.noise.device))
    part = pairs[:size]
    t = torch.full((size,), len(teacher.schedule) / 2, device=part.noise.device)
    first, second = (_timed(lambda: teacher(part.noise, t, part.condition).cpu()) for _ in range(2))
    return min(first, second) * teacher.num_inference_steps / size


@torch.no_grad()
def _own_pair_seconds(trainer: Trainer) -> float:
    """Seconds of the student for one pair."""
    part = trainer.pairs[: batch_of(trainer.teacher, trainer.pairs.noise.device)]
    return _timed(lambda: trainer.context.policy.sample(part.noise, part.condition).cpu()) / len(part)


def _update(trainer: Trainer) -> tuple[float, float]:
    """The seconds and the forward-equivalents of an update, on average over the run: one is made in each phase."""
    seconds, cost = 0.0, 0.0
    for start, share in _phases(trainer.config):
        for _ in range(2):
            before = trainer.meter.forward_equivalents
            took = _timed(partial(trainer.step, start))
            if took > SLOW:
                break
        seconds += share * took
        cost += share * (trainer.meter.forward_equivalents - before)
    return seconds, cost


def _phases(config: DistillConfig) -> list[tuple[float, float]]:
    """Where each phase of a run begins, as a share of it, and its share of the updates."""
    edges = sorted({0.0, 1.0, *(min(1.0, config.get(name) or 0.0) for name in ("segments", "warm_start"))})
    if config.updates:
        made = [place / config.updates for place in range(config.updates)]
        shares = [sum(low <= at < high for at in made) / len(made) for low, high in itertools.pairwise(edges)]
    else:
        shares = [high - low for low, high in itertools.pairwise(edges)]
    return [(low, share) for low, share in zip(edges[:-1], shares, strict=True) if share]


def _check_seconds(trainer: Trainer, count: int) -> float:
    """Seconds of a check on ``count`` pairs."""
    observer = trainer.observer
    observer.pairs = trainer.pairs[: min(count, 2 if trainer.teacher.micro_batch else PAIRS)]
    return _timed(lambda: observer.look(trainer.ema, 0)) * count / len(observer.pairs)


def _peak_memory(trainer: Trainer, pool_size: int) -> float:
    """The most bytes that a run holds: what this process has held so far, or what it holds when the run ends."""
    device = trainer.context.device
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    rows = trainer.teacher.rows
    encoded = 0 if rows is None else rows.row_bytes * max(0, min(len(rows), pool_size) - PAIRS)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    network = sum(weight.numel() for weight in trainer.context.policy.network.parameters())
    merged = 4 * network if trainer.config.lora_rank else 0
    return encoded + max(held, _resident() + merged)


def _resident() -> int:
    """Bytes that this process holds now; 0 where the system does not tell."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
    return 0
