"""What the commands share: their common options, and how rows become a table or a file.

Nothing here knows what a command does; `cli.py` collects the commands.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BAD_INPUT",
    "GATE_FAILED",
    "INTERRUPTED",
    "Json",
    "Quiet",
    "StudentFolderArgument",
    "console_for",
    "fail",
    "numbers",
    "print_rows",
    "show_transfers",
    "sizes_of",
    "write_rows",
]

GATE_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WIDE = 160  # columns

StudentFolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A student's folder.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def fail(message: str, code: int) -> NoReturn:
    """One line on standard error, and the exit code."""
    print("redif:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def numbers(option: str, text: str | None) -> list[int] | None:
    """The numbers of "1,8"."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(f"{option} is {text!r}; give numbers with commas between, as in 1,8") from None


def sizes_of(text: str | None) -> list[tuple[int, int]] | None:
    """The (height, width) pairs of "28x28,56x28"."""
    if text is None:
        return None
    pairs = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    if None in pairs:
        raise InvalidRequest(f"--sizes is {text!r}; give HEIGHTxWIDTH with commas between, as in 28x28,56x28")
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair]


def console_for(json: str | None, quiet: bool) -> Console:
    """Where tables go: standard output, unless JSON goes there."""
    from rich.console import Console

    console = Console(stderr=json == "-", quiet=quiet, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)  # a file or a pipe has no edge
    return console


def show_transfers(json: str | None, quiet: bool) -> None:
    """Let the Hub's client draw its bars on a terminal, unless the output is for a program, or none is wanted."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or json == "-" or not sys.stderr.isatty():
        disable_progress_bars()


def print_rows(console: Console, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print `rows`; `columns` are their keys with the heads to show."""
    from rich.table import Table

    table = Table(*columns.values(), box=None, header_style="bold", padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_rows(target: str | None, command: str, rows: Sequence[Mapping[str, Any]], device: str = "cpu") -> None:
    """Write the rows of `command` to the file `target`, or to standard output for ``-``; None: not at all."""
    if target is not None:
        from redif_sdk.results import document, write_json

        write_json(target, document(command, rows, device=device))
