"""What a student's folder has for plain diffusers: a scheduler that runs its table, and the pipeline around it."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TextCondition
from redif_sdk.card.diffusers_usage import stock_sampler
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.folders import without_bars
from redif_sdk.distill.teachers.weights import link_weights
from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.hollow import files_of
from redif_sdk.sampling.table import StepTable

__all__ = [
    "OWN_FOLDER",
    "class_path",
    "forget_origin",
    "pipeline_name",
    "refuse_default_times",
    "restore_pipeline_name",
    "scheduler_of",
    "write_index",
    "write_own",
    "write_part",
    "write_pipeline",
]

#: How the `_class_name` in a student's model_index.json begins: no class of diffusers, so DiffusionPipeline refuses it.
REFUSAL = "RedifStudent"

#: Of the weights of a network that is no class of diffusers.
OWN_FOLDER = "network"

BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def write_pipeline(teacher: Teacher, folder: Path, parts: dict[str, Any], *, link: bool = False) -> None:
    """The teacher's pipeline with ``parts`` in place of its own, without a safety checker: nothing here would run it.

    With ``link``, weights that are still those of the teacher's files are hard links to them. Every tokenizer has a
    ``tokenizer.json``, which is what deployers without transformers read.
    """
    pipeline = copy(teacher.pipeline)
    if pipeline_name(teacher, parts["scheduler"]) != type(pipeline).__name__:
        pipeline = _as_stable_diffusion(pipeline, parts)
    without = [name for name in ("safety_checker", "feature_extractor", "image_encoder") if hasattr(pipeline, name)]
    pipeline.register_modules(**parts, **dict.fromkeys(without))
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    with without_bars():
        for name, part in pipeline.components.items():
            if part is not None:
                write_part(part, folder / name, link)
        pipeline.save_config(folder)
    if teacher.prompts is not None:
        assert isinstance(teacher.condition, TextCondition)
        for spec in teacher.condition.tokenizers:
            if not (folder / spec.file).is_file():
                name = spec.file.partition("/")[0]
                backend = getattr(getattr(pipeline, name), "backend_tokenizer", None)
                if backend is None:
                    raise UnsupportedModel(f"the pipeline's {name} is no fast tokenizer, so it has no tokenizer.json")
                backend.save(str(folder / spec.file))


def write_part(part: Any, folder: Path, link: bool = False) -> None:
    """A part of a pipeline as its library saves it; with ``link``, unchanged weights as links to their files."""
    files = files_of(part) if link and isinstance(part, nn.Module) else ()
    if not files:
        part.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    if hasattr(part, "save_config"):
        part.save_config(folder)
    else:
        part.config.save_pretrained(folder)  # transformers
    link_weights(files, folder)


def write_own(network: nn.Module, folder: Path) -> None:
    """The weights of a network of somebody's own. Weights that share memory are written once."""
    folder.mkdir()
    save_model(network, str(folder / "model.safetensors"))


def pipeline_name(teacher: Teacher, scheduler: Any) -> str | None:
    """The class of pipelines that a student is saved as: its teacher's, if that takes the scheduler."""
    if teacher.pipeline is None:
        return None
    name = type(teacher.pipeline).__name__
    if name == "LatentConsistencyModelPipeline" and type(scheduler).__name__ != "LCMScheduler":
        return "StableDiffusionPipeline"  # it has the same parts, and tells the network the guidance scale too
    return name


def _as_stable_diffusion(pipeline: Any, parts: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    kept = {**pipeline.components, **parts, "safety_checker": None}
    return StableDiffusionPipeline(**kept, requires_safety_checker=False)


def write_index(folder: Path, manifest: Manifest) -> None:
    """Make ``DiffusionPipeline.from_pretrained(folder)`` raise with a reason instead of sampling at other times.

    diffusers looks ``_class_name`` up among its classes and names it in its error, so the reason stands there. The
    explicit class, with the scheduler and the times that the card gives, still loads a text-to-image student.
    """
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) if index.is_file() else {"_diffusers_version": version("diffusers")}
    lines = ", or the lines for diffusers in its README.md" if stock_sampler(manifest) else ""
    content["_class_name"] = (
        f"{REFUSAL}: {manifest.name} is a few-step student that samples at times of its own, which DiffusionPipeline "
        f"does not know; use redif_sdk.FastPipeline.from_pretrained{lines}"
    )
    index.write_text(json.dumps(content, indent=2) + "\n")


def restore_pipeline_name(folder: Path, name: str) -> None:
    """Undo `write_index` in a copy of a student's folder: its ``model_index.json`` names the pipeline ``name``."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    if str(content.get("_class_name")).startswith(REFUSAL):
        index.write_text(json.dumps(content | {"_class_name": name}, indent=2) + "\n")


def refuse_default_times(folder: Path, manifest: Manifest) -> None:
    """Make the saved DPM-Solver scheduler raise where a pipeline is called without the student's ``timesteps``.

    It uses ``timestep_spacing`` only to choose times by itself, and names an unknown one in its error.
    """
    config = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(config.read_text())
    if content.get("_class_name") == "DPMSolverMultistepScheduler":
        times = [int(time) for time in manifest.tables[0].timesteps]
        content["timestep_spacing"] = f"times of its own (give timesteps={times}, as in README.md): any other spacing"
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def forget_origin(config: Path) -> None:
    """Take the path that the model was loaded from out of diffusers' configuration: it names a machine's folders."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def class_path(module: nn.Module) -> str:
    """The module's class as ``package.module.Class``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def scheduler_of(teacher: Teacher, table: StepTable) -> Any:
    """The stock scheduler that runs ``table`` when it is given the table's times: first-order DPM-Solver is DDIM, and
    LCMScheduler is consistency multistep. Of flows it is the teacher's, which takes the table's times as sigmas.

    No stock scheduler takes a score network: its ``prediction_type`` is written as it is, and diffusers refuses it.
    """
    from diffusers import (
        DPMSolverMultistepScheduler,
        EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
    )

    if teacher.schedule.edm is not None and teacher.scheduler_config is not None:
        kept = {key: value for key, value in teacher.scheduler_config.items() if not key.startswith("_")}
        return EDMEulerScheduler.from_config(kept)
    if teacher.schedule.edm is not None:
        edm = asdict(teacher.schedule.edm)
        kind = "v_prediction" if edm.pop("v_prediction") else "epsilon"
        return EDMEulerScheduler(**edm, num_train_timesteps=len(teacher.schedule), prediction_type=kind)
    if teacher.schedule.flow and teacher.pipeline is not None:
        # a pipeline is given the table's noise levels, which are shifted already
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=len(teacher.schedule) - 1)
    if teacher.schedule.flow:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=len(teacher.schedule) - 1, shift=teacher.shift)
    if teacher.scheduler_config is not None:
        config = teacher.scheduler_config
        betas = {key: config[key] for key in BETAS if config.get(key) is not None}
    else:
        products = torch.tensor(teacher.schedule.alphas) ** 2
        ratios = products / torch.cat([torch.ones(1, dtype=products.dtype), products[:-1]])
        betas = {"trained_betas": (1 - ratios).tolist(), "num_train_timesteps": len(products)}
    if table.sampler == "consistency":
        return LCMScheduler(**betas, prediction_type=table.prediction_type, clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(
        **betas,
        prediction_type=table.prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=1,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        steps_offset=1,  # of no effect on trailing times; Stable Diffusion's pipelines warn of anything else
        thresholding=False,
    )
