"""What was measured once, when a teacher was published: ``judged.npz`` beside it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.measures.features import NETWORK
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest

JUDGED_FILE = "judged.npz"
PROTOCOL = 2  # raise it when a figure of a row is computed in another way: older files are then ignored


@dataclass(frozen=True)
class Judged:
    """What was measured once, when a teacher was published, over its held-out noises.

    Attributes:
        features: of the teacher's images, (N, D) float32.
        rows: quality rows over all N noises, of the teacher and of untrained DDIM.
        floor: Frechet distance between two sets of N of the teacher's own images.
    """

    features: Tensor
    rows: list[dict[str, Any]]
    floor: float

    def row(self, method: str, steps: int) -> dict[str, Any] | None:
        """The row of that contender, if there is one."""
        found = (row for row in self.rows if (row["method"], row["num_inference_steps"]) == (method, steps))
        return next((dict(row) for row in found), None)


def read_judged(teacher: Teacher) -> Judged | None:
    """The contents of ``judged.npz`` beside ``teacher``; None: there is none for this identity, judge and protocol.

    Raises:
        InvalidRequest: the file is damaged.
    """
    if teacher.folder is None or not (path := teacher.folder / JUDGED_FILE).is_file():
        return None
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            key = (str(stored["fingerprint"]), str(stored["judge"]), int(stored["protocol"]))
            if key != (teacher.identity, NETWORK, PROTOCOL):
                return None
            features = torch.from_numpy(stored["features"]).float()
            return Judged(features, json.loads(str(stored["rows"])), float(stored["floor"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path} cannot be read ({error}); remove it to measure again") from error


def write_judged(teacher: Teacher, features: Tensor, rows: Sequence[dict[str, Any]], floor: float, path: Path) -> None:
    """Keep what :func:`read_judged` reads; ``features`` are rounded to float16."""
    np.savez_compressed(
        path,
        fingerprint=np.array(teacher.identity),
        judge=np.array(NETWORK),
        protocol=np.array(PROTOCOL),
        features=features.half().numpy(),
        rows=np.array(json.dumps(list(rows))),
        floor=np.array(floor),
    )
