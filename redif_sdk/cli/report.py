"""The command ``redif report``: the page of a run, from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redif_sdk.cli.terminal import Json, Quiet, console_for, write_rows

__all__ = ["report_command"]


def report_command(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run: OUTPUT.training.")],
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write report.html of a training run, finished or not.

    It has the run's curves and the same images over time; redif distill writes it at the end of a run."""
    from redif_sdk.distill.training.report import write_report

    path = write_report(run)
    write_rows(json, "report", [{"file": str(path), "bytes": path.stat().st_size}])
    console_for(json, quiet).print(f"{path}: open it in a browser", soft_wrap=True)
