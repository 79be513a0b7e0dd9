"""What the commands share: common options, lists of values, and how rows become a table or a file."""

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

    from redif_sdk.marks.signature import ContentSigner
    from redif_sdk.safety import SafetyFilter

__all__ = [
    "BAD_INPUT",
    "GATE_FAILED",
    "INTERRUPTED",
    "C2paCert",
    "C2paKey",
    "Device",
    "GuidanceScale",
    "Height",
    "Json",
    "NoMarks",
    "Precision",
    "PromptFile",
    "Quiet",
    "Runtime",
    "SafetyFilterFile",
    "StudentFolderArgument",
    "StudentRevision",
    "StudentsArgument",
    "TeacherArgument",
    "Threads",
    "TrainingDevice",
    "ValueRange",
    "Variant",
    "Width",
    "black_filter",
    "bytes_of",
    "console_for",
    "fail",
    "listed",
    "numbers",
    "print_rows",
    "show_transfers",
    "signer_of",
    "sizes_of",
    "teacher_options",
    "write_rows",
]

GATE_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
WIDE = 160  # columns

StudentFolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the student.")]
StudentsArgument = Annotated[
    list[str], typer.Argument(metavar="DIR...", help="Folders of students, or their ids on the Hub.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]
NoMarks = Annotated[
    bool, typer.Option("--no-marks", help="Do not write into files that they were generated, and by what.")
]
SafetyFilterFile = Annotated[
    Path | None,
    typer.Option(
        "--safety-filter",
        metavar="FILE",
        help="ONNX classifier (with its JSON beside it) that is asked about every image.",
    ),
]
C2paCert = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Sign the files (C2PA) with this certificate, PEM.")
]
C2paKey = Annotated[Path | None, typer.Option(metavar="FILE", help="The private key of --c2pa-cert, PEM.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda[:N], dml[:N], coreml, gpu[:N] or npu.")]
Precision = Annotated[
    str, typer.Option(help="auto, exact (fp32 on any device), fp32, fp16, bf16, int8, int8wo or int4wo.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all that the process may use.")]
StudentRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a student on the Hub.")]

TeacherArgument = Annotated[
    str,
    typer.Argument(metavar="TEACHER", help="A diffusers folder, or a shipped teacher: fashion-mnist, emoji, mini-sd."),
]
TrainingDevice = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto = a GPU if there is one.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Guidance scale of the teacher; default: its own; 0 or 1 = none.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for a text-to-image teacher, one a line.")
]
Height = Annotated[int | None, typer.Option(help="Image height in pixels, if the pipeline supports several sizes.")]
Width = Annotated[int | None, typer.Option(help="Image width in pixels, if the pipeline supports several sizes.")]
Variant = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Variant of the weights, as fp16; default: the plain files, or the only one."),
]

ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Value range of the teacher's images; default: its own, usually -1 1."),
]


def fail(message: str, code: int) -> NoReturn:
    """One line on standard error, and the exit code."""
    print("redif:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def listed(values: Sequence[str] | None) -> list[str]:
    """The items of an option that was repeated, or given with commas between, or both; each once, in order."""
    parts = [part.strip() for value in values or () for part in value.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def numbers(option: str, values: Sequence[str] | None) -> list[int]:
    """The whole numbers of a list option: ``--steps 1 --steps 2`` and ``--steps 1,2`` are [1, 2]."""
    parts = listed(values)
    for part in parts:
        if not re.fullmatch(r"[+-]?\d+", part):
            raise InvalidRequest(f"{option} is {part!r}; give whole numbers with commas between, as in 1,8")
    return [int(part) for part in parts]


def bytes_of(option: str, value: str | None) -> int | None:
    """The bytes of a size such as ``8GiB`` or ``500 MB``; None for None."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise InvalidRequest(f"{option} is {value!r}; give a size, as in 8GiB or 500MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def sizes_of(values: Sequence[str] | None) -> list[tuple[int, int]]:
    """The (height, width) pairs of the list option ``--sizes 28x28,56x28``."""
    found = []
    for part in listed(values):
        pair = re.fullmatch(r"(\d+)x(\d+)", part)
        if pair is None:
            raise InvalidRequest(f"--sizes is {part!r}; give HEIGHTxWIDTH with commas between, as in 28x28,56x28")
        found.append((int(pair[1]), int(pair[2])))
    return found


def signer_of(certificate: Path | None, key: Path | None) -> ContentSigner | None:
    """What signs image files; None: nothing does.

    Raises:
        InvalidRequest: one of the two is missing, or they cannot sign.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        given, other = ("--c2pa-key", "--c2pa-cert") if certificate is None else ("--c2pa-cert", "--c2pa-key")
        raise InvalidRequest(f"{given} needs {other} too; give a certificate and its private key")
    from redif_sdk.marks.signature import ContentSigner

    return ContentSigner.load(certificate, key)


def black_filter(file: Path | None, threads: int | None) -> SafetyFilter | None:
    """The safety filter of a server's students. It never raises: others' images may be in the same batch."""
    if file is None:
        return None
    from redif_sdk.safety import SafetyFilter

    return SafetyFilter.load(file, action="black", num_threads=threads)


def teacher_options(
    prompts: Path | None,
    height: int | None = None,
    width: int | None = None,
    value_range: tuple[float, float] | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """The arguments of ``Teacher.load`` that were given. The prompts are read from their file."""
    from redif_sdk.models.prompts import read_prompts

    texts = None if prompts is None else read_prompts(prompts)
    given = {"prompts": texts, "height": height, "width": width, "value_range": value_range, "variant": variant}
    return {name: value for name, value in given.items() if value is not None}


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
