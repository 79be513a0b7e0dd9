"""Teachers from folders: a UNet2DModel with its scheduler (DDPM, DDIM, EDM, rectified flow), or a whole pipeline.

Whole pipelines are loaded here, from local files and safetensors alone, and handed to `adapters.py`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.artifact.records import Condition, Latents, Postprocess
from redif_sdk.distill.teachers.base import SHIPPED, TEACHER_FILE, Teacher, fingerprint, noise_process
from redif_sdk.distill.teachers.own_scheduler import own_sampler
from redif_sdk.distill.teachers.saving import without_bars
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser

__all__ = ["from_folder", "from_pipeline", "load_pipeline", "pipeline_name", "takes"]


def takes(pipeline: Any) -> bool:
    """Whether a pipeline has a UNet2DModel and a scheduler, which is all that :func:`from_pipeline` needs."""
    from diffusers import UNet2DModel

    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    return isinstance(network, UNet2DModel) and scheduler is not None


def from_pipeline(pipeline: Any, **options: Any) -> Teacher:
    """DDPM, DDIM and any other pipeline that is a UNet2DModel and its scheduler."""
    scheduler = pipeline.scheduler
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    return _teacher(pipeline.unet, config, {}, None, type(pipeline).__name__, scheduler, **options)


def pipeline_name(folder: Path) -> str:
    """The class of pipelines that a folder is of; "" where it does not say. Raises InvalidRequest for no folder."""
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir() and p.name[0] not in "._"))
        raise InvalidRequest(
            f"{folder} is no folder and no shipped teacher; give a diffusers folder or one of: {known}"
        )
    index = folder / "model_index.json"
    found = _json(index, folder) if index.is_file() else {}
    return str(found.get("_class_name", ""))


def from_folder(folder: Path, name: str, **options: Any) -> Teacher:
    """A UNet2DModel's folder: ``unet/`` and ``scheduler/``. ``name``: of its pipeline, for what is refused."""
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    for needed in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / needed).is_file():
            if name:
                _refuse_pipeline(name)
            raise InvalidRequest(f"{folder} is no teacher: {needed} is missing; give a folder saved by diffusers")
    about = _json(folder / TEACHER_FILE, folder) if (folder / TEACHER_FILE).is_file() else {}
    scheduler_config = _json(folder / "scheduler/scheduler_config.json", folder)
    class_name = _json(folder / "unet/config.json", folder).get("_class_name")
    if class_name != "UNet2DModel":
        if name:
            _refuse_pipeline(name)
        raise UnsupportedModel(f"{folder}/unet is a {class_name}; this adapter takes UNet2DModel")
    try:
        network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(f"the weights in {folder}/unet cannot be read: {first}; copy the teacher again") from error
    return _teacher(network, scheduler_config, about, folder, folder.name, None, **options)


def load_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A whole pipeline from its folder, and what ``redif_teacher.json`` says. Nothing is fetched, no pickle is read.

    Raises:
        InvalidRequest: it cannot be loaded.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    about = _json(folder / TEACHER_FILE, folder) if (folder / TEACHER_FILE).is_file() else {}
    index = _json(folder / "model_index.json", folder)
    left_out: dict[str, Any] = dict.fromkeys(name for name, kind in index.items() if kind == [None, None])
    try:
        with without_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, **left_out
            )
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(f"the pipeline in {folder} cannot be loaded: {first}; copy it again") from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float32)  # diffusers' own warns of what it then does not do
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, about


def _refuse_pipeline(name: str) -> None:
    from redif_sdk.distill.teachers.adapters import adapter_of

    adapter_of(name)


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{folder} is no teacher: a JSON file in it does not parse ({error})") from error
    return found


def _teacher(
    network: Any,
    scheduler_config: dict[str, Any],
    about: dict[str, Any],
    folder: Path | None,
    name: str,
    scheduler: Any,
    *,
    prompts: Any = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
) -> Teacher:
    if prompts is not None:
        raise InvalidRequest(f"{name} draws no prompts; leave them out")
    config, size = network.config, network.config.sample_size
    if config.class_embed_type is not None:
        raise UnsupportedModel(f"class_embed_type {config.class_embed_type!r} is not supported; only a class table is")
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UnsupportedModel(f"the network's sample_size is {size!r:.50}; it must be one number or two")
    shuffle = about.get("pixel_shuffle", 1)
    for axis, asked in enumerate((height, width)):
        if asked is not None:
            sides[axis] = asked // shuffle
    classes = about.get("num_classes", config.num_class_embeds)
    network = network.float().eval().requires_grad_(False)
    denoiser = Denoiser(network, diffusers_call=True)

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        out: Tensor = denoiser.to(x.device)(x, t, condition)
        return out

    schedule, prediction_type, shift = noise_process(scheduler_config)
    teacher = Teacher(
        name=about.get("name", name),
        predict=predict,
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=Latents(channels=config.in_channels, height=sides[0], width=sides[1]),
        condition=Condition(kind="class", num_classes=classes, class_names=about.get("class_names"))
        if classes
        else None,
        postprocess=Postprocess(pixel_shuffle=shuffle),
        num_inference_steps=num_inference_steps or about.get("num_inference_steps", 50),
        make_student=lambda: Denoiser(copy.deepcopy(network).requires_grad_(True), diffusers_call=True),
        licence=about.get("licence", "unknown"),
        folder=folder,
        scheduler_config=scheduler_config,
        sampler=None if scheduler is None else own_sampler(scheduler),
        fingerprint=fingerprint([network], scheduler_config),
        extra=about,
    )
    return teacher.guided(about.get("guidance_scale", 1.0))
