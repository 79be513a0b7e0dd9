"""Pictures for a student's card: ``samples/steps-K.png``, made by the student itself while it is exported."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import RuntimeUnavailable, UnsupportedModel
from redif_sdk.images import contact_sheet

if TYPE_CHECKING:
    from redif_sdk.pipeline import FastPipeline

__all__ = ["FOLDER", "sample_grid", "shown_prompts", "write_samples"]

FOLDER = "samples"
SEED = 0
MOST_CLASSES = 10  # a column each
MOST_PROMPTS = 8  # a column each
ROWS = 4
COLUMNS = 8  # of a student that is asked for nothing
LARGE = 256  # pixels: of pictures this wide there are fewer, since they take long and a card is narrow
LARGE_COLUMNS = 4
SMALLEST_TILE = 56  # pixels
MOST_TABLES = 4  # numbers of steps that are shown


def sample_grid(pipeline: FastPipeline, num_inference_steps: int | None = None) -> Image.Image:
    """Rows of pictures of seed 0, none picked: a column a class (the first ten), or one of the prompts that the
    manifest gives as examples (the first eight), or eight columns. Four rows; one of four columns of large pictures.

    A picture keeps its own pixels; small ones are enlarged by a whole factor. It takes one row of memory at a time.
    """
    manifest = pipeline.manifest
    large = _large(manifest)
    columns = LARGE_COLUMNS if large else COLUMNS
    asked: dict[str, Any] = {}
    if manifest.classes is not None:
        columns = min(manifest.classes.num_classes, LARGE_COLUMNS if large else MOST_CLASSES)
        asked = {"class_labels": list(range(columns))}
    elif manifest.text is not None:
        asked = {"prompt": shown_prompts(manifest)}
        columns = len(asked["prompt"])
    images: list[Image.Image] = []
    for row in range(1 if large else ROWS):
        out = pipeline(
            **asked,
            num_images_per_prompt=1 if asked else columns,
            num_inference_steps=num_inference_steps,
            seed=[(SEED, row * columns + column) for column in range(columns)],
        )
        images += out.images
    factor = math.ceil(SMALLEST_TILE / min(images[0].size))
    width, height = images[0].size
    tiles = [image.resize((width * factor, height * factor), Image.Resampling.NEAREST) for image in images]
    return contact_sheet(tiles, columns)


def shown_prompts(manifest: Manifest) -> list[str]:
    """The prompts of a student's columns."""
    if manifest.text is None:
        return []
    return manifest.text.examples[: LARGE_COLUMNS if _large(manifest) else MOST_PROMPTS]


def _large(manifest: Manifest) -> bool:
    return max(manifest.image_shape[:2]) >= LARGE


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
