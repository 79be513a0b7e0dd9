"""Real images and a published teacher's, at eight times their size: ``python -m zoo.teacher_sheet NAME -o FILE.png``.

A column has one class. The first rows are real test images, the first of their class; then come the teacher's, of the
first held-out noises in its bank. Nothing is picked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from redif_sdk.distill import Teacher, pool
from redif_sdk.distill.evaluation import datasets as data
from zoo.publish_teacher import grid

COLUMNS, SCALE, MARGIN, FONT = 10, 8, 30, 18


def main(
    name: Annotated[str, typer.Argument(help="The data set and its shipped teacher: fashion-mnist or emoji.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG file.")],
    teacher: Annotated[Path | None, typer.Option(help="A teacher's folder, in place of the shipped one.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 2,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the data set's files.")] = None,
) -> None:
    """Draw the sheet."""
    test = data.load(name, "test", data_dir)
    loaded = Teacher.load(str(teacher or name))
    held, _ = pool.get(loaded, pool.PIXEL_BANK_SIZES["held_out"], "held_out")
    assert held.condition is not None
    made, labels = loaded.images(held.target), held.condition.numpy()
    classes = np.linspace(0, len(test.class_names) - 1, min(COLUMNS, len(test.class_names))).round().astype(int)

    def first(of: np.ndarray, k: int) -> list[int]:
        return [int(np.flatnonzero(of == c)[k]) for c in classes]

    real = torch.tensor(test.images).float() / 127.5 - 1
    chosen = [real[first(test.labels, k)] for k in range(rows)] + [made[first(labels, k)] for k in range(rows)]
    drawn = grid(torch.cat(chosen), len(classes), SCALE).convert("RGB")
    side = drawn.width // len(classes)
    sheet = Image.new("RGB", (drawn.width, drawn.height + 2 * MARGIN), "white")
    half = rows * side
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for top, title, part in ((0, "real test images", 0), (half + MARGIN, f"the teacher {name}", half)):
        pen.text((6, top + 4), title, "black", font)
        sheet.paste(drawn.crop((0, part, drawn.width, part + half)), (0, top + MARGIN))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    typer.run(main)
