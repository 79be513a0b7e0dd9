"""The command `redif`. Each command reads its options, calls one function of the package, and prints what it returns.

Exit codes: 0 done; 1 the work failed a gate (parity, hashes in `verify`, divergence in training); 2 bad usage or input;
130 interrupted. What goes wrong on purpose is one line on standard error, "redif: ...". Commands import what they need
when they run, so that `redif generate` and `redif --help` never import torch.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.distill.commands import distill_command, eval_command, import_command, quickstart_command
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError, ParityError, RedifError, TrainingDiverged

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

__all__ = ["app", "main"]

GATE_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

# What typer raises for bad usage: click's class in older releases, its own copy in newer ones.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="redif",
    help="Few-step diffusion students: distil them by reinforcement, export them to ONNX, run them without torch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Student = Annotated[Path, typer.Argument(metavar="DIR", help="A student's folder.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def main() -> None:
    """The entry point: run the command, and turn what it raises into one line and an exit code."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="redif", standalone_mode=False)
    except _UsageError as error:
        usage: Any = error
        _fail(f"{usage.format_message()} (redif --help says more)", BAD_INPUT)
    except (ParityError, TrainingDiverged) as error:
        _fail(str(error), GATE_FAILED)
    except (RedifError, OSError) as error:
        _fail(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is not installed; pip install "redif-sdk[distill,export]" to train and export', BAD_INPUT)
    except MemoryError as error:
        _fail(f"there is not enough memory: {error}", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print("redif:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _console(json: str | None, quiet: bool) -> Console:
    """Where tables go: standard output, unless JSON goes there."""
    from rich.console import Console

    return Console(stderr=json == "-", quiet=quiet, highlight=False, markup=False)


def _table(console: Console, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
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
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _write_json(target: str | None, command: str, rows: Sequence[Mapping[str, Any]], device: str = "cpu") -> None:
    if target is not None:
        from redif_sdk.report import document, write_json

        write_json(target, document(command, rows, device=device))


FINDINGS = {"subject": "subject", "status": "status", "detail": "detail"}
PARITY = {
    "component": "component",
    "runtime": "runtime",
    "precision": "prec",
    "num_inference_steps": "steps",
    "batch": "batch",
    "max_abs": "max_abs",
    "relative_rmse": "rel_rmse",
    "psnr": "psnr",
    "threshold": "threshold",
    "passed": "passed",
}


@app.command("export")
def export_command(
    folder: Student,
    target: Annotated[
        list[str] | None, typer.Option(help="What to compile to; may be repeated. Default: onnx.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Of graphs; may be repeated. Default: fp32.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compile a student to ONNX: the network, and the fused generator; checked against torch."""
    from redif_sdk.export import export

    console = _console(json, quiet)
    with console.status("compiling") if console.is_terminal else nullcontext():
        manifest = export(folder, target or ["onnx"], precision or ["fp32"])
    _write_json(json, "export", manifest.verification)
    _table(console, PARITY, manifest.verification)
    console.print(f"{folder}: {', '.join(graph.file for graph in manifest.graphs)}", soft_wrap=True)


@app.command("verify")
def verify_command(
    folder: Student,
    runtime: Annotated[list[str] | None, typer.Option(help="Engines to check; default: those installed.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Check every file's hash, and every graph against the recorded torch outputs. Writes nothing; exits 1 if it fails.

    The hashes come first: an altered, missing or additional file is named, and nothing of the student is run.
    """
    from redif_sdk.export.verify import summary, verify
    from redif_sdk.manifest import MANIFEST_NAME

    try:
        rows = verify(folder, runtime)
    except ManifestError as error:
        if not isinstance(error, IntegrityError) and not (folder / MANIFEST_NAME).is_file():
            raise  # this is no student; an altered manifest may be one that cannot even be read
        _fail(str(error), GATE_FAILED)
    _write_json(json, "verify", rows)
    console = _console(json, quiet)
    _table(console, PARITY, rows)
    if failed := summary(rows):
        raise ParityError(f"{folder} failed: {failed}")
    console.print(f"{folder}: every file is unaltered, and all {len(rows)} checks passed", soft_wrap=True)


@app.command("generate")
def generate_command(
    student: Annotated[str, typer.Argument(metavar="DIR", help="A student's folder, or its id on the Hub.")],
    prompt: Annotated[str | None, typer.Argument(help="A class by name.")] = None,
    class_label: Annotated[list[str] | None, typer.Option(help="A class by number or name; may be repeated.")] = None,
    number: Annotated[int, typer.Option("-n", help="Pictures a class.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Network calls; default: the student's first.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same pictures.")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file for all pictures, or a folder (DIR/) for one file each.")
    ] = "out.png",
    runtime: Annotated[str, typer.Option(help="auto or onnxruntime.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto or fp32.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: the engine's.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Generate pictures."""
    from redif_sdk.pipeline import FastPipeline

    labels = [int(label) if label.lstrip("-").isdecimal() else label for label in class_label or []]
    pipe = FastPipeline.from_pretrained(
        student, runtime=runtime, device=device, precision=precision, num_threads=threads
    )
    out = pipe(
        prompt,
        class_labels=labels or None,
        num_images_per_prompt=number,
        num_inference_steps=steps,
        seed=seed,
    )
    files = _save(out.images, output)
    used = {key: out.runtime_info[key] for key in ("runtime", "precision", "device", "component")}
    seconds = out.timings["total"] / len(files)
    rows = [
        {"file": file, "seed": number, "index": index, "seconds": seconds, **used}
        for file, (number, index) in zip(files, out.seeds, strict=True)
    ]
    _write_json(json, "generate", rows, device=out.runtime_info["device"])
    _console(json, quiet).print(
        f"{', '.join(dict.fromkeys(files))}: {len(files)} picture(s), seed {out.seeds[0][0]}, "
        f"{out.timings['total']:.3f} s on {out.runtime_info['device']}",
        soft_wrap=True,
    )


def _save(images: Sequence[Image], output: str) -> list[str]:
    """Write all pictures as one sheet, or each into a folder; every file is written whole. The file of each picture."""
    from redif_sdk.files import atomic_write
    from redif_sdk.images import contact_sheet

    path = Path(output)
    as_folder = output.endswith(("/", "\\")) or path.is_dir()
    files = [path / f"{index}.png" for index in range(len(images))] if as_folder else [path]
    sheets = list(images) if as_folder else [contact_sheet(images)]
    encoded = []
    for sheet, file in zip(sheets, files, strict=True):
        buffer = io.BytesIO()
        try:
            sheet.save(buffer, format=_format(file))
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"{file} is no name for a picture ({error}); use one that ends in .png") from error
        encoded.append(buffer.getvalue())
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, data in zip(files, encoded, strict=True):
        atomic_write(file, data)
    return [str(file) for file in files] if as_folder else [output] * len(images)


def _format(file: Path) -> str:
    from PIL import Image

    return Image.registered_extensions()[file.suffix.lower()]


@app.command("doctor")
def doctor_command(json: Json = None, quiet: Quiet = False) -> None:
    """Say what is installed, what shadows what, and what each engine can do here. Exits 1 if something is broken."""
    from redif_sdk.doctor import examine

    rows = examine()
    _write_json(json, "doctor", rows)
    _table(_console(json, quiet), FINDINGS, rows)
    if broken := [row["subject"] for row in rows if row["status"] == "problem"]:
        _fail(f"there are problems with {', '.join(broken)}", GATE_FAILED)


app.command("distill")(distill_command)
app.command("import")(import_command)
app.command("eval")(eval_command)
app.command("quickstart")(quickstart_command)
