"""Existing pipelines as students, without training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.pool import compute
from redif_sdk.distill.student.base import Student
from redif_sdk.distill.student.decision import check_teacher
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.changes import Lora
from redif_sdk.distill.teachers.own_scheduler import own_table, run_table
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.sampling.noise import noise
from redif_sdk.sampling.table import StepTable

_log = logging.getLogger(__name__)

#: What a text-to-image student is checked with and shows where no prompts are given.
EXAMPLES = (
    "a photograph of a red fox in the snow",
    "a lighthouse on a cliff at sunset, oil painting",
    "a bowl of oranges on a wooden table",
    "a small robot reading a book in a garden",
)

SAMPLE = 4  # images on which the effect of clipping is measured

RANGED_ON = 32  # outputs on which the value range of a function is measured


def import_pipeline(
    source: Any,
    output: str | Path,
    steps: Sequence[int],
    *,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    value_range: tuple[float, float] | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    loras: Sequence[str] = (),
    decoder: str | Path | None = None,
    link: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Any existing pipeline as a student, as it is: its weights, its guidance, and a table for each of ``steps``.

    Nothing is trained, and the weights keep their dtype: those of a folder are copied from file to file, so that the
    memory of the largest layer is enough. A guided image still takes two network calls a step. The tables are those
    of the pipeline's own scheduler, which the student keeps. Clipping is no part of a table: where it is switched on, a
    warning says how far images differ without it. The pipeline itself is never changed.

    Args:
        guidance_scale: in place of the pipeline's own: few-step pipelines are made for 1. It is the default of calls,
            which may choose another where the pipeline is guided at all.
        prompts: examples of what a text-to-image pipeline can draw, for its page and its check; None: `EXAMPLES`.
        value_range: (low, high) of its images; None: diffusers' own [-1, 1], of a function the range of its outputs.
        variant: of the weights in a folder, such as fp16.
        scheduler: the class of a scheduler to use in place of the pipeline's own, with its settings: for pipelines
            whose own is not a step table (PNDM, DPM-Solver++(2M), UniPC).
        loras: safetensors files of LoRAs to merge into the weights, as ``FILE`` or ``FILE:SCALE``.
        decoder: the folder or Hub id of an autoencoder to decode with in place of the pipeline's own: an
            ``AutoencoderTiny`` (TAESD) costs an eighteenth, and somewhat of the detail.
        link: make hard links to the weights of a folder instead of copies, which takes no disk. A file that is then
            written in place, as by saving into the folder again, changes in the student too, which is refused later.
        overwrite: replace a folder that exists.

    Raises:
        InvalidRequest: no steps, a number of them that the scheduler does not have, a LoRA that does not fit, or a
            folder that exists already.
        UnsupportedModel: what `export` would refuse, what cannot be sampled, or a scheduler that is not a step table.
    """
    if not steps:
        raise InvalidRequest("no number of steps is given; name at least one, e.g. --steps 4")
    for count in steps:
        if count < 1:
            raise InvalidRequest(f"steps must be at least 1, not {count}")
    if scheduler is not None and isinstance(source, Teacher):
        raise InvalidRequest("scheduler replaces that of a pipeline; load the teacher with it: Teacher.from_diffusers")
    options: dict[str, Any] = {
        "prompts": prompts,
        "examples": EXAMPLES,
        "height": height,
        "width": width,
        "value_range": value_range,
        "variant": variant,
        "scheduler": scheduler,
        "loras": [Lora.parsed(text) for text in loras],
        "decoder": decoder,
        "mapped": isinstance(source, str | Path),
    }
    teacher = Teacher.load(source, **{name: value for name, value in options.items() if value is not None})
    if guidance_scale is not None:
        teacher = teacher.guided(guidance_scale)
    _check(teacher)
    if not teacher.range_known:
        teacher = teacher.ranged_by(compute(teacher, RANGED_ON, "train").target)
    counts = list(dict.fromkeys(steps))
    tables = [own_table(teacher, count) for count in counts]
    _warn_of_clipping(teacher, tables)
    network = teacher.make_student()
    if isinstance(network, Denoiser):
        network.guidance = teacher.guidance or teacher.guidance_of_calls()
    student = Student(teacher, network, tables, teacher.name)
    if teacher.own is not None:
        student.scheduler = teacher.own.scheduler
    return student.save_pretrained(output, overwrite=overwrite, link=link)


def _check(teacher: Teacher) -> None:
    """Raise UnsupportedModel for a teacher that cannot be imported, or not exported then."""
    if teacher.guidance is not None and teacher.data is not None:
        raise UnsupportedModel(
            f"{teacher.name} is guided and conditioned on arrays, and graphs do not hold null arrays; distil it, or "
            "import it with guidance_scale 1"
        )
    check_teacher(teacher, chosen_device("auto"))


@torch.no_grad()
def _warn_of_clipping(teacher: Teacher, tables: Sequence[StepTable]) -> None:
    """Warn of a scheduler that clips, with the difference to diffusers' own images on a sample."""
    own = teacher.own
    if own is None or not own.clips:
        return
    start = torch.from_numpy(noise([(0, i) for i in range(SAMPLE)], teacher.shape)[0])
    labels = teacher.labels(np.arange(SAMPLE))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t, labels)

    found = []
    for table in tables:
        steps = table.num_inference_steps
        ours, theirs = run_table(table, predict, start, seed=0), own.run(predict, start, steps, seed=0)
        levels = (_levels(teacher, ours) - _levels(teacher, theirs)).abs()
        found.append(f"{float(levels.mean()):.1f} on average and {int(levels.max())} at most at {steps} step(s)")
    _log.warning(
        "%s has %s, which a step table does not have, so the student samples without: the levels of %d sample images "
        "(0 to 255) differ from diffusers' by %s",
        own.name,
        " and ".join(f"{name}=True" for name in own.clips),
        SAMPLE,
        ", ".join(found),
    )


def _levels(teacher: Teacher, latents: Tensor) -> Tensor:
    return ((teacher.seen(latents) + 1) * 127.5).round()
