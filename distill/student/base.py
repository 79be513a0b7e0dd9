"""A student: a network, its step tables, where they came from, and how it is written to disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from redif_sdk.artifact.atomic import atomic_folder, atomic_write
from redif_sdk.artifact.folder import write_manifest
from redif_sdk.artifact.manifest import CARD_NAME, TASKS, Manifest
from redif_sdk.artifact.records import Distillation, Guidance, Network, TeacherInfo, calls_per_step
from redif_sdk.card.render import read_card, render_over
from redif_sdk.card.sections import is_generated, user_sections
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.teachers import saving
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.callables import write_examples
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser, inner_of
from redif_sdk.models.portable import is_library_network
from redif_sdk.models.rows import Rows
from redif_sdk.sampling.noise import noise
from redif_sdk.sampling.table import StepTable

PACKAGES = ("torch", "diffusers", "numpy", "redif-sdk")


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
    worse: str = ""  # said of a run that ended worse than its untrained start
    note: str = ""  # said of its weights: that they are of an earlier check, or what the reward cost
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
        """Network calls on one image for each step."""
        return calls_per_step(self.guidance)

    @property
    def inner(self) -> Any:
        """The network itself, without the signature that the distiller wraps around it."""
        return inner_of(self.network)

    @property
    def folder(self) -> str:
        """Of the network in the student's folder."""
        return saving.OWN_FOLDER if self.is_own else self.teacher.network_folder or "unet"

    @property
    def is_own(self) -> bool:
        """Whether the network is no class of diffusers: its folder has the weights, and the class by name only."""
        return not is_library_network(self.inner)

    def use_rows(self, rows: Rows | None) -> None:
        """Conditions become places among ``rows``, a teacher's, instead of the student's own; None: no change."""
        if rows is not None and isinstance(self.network, Denoiser):
            self.network.rows = rows

    def use_guidance(self, teacher: Teacher) -> None:
        """What is asked for without a guidance scale has this teacher's, where the network takes one of a range.

        Raises:
            InvalidRequest: it was not trained on that scale.
        """
        network, scale = self.network, teacher.guidance_scale
        if not isinstance(network, Denoiser) or network.guidance_range is None:
            return
        low, high = network.guidance_range
        if not low <= scale <= high:
            raise InvalidRequest(
                f"{self.name} learnt guidance scales from {low:g} to {high:g}, and {teacher.name} is guided at "
                f"{scale:g}; give a teacher with a scale in that range"
            )
        network.embedded_guidance = scale

    def policy(self, num_inference_steps: int | None = None) -> StudentPolicy:
        """The student in float32, with its table of ``num_inference_steps``; where it has none, with the first."""
        table = next((t for t in self.tables if t.num_inference_steps == num_inference_steps), self.tables[0])
        return StudentPolicy(self.network, table, self.teacher.schedule, exact=True)

    def images(self, seed: int, count: int) -> NDArray[np.uint8]:
        """(N, H, W, C) of the default table, before any export: image i has the noise (seed, i); conditions in turn."""
        start = torch.from_numpy(noise([(seed, i) for i in range(count)], self.teacher.shape)[0])
        with torch.no_grad():
            latents = self.policy().sample(start, self.teacher.labels(np.arange(count)))
            levels = ((self.teacher.seen(latents) + 1) * 127.5).round().to(torch.uint8)
        found: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).numpy()
        return found

    def manifest(self, name: str) -> Manifest:
        """What ``redif.json`` says of this student under ``name``."""
        teacher, guidance, network = self.teacher, self.guidance, self.network
        inner, ranged, told = self.inner, None, teacher.embedded_guidance
        if isinstance(network, Denoiser) and network.guidance_range is not None:
            ranged, told = network.guidance_range, network.embedded_guidance
        if guidance is not None and teacher.prompts is not None:
            guidance = guidance.model_copy(update={"null_class": 0})  # a place among prompts that do not travel
        class_path = saving.class_path(inner) if self.is_own else f"diffusers.{type(inner).__name__}"
        return Manifest(
            name=name,
            licence=teacher.licence,
            task=TASKS[teacher.condition.kind if teacher.condition else None],
            teacher=TeacherInfo(
                id=teacher.name,
                revision=teacher.revision,
                hash=teacher.fingerprint or None,
                num_inference_steps=teacher.num_inference_steps,
                guidance_scale=teacher.guidance_scale,
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
                embedded_guidance=told,
                guidance_range=ranged,
                inpainting=teacher.inpainting,
                pipeline=saving.pipeline_name(teacher, self._scheduler()),
                call="x, t, condition" if self.is_own else "diffusers",
            ),
            metrics=self.metrics,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False, link: bool = False) -> Manifest:
        """Write the student folder: diffusers' network and scheduler in safetensors, ``redif.json``, the card.

        Of a network of your own, the weights are written, and its class by name. It appears whole or not at all. Graphs
        are added by ``redif_sdk.export.export``. The user's sections in the card of a folder that is overwritten stay.

        Args:
            folder: where.
            overwrite: whether to replace a folder that exists.
            link: make hard links to the teacher's files of weights that did not change, where they were mapped.

        Raises:
            InvalidRequest: the folder exists already and ``overwrite`` is off, its card has malformed sections, or a
                file cannot be linked.
            UnsupportedModel: a network of your own in place of a pipeline's.
        """
        folder = Path(folder)
        inner = self.inner
        old = read_card(folder) if overwrite else None
        if old is not None and not is_generated(old):
            old = None
        user_sections(old or "")  # malformed ones are refused before anything is written
        with atomic_folder(folder, overwrite=overwrite) as staging:
            try:
                self._write_models(staging, inner, link)
            except SafetensorError as error:
                raise RedifError(f"{folder} cannot be written: {error}; is the disk full?") from error
            for config in (*staging.glob("*/config.json"), staging / "scheduler/scheduler_config.json"):
                saving.forget_origin(config)
            described = self.manifest(folder.name)
            if self.scheduler is None or self.teacher.pipeline is None:
                saving.write_index(staging, described)
                if described.network.pipeline is not None and self.scheduler is None:
                    saving.refuse_default_times(staging, described)
            manifest = write_manifest(staging, described)
            atomic_write(staging / CARD_NAME, render_over(manifest, old).encode())
            return manifest

    def _scheduler(self) -> Any:
        return self.scheduler or saving.scheduler_of(self.teacher, self.tables[0])

    def _write_models(self, staging: Path, inner: Any, link: bool) -> None:
        """diffusers' folder: the network and a scheduler, or the teacher's whole pipeline with these two in it."""
        scheduler = self._scheduler()
        if self.teacher.data is not None:
            write_examples(self.teacher.data, staging)
        if self.teacher.pipeline is not None:
            if self.is_own:
                raise UnsupportedModel(
                    f"a {type(self.teacher.pipeline).__name__} is saved with a network of diffusers, not with a "
                    f"{type(inner).__name__}"
                )
            parts = {self.folder: inner, "scheduler": scheduler}
            saving.write_pipeline(self.teacher, staging, parts, link=link)
            return
        if self.is_own:
            saving.write_own(inner, staging / self.folder)
        else:
            saving.write_part(inner, staging / self.folder, link)
        scheduler.save_pretrained(staging / "scheduler")
