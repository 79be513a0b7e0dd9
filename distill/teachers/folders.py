"""Teachers' folders, as diffusers saves them: where one lies, and what is in it. No pickle is read.

``redif_teacher.json`` beside ``model_index.json`` says what diffusers has no place for (`TEACHER_FILE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redif_sdk.distill.teachers.facts import read_facts
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.hub import fetch, is_hub_id
from redif_sdk.textfile import read_json_file

__all__ = [
    "SHIPPED",
    "TEACHER_FILE",
    "UNetFolder",
    "holds_unet",
    "load_pipeline",
    "load_unet",
    "locate",
    "pipeline_name",
]

SHIPPED = Path(__file__).parent.parent / "shipped"
TEACHER_FILE = "redif_teacher.json"
HUB_FILES = (
    TEACHER_FILE,
    "model_index.json",
    *(f"*/*.{kind}" for kind in ("json", "safetensors", "txt", "model")),  # networks, schedulers, tokenizers
)
UNET_FILE, SCHEDULER_FILE = "unet/config.json", "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class UNetFolder:
    """A UNet2DModel and the configuration of its scheduler, from a folder that need not hold a whole pipeline."""

    name: str
    unet: Any
    scheduler: dict[str, Any]


def locate(source: str | Path) -> tuple[Path, str | None]:
    """The folder of a teacher: a shipped one by its name, a folder itself, or the download of a Hub id.

    Returns:
        The folder, and of a download its commit.
    """
    if (SHIPPED / str(source) / TEACHER_FILE).is_file():
        return SHIPPED / str(source), None
    if not Path(source).exists() and is_hub_id(str(source)):
        folder = fetch(str(source), HUB_FILES)
        return folder, folder.name
    return Path(source), None


def pipeline_name(folder: Path) -> str:
    """The class of the pipeline in ``folder``; "" where ``model_index.json`` does not say.

    Raises:
        InvalidRequest: there is no such folder.
    """
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir() and p.name[0] not in "._"))
        raise InvalidRequest(
            f"{folder} is no folder and no shipped teacher; give a diffusers folder or one of: {known}"
        )
    index = folder / "model_index.json"
    found = _json(index, folder) if index.is_file() else {}
    return str(found.get("_class_name", ""))


def is_unet_with_scheduler(pipeline: Any) -> bool:
    """Whether a pipeline has a UNet2DModel and a scheduler, which is all that a teacher of pixels needs."""
    from diffusers import UNet2DModel

    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    return isinstance(network, UNet2DModel) and scheduler is not None


def holds_unet(folder: Path) -> bool:
    """Whether ``folder`` has a UNet2DModel and a scheduler, as :func:`load_unet` takes them."""
    there = all((folder / needed).is_file() for needed in (UNET_FILE, SCHEDULER_FILE))
    return there and _json(folder / UNET_FILE, folder).get("_class_name") == "UNet2DModel"


def load_unet(folder: Path) -> tuple[UNetFolder, dict[str, Any]]:
    """A UNet2DModel and its scheduler's configuration, and what ``redif_teacher.json`` says.

    Raises:
        InvalidRequest: a file is missing or cannot be read.
        UnsupportedModel: ``unet/`` holds a network of another class.
    """
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    for needed in (UNET_FILE, SCHEDULER_FILE):
        if not (folder / needed).is_file():
            raise InvalidRequest(f"{folder} is no teacher: {needed} is missing; give a folder saved by diffusers")
    about, scheduler = _about(folder), _json(folder / SCHEDULER_FILE, folder)
    class_name = _json(folder / UNET_FILE, folder).get("_class_name")
    if class_name != "UNet2DModel":
        raise UnsupportedModel(f"{folder}/unet is a {class_name}; this adapter takes UNet2DModel")
    try:
        network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(f"the weights in {folder}/unet cannot be read: {first}; copy the teacher again") from error
    return UNetFolder(folder.name, network, scheduler), about


def load_pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A whole pipeline from its folder, and what ``redif_teacher.json`` says. Nothing is fetched, no pickle is read.

    Raises:
        InvalidRequest: it cannot be loaded.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    about = _about(folder)
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


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars that transformers and diffusers draw while they load and save a file, and without transformers'
    remark that torchvision is absent: it reads no image here."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = [(log, log.is_progress_bar_enabled()) for log in (ours, theirs)]
    for log, _ in before:
        log.disable_progress_bar()
    loud = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(loud)
        for log, shown in before:
            if shown:
                log.enable_progress_bar()


def _about(folder: Path) -> dict[str, Any]:
    return read_facts(folder / TEACHER_FILE) if (folder / TEACHER_FILE).exists() else {}


def _json(path: Path, folder: Path) -> dict[str, Any]:
    found = read_json_file(path, f"a file of the teacher {folder.name}")
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}, not an object; copy the teacher again")
    return found
