"""The command ``redif push``: send a student to the Hugging Face Hub.

The Hub's client is imported when the command runs. It shows the progress of transfers itself, on standard error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    Json,
    Quiet,
    StudentFolderArgument,
    console_for,
    listed,
    print_rows,
    show_transfers,
    write_rows,
)
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from redif_sdk.hub import Pushed

__all__ = ["push_command"]

FILES = {"action": "action", "megabytes": "MB", "path": "path"}


def push_command(
    folder: StudentFolderArgument,
    repo_id: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="A repository on the Hub, as org/name; or --space.")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Also push a demo Space; without REPO, the Space holds the files."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility; default: public for a new repository, else unchanged."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch (made if missing), or refs/pr/N. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="TAG,...", help="Tags for the card; may be repeated.")
    ] = None,
    git_tag: Annotated[str | None, typer.Option(metavar="NAME", help="Git tag for the commit, as in v1.0.")] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Push even if the student did not pass its parity gate.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Push a student to the Hugging Face Hub.

    Files are checked here, sent as one commit, and checked there. The token is read from HF_TOKEN or from `hf auth
    login`. Repeat a push that was interrupted. A page made by `redif export --target web` can only be pushed to a
    Space.
    """
    from redif_sdk.hub import push, push_space

    if repo_id is None and space is None:
        raise InvalidRequest("no destination is given; name a repository as org/name, or a Space with --space org/name")
    if space is not None and create_pr:
        raise InvalidRequest("--pr opens a pull request, which a Space cannot show; push with --pr, or with --space")
    if repo_id is None:
        for option, given in (("--revision", revision), ("--git-tag", git_tag), ("--pr", create_pr), ("--tag", tag)):
            if given:
                raise InvalidRequest(f"{option} needs a repository for the student; give REPO before --space")
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
        sent = push(
            folder, repo_id, revision=revision, create_pr=create_pr, tags=listed(tag), git_tag=git_tag, **common
        )
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
            console.print(f"{place}: {megabytes:.1f} MB sent; the Hub's files match", soft_wrap=True)
    if space is not None and repo_id is not None and private:
        console.print(f"{repo_id} is private: give the Space {space} a token as its secret HF_TOKEN", soft_wrap=True)
