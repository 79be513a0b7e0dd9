"""Measured figures into a student's folder: rows of quality and speed in ``redif.json``, and the card that shows them.

Who measures is `redif eval`, `redif bench` and the quickstart; what the rows say is in the design's section 7.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from redif_sdk.card.metadata import BASELINES
from redif_sdk.card.render import CARD_NAME, check_writable, render_folder
from redif_sdk.errors import InvalidRequest
from redif_sdk.results import machine

__all__ = ["check_recordable", "kind_of", "quality_rows", "record", "speed_rows"]

#: The field that tells a kind of row.
KINDS = {"quality": "method", "speed": "contender"}

#: What a manifest has no use for.
_DROPPED = frozenset({"round_seconds", "skipped"})


def kind_of(row: Mapping[str, Any]) -> str:
    """ "quality" or "speed"; InvalidRequest for a row of neither."""
    for kind, field in KINDS.items():
        if field in row:
            return kind
    raise InvalidRequest(f"a row with {', '.join(map(str, row)) or 'nothing'} is neither of quality nor of speed")


def quality_rows(rows: Iterable[Mapping[str, Any]], steps: int | None = None) -> list[dict[str, Any]]:
    """The rows of the teacher and of untrained samplers, and the students', or that of `steps` steps alone."""
    return [
        dict(row) for row in rows if steps is None or row["method"] in BASELINES or row["num_inference_steps"] == steps
    ]


def speed_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were timed, each with the processor's name."""
    processor = machine()["processor"]
    return [
        {key: value for key, value in row.items() if key not in _DROPPED} | {"machine": processor}
        for row in rows
        if row.get("seconds_median") is not None
    ]


def check_recordable(folder: str | Path) -> None:
    """Raise what `record` would raise for this folder, before the work of measuring is done."""
    student = StudentFolder(folder)
    for name in (MANIFEST_NAME, CARD_NAME):
        check_writable(student.path, name)
    render_folder(student.path, student.manifest)


def record(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> Manifest:
    """Put measured rows into a student's manifest, and make its card anew; returns the manifest.

    Rows of one kind, quality or speed, take the place of the old ones of that kind; the other kind stays. No file is
    hashed anew: one that was altered stays refused. Raises InvalidRequest for rows that are of neither kind or no
    JSON, and for a card whose sections are malformed; then nothing is written.
    """
    student = StudentFolder(folder)
    new = [_plain(row) for row in rows]
    kinds = {kind_of(row) for row in new}
    if not kinds:
        return student.manifest
    kept = [row for row in student.manifest.metrics if not any(KINDS[kind] in row for kind in kinds)]
    for name in (MANIFEST_NAME, CARD_NAME):
        check_writable(student.path, name)
    update = {"metrics": [*kept, *new], "format_version": FORMAT_VERSION}
    manifest = student.manifest.model_copy(update=update).digested()
    data = manifest.to_bytes()
    Manifest.from_bytes(data)  # what no reader would take is not written
    card = render_folder(student.path, manifest)
    atomic_write(student.path / MANIFEST_NAME, data)
    atomic_write(student.path / CARD_NAME, card.encode())
    return manifest


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is no JSON")

    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(row), allow_nan=False, default=plain))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a row of figures cannot be recorded: {error}") from error
    return result
