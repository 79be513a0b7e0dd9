"""``report.html`` of a run: its curves and the same images over time, one file that loads nothing.

It is drawn from what `log` wrote, so that a run that is still going can be looked at too: ``redif report RUN``.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.bench.plot import INK, new_figure, svg
from redif_sdk.distill.training.log import ABOUT, IMAGES, LOG
from redif_sdk.errors import InvalidRequest, RedifError

__all__ = ["REPORT", "try_to_report", "write_report"]

REPORT = "report.html"
MOST_STRIPS = 16  # checks whose images are shown
SMALL = 800  # pixels of a strip's width, up to which a page makes it wider
LINE, PALE = "#c2410c", "#94a3b8"  # the student, and what it is compared with
SIZE = 4.2, 2.3  # inches of a chart

_log = logging.getLogger(__name__)

#: What curves may be drawn over: (key, title). A row without the figure is left out.
AXES = (
    ("update", "updates"),
    ("forward_equivalents", "forward-equivalents"),
    ("reward_calls", "images judged by rewards"),
)


CLOSE, LOST, MADE = "How close, and how good", "Is anything lost?", "The optimisation"


@dataclass(frozen=True)
class Chart:
    """A figure of the log.

    Attributes:
        group: The heading that it is under.
        key: Its name in a row.
        title: What it is.
        note: How to read it.
        level: Where the teacher is; None: nowhere.
        logarithmic: Its axis, where the values span enough for that.
    """

    group: str
    key: str
    title: str
    note: str = ""
    level: float | None = None
    logarithmic: bool = False


CHARTS = (
    Chart(CLOSE, "reward", "Reward", "On the pairs of the checks; higher is better."),
    Chart(CLOSE, "error", "Error to the teacher", "Of each image to the teacher's of its noise.", logarithmic=True),
    Chart(CLOSE, "judge", "Held-out judge", "A reward that is not trained for."),
    Chart(LOST, "spread", "Spread in a condition", "Variety of one prompt or class, over the teacher's.", 1.0),
    Chart(LOST, "recall", "Recall", "Share of the teacher's variety that is reached.", 1.0),
    Chart(LOST, "contrast", "Contrast", "Standard deviation over the teacher's.", 1.0),
    Chart(LOST, "detail", "High frequencies", "Energy in fine detail over the teacher's.", 1.0),
    Chart(LOST, "grid", "Nyquist ratio", "The strongest peak of a lattice over the teacher's.", 1.0),
    Chart(MADE, "loss", "Loss", "The method's own."),
    Chart(
        MADE,
        "check_mse",
        "MSE of the checks",
        "To the teacher's latents, in their amplitude.",
        logarithmic=True,
    ),
    Chart(
        MADE,
        "mse",
        "MSE of the batches",
        "The same, of pairs that are trained on.",
        logarithmic=True,
    ),
    Chart(MADE, "grad_norm", "Gradient norm", "Before it is clipped.", logarithmic=True),
)
#: Keys of a row that are no figures to draw.
_NO_FIGURES = {"update", "progress", "budget", "checks", "warning", "stopped"}


def try_to_report(folder: Path | None) -> None:
    """:func:`write_report` at the end of a run, which is not to fail for it: a warning says what went wrong."""
    if folder is None:
        return
    try:
        write_report(folder)
    except (RedifError, OSError) as error:
        _log.warning("there is no report of the run: %s", error)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, from what its log has so far.

    Raises:
        InvalidRequest: The folder holds no run, or matplotlib is missing.
        OSError: It cannot be read or written.
    """
    rows = _rows(folder)
    path = folder / REPORT
    atomic_write(path, _render(folder, rows).encode())
    return path


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that is being written is left out. What a run spent is beside the figures."""
    if not (folder / LOG).is_file():
        raise InvalidRequest(f"{folder} holds no {LOG}; give the folder of a run, which is OUTPUT.training")
    rows = []
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("update"), int):
            spent = row.get("budget") or {"forward_equivalents": 0.0, "reward_calls": 0, "seconds": 0.0}
            rows.append({**spent, **row})
    if not rows:
        raise InvalidRequest(f"{folder / LOG} has no row yet; wait for the run's first check")
    return rows


def _render(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    about = _about(folder)
    last = rows[-1]
    known = {chart.key for chart in CHARTS} | _NO_FIGURES | set(last.get("budget") or {})
    more = sorted({key for row in rows for key, value in row.items() if key not in known and _is_number(value)})
    charts = [*CHARTS, *(Chart(MADE, key, key.replace("_", " ")) for key in more)]
    axes = [axis for axis in AXES if len({row[axis[0]] for row in rows if axis[0] in row}) > 1]
    drawn = [(chart, _drawn(rows, chart, axes)) for chart in charts if _points(rows, chart.key, "update")]
    strips = _strips(folder, rows)
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    checks = next((row["checks"] for row in reversed(rows) if row.get("checks")), None)
    return environment.get_template("report.html.j2").render(
        name=folder.name.removesuffix(".training"),
        about=about,
        last=last,
        axes=axes,
        groups=[(group, [pair for pair in drawn if pair[0].group == group]) for group in (CLOSE, LOST, MADE)],
        strips=strips,
        teacher=_inline(folder / IMAGES / "teacher.png"),
        checks=checks,
        warnings=[(row["update"], row["warning"]) for row in rows if row.get("warning")],
        stopped=next((row["stopped"] for row in reversed(rows) if row.get("stopped")), ""),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _about(folder: Path) -> dict[str, Any]:
    """What the run said of itself; of a run of an older release nothing."""
    nothing: dict[str, Any] = dict.fromkeys(("teacher", "teacher_steps", "method", "num_inference_steps", "seed"))
    nothing |= {"captions": [], "rewards": [], "batch_size": None}
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return nothing
    return nothing | found if isinstance(found, dict) else nothing


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(rows: Sequence[dict[str, Any]], key: str, over: str) -> list[tuple[float, float]]:
    return [(row[over], row[key]) for row in rows if _is_number(row.get(key)) and _is_number(row.get(over))]


def _drawn(rows: Sequence[dict[str, Any]], chart: Chart, axes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(axis, SVG) of a figure over each axis."""
    return [(over, _curve(_points(rows, chart.key, over), chart, title)) for over, title in axes or AXES[:1]]


def _curve(points: Sequence[tuple[float, float]], chart: Chart, over: str) -> str:
    """One figure as an SVG document."""
    figure = new_figure(*SIZE)  # says what to install where matplotlib is missing
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = figure.subplots()
    if chart.level is not None:
        axis.axhline(chart.level, color=PALE, linewidth=1, linestyle=(0, (4, 3)))
    places, values = zip(*points, strict=True)
    axis.plot(places, values, "o-" if len(points) <= 60 else "-", color=LINE, linewidth=1.6, markersize=3.5)
    if chart.logarithmic and min(values) > 0 and max(values) > 5 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.margins(y=0.12)
        axis.ticklabel_format(axis="y", style="plain", useOffset=False)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(over, color=INK, fontsize=8)
    axis.tick_params(which="both", colors=INK, labelcolor=INK, labelsize=8, length=2)
    axis.grid(axis="y", color=PALE, alpha=0.25, linewidth=0.6)
    axis.spines[:].set_color(PALE)
    axis.spines[["top", "right"]].set_visible(False)
    return svg(figure, f"{chart.title} over {over}", ink="currentColor")


def _strips(folder: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images of at most `MOST_STRIPS` checks, evenly over the run, the first and the last among them."""
    files = sorted((folder / IMAGES).glob("update-*.png"))
    if len(files) > MOST_STRIPS:
        last = len(files) - 1
        files = [files[round(place * last / (MOST_STRIPS - 1))] for place in range(MOST_STRIPS)]
    rewards = {row["update"]: row.get("reward") for row in rows}
    found = []
    for file in files:
        update = int(file.stem.partition("-")[2])
        with Image.open(file) as strip:
            pixels = strip.width <= SMALL  # enlarged by the page: their pixels stay sharp
        found.append({"update": update, "image": _inline(file), "reward": rewards.get(update), "pixels": pixels})
    return found


def _inline(file: Path) -> str:
    """A PNG file as a data URL; empty where there is none."""
    if not file.is_file():
        return ""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
