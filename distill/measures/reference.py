"""Statistics of real images that lie beside a shipped teacher, as ``reference.npz``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from redif_sdk.distill.measures.distances import Statistics

REFERENCE_FILE = "reference.npz"


def read_reference(folder: Path) -> Statistics | None:
    """The statistics that ``reference.npz`` holds, if the folder has any."""
    path = folder / REFERENCE_FILE
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        mean = stored["mean"].astype(np.float64)
        covariance = np.zeros((len(mean), len(mean)))
        upper = np.triu_indices(len(mean))
        covariance[upper] = stored["covariance"]
    return Statistics(mean, covariance + np.triu(covariance, 1).T)
