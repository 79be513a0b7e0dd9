"""Pictures for a student's card: ``samples/steps-K.png``, made by the student itself while it is exported."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from redif_sdk.errors import RuntimeUnavailable, UnsupportedModel
from redif_sdk.folder import StudentFolder
from redif_sdk.images import contact_sheet

if TYPE_CHECKING:
    from redif_sdk.pipeline import FastPipeline

__all__ = ["FOLDER", "sample_grid", "write_samples"]

FOLDER = "samples"
SEED = 0
MOST_CLASSES = 10  # a column each
ROWS = 4
COLUMNS = 8  # of a student without classes
SMALLEST_TILE = 56  # pixels
MOST_TABLES = 4  # numbers of steps that are shown


def sample_grid(pipeline: FastPipeline, num_inference_steps: int | None = None) -> Image.Image:
    """Four rows of pictures of seed 0, none picked: one column a class (the first ten), or eight columns.

    A picture keeps its own pixels; small ones are enlarged by a whole factor. It takes one row of memory at a time.
    """
    condition = pipeline.manifest.condition
    labels = None if condition is None else list(range(min(condition.num_classes, MOST_CLASSES)))
    columns = COLUMNS if labels is None else len(labels)
    images: list[Image.Image] = []
    for row in range(ROWS):
        out = pipeline(
            class_labels=labels,
            num_images_per_prompt=columns if labels is None else 1,
            num_inference_steps=num_inference_steps,
            seed=[(SEED, row * columns + column) for column in range(columns)],
        )
        images += out.images
    factor = math.ceil(SMALLEST_TILE / min(images[0].size))
    width, height = images[0].size
    tiles = [image.resize((width * factor, height * factor), Image.Resampling.NEAREST) for image in images]
    return contact_sheet(tiles, columns)


def write_samples(folder: str | Path) -> list[str]:
    """Write ``samples/steps-K.png`` for the first numbers of steps of the student in `folder`; returns the paths.

    Computed in fp32 on the CPU where it can be. Nothing is written where no engine here runs the student. The files
    are not in the manifest's list: `write_manifest` comes after.
    """
    pipeline = _pipeline(StudentFolder(folder))
    if pipeline is None:
        return []
    (Path(folder) / FOLDER).mkdir(exist_ok=True)
    written = []
    for count in pipeline.manifest.supported_steps[:MOST_TABLES]:
        buffer = io.BytesIO()
        sample_grid(pipeline, count).save(buffer, format="PNG", optimize=True)
        written.append(f"{FOLDER}/steps-{count}.png")
        (Path(folder) / written[-1]).write_bytes(buffer.getvalue())
    return written


def _pipeline(student: StudentFolder) -> FastPipeline | None:
    from redif_sdk.pipeline import FastPipeline

    fp32 = any(graph.precision == "fp32" for graph in student.manifest.graphs)
    for runtime in ("onnxruntime", "auto"):  # the first needs no compilation
        try:
            return FastPipeline(student, runtime=runtime, device="cpu", precision="fp32" if fp32 else "auto")
        except (RuntimeUnavailable, UnsupportedModel):
            continue
    return None
