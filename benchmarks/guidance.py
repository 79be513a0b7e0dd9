"""What guidance inputs cost where no call uses them: one student's graphs with and without them, by turns.

    python -m benchmarks.guidance distill/shipped/mini-sd --steps 4 --json FILE

Imports the pipeline at scale 1 and exports it twice: once so that calls may be guided, once as a distilled student is.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.bench.interleave import interleave
from redif_sdk.distill import import_pipeline
from redif_sdk.export import export
from redif_sdk.results import machine

RUNTIMES = ("onnxruntime", "openvino")


def measured(
    with_: Path, without: Path, runtime: str, prompts: list[str], rounds: int, threads: int
) -> dict[str, float | int | str]:
    """Medians of one engine: seconds a call, and the ratios of the others to it, each of one round."""
    inputs, plain = (
        FastPipeline.from_pretrained(path, runtime=runtime, num_threads=threads) for path in (with_, without)
    )
    calls = {
        "with": lambda: inputs(prompts, seed=0),
        "without": lambda: plain(prompts, seed=0),
        "guided": lambda: inputs(prompts, seed=0, guidance_scale=3),
    }
    times = {
        name: [statistics.mean(turn) for turn in turns]
        for name, turns in interleave(calls, rounds, min_seconds=0.0).items()
    }
    found = {
        name: statistics.median(one / own for one, own in zip(times[name], times["with"], strict=True))
        for name in ("without", "guided")
    }
    seconds = statistics.median(times["with"])
    print(
        f"{runtime}: {seconds * 1000:.1f} ms a call; without the inputs {found['without']:.3f} times as long, guided "
        f"{found['guided']:.2f} times"
    )
    return {"runtime": runtime, "batch": len(prompts), "seconds": seconds, **found}


def main(
    pipeline: Annotated[Path, typer.Argument(help="A folder of a text-to-image pipeline.")],
    steps: int = 4,
    batch: int = 1,
    rounds: int = 15,
    threads: int = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the ratio of seconds a call for each engine: without the inputs over with them."""
    with tempfile.TemporaryDirectory() as folder:
        with_, without = Path(folder, "with"), Path(folder, "without")
        for path in (with_, without):
            import_pipeline(pipeline, path, [steps], guidance_scale=1.0)
        manifest = StudentFolder(without).manifest
        plain = manifest.network.model_copy(update={"guidance": None})
        write_manifest(without, manifest.model_copy(update={"network": plain}))
        for path in (with_, without):
            export(path)
        texts = manifest.text.examples if manifest.text is not None else [None]
        rows = [measured(with_, without, runtime, (texts * batch)[:batch], rounds, threads) for runtime in RUNTIMES]
        if json_file is not None:
            json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
