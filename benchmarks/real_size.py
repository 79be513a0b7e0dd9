"""Models of real size through the whole chain: import, export and gate, one image, each in a process of its own.

    python -m benchmarks.real_size sd15 --work build/real --json docs/results/real-size-sd15.json

Weights are random (`real_shapes.py`). Each row has the seconds, the peak memory and the size on disk. ``--rounds N``
draws the image N times with each contender, in turn. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import measured
from benchmarks.real_shapes import SHAPES, make, tiny_decoder
from redif_sdk.results import document, write_json

STEPS = 4
CONTENDERS = ("diffusers", "onnxruntime", "openvino")
REDIF = (sys.executable, "-c", "from redif_sdk.cli.main import main; main()")

#: Draws one image as diffusers does, and prints the seconds of the second call.
DIFFUSERS = """
import sys, time, torch
from diffusers import DiffusionPipeline
folder, steps, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
for _ in range(2):
    began = time.perf_counter()
    pipeline("a cat", num_inference_steps=steps, guidance_scale=1.0, height=side, width=side, output_type="np")
    print(time.perf_counter() - began, flush=True)
"""

#: The same with a student on one engine; "low" after it frees each graph after its use, and draws one image.
STUDENT = """
import sys, time
from redif_sdk import FastPipeline
folder, steps, side, runtime, precision = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
low, runtime = runtime.endswith(" low"), runtime.partition(" ")[0]
pipeline = FastPipeline.from_pretrained(folder, runtime=runtime, precision=precision, low_memory=low)
for _ in range(1 if low else 2):
    began = time.perf_counter()
    image = pipeline("a cat", num_inference_steps=steps, height=side, width=side, seed=0, output_type="np").images
    assert image.std() > 0.01, "the image is flat"
    print(time.perf_counter() - began, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES])
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--precision", default="fp32", help="comma-separated; each is exported, and draws images")
    parser.add_argument("--side", type=int, default=512, help="pixels of the image")
    parser.add_argument("--rounds", type=int, default=3, help="images with each contender; 0: none")
    parser.add_argument("--keep", action="store_true", help="take the pipeline and the student that are there")
    parser.add_argument("--link", action="store_true", help="import by hard links")
    parser.add_argument("--tiny-decoder", action="store_true", help="decode with a network of TAESD's shape")
    parser.add_argument("--max-memory", help="of the export, e.g. 6GiB")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="comma-separated; an engine may end in ' low'"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="draws too: COMMAND STEPS SIDE (peers/README.md)",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [] if arguments.keep and student_of(arguments).is_dir() else chain(arguments)
    if arguments.rounds:
        rows += images(arguments)
    if arguments.json is not None:
        write_json(arguments.json, document("real_size", rows))


def student_of(asked: argparse.Namespace) -> Path:
    """Where the student lies."""
    folder: Path = asked.work / f"{asked.shape}-{'tiny-' * asked.tiny_decoder}student"
    return folder


def chain(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Import and export."""
    shape, precision = asked.shape, asked.precision
    source, student = asked.work / shape, student_of(asked)
    if not source.is_dir():
        make(shape, source)
    shutil.rmtree(student, ignore_errors=True)
    options = ["-o", str(student), "--steps", str(STEPS), "--guidance-scale", "1", *["--link"] * asked.link]
    if asked.tiny_decoder:
        options += ["--decoder", str(tiny_decoder(asked.work / "taesd"))]
    most = [] if asked.max_memory is None else ["--max-memory", asked.max_memory]
    rows = [_measured("import", shape, [*REDIF, "import", str(source), *options])]
    rows[-1] |= {"source_bytes": _size(source), "bytes": _size(student)}
    _print(rows[-1])
    rows += [_measured("export", shape, [*REDIF, "export", str(student), "--precision", precision, *most])]
    rows[-1] |= {"precision": precision, "bytes": _size(student / "onnx"), "graphs": _sizes(student / "onnx")}
    _print(rows[-1])
    return rows


def images(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One image with each contender, in turn."""
    shape, student, given = asked.shape, str(student_of(asked)), [str(STEPS), str(asked.side)]
    commands = {}
    for name in asked.contenders.split(","):
        if name == "diffusers":
            commands[name] = [sys.executable, "-c", DIFFUSERS, str(asked.work / shape), *given]
            continue
        for precision in asked.precision.split(","):
            commands[f"{name} {precision}"] = [sys.executable, "-c", STUDENT, student, *given, name, precision]
    for peer in asked.peer:
        name, _, command = peer.partition("=")
        commands[name] = [*shlex.split(command), *given]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(asked.rounds):
        for name, command in commands.items():
            found[name].append(_measured(name, shape, command))
            _print(found[name][-1])
    return [_median(name, shape, runs) for name, runs in found.items()]


def _median(name: str, shape: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = ("seconds", "first_image", "second_image", "peak_rss", "peak_anonymous")
    return {"what": name, "shape": shape, "rounds": len(runs)} | {
        figure: statistics.median(run[figure] for run in runs) for figure in figures if figure in runs[0]
    }


def _measured(what: str, shape: str, command: Sequence[str]) -> dict[str, Any]:
    """A row of a command that ran; of two images it printed the seconds."""
    row = measured(command)
    drawn = {}
    if what not in ("import", "export"):
        drawn = dict(zip(("first_image", "second_image"), map(float, row.output.split()), strict=False))
    return {"what": what, "shape": shape, **row, **drawn}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each graph, its weights included."""
    found: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.partition(".onnx")[0]
        found[name] = found.get(name, 0) + path.stat().st_size
    return found


def _print(row: dict[str, Any]) -> None:
    memory = f"{row['peak_rss'] / 2**30:.2f} GiB resident, {row['peak_anonymous'] / 2**30:.2f} anonymous"
    size = f", {row['bytes'] / 1e9:.2f} GB" if "bytes" in row else ""
    drawn = [f"{row[name]:.1f}" for name in ("first_image", "second_image") if name in row]
    image = f", images {' and '.join(drawn)} s" if drawn else ""
    print(f"{row['what']:18} {row['shape']}: {row['seconds']:.1f} s, {memory}{size}{image}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
