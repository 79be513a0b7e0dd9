"""The command ``redif distill``. Torch is imported when it runs."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.settings import parse_settings, print_settings
from redif_sdk.cli.terminal import (
    GATE_FAILED,
    GuidanceScale,
    Height,
    Json,
    PromptFile,
    Quiet,
    TeacherArgument,
    ValueRange,
    Variant,
    Width,
    fail,
    teacher_options,
)
from redif_sdk.errors import InvalidRequest, WorseThanStart

if TYPE_CHECKING:
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.teachers.base import Teacher

__all__ = ["distill_command"]

Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the student; must not exist.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Network calls of the student for an image; default: 4.")]
Method = Annotated[
    str | None,
    typer.Option(help="redif (default), regression, progressive, consistency, dmd, dmd2, cdm, sgmd, draft or grpo."),
]
Reward = Annotated[
    str | None,
    typer.Option(help="feature, texture, pixel, ..., http://HOST/PATH, or several: texture+pixel; default: feature."),
]
Preset = Annotated[str | None, typer.Option(help="Recipe and its length: fast, balanced or best.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings; overrides the preset.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; may be repeated. Overrides the file."),
]
Updates = Annotated[int | None, typer.Option(help="Budget: optimiser updates; default: 600 if no budget is given.")]
Seconds = Annotated[float | None, typer.Option(help="Budget: wall seconds of training.")]
GuidanceRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guidance scales that the student takes as an input; default: one."),
]
TeacherCalls = Annotated[int | None, typer.Option(help="Budget: network calls of the teacher for the training pairs.")]
Start = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Begin with the weights of this student, not the teacher's.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")]
LoraRank = Annotated[int | None, typer.Option(help="Train low-rank adapters of this rank; default: all weights.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings, time and memory; train and write nothing.")]
RebuildBank = Annotated[bool, typer.Option("--rebuild-bank", help="Sample the teacher again, ignoring cached pairs.")]
ListSettings = Annotated[
    bool, typer.Option("--list-settings", is_eager=True, callback=print_settings, help="List all settings and exit.")
]


def distill_command(
    teacher: TeacherArgument,
    output: Output,
    steps: Steps = None,
    method: Method = None,
    reward: Reward = None,
    preset: Preset = None,
    config_file: Config = None,
    assignments: Set = None,
    updates: Updates = None,
    seconds: Seconds = None,
    teacher_calls: TeacherCalls = None,
    guidance_scale: GuidanceScale = None,
    guidance_range: GuidanceRange = None,
    prompts: PromptFile = None,
    height: Height = None,
    width: Width = None,
    value_range: ValueRange = None,
    variant: Variant = None,
    start: Start = None,
    resume: Resume = False,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw; default: 0.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default: auto, a GPU if there is one.")
    ] = None,
    lora_rank: LoraRank = None,
    dry_run: DryRun = False,
    rebuild_bank: RebuildBank = False,
    list_settings: ListSettings = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a student of few steps.

    Settings without an option here are given as --set NAME=VALUE or --NAME VALUE; --list-settings lists them.
    Checkpoint, log and report.html are written to OUTPUT.training. The student's folder appears when it is complete.
    """
    from redif_sdk.distill.presets import resolve
    from redif_sdk.distill.teachers.base import Teacher
    from redif_sdk.distill.teachers.large import half_of, sized

    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "method": method,
        "reward": reward,
        "updates": updates,
        "seconds": seconds,
        "teacher_calls": teacher_calls,
        "guidance_range": guidance_range,
        "seed": seed,
        "device": device,
        "lora_rank": lora_rank,
    }
    settings = partial(resolve, parse_settings(assignments, options), file=config_file, name=preset)
    _check(settings(), output, resume, start)
    given = teacher_options(prompts, height, width, value_range, variant)
    model = Teacher.load(teacher, **given, half=half_of(settings()))
    if guidance_scale is not None:
        model = model.guided(guidance_scale)
    config = settings(text=model.prompts is not None)  # text to image has presets of its own
    if config.teacher_steps is not None:
        model = model.at_steps(config.teacher_steps)
    config, model = sized(config, model)
    if dry_run:
        _dry_run(model, config, output, rebuild_bank, json, quiet)
    else:
        _run(model, config, output, start=start, resume=resume, rebuild_bank=rebuild_bank, json=json, quiet=quiet)


def _check(config: DistillConfig, output: Path, resume: bool, start: Path | None) -> None:
    """What can be refused before the teacher is loaded."""
    from redif_sdk.distill.compute.device import chosen_device
    from redif_sdk.distill.rewards import reward_names
    from redif_sdk.distill.student import check_targets, training_folder
    from redif_sdk.distill.training.checkpoint import CHECKPOINT

    check_targets(config, start)
    chosen_device(config.device)
    for asked in (config.get("reward"), config.get("judge")):
        if asked is not None:
            reward_names(asked)
    if output.exists():
        raise InvalidRequest(f"{output} exists already; remove it, or choose another -o")
    folder = training_folder(output)
    if (folder / CHECKPOINT).exists() and not resume:
        raise InvalidRequest(f"{folder} holds an unfinished run; continue it with --resume, or remove it")


def _dry_run(
    teacher: Teacher, config: DistillConfig, output: Path, rebuild_bank: bool, json: str | None, quiet: bool
) -> None:
    from redif_sdk.distill import pool
    from redif_sdk.distill.presets import as_yaml
    from redif_sdk.distill.student import check_run, pool_size
    from redif_sdk.distill.training.estimate import estimate
    from redif_sdk.results import document, write_json

    check_run(teacher, config)
    count = pool_size(teacher, config)
    there = config.targets == "teacher" and pool.is_there(teacher, count, "train") and not rebuild_bank
    row = asdict(estimate(teacher, config, count, pool_is_there=there)) | {"output": str(output)}
    if json:
        settings = config.model_dump(mode="json", fallback=str)
        write_json(json, document("distill --dry-run", [row | {"config": settings}]))
    if not quiet and json != "-":
        typer.echo(as_yaml(config))
        for name, value in row.items():
            typer.echo(f"# {name}: {value}")


def _run(
    teacher: Teacher,
    config: DistillConfig,
    output: Path,
    *,
    start: Path | None,
    resume: bool,
    rebuild_bank: bool,
    json: str | None,
    quiet: bool,
) -> None:
    """Train, save the student, and print where it is. Of processes that train together the first writes."""
    from redif_sdk.artifact.atomic import atomic_write
    from redif_sdk.distill.compute import random as draws
    from redif_sdk.distill.presets import as_yaml
    from redif_sdk.distill.student import distill, training_folder
    from redif_sdk.distill.training.checkpoint import CHECKPOINT
    from redif_sdk.distill.training.report import REPORT
    from redif_sdk.progress import Progress
    from redif_sdk.results import document, write_json

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WorseThanStart)  # it is the command's last line
        student = distill(
            teacher,
            config,
            start=start,
            folder=training_folder(output),
            resume=resume,
            progress=Progress(quiet),
            rebuild_pool=rebuild_bank,
        )
    if draws.rank():
        return
    manifest = student.save_pretrained(output)
    folder = training_folder(output)
    (folder / CHECKPOINT).unlink(missing_ok=True)  # the log stays, and the settings beside it
    atomic_write(folder / "config.yaml", as_yaml(config).encode())
    assert manifest.distillation is not None
    row = {
        "output": str(output),
        "method": config.method,
        "num_inference_steps": config.num_inference_steps,
        "timesteps": [float(t) for t in student.tables[0].timesteps],
        "seed": config.seed,
        "budget": manifest.distillation.budget.model_dump(),
        "checks": manifest.distillation.checks.model_dump() if manifest.distillation.checks else None,
    }
    if json:
        write_json(json, document("distill", [row]))
    if not quiet and json != "-":
        if (folder / REPORT).exists():
            typer.echo(f"{folder / REPORT}: curves, and the same images over time")
        typer.echo(
            f"{output}: a {config.num_inference_steps}-step student of {teacher.name}; next: redif export {output}"
        )
        if student.stopped:
            typer.echo(f"stopped early: {student.stopped}")
        if student.note:
            typer.echo(f"note: {student.note}")
    if student.worse:
        fail(f"{output}: {student.worse}", GATE_FAILED)
