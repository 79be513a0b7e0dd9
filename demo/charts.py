"""Latency against quality: a plot and a table of the measured figures.

The figures are those that `redif eval --save` and `redif bench --save` recorded in manifests; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from gradio.components import Component

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.metadata import BASELINES, number, own_rows

__all__ = ["Point", "frame", "points", "show"]

SAMPLER, CALLS, MILLISECONDS, DISTANCE = "sampler", "network calls per image", "ms per image", "FD to the teacher"
NOTHING_MEASURED = (
    "No measurements are recorded for this student. `redif eval DIR --save` records quality, `redif bench DIR --save` "
    "speed."
)
NOTE = (
    "Left is faster, down is closer to the teacher. FD: Frechet distance in the features named on the student's card. "
    "An empty cell was not timed, and is not in the plot."
)


@dataclass(frozen=True)
class Point:
    """One sampler: its name, network calls, Frechet distance to the teacher, and milliseconds per image, if timed."""

    name: str
    calls: int
    distance: float
    milliseconds: float | None
    student: bool


def points(manifests: Mapping[str, Manifest]) -> list[Point]:
    """The measurements of these students, their teacher and untrained samplers; one point per sampler."""
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
    """Milliseconds of a single image: FastPipeline's, else the fastest one timed at that number of steps."""
    timed = [
        (not str(row["contender"]).startswith("fastpipeline"), 1000 * seconds)
        for row in rows
        if "contender" in row
        and number(row, "batch") == 1
        and number(row, "num_inference_steps") == steps
        and (seconds := number(row, "seconds_median")) is not None
    ]
    return min(timed)[1] if timed else None


def frame(found: Iterable[Point]) -> pd.DataFrame:
    """The points as a table with one row per sampler; NaN where no time was recorded."""
    rows = [(point.name, point.calls, point.milliseconds, round(point.distance, 2)) for point in found]
    table = pd.DataFrame(rows, columns=[SAMPLER, CALLS, MILLISECONDS, DISTANCE])
    return table.astype({MILLISECONDS: float})


def show(found: list[Point]) -> list[Component]:
    """Plot, table and a note; or a text that says how to measure. They become part of the page that is being built.

    The plot is over the time of one image, or over network calls if no student was timed.
    """
    if not found:
        return [gr.Markdown(NOTHING_MEASURED)]
    table = frame(found)
    timed = any(point.student and point.milliseconds is not None for point in found)
    across = MILLISECONDS if timed else CALLS
    plot = gr.ScatterPlot(
        table.dropna(subset=[across]),
        x=across,
        y=DISTANCE,
        color=SAMPLER,
        tooltip="all",
        x_lim=[0, 1.08 * float(table[across].max())],  # points on the border would be cut
        y_lim=[-0.05 * float(table[DISTANCE].max()), 1.1 * max(float(table[DISTANCE].max()), 1e-3)],
        height=420,
        title="Latency against quality",
        elem_id="plot",
    )
    shown = table.assign(
        **{MILLISECONDS: table[MILLISECONDS].map(lambda value: "" if pd.isna(value) else f"{value:.3g}")}
    )
    listed = gr.Dataframe(shown, interactive=False, show_label=False, elem_id="measured")
    return [plot, listed, gr.Markdown(NOTE)]
