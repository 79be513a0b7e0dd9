"""The commands `redif push` and `redif pull`: what they take, what they call, what they print.

The Hub's client is imported when a command runs. It shows the progress of transfers by itself, on standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redif_sdk.terminal import (
    Json,
    Quiet,
    StudentFolderArgument,
    console_for,
    print_rows,
    show_transfers,
    write_rows,
)

__all__ = ["pull_command", "push_command"]

Repository = Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, as org/name.")]

FILES = {"action": "action", "megabytes": "MB", "path": "path"}


def push_command(
    folder: StudentFolderArgument,
    repo_id: Repository,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Default: public where it is made, else as it is.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, made where it is not there; or refs/pr/N. Default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request in place of a commit.")] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Of the commit.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word for the card's tags; may be repeated.")] = None,
    git_tag: Annotated[str | None, typer.Option(metavar="NAME", help="Name the commit, as in v1.0.")] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Also a student that did not pass its parity gate.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and change nothing.")] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Send a student to the Hugging Face Hub: checked here, sent as one commit, checked there.

    The token is that of HF_TOKEN or of `hf auth login`. A push that broke is simply repeated.
    """
    from redif_sdk.hub import push

    show_transfers(json, quiet)
    pushed = push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tags=tag or (),
        git_tag=git_tag,
        allow_unverified=allow_unverified,
        dry_run=dry_run,
    )
    rows = [row | {"commit": pushed.commit, "url": pushed.url} for row in pushed.rows]
    write_rows(json, "push", rows)
    console = console_for(json, quiet)
    print_rows(console, FILES, [row | {"megabytes": (row["bytes"] or 0) / 1e6} for row in rows])
    sent = sum(row["bytes"] or 0 for row in rows if row["action"] in ("add", "replace")) / 1e6
    if dry_run:
        console.print(f"{repo_id}: {sent:.1f} MB would be sent; nothing was changed", soft_wrap=True)
    else:
        place = pushed.pull_request or pushed.url
        console.print(f"{place}: {sent:.1f} MB sent, and every file there is what was sent", soft_wrap=True)


def pull_command(
    repo_id: Repository,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")],
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit; default: main.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the student that is in DIR.")] = False,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Take what is in the Hub's cache; download nothing.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Get a whole student from the Hugging Face Hub, every file checked. `redif generate REPO` needs no pull.

    What was downloaded when it failed is kept: repeat the command to go on.
    """
    from redif_sdk.hub import pull

    show_transfers(json, quiet)
    student, origin = pull(repo_id, output, revision=revision, local_files_only=local_files_only, overwrite=overwrite)
    rows = [{"path": entry.path, "bytes": entry.bytes, "commit": origin.commit} for entry in student.manifest.files]
    write_rows(json, "pull", rows)
    megabytes = sum(entry.bytes for entry in student.manifest.files) / 1e6
    console_for(json, quiet).print(
        f"{output}: {len(rows)} files, {megabytes:.1f} MB, of {repo_id} at {origin.commit}; all are unaltered",
        soft_wrap=True,
    )
