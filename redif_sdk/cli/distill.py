"""The command line's ``distill``, ``import``, ``eval`` and ``quickstart``. Torch is imported when one of them runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file; - is standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="The teacher's classifier-free guidance, if not its own; 1 is none.")
]
Teacher = Annotated[str, typer.Argument(help="A diffusers folder, or a shipped teacher: fashion-mnist, emoji.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text-to-image: a file of prompts, one a line.")]
Height = Annotated[int | None, typer.Option(help="Of a picture in pixels, where the pipeline draws several sizes.")]
Width = Annotated[int | None, typer.Option(help="Likewise.")]


def _options(prompts: Path | None, height: int | None = None, width: int | None = None) -> dict[str, Any]:
    """What a teacher is loaded with, of what was given."""
    from redif_sdk.models.prompts import read_prompts

    given = {"prompts": None if prompts is None else read_prompts(prompts), "height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def _progress(quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=quiet,
    )


def distill_command(
    context: typer.Context,
    teacher: Teacher,
    output: Annotated[Path, typer.Option("-o", "--output", help="The student's folder; it must not exist yet.")],
    steps: Annotated[int, typer.Option("--steps", help="The student's network calls an image, K.")] = 4,
    method: Annotated[
        str, typer.Option(help="redif, regression, progressive, consistency, dmd2, draft or grpo.")
    ] = "redif",
    reward: Annotated[
        str,
        typer.Option(help="feature, texture, discriminator, ..., http://HOST/PATH of a black box; or texture+pixel."),
    ] = "feature",
    updates: Annotated[
        int | None, typer.Option(help="Budget: optimiser updates (600 when no budget is given).")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget: wall seconds of training.")] = None,
    teacher_calls: Annotated[int | None, typer.Option(help="Budget: teacher calls for the pool of pairs.")] = None,
    pool_size: Annotated[int, typer.Option(help="Pairs of (noise, teacher's output).")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Pairs an update.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    estimator: Annotated[str, typer.Option(help="redif: same-state, pathwise or trajectory.")] = "same-state",
    guidance_scale: GuidanceScale = None,
    prompts: PromptFile = None,
    height: Height = None,
    width: Width = None,
    reward_space: Annotated[str, typer.Option(help="What rewards see: images, or latents undecoded.")] = "images",
    warm_start: Annotated[float, typer.Option(help="redif: share of the run that is regression.")] = 0.7,
    segments: Annotated[
        float, typer.Option(help="Share of the run in which each step learns its own part of the teacher's path.")
    ] = 0.0,
    step_delta: Annotated[float, typer.Option(help="redif: rms step of the output along the reward's rise.")] = 0.15,
    exploration: Annotated[float, typer.Option(help="redif: standard deviation of an action.")] = 0.1,
    lora_rank: Annotated[int, typer.Option(help="Train low-rank adapters of this rank; 0: all weights.")] = 0,
    shard: Annotated[
        bool, typer.Option("--shard", help="Several processes (torchrun): each keeps a part of the weights (FSDP2).")
    ] = False,
    exploration_rank: Annotated[int, typer.Option(help="redif: principal components of it; 0: white.")] = 40,
    group_size: Annotated[int, typer.Option(help="redif: actions a state, or trajectories a start.")] = 16,
    start: Annotated[
        Path | None, typer.Option(help="Begin with this student's weights instead of the teacher's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: a GPU where there is one.")] = "auto",
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    preset: Annotated[str | None, typer.Option(help="A recipe and its length: fast, balanced or best.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="YAML of settings, over the preset; options are over both.")
    ] = None,
    early_stop: Annotated[
        int, typer.Option(help="End after so many checks in a row that are no better, or look hacked; 0: never.")
    ] = 0,
    tracker: Annotated[str | None, typer.Option(help="tensorboard: figures and pictures, beside the log.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings, time and memory; train and write nothing.")
    ] = False,
    rebuild_bank: Annotated[
        bool, typer.Option("--rebuild-bank", help="Sample the teacher anew for every pair.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a student of K network calls.

    Checkpoint and log are kept in OUTPUT.training; the student's folder appears when it is whole, and the log stays.
    """
    from redif_sdk.artifact.atomic import atomic_write
    from redif_sdk.distill import pool
    from redif_sdk.distill.compute import random as draws
    from redif_sdk.distill.compute.device import chosen_device
    from redif_sdk.distill.methods import make_method
    from redif_sdk.distill.presets import as_yaml, resolve
    from redif_sdk.distill.rewards import reward_names
    from redif_sdk.distill.student import distill, sample_pool, training_folder
    from redif_sdk.distill.student import pool_size as allowed
    from redif_sdk.distill.teachers.base import Teacher as TeacherModel
    from redif_sdk.distill.training.checkpoint import CHECKPOINT
    from redif_sdk.errors import InvalidRequest
    from redif_sdk.results import document, write_json

    options = {
        "num_inference_steps": steps,
        "method": method,
        "reward": reward,
        "reward_space": reward_space,
        "updates": updates,
        "seconds": seconds,
        "teacher_calls": teacher_calls,
        "pool_size": pool_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "estimator": estimator,
        "warm_start": warm_start,
        "segments": segments,
        "step_delta": step_delta,
        "lora_rank": lora_rank,
        "shard": shard,
        "exploration": exploration,
        "exploration_rank": exploration_rank,
        "group_size": group_size,
        "seed": seed,
        "device": device,
        "checkpoint_seconds": checkpoint_seconds,
        "early_stop": early_stop,
        "tracker": tracker,
    }
    renamed = {"num_inference_steps": "steps"}
    given = {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(renamed.get(name, name)), "name", "") == "COMMANDLINE"
    }
    config = resolve(given, file=config_file, name=preset)
    method, steps = config.method, config.num_inference_steps
    chosen_device(config.device)  # a device that is not there is refused first
    make_method(method)
    if config.get("reward") is not None:
        reward_names(config.get("reward"))
    if output.exists():
        raise InvalidRequest(f"{output} exists already; remove it, or choose another -o")
    folder = training_folder(output)
    if (folder / CHECKPOINT).exists() and not resume:
        raise InvalidRequest(f"{folder} holds an unfinished run; go on with --resume, or remove it")
    model = TeacherModel.load(teacher, **_options(prompts, height, width))
    if guidance_scale is not None:
        model = model.guided(guidance_scale)
    if model.prompts is not None:  # a preset means something else for text to image
        config = resolve(given, file=config_file, name=preset, text=True)
    count = allowed(model, config)
    if dry_run:
        from redif_sdk.distill.training.estimate import estimate

        there = pool.is_there(model, count, "train") and not rebuild_bank
        row = asdict(estimate(model, config, count, pool_is_there=there)) | {"output": str(output)}
        if json:
            write_json(json, document("distill --dry-run", [row | {"config": config.model_dump(mode="json")}]))
        if not quiet and json != "-":
            typer.echo(as_yaml(config))
            for name, value in row.items():
                typer.echo(f"# {name}: {value}")
        return
    draws.init_distributed()
    quiet = quiet or draws.rank() > 0
    with _progress(quiet) as progress:
        task = progress.add_task("teacher's outputs", total=count, note="")
        pairs = sample_pool(model, config, rebuild=rebuild_bank, on_batch=lambda n: progress.update(task, advance=n))
        progress.update(task, completed=count)
        task = progress.add_task(f"{method}, {steps} step(s)", total=1.0, note="")

        def show(done: float, figures: dict[str, float]) -> None:
            progress.update(task, completed=done, note=f"mse {figures.get('mse', float('nan')):.4f}")

        student = distill(model, config, start=start, folder=folder, resume=resume, on_progress=show, pairs=pairs)
    if draws.rank():
        return  # of processes that train together the first writes
    manifest = student.save_pretrained(output)
    (folder / CHECKPOINT).unlink(missing_ok=True)  # the log stays, and the settings beside it
    atomic_write(folder / "config.yaml", as_yaml(config).encode())
    assert manifest.distillation is not None
    row = {
        "output": str(output),
        "method": method,
        "num_inference_steps": steps,
        "timesteps": [float(t) for t in student.tables[0].timesteps],
        "seed": seed,
        "budget": manifest.distillation.budget.model_dump(),
    }
    if json:
        write_json(json, document("distill", [row]))
    if not quiet and json != "-":
        typer.echo(f"{output}: a {steps}-step student of {model.name}; next: redif export {output}")
        if student.stopped:
            typer.echo(f"stopped early: {student.stopped}")


def import_command(
    pipeline: Annotated[str, typer.Argument(help="A diffusers folder, or a shipped teacher's name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The student's folder; it must not exist yet.")],
    steps: Annotated[list[int], typer.Option("--steps", help="Steps an image; may be given several times.")],
    guidance_scale: GuidanceScale = None,
    prompts: PromptFile = None,
    height: Height = None,
    width: Width = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Take an existing pipeline as a student, as it is, at K steps of its own scheduler; nothing is trained.

    A scheduler that no step table can say (PNDM, DPM-Solver++(2M)) is replaced by DDIM. LCM, Turbo, Lightning and
    schnell pipelines are made for --guidance-scale 1.
    """
    from redif_sdk.distill.student import import_pipeline
    from redif_sdk.results import document, write_json

    options = _options(prompts, height, width)
    manifest = import_pipeline(pipeline, output, steps, guidance_scale=guidance_scale, **options)
    if json:
        rows = [{"output": str(output), "num_inference_steps": count} for count in manifest.supported_steps]
        write_json(json, document("import", rows))
    if not quiet and json != "-":
        typer.echo(f"{output}: {manifest.name} at {', '.join(map(str, manifest.supported_steps))} step(s)")


def eval_command(
    student: Annotated[Path, typer.Argument(help="A student's folder.")],
    against: Annotated[str, typer.Option(help="The teacher to compare with.")] = "fashion-mnist",
    num_samples: Annotated[int, typer.Option(help="Held-out noises to judge on.")] = 2000,
    data: Annotated[str | None, typer.Option(help="Take the real images from this data set: fashion-mnist.")] = None,
    prompts: PromptFile = None,
    baselines: Annotated[bool, typer.Option(help="Also judge untrained DDIM at the same steps.")] = True,
    save: Annotated[
        bool, typer.Option("--save", help="Record the figures in the student's manifest and card.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Frechet distances, controls, paired error, precision and recall, in features that gave no reward."""
    from redif_sdk.card.record import check_recordable, quality_rows, record
    from redif_sdk.distill.evaluation.arena import evaluate_folder, print_table
    from redif_sdk.results import document, write_json

    if save:
        check_recordable(student)
    with _progress(quiet) as progress:
        task = progress.add_task("evaluating", total=1.0, note="")
        rows = evaluate_folder(
            student,
            against,
            num_samples,
            data=data,
            baselines=baselines,
            **_options(prompts),
            on_progress=lambda done, note: progress.update(task, completed=done, note=note),
        )
    if save:
        record(student, quality_rows(rows))
    if json:
        write_json(json, document("eval", rows))
    if not quiet and json != "-":
        print_table(rows)


def quickstart_command(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for students, report and results; default build/quickstart."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Text to image: the mini Stable Diffusion; default build/quickstart-text.")
    ] = False,
    teacher: Annotated[str, typer.Option(help="With --text: another teacher's folder.")] = "mini-sd",
    trained: Annotated[
        bool, typer.Option("--trained", help="With --text: the students that come with the teacher; train nothing.")
    ] = False,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Students to make; default 1, 2 and 4, with --text 2 and 4.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Recipe and length: fast, balanced or best, as in redif distill --preset.")
    ] = "fast",
    minutes: Annotated[
        float, typer.Option(help="Limit on the minutes of training; a student that it cuts says so.")
    ] = 30,
    updates: Annotated[int | None, typer.Option(help="Updates a student, instead of the preset's.")] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Held-out noises to judge on; default 2000, with --text 1000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    rebuild_bank: Annotated[bool, typer.Option("--rebuild-bank", help="Sample the teacher anew (takes long).")] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """The main job end to end: distil the shipped teacher, export, verify, generate, evaluate, and write a report."""
    from redif_sdk.errors import InvalidRequest
    from redif_sdk.quickstart.images import quickstart
    from redif_sdk.quickstart.text import text_quickstart
    from redif_sdk.results import write_json

    shared: dict[str, Any] = {"preset": preset, "minutes": minutes, "updates": updates, "seed": seed, "quiet": quiet}
    if text:
        if rebuild_bank:
            raise InvalidRequest("--rebuild-bank is of the quickstart on classes; leave it out with --text")
        results = text_quickstart(
            output or Path("build/quickstart-text"),
            steps=steps or [2, 4],
            num_samples=num_samples or 1000,
            teacher=teacher,
            trained=trained,
            **shared,
        )
    else:
        if trained:
            raise InvalidRequest("--trained is of the quickstart with --text; leave it out, or add --text")
        results = quickstart(
            output or Path("build/quickstart"),
            steps=steps or [1, 2, 4],
            num_samples=num_samples or 2000,
            rebuild_bank=rebuild_bank,
            **shared,
        )
    if json:
        write_json(json, results)
