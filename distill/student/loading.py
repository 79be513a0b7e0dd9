"""A student's folder back into torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load
from torch import nn

from redif_sdk.artifact.examples import example_conditions, example_count
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.distill.student.base import Student
from redif_sdk.distill.teachers import saving
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.known_schedulers import noise_process
from redif_sdk.errors import InvalidRequest, ManifestError, RedifError, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.models.portable import filled
from redif_sdk.sampling.table import StepTable


def load_student(folder: str | Path, teacher: Teacher | None = None, *, network: nn.Module | None = None) -> Student:
    """A student folder back into torch, from a checked copy of its files: what was hashed is what is read.

    Args:
        teacher: what the student is of; None: what the manifest says of it.
        network: of a student that is a module of your own, one of that class. It is copied, and gets the folder's
            weights.

    Raises:
        ManifestError, IntegrityError: the folder is no student, was altered, or holds no network that diffusers makes.
        UnsupportedModel: its network is somebody's own, and none is given; or it is an inpainting student.
        InvalidRequest: the folder's weights are not those of ``network``.
    """
    checked = StudentFolder(Path(folder))
    manifest = checked.manifest
    if manifest.network.is_own and network is None:
        raise UnsupportedModel(
            f"the network of {folder} is a {manifest.network.class_path}, no class of diffusers; load it with "
            "load_student(folder, network=module)"
        )
    if manifest.network.inpainting:
        raise UnsupportedModel(
            f"{folder} is an inpainting student, which is exported and run, and neither trained nor evaluated; give a "
            "student that takes noise and a condition alone"
        )
    ours = _model_folders(manifest)
    others = {entry.path.partition("/")[0] for entry in manifest.files} - ours
    for part in ours - {"model_index.json"}:
        for path in checked.files(part):
            checked.read(path)
    with TemporaryDirectory(prefix="redif-") as copy:
        checked.copy_to(Path(copy), without=(*others, ""))
        try:
            if network is not None and manifest.network.is_own:
                source = _with_own(checked, Path(copy), network)
            else:
                source = _as_teacher(Path(copy), manifest)
        except InvalidRequest:
            raise
        except RedifError as error:
            raise ManifestError(str(error).replace(copy, str(folder))) from error
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ManifestError(f"{folder} holds no network that diffusers makes: {error!s:.300}") from error
    inner = source.make_student()
    if isinstance(inner, Denoiser):
        null = {} if source.prompts is None else {"null_class": source.prompts.null}
        guidance = manifest.network.guidance
        inner.guidance = guidance and guidance.model_copy(update=null)
        inner.guidance_range = manifest.network.guidance_range
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
    student.use_rows(teacher.rows if teacher else None)
    return student


def _with_own(student: StudentFolder, copied: Path, network: nn.Module) -> Teacher:
    """As :func:`_as_teacher`, of a network of somebody's own."""
    manifest, table = student.manifest, student.manifest.tables[0]
    files = [file for file in student.files(manifest.network.folder) if file.endswith(".safetensors")]
    weights = {key: value for file in files for key, value in load(student.read(file)).items()}
    own = filled(network, weights, f"{student.path}/{manifest.network.folder}")
    config = json.loads((copied / "scheduler" / "scheduler_config.json").read_text())
    schedule, _, shift = noise_process(config)
    classes = manifest.classes
    teacher = Teacher.from_callable(
        Denoiser(own, diffusers_call=False),
        schedule=schedule,
        prediction_type=table.prediction_type,
        shape=(manifest.latents.channels, manifest.latents.height, manifest.latents.width),
        student=own,
        num_classes=classes.num_classes if classes else None,
        conditions=_examples(student) if manifest.arrays else None,
        shift=shift,
        pixel_shuffle=manifest.postprocess.pixel_shuffle,
        name=manifest.name,
    )
    return replace(teacher.in_range(manifest.postprocess.value_range), scheduler_config=config)


def _examples(student: StudentFolder) -> dict[str, Any]:
    """The example conditions of a student on arrays, as its data."""
    return example_conditions(student, range(example_count(student)))


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
        height, width = manifest.latents.height, manifest.latents.width
        return replace(Teacher.from_diffusers(folder, height=height, width=width, checked=False), folder=None)
    saving.restore_pipeline_name(folder, manifest.network.pipeline)
    height, width, _ = manifest.image_shape
    sized: dict[str, Any] = {}
    if manifest.text is not None:
        sized = {"prompts": manifest.text.examples, "height": height, "width": width}
    source = Teacher.from_diffusers(folder, checked=False, **sized)
    if manifest.network.embedded_guidance is not None:
        source = source.guided(manifest.network.embedded_guidance)
    return replace(source, folder=None, guidance=None, sampler=None)
