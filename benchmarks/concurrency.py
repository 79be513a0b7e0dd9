"""Concurrent calls of one pipeline, and the effect of ONNX Runtime's memory settings (docs/performance.md).

    python benchmarks/concurrency.py build/quickstart/student-2 [--json FILE]

Rounds are interleaved; figures are medians. Exits 1 if eight threads give other images than one, or fewer a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.bench.interleave import interleave
from redif_sdk.bench.rounds import Workload
from redif_sdk.results import document, write_json

CALLS = 32
THREADS = 8


def medians(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, over interleaved rounds."""
    turns = interleave(jobs, rounds)
    return {name: statistics.median(time for turn in times for time in turn) for name, times in turns.items()}


def callers(folder: Path, runtime: str, rounds: int) -> list[dict[str, Any]]:
    """Rates of the same 32 calls from one thread and from eight."""
    pipe = FastPipeline.from_pretrained(folder, runtime=runtime)
    pool = ThreadPoolExecutor(THREADS)
    asked: dict[str, Any] = {} if pipe.manifest.classes is None else {"class_labels": 0}
    if pipe.manifest.text is not None:
        asked = {"prompt": pipe.manifest.text.examples[0]}
    kept: dict[str, list[Any]] = {}

    def call(seed: int) -> Any:
        return pipe(seed=seed, output_type="uint8", **asked).images

    def one() -> None:
        kept["one"] = [call(seed) for seed in range(CALLS)]

    def many() -> None:
        kept["many"] = list(pool.map(call, range(CALLS)))

    seconds = medians({"1 thread": one, f"{THREADS} threads": many}, rounds)
    same = all(np.array_equal(a, b) for a, b in zip(kept["one"], kept["many"], strict=True))
    return [
        {"what": name, "runtime": runtime, "batch": 1, "images_per_second": CALLS / value, "same_pictures": same}
        for name, value in seconds.items()
    ]


def session(model: bytes, *, arena: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = arena
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def memory(folder: Path, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rates of one ONNX Runtime thread with and without its memory arena, and with preallocated outputs."""
    student = StudentFolder(folder)
    graph = student.manifest.graph("generator", "fp32")
    assert graph is not None
    model, work = student.read(graph.file), Workload.of(folder, batch=batch)
    feed = work.graph_inputs(work.noise)
    plain, bare = session(model, arena=True), session(model, arena=False)
    bound = plain.io_binding()
    for name, value in feed.items():
        bound.bind_cpu_input(name, value)
    images = onnxruntime.OrtValue.ortvalue_from_numpy(plain.run(None, feed)[0])
    bound.bind_ortvalue_output("images", images)
    jobs: dict[str, Callable[[], object]] = {
        "arena (default)": lambda: plain.run(None, feed),
        "no arena": lambda: bare.run(None, feed),
        "arena, bound buffers": lambda: plain.run_with_iobinding(bound),
    }
    rows = []
    for name, value in medians(jobs, rounds).items():
        rows.append({"what": name, "runtime": "onnxruntime", "batch": batch, "images_per_second": batch / value})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", action="append", choices=["onnxruntime", "openvino"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args(arguments)
    rows = [
        row
        for name in asked.runtime or ["onnxruntime", "openvino"]
        for row in callers(asked.folder, name, asked.rounds)
    ]
    kept = all(
        many["same_pictures"] and many["images_per_second"] >= one["images_per_second"]
        for one, many in zip(rows[::2], rows[1::2], strict=True)
    )
    rows += [row for batch in (1, 4) for row in memory(asked.folder, batch, asked.rounds)]
    print("| what | runtime | batch | images a second | the same images |")
    print("|---|---|---|---|---|")
    for row in rows:
        same = {True: "yes", False: "NO", None: ""}[row.get("same_pictures")]
        print(f"| {row['what']} | {row['runtime']} | {row['batch']} | {row['images_per_second']:.0f} | {same} |")
    if asked.json:
        write_json(asked.json, document("benchmarks/concurrency.py", rows))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
