"""Every figure of ``docs/performance.md``: ``python benchmarks/performance.py [--only PART...] [--rounds N]``.

Parts: ``student`` (the quickstart's two-step student, and its teacher), ``unet`` (a UNet of 6.8 million parameters with
random weights, with attention heads of 64 and of diffusers' default 8), ``cold`` (first image and memory, in fresh
processes), ``sizes`` (installed). Each part replaces its own rows in ``docs/results/performance.json``, so parts can be
run one by one. Run nothing else on the machine. ``--bounds`` prints which bounds the figures keep.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import performance_bounds

from redif_sdk.bench.plot import bars
from redif_sdk.cli.bench import BenchSettings, measure
from redif_sdk.results import document, write_json

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 8)
HEADS = (64, 8)
UNET_STEPS = 4
#: The two installations that are compared: a deployer's, and that of diffusers.
SIZES = {"redif-sdk[cpu]": ["{source}[cpu]"], "torch + diffusers": ["torch", "diffusers"]}


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


# ---------------------------------------------------------------- the parts: rows, and what is stored beside them


def student(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return _measured(BenchSettings(asked.student, "fashion-mnist", rounds=asked.rounds, **_common(asked)), asked)


def unet(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, kept = [], {}
    for heads in HEADS:
        folder = ROOT / f"build/performance/unet-6.8M-heads-{heads}"
        if not (folder / "onnx").is_dir():
            say(f"making {folder.name}")
            build_unet(folder, heads)
        more, also = _measured(BenchSettings(folder, rounds=max(3, asked.rounds // 2), **_common(asked)), asked)
        rows += more
        kept |= also
    return rows, kept


def cold(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    request = BenchSettings(asked.student, "fashion-mnist", num_threads=asked.threads, batches=BATCHES, timings=False)
    result = measure(request, say)
    return [{"student": result["student"], **row} for row in result["rows"]], {}


def sizes(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*_UNPACKAGED))
        rows = []
        for name, wanted in SIZES.items():
            say(f"installing {name}")
            rows.append(
                _installed(Path(folder) / "venv", name, [requirement.format(source=source) for requirement in wanted])
            )
    return rows, {}


_UNPACKAGED = (".venv", ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")

PARTS: dict[str, Callable[[argparse.Namespace], tuple[list[dict[str, Any]], dict[str, Any]]]] = {
    "student": student,
    "unet": unet,
    "cold": cold,
    "sizes": sizes,
}


def _common(asked: argparse.Namespace) -> dict[str, Any]:
    return {"batches": BATCHES, "num_threads": asked.threads, "cold_start": False}


def _measured(request: BenchSettings, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of `redif bench`, and their plot."""
    result = measure(request, say)
    name, machine = result["student"], result["machine"]
    steps = next(row["num_inference_steps"] for row in result["rows"] if row["contender"] != "teacher")
    asked.images.mkdir(parents=True, exist_ok=True)
    subtitle = (
        f"{machine['processor']}, {machine['cores']} cores, {result['date'][:10]}; {request.rounds} rounds, interleaved"
    )
    (asked.images / f"performance-{name}.svg").write_text(bars(result["rows"], f"{name}, {steps} steps", subtitle))
    kept = {key: result[key] for key in ("gemm_peak_gflop_per_second", "gflop_per_image_call")}
    return [{"student": name, **row} for row in result["rows"]], {name: kept}


def build_unet(folder: Path, heads: int) -> None:
    """A stock UNet2DModel, 32 x 32 x 3, with random weights, as an exported student of DDIM at `UNET_STEPS`."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    from redif_sdk.artifact.folder import write_manifest
    from redif_sdk.artifact.manifest import Manifest
    from redif_sdk.artifact.records import Latents, Network
    from redif_sdk.export import export
    from redif_sdk.sampling.table import StepTable

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=heads,
    )
    network.save_pretrained(folder / "unet")
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text("# A UNet with random weights, for measuring\n")
    manifest = Manifest(
        name=folder.name,
        licence="apache-2.0",
        task="unconditional",
        step_tables=[StepTable.from_scheduler(scheduler, num_inference_steps=UNET_STEPS).to_dict()],
        latents=Latents(channels=3, height=32, width=32),
        network=Network(class_path="diffusers.UNet2DModel", folder="unet"),
    )
    write_manifest(folder, manifest)
    export(folder)


def _installed(venv: Path, name: str, wanted: list[str]) -> dict[str, Any]:
    """Install `wanted` into an empty environment; its bytes, and those of the largest packages."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "-q"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *wanted], check=True, stderr=subprocess.DEVNULL)
    packages = next((venv / "lib").glob("python*/site-packages"))
    by_folder = {path.name: _bytes(path) / 2**20 for path in packages.iterdir()}
    largest = sorted(by_folder.items(), key=lambda entry: -entry[1])[:12]
    return {"contender": name, "installed_mb": sum(by_folder.values()), "largest": dict(largest)}


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--student", type=Path, default=ROOT / "build/quickstart/student-2")
    parser.add_argument("--rounds", type=int, default=11, help="of the student; the UNets have half as many")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/results/performance.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--bounds", action="store_true", help="measure nothing; check the bounds")
    asked = parser.parse_args()
    if asked.bounds:
        return performance_bounds.check(asked.output)
    for name in asked.only:
        start = time.perf_counter()
        rows, kept = PARTS[name](asked)
        _store(asked.output, name, rows, {"seconds": time.perf_counter() - start, "students": kept})
        say(f"{name}: {time.perf_counter() - start:.0f} s")
    return 0


def _store(output: Path, part: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Replace a part's former rows, with the date of the measurement."""
    before = json.loads(output.read_text()) if output.is_file() else {"rows": [], "parts": {}}
    others = [row for row in before["rows"] if row["part"] != part]
    result = document("performance", [*others, *({"part": part, **row} for row in rows)])
    parts = before["parts"] | {part: {"date": result["date"], **about}}
    write_json(output, result | {"parts": parts})


if __name__ == "__main__":
    sys.exit(main())
