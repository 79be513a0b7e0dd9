"""The machine-readable result of a command: one object with its date, versions, machine and rows.

`document` makes it, `write_json` writes it to a file or to standard output. What the rows say is each command's own.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from redif_sdk.artifact.atomic import atomic_write

__all__ = ["SCHEMA", "document", "label", "machine", "versions", "write_json"]

SCHEMA = "redif-results-1"

PACKAGES = (
    "redif-sdk",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "onnx",
    "onnxscript",
    "onnxslim",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
)


def versions() -> dict[str, str]:
    """Package -> version, of those in `PACKAGES` that are installed, and Python's own. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, the threads that OMP_NUM_THREADS asks for (null: unset), and the `device` that was used."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": int(threads) if threads.isdigit() else None,
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def document(command: str, rows: Sequence[Mapping[str, Any]], *, device: str = "cpu", **extra: Any) -> dict[str, Any]:
    """The result of `command`: schema, date (UTC), versions, machine, rows; `extra` adds further top-level keys."""
    return {
        "schema": SCHEMA,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(device),
        "rows": [dict(row) for row in rows],
        **extra,
    }


def label(row: Mapping[str, Any]) -> str:
    """How a quality row's contender was made: "redif (same-state, texture)", or its method alone."""
    how = ", ".join(str(row[key]) for key in ("estimator", "reward") if row.get(key))
    return f"{row['method']} ({how})" if how else str(row["method"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_json(target: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` to the file `target`, or to standard output for ``-``. ValueError for NaN and infinity."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
