"""The machine-readable result of a command: one object with its date, versions, machine and rows.

`document` makes it; `write_json` writes it to a file or to standard output. Each command has rows of its own.
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
    """Package -> version of each installed package of `PACKAGES`, and of Python. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, usable cores, OMP_NUM_THREADS (None: unset), the `device` that was used, and the system."""
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
    """The result of `command`: schema, date (UTC), versions, machine and rows. `extra` adds top-level keys."""
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
    """Write `content` to the file `target`, or to standard output for ``-``.

    Raises:
        ValueError: `content` holds NaN or infinity.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
