"""The quickstart's ``report.html``, one self-contained file, and its sheets of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from redif_sdk.bench.plot import INK, new_figure, svg
from redif_sdk.results import label

SPEED_NOTE = "5 rounds after a warm-up"
COLOURS = {"DDIM, untrained": "#64748b", "students": "#c2410c"}


@dataclass(frozen=True)
class Sheet:
    """Images from the same noises: ``rows`` of (title, uint8 (N, H, W, C))."""

    steps: int
    rows: list[tuple[str, NDArray[np.uint8]]]


def strip(images: NDArray[np.uint8]) -> Image.Image:
    """Images uint8 (N, H, W, C) side by side."""
    row = np.concatenate(list(images), axis=1)
    return Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row)


def poster(sheets: Sequence[Sheet], scale: int = 2) -> Image.Image:
    """All sheets as one image with the titles beside the strips: ``samples.png``."""
    font, margin, gap = ImageFont.load_default(15), 190, 14
    strips = [[(title, strip(images)) for title, images in sheet.rows] for sheet in sheets]
    width, height = strips[0][0][1].width * scale, strips[0][0][1].height * scale
    whole = Image.new("RGB", (margin + width, sum(len(rows) * height + gap for rows in strips) - gap), "white")
    pen, y = ImageDraw.Draw(whole), 0
    for rows in strips:
        for title, image in rows:
            pen.text((8, y + height // 2 - 9), title, fill="black", font=font)
            whole.paste(image.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (margin, y))
            y += height
        y += gap
    return whole


def grid(sheet: Sheet, captions: Sequence[str], columns: int, scale: int = 1) -> Image.Image:
    """Blocks of ``columns`` captions with a line of images for every row of the sheet; titles at the left."""
    font, small, margin, line, gap = ImageFont.load_default(13), ImageFont.load_default(9), 130, 26, 10
    count, height, width = sheet.rows[0][1].shape[:3]
    height, width = height * scale, width * scale
    blocks = -(-count // columns)
    tall = line + len(sheet.rows) * (height + 2) + gap
    whole = Image.new("RGB", (margin + columns * (width + 2), blocks * tall), "white")
    pen = ImageDraw.Draw(whole)
    for place in range(count):
        x, y = margin + place % columns * (width + 2), place // columns * tall
        words = _wrapped(captions[place], small, width)
        pen.multiline_text((x + 1, y), "\n".join(words), fill="black", font=small, spacing=1)
        for row, (title, images) in enumerate(sheet.rows):
            top = y + line + row * (height + 2)
            if place % columns == 0:
                pen.text((6, top + height // 2 - 8), title, fill="black", font=font)
            image = Image.fromarray(images[place][..., 0] if images.shape[-1] == 1 else images[place])
            whole.paste(image.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (x, top))
    return whole


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """At most two lines of a caption."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:2]


def _inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _is_student(row: dict[str, Any]) -> bool:
    return row["method"] not in ("teacher", "ddim")


#: Titles, and rows of (whether it is a student's, cells).
Table = tuple[list[str], list[tuple[bool, list[str]]]]


def _quality(rows: list[dict[str, Any]], real: bool) -> Table:
    names = {"teacher": "teacher", "ddim": "DDIM, untrained"}
    distances = {"fd_teacher": "FD to teacher", "fd_teacher_gain": "best gain", "fd_teacher_std": "std match"}
    distances |= {"fd_unpaired": "unpaired FD"} | ({"fd_real": "FD to real"} if real else {})
    cells = []
    for row in rows:
        name = names.get(row["method"], f"student: {label(row)}")
        counts = [str(row["num_inference_steps"]), str(row["network_calls"])]
        tail = [_number(row["mse"], 4), *(_number(row.get(key), 2) for key in ("precision", "recall", "coverage"))]
        cells.append((_is_student(row), [name, *counts, *(_number(row.get(key)) for key in distances), *tail]))
    return ["", "steps", "calls", *distances.values(), "paired MSE", "precision", "recall", "coverage"], cells


def _speed(rows: list[dict[str, Any]]) -> Table:
    calls = max(row["network_calls"] for row in rows)
    cells = []
    for row in rows:
        own = row["network_calls"]
        numbers = [f"{row['seconds_per_image']:.4f}", f"{row['images_per_second']:.1f}", f"{row['ratio']:.1f}"]
        name = row["contender"]
        cells.append((name != "teacher", [name, str(own), str(row["batch"]), *numbers, f"{calls / own:.1f}"]))
    return ["", "calls", "batch", "seconds/image", "images/second", "times faster", "times fewer calls"], cells


def _chart(rows: list[dict[str, Any]]) -> str:
    """SVG: Frechet distance to the teacher against network calls, both on logarithmic axes."""
    figure = new_figure(9, 4)
    axis = figure.subplots()
    series = {"DDIM, untrained": [row for row in rows if row["method"] == "ddim"]}
    series["students"] = [row for row in rows if _is_student(row)]
    for name, members in series.items():
        ordered = sorted(members, key=lambda row: int(row["network_calls"]))
        calls, distances = [row["network_calls"] for row in ordered], [max(row["fd_teacher"], 0.1) for row in ordered]
        axis.plot(calls, distances, "o-", color=COLOURS[name], label=name)
        for place, row in zip(zip(calls, distances, strict=True), ordered, strict=True):
            axis.annotate(f"{row['fd_teacher']:.1f}", place, (6, 6), textcoords="offset points", color=INK)
    ticks = sorted({row["network_calls"] for members in series.values() for row in members})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.margins(0.08, 0.15)
    low, high = axis.get_ylim()
    levels = [digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5)]
    axis.set_yticks(inside := [level for level in levels if low <= level <= high], [f"{level:g}" for level in inside])
    axis.minorticks_off()
    axis.set_xlabel("network calls per image", color=INK)
    axis.set_ylabel("FD to the teacher", color=INK)
    axis.tick_params(which="both", colors=INK, labelcolor=INK)
    axis.spines[:].set_color(INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, "Frechet distance to the teacher against network calls", ink="currentColor")


def _cost(results: dict[str, Any], students: list[dict[str, Any]]) -> str:
    """Updates and seconds of each student, and what cut a run short."""
    spent = "; ".join(
        f"{row['num_inference_steps']} step(s): {row['budget']['updates']} updates in {row['budget']['seconds']:.0f} s"
        for row in students
    )
    trained = bool(results.get("trained"))
    if results.get("preset") and not trained:
        spent = f"Preset {results['preset']}: {spent}"
    spent = ". ".join([spent, *(f"{name}: {why}" for name, why in results.get("stopped", {}).items())])
    return spent + " (not in this run: they come with the teacher)" * trained


def _strips(sheet: Sheet) -> dict[str, Any]:
    return {"steps": sheet.steps, "rows": [(title, _inline(strip(images))) for title, images in sheet.rows]}


def render(results: dict[str, Any], sheets: Sequence[Sheet], act: Sheet | None = None) -> str:
    """The report as HTML, from the content of ``results.json`` and the images; ``act``: before and after
    reinforcement."""
    rows = results["rows"]
    students, teacher = [row for row in rows if _is_student(row)], rows[0]
    real = any(row["fd_real"] is not None for row in rows)
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["repr"] = repr
    return environment.get_template("report.html.j2").render(
        results,
        teacher=teacher,
        students=students,
        sheets=[_strips(sheet) for sheet in sheets],
        act=act and _strips(act),
        columns=len(sheets[0].rows[0][1]),
        calls_per_step=teacher["network_calls"] // teacher["num_inference_steps"],
        chart=_chart(rows),
        quality=_quality(rows, real),
        real=real,
        speed_table=_speed(results["speed"]),
        speed_note=SPEED_NOTE,
        cost=_cost(results, students),
    )
