"""The command `redif`. Each command reads its options, calls one function of the package, and prints what it returns.

Exit codes: 0 done; 1 the work failed a gate (parity, hashes in `verify`, divergence in training); 2 bad usage or input;
130 interrupted. What goes wrong on purpose is one line on standard error, "redif: ...". Commands import what they need
when they run, so that `redif generate` and `redif --help` never import torch.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.bench import bench_command
from redif_sdk.cli.card import card_command
from redif_sdk.cli.demo import demo_command
from redif_sdk.cli.distill import distill_command, eval_command, import_command, quickstart_command
from redif_sdk.cli.export import export_command, verify_command
from redif_sdk.cli.hub import pull_command, push_command
from redif_sdk.cli.serve import serve_command
from redif_sdk.cli.terminal import (
    BAD_INPUT,
    GATE_FAILED,
    INTERRUPTED,
    Json,
    Quiet,
    console_for,
    fail,
    print_rows,
    show_transfers,
    write_rows,
)
from redif_sdk.errors import InvalidRequest, ParityError, RedifError, TrainingDiverged

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["app", "main"]

# What typer raises for bad usage: click's class in older releases, its own copy in newer ones.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="redif",
    help="Few-step diffusion students: distil them by reinforcement, export them to ONNX, run them without torch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point: run the command, and turn what it raises into one line and an exit code."""
    arguments = sys.argv[1:] or ["--help"]
    warnings.filterwarnings("always", r".* is now ", DeprecationWarning, r"redif_sdk\.")
    try:
        code = app(arguments, prog_name="redif", standalone_mode=False)
    except _UsageError as error:
        usage: Any = error
        fail(f"{usage.format_message()} (redif --help says more)", BAD_INPUT)
    except (ParityError, TrainingDiverged) as error:
        fail(str(error), GATE_FAILED)
    except (RedifError, OSError) as error:
        fail(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed; pip install "redif-sdk[distill,export]" to train and export', BAD_INPUT)
    except MemoryError as error:
        fail(f"there is not enough memory: {error}", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


FINDINGS = {"subject": "subject", "status": "status", "detail": "detail"}


@app.command("generate")
def generate_command(
    student: Annotated[str, typer.Argument(metavar="DIR", help="A student's folder, or its id on the Hub.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to draw; a class by name of a class-conditional student.")
    ] = None,
    class_label: Annotated[list[str] | None, typer.Option(help="A class by number or name; may be repeated.")] = None,
    number: Annotated[int, typer.Option("-n", help="Pictures a prompt or class.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Network calls; default: the student's first.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same pictures.")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file for all pictures, or a folder (DIR/) for one file each.")
    ] = "out.png",
    height: Annotated[int | None, typer.Option(help="In pixels, of a student with free sizes.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, of a student with free sizes.")] = None,
    runtime: Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:N], dml[:N], coreml, gpu[:N] or npu.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16, bf16 or int8.")] = "auto",
    provider: Annotated[
        str | None, typer.Option(help="ONNX Runtime's execution provider, or the package of a plugin one.")
    ] = None,
    engine_dir: Annotated[Path | None, typer.Option(help="Where TensorRT engines lie; default: the cache.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all that the process may use.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a student on the Hub: a branch, a tag or a commit.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Generate pictures."""
    from redif_sdk.hub import is_hub_id
    from redif_sdk.pipeline import FastPipeline

    if is_hub_id(student) and not Path(student).is_dir():
        show_transfers(json, quiet)
    labels = [int(label) if label.lstrip("-").isdecimal() else label for label in class_label or []]
    pipe = FastPipeline.from_pretrained(
        student,
        runtime=runtime,
        device=device,
        precision=precision,
        num_threads=threads,
        provider=provider,
        engine_dir=engine_dir,
        revision=revision,
    )
    out = pipe(
        prompt or None,
        class_labels=labels or None,
        num_images_per_prompt=number,
        num_inference_steps=steps,
        seed=seed,
        height=height,
        width=width,
    )
    files = _save(out.images, output)
    used = {key: out.runtime_info[key] for key in ("runtime", "precision", "device", "component")}
    seconds = out.timings["total"] / len(files)
    rows = [
        {"file": file, "seed": number, "index": index, "seconds": seconds, **used}
        for file, (number, index) in zip(files, out.seeds, strict=True)
    ]
    write_rows(json, "generate", rows, device=out.runtime_info["device"])
    console_for(json, quiet).print(
        f"{', '.join(dict.fromkeys(files))}: {len(files)} picture(s), seed {out.seeds[0][0]}, "
        f"{out.timings['total']:.3f} s on {out.runtime_info['device']}",
        soft_wrap=True,
    )


def _save(images: Sequence[Image], output: str) -> list[str]:
    """Write all pictures as one sheet, or each into a folder; every file is written whole. The file of each picture."""
    from redif_sdk.artifact.atomic import atomic_write
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


app.command("card")(card_command)


@app.command("doctor")
def doctor_command(
    distill: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="Check a teacher in place of the machine, before hours of work."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the student that shall be distilled.")] = 4,
    reward: Annotated[str, typer.Option(help="That shall be used.")] = "feature",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Say what is installed, what shadows what, and what each engine can do here. Exits 1 if something is broken.

    With --distill: does the teacher's prediction type fit, is it deterministic, do its samples belong to their noise,
    does the reward tell actions apart, and how long would it take? Nothing is trained.
    """
    if distill is None:
        from redif_sdk.cli.doctor import examine

        rows = examine()
    else:
        from redif_sdk.distill.evaluation.examine import examine_teacher
        from redif_sdk.distill.teachers.base import Teacher

        rows = examine_teacher(Teacher.load(distill), num_inference_steps=steps, reward=reward)
    write_rows(json, "doctor", rows)
    print_rows(console_for(json, quiet), FINDINGS, rows)
    if broken := [row["subject"] for row in rows if row["status"] == "problem"]:
        fail(f"there are problems with {', '.join(broken)}", GATE_FAILED)


app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("bench")(bench_command)
app.command("serve")(serve_command)
app.command("demo")(demo_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("distill")(distill_command)
app.command("import")(import_command)
app.command("eval")(eval_command)
app.command("quickstart")(quickstart_command)
