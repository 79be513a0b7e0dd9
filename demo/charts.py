"""Latency against quality as a picture: a point for each measured row, in SVG that takes the page's own colours.

The figures are those that `redif eval --save` and `redif bench --save` left in manifests; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.metadata import BASELINES, number, own_rows

__all__ = ["Point", "chart", "points"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 62, 52, 20, 150
STUDENT, OTHER = "#4f46e5", "#8a8a99"


@dataclass(frozen=True)
class Point:
    """One sampler: milliseconds of one picture (None: not timed), Frechet distance to the teacher, and its name."""

    name: str
    calls: int
    distance: float
    milliseconds: float | None
    student: bool


def points(manifests: Mapping[str, Manifest]) -> list[Point]:
    """All that was measured of these students, their teacher and untrained samplers; each sampler once."""
    found: dict[tuple[str, int], Point] = {}
    for name, manifest in manifests.items():
        own = own_rows(manifest)
        for row in manifest.metrics:
            steps, distance = number(row, "num_inference_steps"), number(row, "fd_teacher")
            method = str(row.get("method"))
            mine = any(row is each for each in own)
            if steps is None or distance is None or not (mine or method in BASELINES):
                continue
            calls = number(row, "network_calls") or steps
            label = f"{name}, {steps:.0f} step{'s' * (steps != 1)}" if mine else f"{method} {steps:.0f}"
            timed = _milliseconds(manifest.metrics, steps) if mine or method == "teacher" else None
            key = (name if mine else method, int(steps))
            if key not in found or found[key].milliseconds is None:
                found[key] = Point(label, int(calls), distance, timed, mine)
    return sorted(found.values(), key=lambda point: (not point.student, point.calls, point.name))


def _milliseconds(rows: Iterable[Mapping[str, Any]], steps: float) -> float | None:
    """Of one picture alone: FastPipeline's, else the fastest that was timed at that number of steps."""
    timed = [
        (not str(row["contender"]).startswith("fastpipeline"), 1000 * seconds)
        for row in rows
        if "contender" in row
        and number(row, "batch") == 1
        and number(row, "num_inference_steps") == steps
        and (seconds := number(row, "seconds_median")) is not None
    ]
    return min(timed)[1] if timed else None


def chart(found: list[Point]) -> str:
    """HTML: the chart and a table of the same figures; or a sentence that says how to measure."""
    if not found:
        return (
            "<p>Nothing was measured of this student yet. <code>redif eval DIR --save</code> records its quality, and "
            "<code>redif bench DIR --save</code> its speed.</p>"
        )
    timed = [point for point in found if point.milliseconds is not None]
    by_time = any(point.student for point in timed)
    drawn = timed if by_time else found
    unit = "milliseconds for one picture" if by_time else "network calls for one picture (no speed was recorded)"
    return f'<div class="redif-chart">{_svg(drawn, by_time, unit)}{_table(found)}</div>'


def _svg(drawn: list[Point], by_time: bool, unit: str) -> str:
    places = [(_at(point, by_time), point.distance, point) for point in drawn]
    low_x, high_x = _ends([x for x, _, _ in places])
    top = max(1.15 * max(y for _, y, _ in places), 1e-9)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(x) - math.log(low_x)) / (math.log(high_x) - math.log(low_x))

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * max(y, 0.0) / top

    parts = [_grid(low_x, high_x, top, across, down, unit)]
    taken: list[tuple[float, float]] = []
    for x, y, point in sorted(places, key=lambda place: place[1]):
        cx, cy = across(x), down(y)
        label = cy + 4
        while any(abs(label - other) < 15 and abs(cx - at) < 130 for at, other in taken):
            label -= 15
        taken.append((cx, label))
        colour = STUDENT if point.student else OTHER
        said = f"{point.name}: {x:.3g} {'ms' if by_time else 'calls'}, distance {y:.3g}"
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" fill="{colour}"><title>{escape(said)}</title></circle>'
            f'<text x="{cx + 11:.1f}" y="{label:.1f}" font-weight="{600 if point.student else 400}">'
            f"{escape(point.name)}</text>"
        )
    title = "Latency against quality: to the left is faster, down is nearer to the teacher"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" font-size="13" fill="currentColor" '
        f'font-family="system-ui, sans-serif"><title>{title}</title>{"".join(parts)}</svg>'
    )


def _grid(low: float, high: float, top: float, across: Any, down: Any, unit: str) -> str:
    parts = []
    for tick in _log_ticks(low, high):
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {TOP} V{HEIGHT - BOTTOM}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    step = _step(top)
    for place in range(int(top / step) + 1):
        y = down(place * step)
        parts.append(f'<path d="M{LEFT} {y:.1f} H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{place * step:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(unit)}</text>')
    parts.append(
        f'<text transform="translate(16 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"distance to the teacher (FD)</text>"
    )
    return "".join(parts)


def _at(point: Point, by_time: bool) -> float:
    value = point.milliseconds if by_time else float(point.calls)
    assert value is not None
    return max(value, 1e-6)


def _ends(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.5, max(high * 1.5, low * 4)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the ends; powers alone where that would be too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    powers = [10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high]
    return inside if len(inside) <= 9 else powers


def _step(top: float) -> float:
    rough = top / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _table(found: list[Point]) -> str:
    rows = "".join(
        f"<tr><td>{escape(point.name)}</td><td>{point.calls}</td>"
        f"<td>{'' if point.milliseconds is None else f'{point.milliseconds:.3g}'}</td>"
        f"<td>{point.distance:.2f}</td></tr>"
        for point in found
    )
    return (
        "<table><thead><tr><th>sampler</th><th>network calls</th><th>ms a picture</th><th>FD to the teacher</th></tr>"
        f"</thead><tbody>{rows}</tbody></table><p>FD: Frechet distance in the features that the student's card names. "
        "An empty cell was not timed, and is not in the picture.</p>"
    )
