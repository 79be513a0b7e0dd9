"""A golden file (see `golden.py`) read again, with what is needed to run it: seeds, conditions, expected outputs.

Needs numpy alone. What is compared, and how closely, is `checks.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Golden
from redif_sdk.artifact.untrusted.npz import npz_arrays
from redif_sdk.errors import ManifestError
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

__all__ = ["Arrays", "Record", "read_record"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Record:
    """One golden file of a student. `prompts` and `tokens` are empty, and `latents` None, where it has none."""

    manifest: Manifest
    table: StepTable
    seeds: list[tuple[int, int]]
    conditions: Arrays  # by the names of the denoiser's inputs
    prompts: list[str]
    tokens: Arrays  # by the names of the text encoder's inputs
    rows: list[int]
    x: NDArray[np.float32]
    f: NDArray[np.float32]
    latents: NDArray[np.float32] | None
    images: NDArray[np.uint8]

    def noise(self) -> NDArray[np.float32]:
        return draw(self.seeds, self.x.shape[2:], slices=self.table.noise_slices)


def read_record(student: StudentFolder, golden: Golden) -> Record:
    """Parse a golden file. ManifestError if it is not what the manifest says."""
    manifest = student.manifest
    try:
        arrays = npz_arrays(student.read(golden.file), golden.file)
        text = manifest.text is not None
        record = Record(
            manifest,
            manifest.step_table(golden.num_inference_steps),
            [(int(seed), int(index)) for seed, index in arrays["seeds"]],
            {
                spec.name: arrays[f"conditions.{spec.name}" if text else spec.name].astype(spec.dtype)
                for spec in manifest.condition_tensors
            },
            [str(prompt) for prompt in arrays["prompts"]] if text else [],
            {name: arrays[f"tokens.{name}"].astype(np.int64) for name in _token_shapes(manifest, 0)},
            [int(row) for row in arrays["rows"]],
            arrays["x"].astype(np.float32),
            arrays["f"].astype(np.float32),
            arrays["latents"].astype(np.float32) if manifest.postprocess.decoder is not None else None,
            arrays["images"].astype(np.uint8),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{golden.file} in {student.path} cannot be read: {error}; export the student again"
        ) from error
    if _shapes(record) != _said(manifest, golden, len(record.rows)) or record.rows[:1] != [0]:
        raise ManifestError(f"{golden.file} in {student.path} has arrays of other shapes; export the student again")
    return record


def _token_shapes(manifest: Manifest, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the text encoder's inputs by name."""
    return {
        name: (batch, part.max_length)
        for part in (manifest.text.tokenizers if manifest.text is not None else [])
        for name in (part.input, part.mask)
        if name is not None
    }


def _shapes(record: Record) -> Mapping[str, Any]:
    arrays = {**record.conditions, **record.tokens, "x": record.x, "f": record.f, "images": record.images}
    if record.latents is not None:
        arrays["latents"] = record.latents
    shapes = {name: value.shape for name, value in arrays.items()}
    return {**shapes, "seeds": len(record.seeds), "prompts": len(record.prompts)}


def _said(manifest: Manifest, golden: Golden, rows: int) -> Mapping[str, Any]:
    """What `_shapes` has to be."""
    batch, latents, postprocess = golden.batch, manifest.latents, manifest.postprocess
    height, width = golden.height or latents.height, golden.width or latents.width
    scale, channels = postprocess.scale, postprocess.channels(latents.channels)
    state = (batch, latents.channels, height, width)
    shapes: dict[str, Any] = {spec.name: (batch, *spec.shape[1:]) for spec in manifest.condition_tensors}
    shapes |= _token_shapes(manifest, batch)
    shapes |= {"x": (rows, *state), "f": (rows, *state), "images": (batch, height * scale, width * scale, channels)}
    if postprocess.decoder is not None:
        shapes["latents"] = state
    return {**shapes, "seeds": batch, "prompts": batch if manifest.text is not None else 0}
