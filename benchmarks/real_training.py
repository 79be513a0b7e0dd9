"""Distillation of a model of real size: what `--dry-run` says, what the run then takes, and that it resumes exactly.

    python -m benchmarks.real_training sd15 --work build/real --json docs/results/real-training-sd15.json

Weights are random (`real_shapes.py`). The run is cut by SIGKILL after its first update and resumed; its student must be
that of a run that was not cut, bit for bit. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measured import measured
from benchmarks.real_shapes import SHAPES, make
from redif_sdk.results import document, write_json

REDIF = (sys.executable, "-c", "from redif_sdk.cli.main import main; main()")
PROMPTS = ("a photograph of a red fox", "a lighthouse at sunset", "a bowl of oranges", "a robot reading a book")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES])
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--side", type=int, default=256, help="pixels of the image")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--no-resume", action="store_true", help="leave out the run that is cut")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = train(arguments.shape, arguments.work, arguments.side, arguments.updates)
    if not arguments.no_resume:
        rows.append(resume(arguments.shape, arguments.work, arguments.side, arguments.updates))
    if arguments.json is not None:
        write_json(arguments.json, document("real_training", rows))


def command(shape: str, work: Path, side: int, updates: int, output: Path) -> list[str]:
    """``redif distill`` with regression in its first half and same-state groups in its second."""
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    settings = {
        "prompts": prompts,
        "steps": 2,
        "height": side,
        "width": side,
        "teacher-steps": 4,
        "pool-size": 8,
        "batch-size": 2,
        "updates": updates,
        "warm-start": 0.5,
        "group-size": 4,
        "schedule-updates": 0,
        "exploration-rank": 0,
        "reward": "pixel",
        "checkpoint-seconds": 0,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [*REDIF, "distill", str(work / shape), "-o", str(output), *options]


def train(shape: str, work: Path, side: int, updates: int) -> list[dict[str, Any]]:
    """The dry run and the run; the estimate's figures beside those that were measured."""
    if not (work / shape).is_dir():
        make(shape, work / shape)
    output = _fresh(work / f"{shape}-distilled")
    asked = command(shape, work, side, updates, output)
    os.environ["REDIF_CACHE"] = str(_fresh(work / "cache"))
    dry = measured([*asked, "--dry-run", "--json", "-"])
    told = json.loads(dry.output)["rows"][0]
    run = measured([*asked, "--json", "-"])
    budget = json.loads(run.output)["rows"][0]["budget"]
    checkpoint = (output.with_name(output.name + ".training")) / "log.jsonl"
    last = json.loads(checkpoint.read_text().splitlines()[-1])
    rows: list[dict[str, Any]] = [
        {
            "what": "dry run",
            "shape": shape,
            "side": side,
            **dry,
            **{k: v for k, v in told.items() if k not in ("config", "output")},
        },
        {
            "what": "run",
            "shape": shape,
            "side": side,
            **run,
            "updates": updates,
            "training_seconds": budget["seconds"],
            "forward_equivalents": last["budget"]["forward_equivalents"],
            "student_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        },
    ]
    whole = told["pool_seconds"] + told["training_seconds"] + told["check_seconds"]
    print(f"dry run: {dry['seconds']:.0f} s; it says {whole:.0f} s and {told['peak_memory_mb'] / 1024:.2f} GiB")
    print(f"run: {run['seconds']:.0f} s, {run['peak_rss'] / 2**30:.2f} GiB", flush=True)
    return rows


def resume(shape: str, work: Path, side: int, updates: int) -> dict[str, Any]:
    """A run that is killed after its first update and resumed, beside the one that `train` left."""
    output = _fresh(work / f"{shape}-cut")
    asked = command(shape, work, side, updates, output)
    process = subprocess.Popen(asked, stderr=subprocess.DEVNULL)
    log = output.with_name(output.name + ".training") / "checkpoint.pt"
    while not (log.is_file() and _updates(log)):
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be cut")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = log.stat().st_size
    subprocess.run([*asked, "--resume"], check=True)
    digests = [_weights(work / f"{shape}-{name}") for name in ("distilled", "cut")]
    same = digests[0] == digests[1]
    print(f"cut and resumed: {'the same weights' if same else 'OTHER WEIGHTS'}; checkpoint of {size / 1e6:.0f} MB")
    return {"what": "resume", "shape": shape, "checkpoint_bytes": size, "same_weights": same}


def _updates(checkpoint: Path) -> int:
    import torch

    return int(torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["update"])


def _weights(student: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(student.glob("unet/*.safetensors")) + sorted(student.glob("transformer/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _fresh(folder: Path) -> Path:
    for path in (folder, folder.with_name(folder.name + ".training")):
        shutil.rmtree(path, ignore_errors=True)
    return folder


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
