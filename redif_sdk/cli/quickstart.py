"""The command ``redif quickstart``. Torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from redif_sdk.cli.terminal import Json, Quiet, numbers
from redif_sdk.errors import InvalidRequest

__all__ = ["quickstart_command"]

Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="DIR", help="Folder for students, report and results; default: build/quickstart."
    ),
]
Text = Annotated[
    bool, typer.Option("--text", help="Text to image with mini-sd; the default folder is build/quickstart-text.")
]
Trained = Annotated[
    bool, typer.Option("--trained", help="With --text: use the students shipped with the teacher; train nothing.")
]
Steps = Annotated[
    list[str] | None,
    typer.Option("--steps", metavar="N,...", help="Steps of the students; default: 1,2,4; with --text 2,4."),
]
Preset = Annotated[str, typer.Option(help="Recipe and length: fast, balanced or best, as in redif distill --preset.")]
Minutes = Annotated[float, typer.Option(help="Limit on the minutes of training; a student that is cut says so.")]
Samples = Annotated[int | None, typer.Option(help="Held-out noises to judge on; default: 2000; with --text 1000.")]


def quickstart_command(
    output: Output = None,
    text: Text = False,
    teacher: Annotated[str, typer.Option(help="With --text: a text-to-image teacher's name or folder.")] = "mini-sd",
    trained: Trained = False,
    steps: Steps = None,
    preset: Preset = "fast",
    minutes: Minutes = 30,
    updates: Annotated[int | None, typer.Option(help="Updates of each student, instead of the preset's.")] = None,
    num_samples: Samples = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    rebuild_bank: Annotated[
        bool, typer.Option("--rebuild-bank", help="Sample the teacher again instead of using the shipped pairs (slow).")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Run the whole chain on a shipped teacher.

    Distil students, export, verify, generate and evaluate them, and write a report.
    """
    from redif_sdk.quickstart.images import quickstart
    from redif_sdk.quickstart.text import text_quickstart
    from redif_sdk.results import write_json

    shared: dict[str, Any] = {"preset": preset, "minutes": minutes, "updates": updates, "seed": seed, "quiet": quiet}
    counts = numbers("--steps", steps)
    if text:
        if rebuild_bank:
            raise InvalidRequest("--rebuild-bank does not apply to --text; leave out one of them")
        results = text_quickstart(
            output or Path("build/quickstart-text"),
            steps=counts or [2, 4],
            num_samples=num_samples or 1000,
            teacher=teacher,
            trained=trained,
            **shared,
        )
    else:
        if trained:
            raise InvalidRequest("--trained applies to --text only; leave it out, or add --text")
        results = quickstart(
            output or Path("build/quickstart"),
            steps=counts or [1, 2, 4],
            num_samples=num_samples or 2000,
            rebuild_bank=rebuild_bank,
            **shared,
        )
    if json:
        write_json(json, results)
