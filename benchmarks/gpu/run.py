"""Speed and parity of a student on an NVIDIA GPU: ``python benchmarks/gpu/run.py STUDENT [-o FILE]``.

Each contender generates the same images from the same noises: the network in torch (eager and compiled) stepped by the
table, and FastPipeline on ONNX Runtime (CUDA, TensorRT) and on both TensorRT flavours. They take turns, round by round;
a call ends when its images are on the host, so the GPU has finished. What is not available is listed with its reason.
The parity gate runs first for each of our engines. Exits 2 without a GPU. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.bench.interleave import interleave
from redif_sdk.bench.rounds import Workload
from redif_sdk.errors import ExportError, InvalidRequest, RedifError, RuntimeUnavailable
from redif_sdk.export import verify
from redif_sdk.results import document, write_json
from redif_sdk.runtimes.tensorrt.cuda import find_gpu
from redif_sdk.sampling.loop import run_steps

BATCHES, STEPS = (1, 8, 32), (2, 4)
ROUNDS, WARM_UP = 50, 5
REFERENCE = "torch eager fp32"

#: Noise (N, B, C, H, W), the condition (labels (B,), encoded prompts, or None) and the number of steps -> images uint8
#: (B, H, W, C).
Generate = Callable[[NDArray[np.float32], Any, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Contender:
    """A way to generate the images; `load` raises RedifError or ImportError if it is not available."""

    name: str
    load: Callable[[StudentFolder], Generate]


def torch_loop(student: StudentFolder, precision: str, compiled: bool, device: str = "cuda") -> Generate:
    """The student's own network in torch, stepped by its table; all but the network is float32."""
    import torch

    from redif_sdk.export.onnx import load_network

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(f"torch {torch.__version__} has no CUDA; install a CUDA build of it")
    if student.manifest.network.guidance is not None:
        raise RuntimeUnavailable("the network alone is not what a student with guidance computes")
    if student.manifest.text is not None:
        raise RuntimeUnavailable("text-to-image students are not stepped in torch here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as in our engines
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    # Not by the network's own `to`: diffusers' prints warnings that do not apply here.
    network: Any = torch.nn.Module.to(load_network(student), device=device, dtype=dtype)
    if compiled:
        network = torch.compile(network, mode="reduce-overhead")
    post = student.manifest.postprocess

    def call(x: Any, t: Any, labels: Any) -> Any:
        condition = {} if labels is None else {"class_labels": labels}
        times = torch.from_numpy(t).to(device)
        return network(x.to(dtype), times, **condition).sample.float().clone()

    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None, steps: int) -> NDArray[np.uint8]:
        table = student.manifest.step_table(steps)
        z = torch.from_numpy(noise).to(device)
        asked = None if labels is None else torch.from_numpy(labels).to(device)

        def predict(k: int, x: Any) -> Any:
            t = np.full((len(x),), table.timesteps[k], dtype=np.float32)
            return table.clean(k, x, call(x, t, asked)[:, : x.shape[1]])

        with torch.inference_mode():
            x = run_steps(table, table.start(z[0]), z, predict)
            if post.pixel_shuffle > 1:
                x = torch.nn.functional.pixel_shuffle(x, post.pixel_shuffle)
            low, high = post.value_range
            levels = ((x - low) * (255 / (high - low))).clamp(0, 255).round().to(torch.uint8)
            pictures: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            return pictures

    return generate


def fast_pipeline(student: StudentFolder, runtime: str, precision: str, provider: str | None = None) -> Generate:
    """FastPipeline on one engine, on the GPU."""
    if runtime.startswith("tensorrt"):
        build(student, runtime, precision)
    pipe = FastPipeline.from_pretrained(
        student.path, runtime=runtime, device="cuda", precision=precision, provider=provider
    )
    return pipe.generate_array


def build(student: StudentFolder, flavour: Any, precision: str) -> None:
    """The engines of a precision for this GPU, from the cache if they are there."""
    from redif_sdk.export.tensorrt import build_engines

    try:
        build_engines(student.path, flavour=flavour, precisions=[precision], batches=(1, 8, max(BATCHES)))
    except (ExportError, InvalidRequest) as error:
        raise RuntimeUnavailable(str(error)) from error


CONTENDERS = [
    Contender(REFERENCE, partial(torch_loop, precision="fp32", compiled=False)),
    Contender("torch eager fp16", partial(torch_loop, precision="fp16", compiled=False)),
    Contender("torch.compile fp32", partial(torch_loop, precision="fp32", compiled=True)),
    Contender("torch.compile fp16", partial(torch_loop, precision="fp16", compiled=True)),
    *(
        Contender(
            f"{label} {precision}", partial(fast_pipeline, runtime=runtime, precision=precision, provider=provider)
        )
        for label, runtime, provider in (
            ("onnxruntime CUDA", "onnxruntime", "CUDAExecutionProvider"),
            ("onnxruntime TensorRT", "onnxruntime", "TensorrtExecutionProvider"),
            ("tensorrt", "tensorrt", None),
            ("tensorrt-rtx", "tensorrt-rtx", None),
        )
        for precision in ("fp32", "fp16", "int8")
    ),
]


def load_all(student: StudentFolder) -> Iterator[tuple[str, Generate | str, float]]:
    """Yield (name, the contender or why it is not available, seconds this took) for each."""
    for contender in CONTENDERS:
        start = time.perf_counter()
        try:
            found: Generate | str = contender.load(student)
        except (RedifError, ImportError) as error:
            found = " ".join(str(error).split())
        yield contender.name, found, time.perf_counter() - start


def measure(student: StudentFolder, contenders: dict[str, Generate], batch: int, steps: int, rounds: int) -> list[Any]:
    """One row a contender, timed in turns. A contender that fails at this batch gets a row with the reason."""
    work = Workload.of(student.path, batch=batch, steps=steps)
    calls = {name: partial(generate, work.noise, work.condition, steps) for name, generate in contenders.items()}
    failed: dict[str, str] = {}
    for name in contenders:
        try:
            for _ in range(WARM_UP):
                calls[name]()
        except (RedifError, RuntimeError) as error:  # torch: out of memory is a RuntimeError
            failed[name] = " ".join(str(error).split())[:300]
            del calls[name]
    turns = interleave(calls, rounds, min_seconds=0.0, settle=False)
    times = {name: [seconds for turn in found for seconds in turn] for name, found in turns.items()}
    reference = REFERENCE if REFERENCE in contenders and REFERENCE not in failed else None
    facts = {"num_inference_steps": steps, "batch": batch}
    rows: list[Any] = [{"contender": name, **facts, "skipped": reason} for name, reason in failed.items()]
    for name in (name for name in contenders if name not in failed):
        median = statistics.median(times[name])
        pairs = zip(times[reference], times[name], strict=True) if reference else ()
        ratios = [theirs / ours for theirs, ours in pairs]
        rows.append(
            {
                "contender": name,
                **facts,
                "seconds_median": median,
                "seconds_p95": float(np.quantile(times[name], 0.95)),
                "seconds_per_image": median / batch,
                "images_per_second": batch / median,
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_to": reference,
            }
        )
    return rows


def parity(student: StudentFolder) -> list[dict[str, Any]]:
    """The gate's rows for each engine, or one row with the reason."""
    rows: list[dict[str, Any]] = []
    for runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        try:
            rows += verify(student.path, [runtime])
        except RedifError as error:
            rows.append({"runtime": runtime, "skipped": " ".join(str(error).split())})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu.json"))
    asked = parser.parse_args(arguments)
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"no CUDA device was found ({gpu}); this benchmark needs an NVIDIA GPU and its driver", file=sys.stderr)
        return 2
    try:
        student = StudentFolder(asked.student)
    except RedifError as error:
        print(error, file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    contenders: dict[str, Generate] = {}
    for name, found, seconds in load_all(student):
        if isinstance(found, str):
            rows.append({"contender": name, "skipped": found})
            print(f"{name}: skipped, {found}", flush=True)
        else:
            contenders[name] = found
            print(f"{name}: ready after {seconds:.1f} s", flush=True)
    checks = parity(student)  # after the engines were built
    for steps in STEPS:
        if steps not in student.manifest.supported_steps:
            rows.append({"num_inference_steps": steps, "skipped": f"{student.manifest.name} has no table of that many"})
            continue
        for batch in BATCHES:
            found_rows = measure(student, contenders, batch, steps, asked.rounds)
            rows += found_rows
            for row in found_rows:
                speed = (
                    row.get("skipped") or f"{row['seconds_median'] * 1e3:.2f} ms, p95 {row['seconds_p95'] * 1e3:.2f} ms"
                )
                print(f"{row['contender']}, {steps} steps, batch {batch}: {speed}", flush=True)
    write_json(asked.output, document("gpu", rows, device=f"{gpu.name}, sm {gpu.sm}", parity=checks))
    failed = [row for row in checks if row.get("passed") is False]
    print(f"{asked.output}: {len(rows)} rows, {len(failed)} of {len(checks)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
