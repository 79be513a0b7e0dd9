"""The quickstart's ``report.html``: one file that needs nothing beside it. Only presentation lives here."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from redif_sdk.results import label

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #c2410c; --plain: #64748b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem }
.lead { font-size: 1.15rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .4rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left } tr.student td { font-weight: 600 }
figure { margin: 1rem 0 } figcaption { font-size: .9rem; opacity: .8 }
.strip { display: grid; grid-template-columns: 10rem 1fr; gap: .2rem .8rem; align-items: center; }
.strip img { width: 100%; image-rendering: pixelated; display: block; background: #000 }
@media (max-width: 40rem) { .strip { grid-template-columns: 1fr } }
code, pre { background: #8882; border-radius: .3rem; padding: .1rem .3rem } pre { padding: .8rem; overflow-x: auto }
svg text { fill: currentColor; font-size: 12px }
"""


@dataclass(frozen=True)
class Sheet:
    """Pictures from the same noises: ``rows`` of (title, uint8 (N, H, W, C))."""

    steps: int
    rows: list[tuple[str, NDArray[np.uint8]]]


def strip(images: NDArray[np.uint8]) -> Image.Image:
    """(N, H, W, C) side by side."""
    row = np.concatenate(list(images), axis=1)
    return Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row)


def poster(sheets: Sequence[Sheet], scale: int = 2) -> Image.Image:
    """All sheets as one picture with the titles beside the strips: ``samples.png``."""
    font, margin, gap = ImageFont.load_default(15), 190, 14
    strips = [[(title, strip(images)) for title, images in sheet.rows] for sheet in sheets]
    width, height = strips[0][0][1].width * scale, strips[0][0][1].height * scale
    whole = Image.new("RGB", (margin + width, sum(len(rows) * height + gap for rows in strips) - gap), "white")
    pen, y = ImageDraw.Draw(whole), 0
    for rows in strips:
        for title, picture in rows:
            pen.text((8, y + height // 2 - 9), title, fill="black", font=font)
            whole.paste(picture.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (margin, y))
            y += height
        y += gap
    return whole


def grid(sheet: Sheet, captions: Sequence[str], columns: int, scale: int = 1) -> Image.Image:
    """Blocks of ``columns`` captions, each with a line of pictures for every row of the sheet, titles at their left."""
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
            picture = Image.fromarray(images[place][..., 0] if images.shape[-1] == 1 else images[place])
            whole.paste(picture.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (x, top))
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


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _kind(row: dict[str, Any]) -> str:
    return "student" if row["method"] not in ("teacher", "ddim") else ""


def _has_real(rows: list[dict[str, Any]]) -> bool:
    return any(row["fd_real"] is not None for row in rows)


def _quality(rows: list[dict[str, Any]]) -> str:
    names = {"teacher": "teacher", "ddim": "DDIM, untrained"}
    distances = {"fd_teacher": "FD to teacher", "fd_teacher_gain": "best gain", "fd_teacher_std": "std match"}
    if _has_real(rows):
        distances["fd_real"] = "FD to real"
    titles = ("", "steps", "calls", *distances.values(), "paired MSE", "precision", "recall")
    cells = []
    for row in rows:
        figures = [_number(row[key]) for key in distances]
        tail = [_number(row["mse"], 4), _number(row["precision"], 2), _number(row["recall"], 2)]
        name = names.get(row["method"], f"student: {label(row)}")
        counts = [str(row["num_inference_steps"]), str(row["network_calls"])]
        cells.append((_kind(row), [name, *counts, *figures, *tail]))
    return _table(titles, cells)


def _speed(rows: list[dict[str, Any]]) -> str:
    titles = ("", "calls", "batch", "seconds an image", "images a second", "times faster", "times fewer calls")
    calls = max(row["network_calls"] for row in rows)
    cells = []
    for row in rows:
        own = row["network_calls"]
        numbers = [f"{row['seconds_per_image']:.4f}", f"{row['images_per_second']:.1f}", f"{row['ratio']:.1f}"]
        kind = "" if row["contender"] == "teacher" else "student"
        cells.append((kind, [row["contender"], str(own), str(row["batch"]), *numbers, f"{calls / own:.1f}"]))
    return _table(titles, cells)


def _chart(rows: list[dict[str, Any]]) -> str:
    """Frechet distance to the teacher against network calls, both on logarithmic axes."""
    series = {
        "DDIM, untrained": ([r for r in rows if r["method"] == "ddim"], "var(--plain)"),
        "students": ([r for r in rows if _kind(r)], "var(--accent)"),
    }
    points = [row for rows_, _ in series.values() for row in rows_]
    low, high = (f(max(row["fd_teacher"], 0.1) for row in points) for f in (min, max))
    low, high, most = low * 0.8, high * 1.2, max(row["network_calls"] for row in points)
    width, height, left, bottom = 560, 260, 60, 40

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = left + (width - left - 60) * math.log(row["network_calls"]) / math.log(max(most, 2))
        share = math.log(max(row["fd_teacher"], 0.1) / low) / math.log(high / low)
        return x, (height - bottom) * (1 - share) + 10

    parts = []
    for index, (name, (members, colour)) in enumerate(series.items()):
        places = [(place(row), row) for row in sorted(members, key=lambda r: r["network_calls"])]
        line = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), row in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y - 6:.1f}">{row["fd_teacher"]:.1f}</text>')
        parts.append(f'<circle cx="{width - 150}" cy="{20 + 18 * index}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{width - 140}" y="{24 + 18 * index}">{name}</text>')
    for calls in sorted({row["network_calls"] for row in points}):
        x, _ = place({"network_calls": calls, "fd_teacher": high})
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{calls}</text>')
    parts.append(f'<text x="{width / 2}" y="{height}" text-anchor="middle">network calls an image</text>')
    return (
        f'<svg viewBox="0 0 {width} {height + 6}" width="100%" role="img" '
        f'aria-label="Frechet distance to the teacher against network calls">{"".join(parts)}</svg>'
    )


def _strips(sheet: Sheet) -> str:
    cells = "".join(
        f'<span>{html.escape(title)}</span><img alt="{html.escape(title)}" src="{_inline(strip(images))}">'
        for title, images in sheet.rows
    )
    word = "step" if sheet.steps == 1 else "steps"
    return f'<h3>{sheet.steps} {word}</h3><figure class="strip">{cells}</figure>'


def render(results: dict[str, Any], sheets: Sequence[Sheet]) -> str:
    """The whole page from ``results.json``'s content and the pictures."""
    rows, machine = results["rows"], results["machine"]
    students, teacher_row = [row for row in rows if _kind(row)], rows[0]
    floor = results.get("fd_teacher_floor")
    first = students[0]
    spent = "; ".join(
        f"{row['num_inference_steps']} step(s): {row['budget']['updates']} updates in {row['budget']['seconds']:.0f} s"
        for row in students
    )
    parts = "; ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds_by_part"].items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    fewer = teacher_row["network_calls"] / first["network_calls"]
    per_step = teacher_row["network_calls"] // teacher_row["num_inference_steps"]
    calls_note = f"The teacher is guided: {per_step} network calls a step; its students make one. " * (per_step > 1)
    note = f" Two sets of the teacher's own samples, of other noises, are {floor:.1f} apart." if floor else ""
    real = "FD to real: to the 10,000 real test images. " * _has_real(rows)
    prompts = results.get("prompts")
    if prompts is None:
        asked, shown = "class", ""
        example = 'pipe(class_labels=[3, 7], seed=0).images[0].save("dress.png")'
        pool = "were made beforehand and ship with the package; they are counted in each budget"
    else:
        asked, example = "prompt", f'pipe({prompts[0]!r}, seed=0).images[0].save("picture.png")'
        shown = f" Here: {'; '.join(prompts[: len(sheets[0].rows[0][1])])}."
        pool = "are counted in each budget, whether they were made now, lay in the cache or ship with the package"
    if results.get("preset") and not results.get("trained"):
        spent = f"Preset {results['preset']}: {spent}"
    spent = ". ".join([spent, *(f"{name}: {why}" for name, why in results.get("stopped", {}).items())])
    spent += " (not now: they come with the teacher)" * bool(results.get("trained"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>redif quickstart</title><style>{STYLE}</style></head><body>
<h1>redif quickstart</h1>
<p class="lead">A {teacher_row["network_calls"]}-call diffusion teacher ({html.escape(rows[0]["teacher"])}),
distilled into students of {", ".join(str(row["network_calls"]) for row in students)} network call(s):
up to {fewer:.0f} times fewer calls an image. Made in {results["seconds"]:.0f} s on
{html.escape(str(machine["processor"]))}, {machine["cores"]} cores, {results["date"][:10]}.</p>
<h2>The same noise, three ways</h2>
<p>{calls_note}Every column starts from the same noise and {asked}.
All pictures came out of the exported ONNX graphs.{html.escape(shown)}</p>
{"".join(_strips(sheet) for sheet in sheets)}
<h2>How close to the teacher</h2>
{_chart(rows)}
{_quality(rows)}
<p>FD: Frechet distance in features of {html.escape(rows[0]["features"])}, which gave no reward, over
{rows[0]["num_samples"]} held-out noises, to the teacher's images for the same noises; lower is better.{note}
Two controls: after the best scalar gain on the output, and with each sample's mean and standard deviation set to the
teacher's. {real}MSE: paired, images in [-1, 1].</p>
<h2>How fast</h2>
{_speed(results["speed"])}
<p>Medians of {SPEED_NOTE}, through <code>FastPipeline</code> on ONNX Runtime, the contenders interleaved. Two-core
machines are noisy: take the ratios.</p>
<h2>What it cost</h2>
<p>{html.escape(spent)}. The teacher's calls for the pool of pairs
({students[0]["budget"]["teacher_calls"]:,}) {pool}.</p>
<p>{html.escape(parts)}.</p>
<h2>Use it</h2>
<pre>from redif_sdk import FastPipeline
pipe = FastPipeline.from_pretrained("student-{first["network_calls"]}")
{html.escape(example)}</pre>
<p>Machine-readable: <code>results.json</code>. Versions: {html.escape(versions)}.</p>
</body></html>
"""


SPEED_NOTE = "5 rounds after a warm-up"
