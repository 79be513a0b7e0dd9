"""The commands `redif push` and `redif pull`: what they take, what they call, what they print.

The Hub's client is imported when a command runs. It shows the progress of transfers by itself, on standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    Json,
    Quiet,
    StudentFolderArgument,
    console_for,
    print_rows,
    show_transfers,
    write_rows,
)
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from redif_sdk.hub import Pushed

__all__ = ["pull_command", "push_command"]

Repository = Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, as org/name.")]

FILES = {"action": "action", "megabytes": "MB", "path": "path"}


def push_command(
    folder: StudentFolderArgument,
    repo_id: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="A repository on the Hub, as org/name; or --space.")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Also a Space that shows it; without REPO, with its files inside."),
    ] = None,
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

    The token is that of HF_TOKEN or of `hf auth login`. A push that broke is simply repeated. A page of `redif export
    --target web` goes to a Space alone.
    """
    from redif_sdk.hub import push, push_space

    if repo_id is None and space is None:
        raise InvalidRequest("say where to: a repository as org/name, or a Space with --space org/name")
    if space is not None and create_pr:
        raise InvalidRequest("--pr opens a pull request, which a Space cannot show; push with --pr, or with --space")
    if repo_id is None:
        for option, given in (("--revision", revision), ("--git-tag", git_tag), ("--pr", create_pr), ("--tag", tag)):
            if given:
                raise InvalidRequest(f"{option} is for a repository of the student; give one before --space")
    show_transfers(json, quiet)
    common: dict[str, Any] = {
        "private": private,
        "commit_message": message,
        "allow_unverified": allow_unverified,
        "dry_run": dry_run,
    }
    done: list[Pushed] = []
    if space is not None:  # what is wrong with the Space is said before the student is sent
        done.append(push_space(folder, space, student_id=repo_id, **(common | {"dry_run": True})))
    if repo_id is not None:
        sent = push(folder, repo_id, revision=revision, create_pr=create_pr, tags=tag or (), git_tag=git_tag, **common)
        done.insert(0, sent)
    if space is not None and not dry_run:
        commit = done[0].commit if repo_id is not None else None
        done[-1] = push_space(folder, space, student_id=repo_id, student_commit=commit, **common)
    rows = [row | {"repo_id": to.repo_id, "commit": to.commit, "url": to.url} for to in done for row in to.rows]
    write_rows(json, "push", rows)
    console = console_for(json, quiet)
    for to in done:
        print_rows(console, FILES, [row | {"megabytes": (row["bytes"] or 0) / 1e6} for row in to.rows])
        megabytes = sum(row["bytes"] or 0 for row in to.rows if row["action"] in ("add", "replace")) / 1e6
        if dry_run:
            console.print(f"{to.repo_id}: {megabytes:.1f} MB would be sent; nothing was changed", soft_wrap=True)
        else:
            place = to.pull_request or to.url
            console.print(f"{place}: {megabytes:.1f} MB sent, and every file there is what was sent", soft_wrap=True)
    if space is not None and repo_id is not None and private:
        console.print(f"{repo_id} is private: give the Space {space} a token as its secret HF_TOKEN", soft_wrap=True)


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
