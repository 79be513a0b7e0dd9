"""The command ``redif import``. Torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redif_sdk.cli.terminal import (
    GuidanceScale,
    Height,
    Json,
    Quiet,
    TeacherArgument,
    ValueRange,
    Variant,
    Width,
    numbers,
    teacher_options,
    write_rows,
)

__all__ = ["import_command"]

Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text-to-image: example prompts for the check and the card, one a line; default: four of ours.",
    ),
]


def import_command(
    pipeline: TeacherArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the student; must not exist.")
    ],
    steps: Annotated[
        list[str], typer.Option("--steps", metavar="N,...", help="Numbers of inference steps; may be repeated.")
    ],
    guidance_scale: GuidanceScale = None,
    prompts: Prompts = None,
    height: Height = None,
    width: Width = None,
    value_range: ValueRange = None,
    variant: Variant = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Scheduler to use in place of the pipeline's own, e.g. DDIMScheduler."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="LoRA (safetensors) to merge into the weights; may be repeated."),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Autoencoder to decode with in place of the pipeline's own, e.g. TAESD."),
    ] = None,
    link: Annotated[
        bool,
        typer.Option("--link", help="Link weights of a folder instead of copying them; never write to it afterwards."),
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Make a student from an existing pipeline as it is.

    Nothing is trained, and the pipeline's own scheduler is kept. One that has no step table (PNDM, DPM-Solver++(2M)) is
    refused: choose another with --scheduler. For LCM, Turbo, Lightning and schnell pipelines use --guidance-scale 1.
    """
    from redif_sdk.distill.student import import_pipeline
    from redif_sdk.progress import Progress

    counts, options = numbers("--steps", steps), teacher_options(prompts, height, width, value_range, variant)
    if scheduler is not None:
        options["scheduler"] = scheduler
    with Progress(quiet).stage(f"importing {pipeline}"):
        manifest = import_pipeline(
            pipeline,
            output,
            counts,
            guidance_scale=guidance_scale,
            loras=lora or (),
            decoder=decoder,
            link=link,
            **options,
        )
    write_rows(
        json, "import", [{"output": str(output), "num_inference_steps": count} for count in manifest.supported_steps]
    )
    if not quiet and json != "-":
        typer.echo(f"{output}: {manifest.name} at {', '.join(map(str, manifest.supported_steps))} step(s)")
