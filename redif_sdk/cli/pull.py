"""The command ``redif pull``: download a student from the Hugging Face Hub.

The Hub's client is imported when the command runs. It shows the progress of transfers itself, on standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redif_sdk.cli.terminal import Json, Quiet, console_for, show_transfers, write_rows

__all__ = ["pull_command"]


def pull_command(
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, as org/name.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the student in DIR.")] = False,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Use the Hub's cache only; download nothing.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Pull a student from the Hugging Face Hub.

    Every file is checked. `redif generate REPO` needs no pull. Repeat a pull that failed: it goes on from what was
    downloaded.
    """
    from redif_sdk.hub import pull

    show_transfers(json, quiet)
    student, origin = pull(repo_id, output, revision=revision, local_files_only=local_files_only, overwrite=overwrite)
    rows = [{"path": entry.path, "bytes": entry.bytes, "commit": origin.commit} for entry in student.manifest.files]
    write_rows(json, "pull", rows)
    megabytes = sum(entry.bytes for entry in student.manifest.files) / 1e6
    console_for(json, quiet).print(
        f"{output}: {len(rows)} files, {megabytes:.1f} MB, from {repo_id} at {origin.commit}; all hashes match",
        soft_wrap=True,
    )
