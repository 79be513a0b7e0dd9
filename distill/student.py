"""A trained student on its way to disk and back: ``Student.save_pretrained``, ``distill``, ``import_pipeline``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from redif_sdk.artifact.atomic import atomic_folder, atomic_write
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import CARD_NAME, Manifest
from redif_sdk.artifact.records import Budget, Distillation, Guidance, Network, TeacherInfo, calls_per_step
from redif_sdk.card.render import read_card, render_over
from redif_sdk.card.sections import is_generated, user_sections
from redif_sdk.distill import pool
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods import make_method
from redif_sdk.distill.policy import Meter, StudentPolicy
from redif_sdk.distill.rewards import name_of, reward_names
from redif_sdk.distill.teachers import saving
from redif_sdk.distill.teachers.base import Teacher, check_deterministic
from redif_sdk.distill.teachers.own_scheduler import own_table
from redif_sdk.distill.training.loop import Progress, Trainer
from redif_sdk.errors import InvalidRequest, ManifestError, RedifError, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.models.prompts import Prompts
from redif_sdk.sampling.noise import noise
from redif_sdk.sampling.table import StepTable

PACKAGES = ("torch", "diffusers", "numpy", "redif-sdk")
TASKS: dict[str | None, Literal["unconditional", "class-conditional", "text-to-image"]] = {
    None: "unconditional",
    "class": "class-conditional",
    "text": "text-to-image",
}


@dataclass
class Student:
    """A network, its step tables (the first is the default) and where they came from."""

    teacher: Teacher
    network: nn.Module
    tables: list[StepTable]
    name: str
    distillation: Distillation | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""  # why training ended before its budget did
    scheduler: Any = None  # diffusers' own, of an imported pipeline that keeps it

    @property
    def estimator(self) -> str | None:
        """How the gradient of the reward was estimated, of methods that have an estimator."""
        return self.distillation.estimator if self.distillation else None

    @property
    def guidance(self) -> Guidance | None:
        """Of a network that still mixes two calls a step; a distilled student has none."""
        return self.network.guidance if isinstance(self.network, Denoiser) else None

    @property
    def calls_per_step(self) -> int:
        return calls_per_step(self.guidance)

    @property
    def inner(self) -> Any:
        """The network itself, without the signature that the distiller wraps around it."""
        return self.network.network if isinstance(self.network, Denoiser) else self.network

    @property
    def folder(self) -> str:
        """Of the network in the student's folder."""
        return self.teacher.network_folder or "unet"

    def ask_by(self, prompts: Prompts | None) -> None:
        """Let conditions be places among ``prompts``, a teacher's, in place of the student's own few."""
        if prompts is not None and isinstance(self.network, Denoiser):
            self.network.prompts = prompts

    def policy(self, num_inference_steps: int | None = None) -> StudentPolicy:
        table = next((t for t in self.tables if t.num_inference_steps == num_inference_steps), self.tables[0])
        return StudentPolicy(self.network, table, self.teacher.schedule, exact=True)

    def images(self, seed: int, count: int) -> NDArray[np.uint8]:
        """(N, H, W, C) of the default table, before any export: image i has the noise (seed, i); conditions in turn."""
        start = torch.from_numpy(noise([(seed, i) for i in range(count)], self.teacher.shape)[0])
        with torch.no_grad():
            latents = self.policy().sample(start, self.teacher.labels(np.arange(count)))
            levels = ((self.teacher.images(latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        found: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).numpy()
        return found

    def manifest(self, name: str) -> Manifest:
        teacher, guidance = self.teacher, self.guidance
        inner = self.inner
        if guidance is not None and teacher.prompts is not None:
            guidance = guidance.model_copy(update={"null_class": 0})  # a place among prompts that do not travel
        package = type(inner).__module__.partition(".")[0]
        class_path = f"diffusers.{type(inner).__name__}" if package == "diffusers" else saving.class_path(inner)
        return Manifest(
            name=name,
            licence=teacher.licence,
            task=TASKS[teacher.condition.kind if teacher.condition else None],
            teacher=TeacherInfo(
                id=teacher.name,
                revision=teacher.revision,
                hash=teacher.fingerprint or None,
                num_inference_steps=teacher.num_inference_steps,
                guidance_scale=teacher.guidance.scale if teacher.guidance else teacher.embedded_guidance or 1.0,
            ),
            distillation=self.distillation,
            step_tables=[table.to_dict() for table in self.tables],
            latents=teacher.latents,
            condition=teacher.condition,
            postprocess=teacher.postprocess,
            network=Network(
                class_path=class_path,
                folder=self.folder,
                guidance=guidance,
                embedded_guidance=teacher.embedded_guidance,
                pipeline=saving.pipeline_name(teacher, self._scheduler()),
            ),
            metrics=self.metrics,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Manifest:
        """Write the student folder: diffusers' network and scheduler in safetensors, ``redif.json``, the card.

        It appears whole or not at all. Graphs are added by ``redif_sdk.export.export``. The user's sections in the card
        of a folder that is overwritten stay.

        Raises:
            InvalidRequest: the folder exists already and ``overwrite`` is off, or its card has malformed sections.
            UnsupportedModel: the network is no diffusers model, so it cannot be saved as a diffusers folder.
        """
        folder = Path(folder)
        inner = self.inner
        if not hasattr(inner, "save_pretrained"):
            raise UnsupportedModel(
                f"{type(inner).__name__} has no save_pretrained; give the student as a diffusers model to save it"
            )
        old = read_card(folder) if overwrite else None
        if old is not None and not is_generated(old):
            old = None
        user_sections(old or "")  # malformed ones are refused before anything is written
        with atomic_folder(folder, overwrite=overwrite) as staging:
            try:
                self._write_models(staging, inner)
            except SafetensorError as error:
                raise RedifError(f"{folder} cannot be written: {error}; is the disk full?") from error
            for config in (*staging.glob("*/config.json"), staging / "scheduler/scheduler_config.json"):
                saving.forget_origin(config)
            described = self.manifest(folder.name)
            if self.scheduler is None:
                saving.write_index(staging, described)
                if described.network.pipeline is not None:
                    saving.refuse_default_times(staging, described)
            manifest = write_manifest(staging, described)
            atomic_write(staging / CARD_NAME, render_over(manifest, old).encode())
            return manifest

    def _scheduler(self) -> Any:
        return self.scheduler or saving.scheduler_of(self.teacher, self.tables[0])

    def _write_models(self, staging: Path, inner: Any) -> None:
        """diffusers' folder: the network and a scheduler, or the teacher's whole pipeline with these two in it."""
        scheduler = self._scheduler()
        if self.teacher.pipeline is not None:
            saving.write_pipeline(self.teacher, staging, {self.folder: inner, "scheduler": scheduler})
            return
        inner.save_pretrained(staging / "unet", safe_serialization=True)
        scheduler.save_pretrained(staging / "scheduler")


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
) -> Student:
    """Distil a teacher into a student of ``config.num_inference_steps`` network calls.

    Args:
        source: a diffusers folder, a shipped teacher's name ("fashion-mnist"), a pipeline, or a :class:`Teacher`.
        student: a network to train in place of a copy of the teacher's (a black box has no weights).
        start: a student (or its folder) whose weights training begins with, e.g. one of other steps.
        folder: where checkpoint and log are kept; None: nowhere.
        resume: go on from ``folder``'s checkpoint.
        pairs: the pool, when the caller holds it already.
        prompts: of a text-to-image teacher, what the student is to draw, if the teacher's folder has none.

    Raises:
        InvalidRequest: an argument is wrong. UnsupportedModel: this teacher cannot be distilled.
        TrainingDiverged: an in-training check failed.
    """
    config = config or DistillConfig()
    draws.init_distributed()
    make_method(config.method)
    names = [] if config.get("reward") is None else reward_names(config.get("reward"))
    teacher = Teacher.load(source, prompts=prompts) if prompts is not None else Teacher.load(source)
    if student is not None:
        network = Denoiser(
            student,
            diffusers_call=type(student).__module__.startswith("diffusers."),
            prompts=teacher.prompts,
            embedded_guidance=teacher.embedded_guidance,
            scale=teacher.postprocess.scale,
        )
        teacher = _with_student(teacher, network)
    check_deterministic(teacher)
    if pairs is None:
        size, place = pool_size(teacher, config), chosen_device(config.device)
        pairs, calls = pool.get(teacher, size, "train", device=place, path=config.get("segments", 0.0) > 0)
    else:
        calls = len(pairs) * teacher.num_inference_steps * teacher.calls_per_step
    begin = load_student(start, teacher) if isinstance(start, (str, Path)) else start
    trainer = Trainer(teacher, config, pairs, folder, start=begin.network if begin else None, on_progress=on_progress)
    policy = trainer.run(resume)
    spent: Meter = policy.meter
    budget = Budget(
        teacher_calls=calls + spent.teacher_calls * spent.processes,
        student_calls=spent.student_calls * spent.processes,
        gradient_samples=spent.gradient_samples * spent.processes,
        forward_equivalents=calls + spent.forward_equivalents,  # the pool, then what training spent
        updates=spent.updates,
        seconds=round(spent.seconds, 3),
    )
    return Student(
        teacher=teacher,
        network=policy.network,
        tables=[policy.table],
        name=f"{teacher.name}-{config.num_inference_steps}",
        stopped=trainer.stopped,
        distillation=Distillation(
            method=config.method,
            estimator=config.get("estimator") if config.method == "redif" else None,
            rewards=names,
            seed=config.seed,
            budget=budget,
            versions={"python": sys.version.split()[0]} | {p: version(p) for p in PACKAGES},
            configuration=recorded(config),
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


def _with_student(teacher: Teacher, network: nn.Module) -> Teacher:
    return replace(teacher, make_student=lambda: deepcopy(network).requires_grad_(True))


def load_student(folder: str | Path, teacher: Teacher | None = None) -> Student:
    """A student folder back into torch, from a checked copy of its files: what was hashed is what is read.

    Raises:
        ManifestError, IntegrityError: the folder is no student, was altered, or holds no network that diffusers makes.
    """
    checked = StudentFolder(Path(folder))
    manifest = checked.manifest
    ours = _model_folders(manifest)
    others = {entry.path.partition("/")[0] for entry in manifest.files} - ours
    for part in ours - {"model_index.json"}:
        for path in checked.files(part):
            checked.read(path)
    with TemporaryDirectory(prefix="redif-") as copy:
        checked.copy_to(Path(copy), without=(*others, ""))
        try:
            source = _as_teacher(Path(copy), manifest)
        except RedifError as error:
            raise ManifestError(str(error).replace(copy, str(folder))) from error
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ManifestError(f"{folder} holds no network that diffusers makes: {error!s:.300}") from error
    inner = source.make_student()
    if isinstance(inner, Denoiser):
        null = {} if source.prompts is None else {"null_class": source.prompts.null}
        guidance = manifest.network.guidance
        inner.guidance = guidance and guidance.model_copy(update=null)
    origin = manifest.teacher
    described = replace(
        source,
        name=origin.id if origin else manifest.name,
        fingerprint=(origin.hash if origin else None) or "",
        num_inference_steps=origin.num_inference_steps if origin else source.num_inference_steps,
        latents=manifest.latents,
        condition=manifest.condition,
        postprocess=manifest.postprocess,
        licence=manifest.licence,
    )
    student = Student(
        teacher=teacher or described,
        network=inner.eval().requires_grad_(False),
        tables=[StepTable.from_dict(table) for table in manifest.step_tables],
        name=manifest.name,
        distillation=manifest.distillation,
        metrics=list(manifest.metrics),
    )
    student.ask_by(teacher.prompts if teacher else None)
    return student


def _model_folders(manifest: Manifest) -> set[str]:
    """The top-level names of what diffusers loads."""
    folders = {manifest.network.folder, "scheduler"}
    if manifest.network.pipeline is None:
        return folders
    folders.add("model_index.json")
    if manifest.postprocess.decoder is not None:
        folders.add(manifest.postprocess.decoder.folder)
    if manifest.text is not None:
        folders |= {encoder.folder for encoder in manifest.text.encoders}
        folders |= {tokenizer.file.partition("/")[0] for tokenizer in manifest.text.tokenizers}
    return folders


def _as_teacher(folder: Path, manifest: Manifest) -> Teacher:
    """The student's network and what is around it, as a teacher without guidance of its own."""
    if manifest.network.pipeline is None:
        return replace(Teacher.from_diffusers(folder), folder=None)
    saving.restore_pipeline_name(folder, manifest.network.pipeline)
    height, width, _ = manifest.image_shape
    sized: dict[str, Any] = {}
    if manifest.text is not None:
        sized = {"prompts": manifest.text.examples, "height": height, "width": width}
    source = Teacher.from_diffusers(folder, **sized)
    if manifest.network.embedded_guidance is not None:
        source = source.guided(manifest.network.embedded_guidance)
    return replace(source, folder=None, guidance=None, sampler=None)


def import_pipeline(
    source: Any,
    output: str | Path,
    steps: Sequence[int],
    *,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Any existing pipeline as a student, as it is: its weights, its guidance, and a table for each of ``steps``.

    Nothing is trained; a guided pipeline still makes two network calls a step. The tables are those of the pipeline's
    own scheduler where a table can say what it does (LCM, Euler, Euler ancestral, DDIM, flow matching), else DDIM with
    trailing spacing. ``guidance_scale`` replaces the pipeline's own: few-step pipelines are made for 1.
    ``prompts``: examples of what a text-to-image pipeline can draw, for its page and its check.
    """
    if not steps:
        raise InvalidRequest("no number of steps is given; name at least one, e.g. --steps 4")
    for count in steps:
        if count < 1:
            raise InvalidRequest(f"steps must be at least 1, not {count}")
    options = {"prompts": prompts, "height": height, "width": width}
    teacher = Teacher.load(source, **{name: value for name, value in options.items() if value is not None})
    if guidance_scale is not None:
        teacher = teacher.guided(guidance_scale)
    counts = list(dict.fromkeys(steps))
    own = [own_table(teacher, count) for count in counts]
    tables = [table or teacher.table(count) for table, count in zip(own, counts, strict=True)]
    network = teacher.make_student()
    if isinstance(network, Denoiser):
        network.guidance = teacher.guidance
    student = Student(teacher, network, tables, teacher.name)
    if None not in own and teacher.pipeline is not None:
        student.scheduler = teacher.pipeline.scheduler
    return student.save_pretrained(output, overwrite=overwrite)
