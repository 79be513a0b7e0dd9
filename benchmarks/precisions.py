"""The cost in quality and the gain in speed of a precision, on trained students: the table of docs/performance.md.

    python benchmarks/precisions.py build/quickstart/student-1 build/quickstart/student-2 [--json FILE]

The students must have been exported in the precisions to compare (``redif export --precision ...``). Frechet distances
are those of `redif eval`: to the teacher's images for 2,000 held-out noises. A precision that no engine computes here
(bf16 on most processors) is emulated, which gives its quality but not its speed. The timing interleaves its rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.bench.interleave import interleave
from redif_sdk.distill import Teacher
from redif_sdk.distill.evaluation.arena import Arena
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.export.verify import Emulated
from redif_sdk.results import document, write_json
from redif_sdk.runtimes import RuntimeOptions

PIECE = 40
Draw = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


def artist(folder: Path, precision: str, texts: Sequence[str]) -> tuple[Draw, str]:
    """A function that generates uint8 images in `precision` from noise (1, B, C, H, W) and labels, and its name.

    Labels are classes, or places among the prompts `texts`.
    """
    student = StudentFolder(folder)
    table = student.manifest.step_table()
    try:
        pipe = FastPipeline.from_pretrained(folder, precision=precision)
    except RuntimeUnavailable:
        graph = student.manifest.graph("generator", precision)
        assert graph is not None
        engine = Emulated.load(student, graph, RuntimeOptions())
    else:
        runtime = pipe.runtime_info["runtime"]
        return (
            (pipe.generate_array, runtime) if student.manifest.text is None else (partial(_draw, pipe, texts), runtime)
        )

    def emulated(noise: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        scale = np.asarray(table.init_scale, np.float32)
        condition = {} if labels is None else {"class_labels": labels}
        return engine.run({"noise": noise, "table": table.rows, "init_scale": scale, **condition})["images"]

    return emulated, "emulated"


def _draw(pipe: FastPipeline, texts: Sequence[str], noise: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None
    images = pipe([texts[int(label)] for label in labels], latents=noise[0], output_type="np").images
    return (np.asarray(images) * 255).round().astype(np.uint8)


def pictures(draw: Draw, arena: Arena) -> np.ndarray:
    """The images of every held-out pair, uint8 (N, H, W, C)."""
    parts = []
    for low in range(0, len(arena.pairs), PIECE):
        part = arena.pairs[low : low + PIECE]
        labels = None if part.condition is None else part.condition.numpy()
        parts.append(draw(part.noise.numpy()[None], labels))
    return np.concatenate(parts)


def seconds(draws: dict[str, Draw], arena: Arena, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a call on `batch` images."""
    part = arena.pairs[:batch]
    noise, labels = part.noise.numpy()[None], None if part.condition is None else part.condition.numpy()
    turns = interleave({name: partial(draw, noise, labels) for name, draw in draws.items()}, rounds)
    return {name: statistics.median(time for turn in times for time in turn) for name, times in turns.items()}


def measure(folder: Path, arena: Arena, rounds: int) -> list[dict[str, Any]]:
    manifest = StudentFolder(folder).manifest
    precisions = list(dict.fromkeys(graph.precision for graph in manifest.graphs))
    texts = arena.teacher.prompts.texts if arena.teacher.prompts is not None else ()
    known = [p for p in precisions if manifest.graph("denoiser", p) is not None]
    artists = {precision: artist(folder, precision, texts) for precision in known}
    drawn = {precision: pictures(draw, arena) for precision, (draw, _) in artists.items()}
    timed = {precision: draw for precision, (draw, name) in artists.items() if name != "emulated"}
    speed = {batch: seconds(timed, arena, batch, rounds) for batch in (1, 8)}
    rows = []
    for precision, images in drawn.items():
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        error = np.mean((images.astype(np.float64) - drawn["fp32"]) ** 2)
        row: dict[str, Any] = {
            "student": folder.name,
            "num_inference_steps": manifest.step_table().num_inference_steps,
            "graph_precision": precision,  # "precision" here is the measure beside "recall"
            "runtime": artists[precision][1],
            "psnr_to_fp32": 10 * math.log10(255**2 / error) if error else None,
            "megabytes": sum(path.stat().st_size for path in folder.glob(f"onnx/generator.{precision}.*")) / 1e6,
            **arena.judge.quality(scaled).row(),
        }
        for batch, found in speed.items():
            row[f"speedup_batch_{batch}"] = found["fp32"] / found[precision] if precision in found else None
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| student | precision | computed by | PSNR to fp32, dB | FD to teacher | best gain | paired MSE | recall | MB "
        "| times as fast as fp32, batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "" if row["psnr_to_fp32"] is None else f"{row['psnr_to_fp32']:.1f}"
        fast = ["" if row[f"speedup_batch_{b}"] is None else f"{row[f'speedup_batch_{b}']:.2f}" for b in (1, 8)]
        lines.append(
            f"| {row['student']} | {row['graph_precision']} | {row['runtime']} | {psnr} | {row['fd_teacher']:.2f} "
            f"| {row['fd_teacher_gain']:.2f} | {row['mse']:.4f} | {row['recall']:.2f} | {row['megabytes']:.1f} "
            f"| {fast[0]} | {fast[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--teacher", default="fashion-mnist")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()
    arena = Arena.of(Teacher.load(asked.teacher), asked.samples)
    rows = [row for folder in asked.folders for row in measure(folder, arena, asked.rounds)]
    print(table(rows))
    if asked.json:
        write_json(asked.json, document("benchmarks/precisions.py", rows))


if __name__ == "__main__":
    main()
