"""What a card shows of measured figures, files and verification, as plain rows for the template (`card.md.j2`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.metadata import BASELINES, judge_title, number, own_rows

__all__ = ["MOST", "files", "parity", "quality", "samples", "speed", "unmeasured"]

MOST = 100  # rows of a table, names of a list: a stranger's manifest may hold millions

#: The columns of the quality table after the name: (key of a row, digits).
_QUALITY = (
    *(("num_inference_steps", 0), ("network_calls", 0), ("fd_teacher", 2), ("fd_teacher_gain", 2)),
    *(("fd_teacher_std", 2), ("fd_unpaired", 2), ("fd_real", 2), ("mse", 4), ("precision", 2), ("recall", 2)),
    *(("coverage", 2), ("spread", 2), ("grid", 1), ("fine_energy", 2)),
)
_SAMPLE = re.compile(r"samples/(?:steps-(\d+)|[A-Za-z0-9._-]+)\.png")


def _figure(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A number of a row with so many digits, or an empty string if there is none."""
    value = number(row, key)
    return "" if value is None else f"{value:,.{digits}f}"


def samples(manifest: Manifest) -> list[tuple[str, str]]:
    """Return (path, description) of the sample images, those of fewer steps first."""
    found = []
    for entry in manifest.files:
        if match := _SAMPLE.fullmatch(entry.path):
            steps = match[1]
            found.append((entry.path, f"Samples at {steps} step{'s' * (steps != '1')}" if steps else "Samples"))
    return sorted(found, key=lambda sample: (len(sample[0]), sample[0]))[:MOST]


def quality(manifest: Manifest) -> dict[str, Any] | None:
    """Return the quality rows as table cells, and what they were measured with; None if there are none."""
    rows = [row for row in manifest.metrics if "method" in row][:MOST]
    if not rows:
        return None
    own = own_rows(manifest)
    shown = []
    for row in rows:
        mine = any(row is one for one in own)
        untrained = not mine and str(row["method"]) in BASELINES - {"teacher"}
        cells = [_figure(row, key, digits) for key, digits in _QUALITY]
        shown.append({"figures": cells, "method": row["method"], "own": mine, "untrained": untrained})
    some = (own or rows)[0]
    judge = str(some.get("features") or "a network without a name")
    title = judge_title(judge)
    return {
        "rows": shown,
        "features": title or judge,
        "independent": title is not None,
        "samples": _figure(some, "num_samples", 0),
        "prompts": prompts if (prompts := some.get("prompts")) in ("given", "held out", "trained on") else None,
        "data": some.get("data"),
    }


def speed(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the rows that were timed: their table cells, seconds per image among them, and the machine."""
    shown: list[dict[str, Any]] = []
    for row in manifest.metrics:
        seconds = number(row, "seconds_median")
        if "contender" in row and seconds is not None and len(shown) < MOST:
            batch, ratio = max(number(row, "batch") or 1.0, 1.0), number(row, "ratio")
            against = "" if ratio is None else f"{ratio:.2f} x {row.get('ratio_to') or 'the reference'}"
            names = [row.get(key) or "" for key in ("contender", "runtime", "precision")]
            cells = [*names, _figure(row, "num_inference_steps", 0), f"{batch:.0f}", f"{seconds / batch:.4g}", against]
            shown.append({"figures": cells, "machine": row.get("machine")})
    return shown


def parity(manifest: Manifest) -> list[list[str]]:
    """Return a row of cells for each component, precision and runtime that was compared with torch."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in manifest.verification:
        key = (str(row.get("component")), str(row.get("precision")), str(row.get("runtime")))
        groups.setdefault(key, []).append(row)
    cells = []
    for key, rows in [*groups.items()][:MOST]:
        worst = [value for row in rows if (value := number(row, "max_abs")) is not None]
        psnr = [value for row in rows if (value := number(row, "psnr")) is not None]
        passed = "yes" if all(row.get("passed") is True for row in rows) else "NO"
        difference, ratio = f"{max(worst):.2g}" if worst else "", f"{min(psnr):.1f} dB" if psnr else ""
        cells.append([*key, str(len(rows)), difference, ratio, passed])
    return cells


def files(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Return (path, description, size) of each graph and of each other folder or file; the last row is the total."""
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    rows = []
    for graph in manifest.graphs[:MOST]:
        size = sum(sizes.get(path, 0) for path in (graph.file, *graph.data))
        rows.append((graph.file, f"{graph.component} in {graph.precision}, opset {graph.opset}", _bytes(size)))
    listed = {path for graph in manifest.graphs for path in (graph.file, *graph.data)}
    folders: dict[str, list[int]] = {}
    for path, size in sizes.items():
        if path not in listed:
            first, _, rest = path.partition("/")
            folders.setdefault(f"{first}/" if rest else first, []).append(size)
    for folder, found in [*folders.items()][:MOST]:
        count = f"{len(found)} file{'s' * (len(found) != 1)}" if folder.endswith("/") else "file"
        rows.append((folder, count, _bytes(sum(found))))
    return [*rows, ("", "in all", _bytes(sum(sizes.values())))] if sizes else []


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def unmeasured(manifest: Manifest) -> dict[str, Any]:
    """Return what limits the figures above: step counts without quality, and what the parity gate did not see."""
    measured = {row["num_inference_steps"] for row in own_rows(manifest)}
    rows = [row for row in manifest.verification if row.get("runtime") != "numpy"]
    real = [row for row in rows if row.get("runtime") != "emulated"]
    checked = {str(row.get("precision")) for row in rows}
    precisions = dict.fromkeys(graph.precision for graph in manifest.graphs)
    return {
        "quality": bool(measured),
        "steps": [str(count) for count in manifest.supported_steps if count not in measured][:MOST],
        "speed": any("contender" in row for row in manifest.metrics),
        "failed": any(row.get("passed") is not True for row in rows),
        "precisions": [precision for precision in precisions if precision not in checked],
        "where": [*dict.fromkeys(f"{row.get('runtime')} ({row.get('device')})" for row in real)][:MOST],
        "emulated": len(real) < len(rows),
        "decoder": _decoder(manifest),
    }


def _decoder(manifest: Manifest) -> dict[str, str] | None:
    """How far the images are from those of the decoder that was there before; None if it was not replaced."""
    rows = [row for row in manifest.metrics if "decoder" in row and "in_place_of" in row]
    if not rows:
        return None
    psnr = number(rows[-1], "psnr")
    return {
        "kind": str(rows[-1]["decoder"]),
        "former": str(rows[-1]["in_place_of"]),
        "samples": _figure(rows[-1], "num_samples", 0),
        "distance": "the same" if psnr is None else f"{psnr:.1f} dB from its images",
    }
