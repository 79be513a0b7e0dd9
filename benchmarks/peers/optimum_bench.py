"""optimum-onnx beside FastPipeline, in optimum's own environment: started by ``optimum.sh``.

optimum exports and runs only the pipelines of its registry, which has none of a UNet2DModel; its error messages are
kept with the result. Its session for graphs from elsewhere, ``ORTModelForCustomTasks``, runs the student's own
denoiser, and the step table around it makes it a contender like the others of `redif bench`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTDiffusionPipeline, ORTModelForCustomTasks

from redif_sdk.bench.engines import contenders as engines
from redif_sdk.bench.rounds import Contender, Prepared, Workload, compare, disagreeing
from redif_sdk.distill.evaluation.peers import contenders as torch_contenders
from redif_sdk.images import to_uint8
from redif_sdk.results import document, write_json
from redif_sdk.sampling.loop import run_steps

WANTED = ("fastpipeline-auto", "onnxruntime", "torch-eager", "diffusers-eager")


def own_routes(student: Path) -> dict[str, str]:
    """The result of each of optimum's own ways to export a student's folder: "done", or its error."""
    with tempfile.TemporaryDirectory() as folder:
        routes: dict[str, Callable[[], object]] = {
            "ORTDiffusionPipeline.from_pretrained(student, export=True)": lambda: ORTDiffusionPipeline.from_pretrained(
                str(student), export=True
            ),
            "main_export(student)": lambda: main_export(str(student), output=folder),
            'main_export(student, task="text-to-image")': lambda: main_export(
                str(student), output=folder, task="text-to-image"
            ),
        }
        return {name: _asked(route) for name, route in routes.items()}


def _asked(route: Callable[[], object]) -> str:
    try:
        route()
    except Exception as error:  # any error is the result that is recorded
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "done"


def prepare(work: Workload) -> Prepared:
    """The student's denoiser in optimum's session, stepped by its table in numpy."""
    graph = work.manifest.graph("denoiser", "fp32")
    assert graph is not None
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(work.student.path / graph.file, Path(folder) / "model.onnx")
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "bert"}))  # a known name is required
        model = ORTModelForCustomTasks.from_pretrained(folder)
    table = work.table
    times = [np.full((work.batch,), t, dtype=np.float32) for t in table.timesteps]

    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        condition = {} if labels is None else {"class_labels": labels}

        def predict(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
            clean: NDArray[np.float32] = table.clean(k, x, model(sample=x, timestep=times[k], **condition)["f"])
            return clean

        return to_uint8(run_steps(table, table.start(noise[0]), noise, predict), work.manifest.postprocess)

    return Prepared(generate, "onnxruntime", "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="?", default=Path("build/quickstart/student-2"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/optimum.json"))
    asked = parser.parse_args()
    said = own_routes(asked.student)
    for route, answer in said.items():
        print(f"{route}: {answer}")
    known = [*engines(["onnxruntime"], ["fp32"]), *torch_contenders(["fp32"])]
    others = [entry for entry in known if entry.name in WANTED]
    rows: list[dict[str, Any]] = []
    for batch in asked.batch:
        work = Workload.of(asked.student, batch=batch, num_threads=asked.threads)
        rows += compare([*others, Contender("optimum", "onnxruntime", "fp32", prepare)], work, rounds=asked.rounds)
    for row in rows:
        if row["seconds_median"] is not None:
            speed = f"{1e3 * row['seconds_median']:8.2f} ms, {row['ratio']:.2f} times {row['ratio_to']}"
            spread = f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            print(f"batch {row['batch']} {row['contender']:18} {speed} {spread}")
    if wrong := disagreeing(rows):
        print(f"other images: {wrong}")
    found = {name: version(name) for name in ("optimum", "optimum-onnx", "transformers", "diffusers")}
    write_json(asked.output, document("optimum", rows, optimum=found, own_routes=said))


if __name__ == "__main__":
    main()
