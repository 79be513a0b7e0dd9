"""`redif bench` as a picture: a bar a contender, an image an axis, in plain SVG that needs no font and no script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["bars"]

WIDTH, LABELS, FIGURES = 940, 262, 232  # of the picture, of the names on the left, of the figures on the right
BAR, GAP, HEAD, GROUP, FOOT = 20, 9, 62, 34, 30
FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"
INK, PALE, LINE = "#1e293b", "#64748b", "#e2e8f0"
OURS, ENGINE, TORCH = "#c2410c", "#0f766e", "#94a3b8"
COLOURS = {"FastPipeline": OURS, "bare engines": ENGINE, "torch and diffusers": TORCH}

TITLES = {
    "fastpipeline-auto": "FastPipeline (auto)",
    "fastpipeline": "FastPipeline",
    "onnxruntime": "bare ONNX Runtime",
    "openvino": "bare OpenVINO, fused",
    "openvino-stepped": "bare OpenVINO, stepped",
    "torch-eager": "torch eager",
    "torch-compile": "torch.compile",
    "diffusers-eager": "diffusers",
    "diffusers-pipeline": "diffusers DDIMPipeline",
    "optimum": "optimum-onnx",
}
SHORT = {"onnxruntime": "ORT", "openvino": "OpenVINO"}


def bars(rows: Sequence[Mapping[str, Any]], title: str, subtitle: str = "") -> str:
    """An SVG document: for every batch among `rows`, a group of bars in milliseconds an image, the fastest first.

    The bar ends at the median; the mark shows the 95th percentile; the figures are the milliseconds and how many times
    faster than the reference. Rows that were not timed are left out. Bars longer than ten times the group's median
    are cut, and say so by a gap.
    """
    timed = [row for row in rows if row["seconds_median"] is not None]
    batches = sorted({row["batch"] for row in timed})
    parts, y = [], float(HEAD)
    for batch in batches:
        group = sorted((row for row in timed if row["batch"] == batch), key=lambda row: row["seconds_median"])
        drawn, y = _group(group, batch, y)
        parts += drawn
    height = y + FOOT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" font-family="{FONT}" font-size="13">',
            f"<title>{html.escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
            _text(16, 28, title, size=18, weight=600),
            _text(16, 48, subtitle, colour=PALE),
            *parts,
            _legend(y + 14),
            "</svg>\n",
        ]
    )


def _group(rows: Sequence[Mapping[str, Any]], batch: int, y: float) -> tuple[list[str], float]:
    """The bars of one batch from `y` down, and where they end."""
    reference = next((row["ratio_to"] for row in rows if row["ratio_to"]), None)
    against = f", times faster than {TITLES.get(reference, reference)}" if reference else ""
    parts = [_text(16, y + 20, f"Batch {batch}: milliseconds an image{against}", weight=600)]
    y += GROUP
    times = [1000 * row["seconds_median"] / batch for row in rows]
    end = _axis_end(times)
    space = WIDTH - LABELS - FIGURES
    bottom = y + len(rows) * (BAR + GAP)
    for tick in _ticks(end):
        x = LABELS + space * tick / end
        parts.append(f'<line x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="{LINE}"/>')
        parts.append(_text(x, bottom + 12, f"{tick:g}", colour=PALE, size=11, anchor="middle"))
    for row, milliseconds in zip(rows, times, strict=True):
        parts += _bar(row, milliseconds, end, space, y)
        y += BAR + GAP
    return parts, bottom + 24


def _bar(row: Mapping[str, Any], milliseconds: float, end: float, space: float, y: float) -> list[str]:
    kind = _kind(row)
    cut = milliseconds > end
    width = space * min(milliseconds, end) / end
    middle = y + BAR / 2 + 4.5
    weight = 600 if kind == "FastPipeline" else 400
    parts = [
        _text(LABELS - 10, middle, _title(row), anchor="end", weight=weight),
        f'<rect x="{LABELS}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" fill="{COLOURS[kind]}"/>',
    ]
    high = 1000 * row["seconds_p95"] / row["batch"]
    reach = LABELS + space * min(high, end) / end
    if cut:
        gap = LABELS + space * 0.93
        parts.append(f'<path d="M{gap:.1f} {y + BAR + 2:.1f} l6 -{BAR + 4} h7 l-6 {BAR + 4} z" fill="#ffffff"/>')
    elif high > milliseconds:
        centre = y + BAR / 2
        line = f"M{LABELS + width:.1f} {centre:.1f} H{reach:.1f} M{reach:.1f} {centre - 5:.1f} v10"
        parts.append(f'<path d="{line}" stroke="{INK}" stroke-width="1.2" fill="none"/>')
    ratio = "" if row["ratio"] is None else f" · {_number(row['ratio'])}x"
    spread = "" if row["ratio_low"] is None else f" ({_number(row['ratio_low'])}-{_number(row['ratio_high'])})"
    figures = f"{_number(milliseconds)} ms{ratio}"
    at = max(LABELS + width, 0 if cut else reach) + 8
    parts.append(
        f'<text x="{at:.1f}" y="{middle:.1f}" fill="{INK}" font-weight="{weight}">{figures}'
        f'<tspan fill="{PALE}" font-size="11" font-weight="400">{spread}</tspan></text>'
    )
    return parts


def _kind(row: Mapping[str, Any]) -> str:
    if row["contender"].startswith("fastpipeline"):
        return "FastPipeline"
    return "torch and diffusers" if row["runtime"] == "torch" else "bare engines"


def _title(row: Mapping[str, Any]) -> str:
    """The contender as a reader knows it, with its engine, precision and steps where they tell it from others."""
    name = TITLES.get(row["contender"], row["contender"])
    if row["contender"] == "teacher":
        return f"teacher in diffusers, {row['num_inference_steps']} steps"
    engine = SHORT.get(row["runtime"], row["runtime"])
    if row["contender"] == "fastpipeline-auto":
        return f"FastPipeline (auto: {engine}, {row['precision']})"
    return f"{name}{f' on {engine}' if row['contender'] == 'fastpipeline' else ''}, {row['precision']}"


def _axis_end(values: Sequence[float]) -> float:
    """The end of the axis: the longest bar, but for those that would make all others invisible."""
    middle = sorted(values)[len(values) // 2]
    return max(value for value in values if value <= 10 * middle) * 1.05


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`, three to six of them."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(power * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if end / (power * factor) <= 6)
    return [round(step * index, 10) for index in range(int(end / step) + 1)]


def _number(value: float) -> str:
    """Three figures, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _legend(y: float) -> str:
    parts, x = [], 16.0
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="{y - 9:.1f}" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 17, y, name, colour=PALE, size=12))
        x += 40 + 7 * len(name)
    note = "bar: median; mark: 95th percentile; in brackets: 10-90 % of the rounds"
    return "".join([*parts, _text(WIDTH - 16, y, note, colour=PALE, size=12, anchor="end")])


def _text(
    x: float, y: float, text: str, *, colour: str = INK, size: int = 13, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{html.escape(text)}</text>'
    )
