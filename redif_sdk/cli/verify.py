"""The command ``redif verify``. It needs numpy and an engine, no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from redif_sdk.cli.export import PARITY
from redif_sdk.cli.terminal import (
    GATE_FAILED,
    Json,
    Quiet,
    StudentFolderArgument,
    console_for,
    fail,
    listed,
    numbers,
    print_rows,
    sizes_of,
    write_rows,
)
from redif_sdk.errors import IntegrityError, ManifestError, ParityError

__all__ = ["verify_command"]

Strings = list[str] | None


def verify_command(
    folder: StudentFolderArgument,
    runtime: Annotated[
        Strings, typer.Option(metavar="NAME,...", help="Engines to check; default: those that run here.")
    ] = None,
    precision: Annotated[Strings, typer.Option(metavar="NAME,...", help="Precisions to check; default: all.")] = None,
    batches: Annotated[Strings, typer.Option(metavar="N,...", help="Batch sizes to check; default: all.")] = None,
    sizes: Annotated[Strings, typer.Option(metavar="HxW,...", help="Image sizes to check; default: all.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Check every file's hash and every graph's outputs.

    Graphs are compared with the recorded outputs of torch. Exits with 1 if a check fails. The hashes come first: an
    altered, missing or additional file is named, and nothing of the student is run. Nothing is written.
    """
    from redif_sdk.artifact.manifest import MANIFEST_NAME
    from redif_sdk.export.verify import absent, summary, verify
    from redif_sdk.progress import Progress

    counts, sides = numbers("--batches", batches) or None, sizes_of(sizes) or None
    try:
        with Progress(quiet).stage(f"verify {folder}"):
            precisions = listed(precision) or None
            rows = verify(folder, listed(runtime) or None, precisions=precisions, batches=counts, sizes=sides)
    except ManifestError as error:
        if not isinstance(error, IntegrityError) and not (folder / MANIFEST_NAME).is_file():
            raise  # this is no student; an altered manifest may be one that cannot even be read
        fail(str(error), GATE_FAILED)
    write_rows(json, "verify", rows)
    console = console_for(json, quiet)
    print_rows(console, PARITY, [row for row in rows if row["passed"] is not None])
    if failed := summary(rows):
        raise ParityError(f"{folder} failed: {failed}")
    passed = sum(bool(row["passed"]) for row in rows)
    console.print(f"{folder}: all hashes match, and all {passed} checks passed", soft_wrap=True)
    if unchecked := absent(rows):
        console.print(f"not checked here: {unchecked}", soft_wrap=True)
