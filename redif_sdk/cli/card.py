"""The command ``redif card``: write the model card of a student's folder, or say whether it is up to date."""

from __future__ import annotations

from typing import Annotated

import typer

from redif_sdk.cli.terminal import Json, Quiet, StudentFolderArgument, console_for, write_rows
from redif_sdk.errors import ParityError

__all__ = ["card_command"]


def card_command(
    folder: StudentFolderArgument,
    check: Annotated[
        bool, typer.Option("--check", help="Only check; exit with 1 if the card is not up to date.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write the model card of a student.

    README.md is made from the manifest; your marked sections and your tags are kept."""
    from redif_sdk.artifact.folder import StudentFolder
    from redif_sdk.artifact.manifest import CARD_NAME
    from redif_sdk.card.render import read_card, render_folder, write_card

    student = StudentFolder(folder)
    old = read_card(folder)
    new = render_folder(folder, student.manifest)
    current = old is not None and old.replace("\r\n", "\n") == new
    if not check and not current:
        write_card(folder)
    written = not check and not current
    path = str(folder / CARD_NAME)
    write_rows(json, "card", [{"file": path, "up_to_date": current, "written": written, "bytes": len(new.encode())}])
    if check and not current:
        raise ParityError(f"{path} is not what {folder}'s manifest says; run redif card {folder}")
    console_for(json, quiet).print(f"{path}: {'written' if written else 'up to date'}", soft_wrap=True)
