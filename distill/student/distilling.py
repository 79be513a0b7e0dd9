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

import torch
from torch import nn

from redif_sdk.artifact.records import Budget, Distillation
from redif_sdk.distill import pool
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods import make_method
from redif_sdk.distill.policy import Meter, StudentPolicy
from redif_sdk.distill.rewards import name_of, reward_names
from redif_sdk.distill.student.base import Student
from redif_sdk.distill.student.decision import check_run, pool_size
from redif_sdk.distill.student.loading import load_student
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.large import half_of, sized
from redif_sdk.distill.training import checkpoint
from redif_sdk.distill.training.loop import OnProgress, Trainer
from redif_sdk.errors import InvalidRequest, WorseThanStart
from redif_sdk.models.copies import private_copy
from redif_sdk.models.denoiser import Denoiser, StudentOf, inner_of
from redif_sdk.models.portable import is_library_network
from redif_sdk.progress import Progress
from redif_sdk.sampling.table import StepTable

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
    on_progress: OnProgress | None = None,
    progress: bool | Progress = True,
    pairs: pool.Pairs | None = None,
    rebuild_pool: bool = False,
    prompts: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Student:
    """Distil a teacher into a student of ``config.num_inference_steps`` network calls.

    What the caller gives is never changed: networks are copied, schedulers and tokenizers too. What cannot be
    distilled, saved or exported is refused before the teacher is sampled.

    A run whose end is worse than its untrained start gives a :class:`~redif_sdk.errors.WorseThanStart` warning, and
    `Student.worse` says so; unless ``config.keep`` is "last", the student has the best weights of the run, or those of
    its start.

    Args:
        source: a diffusers folder, a shipped teacher's name ("fashion-mnist"), a pipeline, or a :class:`Teacher`.
        student: a network to train in place of a copy of the teacher's (a black box has no weights): one of diffusers,
            or any module that is called as ``student(x, t, condition)``.
        start: a student (or its folder) whose weights training begins with, and its step table of as many steps.
        folder: where checkpoint and log are kept; None: nowhere.
        resume: go on from ``folder``'s checkpoint.
        on_progress: called after each update with the share of the training that is done, and figures; then nothing
            else is shown.
        progress: show how far the pool and the training are, on standard error as the command does; False: nothing.
        pairs: the pool, when the caller holds it already.
        rebuild_pool: sample the teacher for every pair, whatever the bank and the cache hold.
        prompts: of a text-to-image teacher, what the student is to draw, if the teacher's folder has none.
        value_range: (low, high) of the teacher's images; None: its own, or of a function's the range of its outputs.

    Raises:
        InvalidRequest: an argument is wrong, or another run is writing to ``folder``.
        UnsupportedModel: this teacher, or this student, cannot be trained with these settings.
        TrainingDiverged: a check during training failed.
    """
    config = config or DistillConfig()
    check_targets(config, start, pairs)
    draws.init_distributed()
    make_method(config.method)
    for asked in (config.get("reward"), config.get("judge")):
        if asked is not None:
            reward_names(asked)  # an unknown one is refused before anything is loaded
    config, teacher = _opened(source, config, student, prompts=prompts, value_range=value_range)
    display = progress if isinstance(progress, Progress) else Progress(not progress or on_progress is not None)
    display = Progress(quiet=True) if draws.rank() else display
    asked = inner_of(teacher.frozen_student())
    own = None if is_library_network(asked) else asked
    if own is not None:
        display.say(
            f"the student is a {type(own).__name__}: its weights are saved, its class by name only; plain diffusers "
            "cannot load it; export it with export(folder, network=module)"
        )
    begin = load_student(start, teacher, network=own) if isinstance(start, (str, Path)) else start
    network = begin.network if begin else None
    if resume:  # a checkpoint of other settings is refused here
        checkpoint.read(folder, checkpoint.identity(config, teacher), torch.device("cpu"))
    check_run(teacher, config, network, pairs=None if pairs is None else len(pairs))
    with checkpoint.run_lock(folder):
        if pairs is None:
            pairs = _sampled(teacher, config, rebuild_pool, display, _policy(begin, config))
        with display.stage(f"{config.method}, {config.num_inference_steps} step(s)") as show:
            table = own_table(begin, config.num_inference_steps)
            trainer = Trainer(teacher, config, pairs, folder, network, table, on_progress or show)
            policy = trainer.run(resume)
    verdict = trainer.verdict
    assert verdict is not None
    if verdict.worse:
        warnings.warn(verdict.worse, WorseThanStart, stacklevel=2)
    return made_student(trainer, policy, config, len(pairs))


def _opened(
    source: Any, config: DistillConfig, student: nn.Module | None, **given: Any
) -> tuple[DistillConfig, Teacher]:
    """The teacher of a run, at the steps asked for, and the settings that fit its size; ``given``: None is unsaid."""
    options = {**given, "half": half_of(config)}
    teacher = Teacher.load(source, **{name: value for name, value in options.items() if value is not None})
    if config.teacher_steps is not None:
        teacher = teacher.at_steps(config.teacher_steps)
    return sized(config, teacher if student is None else _with_student(teacher, student))


def check_targets(config: DistillConfig, start: object, pairs: pool.Pairs | None = None) -> None:
    """Refuse a start's outputs as targets without a start, or beside a pool.

    Raises:
        InvalidRequest: one of these.
    """
    if config.targets == "start" and start is None:
        raise InvalidRequest("targets is start, whose outputs make the pool; give the start too (start=, --start)")
    if config.targets == "start" and pairs is not None:
        raise InvalidRequest("targets is start, whose outputs make the pool; leave the pairs out")


def own_table(start: Student | None, num_inference_steps: int) -> StepTable | None:
    """The step table that a start brings for so many steps; None: it has none, or it draws noise."""
    tables = [] if start is None else start.tables
    fitting = (table for table in tables if table.num_inference_steps == num_inference_steps)
    return next((table for table in fitting if not table.stochastic), None)


def _policy(start: Student | None, config: DistillConfig) -> StudentPolicy | None:
    """The start, where its outputs are the targets."""
    if start is None or config.targets == "teacher":
        return None
    table = own_table(start, config.num_inference_steps) or start.teacher.table(config.num_inference_steps)
    device = chosen_device(config.device)
    network = start.network if device.type == "cpu" else deepcopy(start.network).to(device)  # the caller's stays there
    return StudentPolicy(network, table, start.teacher.schedule, precision=config.precision)


def made_student(trainer: Trainer, policy: StudentPolicy, config: DistillConfig, pairs: int) -> Student:
    """The student of a finished run on a pool of ``pairs``."""
    verdict = trainer.verdict
    assert verdict is not None
    return Student(
        teacher=trainer.teacher,
        network=policy.network,
        tables=trainer.method.tables(trainer.context, policy),
        name=f"{trainer.teacher.name}-{config.num_inference_steps}",
        stopped=trainer.stopped,
        worse=verdict.worse,
        note=verdict.note,
        distillation=Distillation(
            method=config.method,
            estimator=config.get("estimator") if config.method == "redif" else None,
            rewards=[] if config.get("reward") is None else reward_names(config.get("reward")),
            seed=config.seed,
            budget=_budget(policy.meter, trainer.teacher, config, pairs),
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
    for setting in ("reward", "judge"):
        if (reward := settings.get(setting)) is not None:
            names = reward_names(reward)
            settings[setting] = dict(zip(names, reward.values(), strict=True)) if isinstance(reward, Mapping) else names
    return {name: _json(value) for name, value in settings.items()}


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else name_of(value)


def sample_pool(
    teacher: Teacher,
    config: DistillConfig,
    *,
    rebuild: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> pool.Pairs:
    """The pairs that a run of ``config`` trains on, on its device, after a look at whether that run can be made at all.

    Args:
        rebuild: sample the teacher for every pair, whatever the bank and the cache hold.
        on_batch: called with the number of pairs of each batch that was sampled.

    Raises:
        InvalidRequest: the targets are a start's own outputs.
        RedifError: as `redif_sdk.distill.student.decision.check_run`.
    """
    if config.targets == "start":
        raise InvalidRequest("targets is start, so the pool is made in the run; give distill the start")
    config, teacher = sized(config, teacher)
    check_run(teacher, config)
    return _pairs(teacher, config, rebuild, on_batch)


def _pairs(
    teacher: Teacher,
    config: DistillConfig,
    rebuild: bool,
    on_batch: Callable[[int], object] | None,
    start: StudentPolicy | None = None,
) -> pool.Pairs:
    size, device = pool_size(teacher, config), chosen_device(config.device)
    if start is not None:
        return pool.compute_by(start.sample, teacher, size, "train", device=device, on_batch=on_batch)
    path = config.get("segments", 0.0) > 0
    return pool.get(teacher, size, "train", rebuild=rebuild, device=device, on_batch=on_batch, path=path)[0]


def _sampled(
    teacher: Teacher, config: DistillConfig, rebuild: bool, display: Progress, start: StudentPolicy | None = None
) -> pool.Pairs:
    """The pool, with a line that says what the run needs, and the display of its sampling."""
    count, made = pool_size(teacher, config), 0
    there = start is None and pool.is_there(teacher, count, "train") and not rebuild
    calls, whose = _pool_calls(teacher, config, count), "teacher" if start is None else "student"
    pairs_of = f"{count} pairs ({'in the cache' if there else f'{calls:,} {whose} calls'})"
    budgets = {"updates": config.updates, "s": config.seconds, "forward-equivalents": config.forward_equivalents}
    limits = " or ".join(f"{value:g} {unit}" for unit, value in budgets.items() if value)
    place = chosen_device(config.device)
    display.say(f"{teacher.name}: {pairs_of}, then at most {limits} of {config.method} on {place}")
    with display.stage(f"{whose}'s outputs") as show:

        def on_batch(size: int) -> None:
            nonlocal made
            made += size
            show(made / count)

        return _pairs(teacher, config, rebuild, on_batch, start)


def _pool_calls(teacher: Teacher, config: DistillConfig, pairs: int) -> int:
    """Network calls of the teacher for so many pairs, or of the start."""
    if config.targets == "start":
        return pairs * config.num_inference_steps
    return pairs * teacher.num_inference_steps * teacher.calls_per_step


def _with_student(teacher: Teacher, student: nn.Module) -> Teacher:
    """``teacher`` with another network to train."""
    own = private_copy(student, "the student")
    options: dict[str, Any] = {
        "rows": teacher.rows,
        "embedded_guidance": teacher.embedded_guidance,
        "scale": teacher.postprocess.scale,
    }
    if is_library_network(own):
        return replace(teacher, make_student=StudentOf(own, options))
    network = Denoiser(own, diffusers_call=False, **options)
    return replace(teacher, make_student=lambda: deepcopy(network).requires_grad_(True))


def _budget(spent: Meter, teacher: Teacher, config: DistillConfig, pairs: int) -> Budget:
    """What a run spent, on all processes: the pool, then training."""
    pool_calls = _pool_calls(teacher, config, pairs)
    own = pool_calls if config.targets == "start" else 0
    return Budget(
        teacher_calls=pool_calls - own + spent.teacher_calls * spent.processes,
        student_calls=own + spent.student_calls * spent.processes,
        gradient_samples=spent.gradient_samples * spent.processes,
        forward_equivalents=pool_calls + spent.forward_equivalents,
        updates=spent.updates,
        seconds=round(spent.seconds, 3),
    )
