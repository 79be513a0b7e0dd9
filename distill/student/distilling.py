"""``distill``: a teacher into a student."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from redif_sdk.artifact.records import Budget, Distillation
from redif_sdk.distill import pool
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods import make_method
from redif_sdk.distill.policy import Meter
from redif_sdk.distill.rewards import name_of, reward_names
from redif_sdk.distill.student.base import Student
from redif_sdk.distill.student.loading import load_student
from redif_sdk.distill.teachers.base import Teacher, check_deterministic
from redif_sdk.distill.training.check import check_student
from redif_sdk.distill.training.checkpoint import run_lock
from redif_sdk.distill.training.loop import Progress, Trainer
from redif_sdk.errors import InvalidRequest, WorseThanStart
from redif_sdk.models.denoiser import Denoiser

PACKAGES = ("torch", "diffusers", "numpy", "redif-sdk")


def training_folder(output: Path) -> Path:
    """Where a run keeps its checkpoint and log: beside its output, which appears only when it is whole."""
    return output.with_name(output.name + ".training")


def distill(
    source: Any,
    config: DistillConfig | None = None,
    *,
    student: nn.Module | None = None,
    start: str | Path | Student | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
    pairs: pool.Pairs | None = None,
    prompts: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Student:
    """Distil a teacher into a student of ``config.num_inference_steps`` network calls.

    A run whose end is worse than its untrained start gives a :class:`~redif_sdk.errors.WorseThanStart` warning, and
    `Student.worse` says so; unless ``config.keep`` is "last", the student has the best weights of the run, or those of
    its start.

    Args:
        source: a diffusers folder, a shipped teacher's name ("fashion-mnist"), a pipeline, or a :class:`Teacher`.
        student: a network to train in place of a copy of the teacher's (a black box has no weights).
        start: a student (or its folder) whose weights training begins with, e.g. one of other steps.
        folder: where checkpoint and log are kept; None: nowhere.
        resume: go on from ``folder``'s checkpoint.
        pairs: the pool, when the caller holds it already.
        prompts: of a text-to-image teacher, what the student is to draw, if the teacher's folder has none.
        value_range: (low, high) of the teacher's images; None: its own, or of a function's the range of its outputs.

    Raises:
        InvalidRequest: an argument is wrong, or another run is writing to ``folder``.
        UnsupportedModel: this teacher, or this student, cannot be trained with these settings.
        TrainingDiverged: a check during training failed.
    """
    config = config or DistillConfig()
    draws.init_distributed()
    make_method(config.method)
    names = [] if config.get("reward") is None else reward_names(config.get("reward"))
    options = {"prompts": prompts, "value_range": value_range}
    teacher = Teacher.load(source, **{name: value for name, value in options.items() if value is not None})
    if student is not None:
        teacher = _with_student(teacher, student)
    with run_lock(folder):
        if pairs is None:
            pairs = sample_pool(teacher, config)
        else:
            _check(teacher, config)
        begin = load_student(start, teacher) if isinstance(start, (str, Path)) else start
        network = begin.network if begin else None
        trainer = Trainer(teacher, config, pairs, folder, start=network, on_progress=on_progress)
        policy = trainer.run(resume)
    verdict = trainer.verdict
    assert verdict is not None
    if verdict.worse:
        warnings.warn(verdict.worse, WorseThanStart, stacklevel=2)
    calls = len(pairs) * teacher.num_inference_steps * teacher.calls_per_step
    return Student(
        teacher=trainer.teacher,
        network=policy.network,
        tables=[policy.table],
        name=f"{teacher.name}-{config.num_inference_steps}",
        stopped=trainer.stopped,
        worse=verdict.worse,
        note=verdict.note,
        distillation=Distillation(
            method=config.method,
            estimator=config.get("estimator") if config.method == "redif" else None,
            rewards=names,
            seed=config.seed,
            budget=_budget(policy.meter, calls),
            versions={"python": sys.version.split()[0]} | {p: version(p) for p in PACKAGES},
            configuration=recorded(config),
            checks=verdict.checks,
        ),
    )


def recorded(config: DistillConfig) -> dict[str, Any]:
    """Return all settings of a run as JSON for ``redif.json``; what is not JSON becomes its name.

    Rewards are always recorded by name, since the address of an endpoint can contain a password.
    """
    settings = config.settings()
    if (reward := settings.get("reward")) is not None:
        names = reward_names(reward)
        settings["reward"] = dict(zip(names, reward.values(), strict=True)) if isinstance(reward, Mapping) else names
    return {name: _json(value) for name, value in settings.items()}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else name_of(value)


def pool_size(teacher: Teacher, config: DistillConfig) -> int:
    """The pool that the budget of teacher calls allows."""
    if config.teacher_calls is None:
        return config.pool_size
    calls = teacher.num_inference_steps * teacher.calls_per_step
    allowed = min(config.pool_size, config.teacher_calls // calls)
    if allowed < config.batch_size:
        raise InvalidRequest(
            f"{config.teacher_calls} teacher calls make {allowed} pairs at {calls} calls each, "
            f"fewer than one batch of {config.batch_size}; allow more calls or lower batch_size"
        )
    return allowed


def sample_pool(
    teacher: Teacher,
    config: DistillConfig,
    *,
    rebuild: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> pool.Pairs:
    """The pairs that a run of ``config`` trains on, on its device, after a look at whether they can be paired at all.

    Args:
        rebuild: sample the teacher for every pair, whatever the bank and the cache hold.
        on_batch: called with the number of pairs of each batch that was sampled.

    Raises:
        RedifError: the teacher gives two outputs for one input.
        UnsupportedModel: the student does.
    """
    _check(teacher, config)
    size, device = pool_size(teacher, config), chosen_device(config.device)
    path = config.get("segments", 0.0) > 0
    return pool.get(teacher, size, "train", rebuild=rebuild, device=device, on_batch=on_batch, path=path)[0]


def _check(teacher: Teacher, config: DistillConfig) -> None:
    """Teacher and student are deterministic, on the device that will train."""
    device = chosen_device(config.device)
    check_deterministic(teacher, device)
    check_student(teacher.make_student().eval().to(device), teacher, device)


def _with_student(teacher: Teacher, student: nn.Module) -> Teacher:
    """``teacher`` with another network to train."""
    network = Denoiser(
        student,
        diffusers_call=type(student).__module__.startswith("diffusers."),
        prompts=teacher.prompts,
        embedded_guidance=teacher.embedded_guidance,
        scale=teacher.postprocess.scale,
    )
    return replace(teacher, make_student=lambda: deepcopy(network).requires_grad_(True))


def _budget(spent: Meter, pool_calls: int) -> Budget:
    """What a run spent, on all processes: the pool, then training."""
    return Budget(
        teacher_calls=pool_calls + spent.teacher_calls * spent.processes,
        student_calls=spent.student_calls * spent.processes,
        gradient_samples=spent.gradient_samples * spent.processes,
        forward_equivalents=pool_calls + spent.forward_equivalents,
        updates=spent.updates,
        seconds=round(spent.seconds, 3),
    )
