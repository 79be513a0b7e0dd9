"""Record measured rows of quality and speed in a student's ``redif.json``, and make the card that shows them.

`redif eval`, `redif bench` and the quickstart measure; docs/design.md describes the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import CARD_NAME, FORMAT_VERSION, MANIFEST_NAME, Manifest
from redif_sdk.card.metadata import BASELINES
from redif_sdk.card.render import check_writable, render_folder
from redif_sdk.errors import InvalidRequest
from redif_sdk.results import machine

__all__ = ["check_recordable", "kind_of", "quality_rows", "record", "speed_rows"]

#: The field that only rows of this kind have.
KINDS = {"quality": "method", "speed": "contender"}

#: Fields that are not recorded.
_DROPPED = frozenset({"round_seconds", "skipped"})


def kind_of(row: Mapping[str, Any]) -> str:
    """Return "quality" or "speed"; raise InvalidRequest for any other row."""
    for kind, field in KINDS.items():
        if field in row:
            return kind
    raise InvalidRequest(f"a row with {', '.join(map(str, row)) or 'nothing'} is neither a quality row nor a speed row")


def quality_rows(rows: Iterable[Mapping[str, Any]], steps: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of the teacher, untrained samplers and students; of students only `steps` steps, if given."""
    return [
        dict(row) for row in rows if steps is None or row["method"] in BASELINES or row["num_inference_steps"] == steps
    ]


def speed_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were timed, each with the processor's name."""
    processor = machine()["processor"]
    return [
        {key: value for key, value in row.items() if key not in _DROPPED} | {"machine": processor}
        for row in rows
        if row.get("seconds_median") is not None
    ]


def check_recordable(folder: str | Path) -> None:
    """Raise what `record` would raise for this folder; called before the measuring."""
    student = StudentFolder(folder)
    for name in (MANIFEST_NAME, CARD_NAME):
        check_writable(student.path, name)
    render_folder(student.path, student.manifest)


def record(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> Manifest:
    """Put measured rows into a student's manifest, and make its card anew; returns the manifest.

    New rows of a kind, quality or speed, replace the old rows of that kind; the other kind stays. No file is hashed
    anew: an altered file stays refused.

    Raises:
        InvalidRequest: a row is of neither kind or is not JSON, or the card has malformed sections. Nothing is written.
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
        raise TypeError(f"{type(value).__name__} is not JSON")

    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(row), allow_nan=False, default=plain))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a row of figures cannot be recorded: {error}") from error
    return result
