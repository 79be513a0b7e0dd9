"""From a prompt to a PNG: a student against its teacher's guided pipeline in diffusers (docs/text-to-image.md).

    python benchmarks/text_to_image.py STUDENT TEACHER [--batch 1 8] [--steps N] [--json FILE]

The teacher is diffusers' own pipeline at its own number of steps and guidance, in torch; the student is `FastPipeline`.
Both tokenise and encode the prompt, sample, decode, and write a PNG to memory. Turns are interleaved in one process;
figures are medians. Both use as many threads as the process may. Exits 1 below the bound of ``--least``.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redif_sdk import FastPipeline
from redif_sdk.bench.interleave import interleave
from redif_sdk.results import document, write_json

PROMPT = "red heart"


def png(images: list[Any]) -> int:
    """The images as bytes of PNG files."""
    total = 0
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        total += len(buffer.getvalue())
    return total


def contenders(
    student: Path, teacher: Path, steps: int | None, batch: int, precision: str
) -> dict[str, Callable[[], object]]:
    from redif_sdk.distill.teachers.folders import load_pipeline

    pipeline, about = load_pipeline(teacher)
    scale, steps = float(about.get("guidance_scale", 7.5)), steps or int(about["num_inference_steps"])
    fast = FastPipeline.from_pretrained(student, precision=precision)

    def original() -> int:
        found = pipeline(PROMPT, num_images_per_prompt=batch, num_inference_steps=steps, guidance_scale=scale)
        return png(found.images)

    def few() -> int:
        return png(fast(PROMPT, num_images_per_prompt=batch, seed=0).images)

    calls = fast.manifest.supported_steps[0]
    info = fast.runtime_info
    return {
        f"teacher, diffusers, {steps} guided steps": original,
        f"student, {calls} call(s), {info['runtime']} {info['precision']}": few,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, help="of the teacher; default: its own number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--least", type=float, help="Exit 1 if the student is not at least so many times as fast.")
    parser.add_argument("--json", dest="json_file")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch in asked.batch:
        jobs = contenders(asked.student, asked.teacher, asked.steps, batch, asked.precision)
        turns = interleave(jobs, asked.rounds)
        medians = {name: statistics.median(time for turn in times for time in turn) for name, times in turns.items()}
        slowest = next(iter(medians.values()))
        for name, seconds in medians.items():
            rows.append({"contender": name, "batch": batch, "seconds_median": seconds, "ratio": slowest / seconds})
            print(f"batch {batch}: {name}: {seconds:.4f} s, {slowest / seconds:.1f} times as fast", flush=True)
    if asked.json_file:
        write_json(asked.json_file, document("benchmarks/text_to_image.py", rows))
    fastest = [row["ratio"] for row in rows if row["contender"].startswith("student")]
    return 0 if asked.least is None or min(fastest) >= asked.least else 1


if __name__ == "__main__":
    sys.exit(main())
