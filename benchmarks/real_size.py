"""Models of real size through the whole chain: import, export and gate, one image, each in a process of its own.

    python -m benchmarks.real_size sd15 --work build/real --json docs/results/real-size-sd15.json

Weights are random (`real_shapes.py`). Each row has the seconds, the peak memory and the size on disk. ``--rounds N``
draws the image N times with each contender, in turn. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import measured
from benchmarks.real_shapes import SHAPES, make
from redif_sdk.results import document, write_json

STEPS = 4
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

#: The same with a student on one engine.
STUDENT = """
import sys, time
from redif_sdk import FastPipeline
folder, steps, side, runtime, precision = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
pipeline = FastPipeline.from_pretrained(folder, runtime=runtime, precision=precision)
for _ in range(2):
    began = time.perf_counter()
    pipeline("a cat", num_inference_steps=steps, height=side, width=side, seed=0)
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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = chain(arguments.shape, arguments.work, arguments.precision, arguments.keep)
    if arguments.rounds:
        precisions = arguments.precision.split(",")
        rows += images(arguments.shape, arguments.work, arguments.side, arguments.rounds, precisions)
    if arguments.json is not None:
        write_json(arguments.json, document("real_size", rows))


def chain(shape: str, work: Path, precision: str, keep: bool) -> list[dict[str, Any]]:
    """Import and export."""
    source, student = work / shape, work / f"{shape}-student"
    if not source.is_dir():
        make(shape, source)
    if keep and student.is_dir():
        return []
    shutil.rmtree(student, ignore_errors=True)
    options = ["-o", str(student), "--steps", str(STEPS), "--guidance-scale", "1"]
    rows = [_measured("import", shape, [*REDIF, "import", str(source), *options])]
    rows[-1] |= {"source_bytes": _size(source), "bytes": _size(student)}
    rows += [_measured("export", shape, [*REDIF, "export", str(student), "--precision", precision])]
    rows[-1] |= {"precision": precision, "bytes": _size(student / "onnx"), "graphs": _sizes(student / "onnx")}
    for row in rows:
        _print(row)
    return rows


def images(shape: str, work: Path, side: int, rounds: int, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """One image with each contender, in turn."""
    student = str(work / f"{shape}-student")
    given = [str(STEPS), str(side)]
    commands = {"diffusers": [sys.executable, "-c", DIFFUSERS, str(work / shape), *given]}
    for engine, precision in itertools.product(("onnxruntime", "openvino"), precisions):
        commands[f"{engine} {precision}"] = [sys.executable, "-c", STUDENT, student, *given, engine, precision]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(_measured(name, shape, command))
            _print(found[name][-1])
    return [_median(name, shape, runs) for name, runs in found.items()]


def _median(name: str, shape: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = ("seconds", "first_image", "second_image", "peak_rss", "peak_anonymous")
    return {"what": name, "shape": shape, "rounds": len(runs)} | {
        figure: statistics.median(run[figure] for run in runs) for figure in figures
    }


def _measured(what: str, shape: str, command: Sequence[str]) -> dict[str, Any]:
    """A row of a command that ran; of two images it printed the seconds."""
    row = measured(command)
    lines = row.output.split()
    drawn = (
        {"first_image": float(lines[0]), "second_image": float(lines[1])} if what not in ("import", "export") else {}
    )
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
    image = f", second image {row['second_image']:.1f} s" if "second_image" in row else ""
    print(f"{row['what']:18} {row['shape']}: {row['seconds']:.1f} s, {memory}{size}{image}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
