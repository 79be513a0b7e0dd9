"""Charts as SVG files, by matplotlib, and the chart of `redif bench`."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bars", "new_figure", "svg"]

INK, PALE, LINE = "#1e293b", "#64748b", "#e2e8f0"
COLOURS = {"FastPipeline": "#c2410c", "bare engines": "#0f766e", "torch and diffusers": "#94a3b8"}
ROW, HEAD, GROUP = 0.29, 1.15, 0.55  # inches: of a bar, of title and legend, around a group of bars
NOTE = "bar: median; mark: 95th percentile; in brackets: 10-90 % of the rounds"

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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises InvalidRequest if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequest(f'charts need matplotlib ({error}); pip install "redif-sdk[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def svg(figure: Figure, title: str, *, ink: str = INK) -> str:
    """The figure as an SVG document with text as text; equal figures give equal bytes.

    `ink`: what stands for the colour `INK`; "currentColor" takes the colour of the page that it is embedded in.
    """
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "redif", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=ink != INK)
    text = buffer.getvalue()
    head, _, rest = text[text.index("<svg") :].partition(">")
    return f"{head}><title>{html.escape(title)}</title>{rest}".replace(INK, ink)


def bars(rows: Sequence[Mapping[str, Any]], title: str, subtitle: str = "") -> str:
    """The chart of bench rows as an SVG document: a group of bars per batch size, in milliseconds per image.

    Bars end at the median, a mark shows the 95th percentile. Bars more than ten times as long as the group's median are
    cut. Rows that were not timed are left out.
    """
    timed = [row for row in rows if row["seconds_median"] is not None]
    groups = [
        sorted((row for row in timed if row["batch"] == batch), key=lambda row: float(row["seconds_median"]))
        for batch in sorted({row["batch"] for row in timed})
    ]
    figure = new_figure(9.8, HEAD + sum(ROW * len(group) + GROUP for group in groups))
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    figure.supxlabel(_literal(subtitle), x=0.01, ha="left", fontsize=9, color=PALE)
    if groups:
        axes = figure.subplots(
            len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [ROW * len(g) + GROUP for g in groups]}
        )
        for group, axis in zip(groups, axes[:, 0], strict=True):
            _group(axis, group)
        _legend(figure)
    return svg(figure, title)


def _group(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The bars of one batch size, the fastest at the top."""
    batch = rows[0]["batch"]
    times = [1000 * row["seconds_median"] / batch for row in rows]
    middle = sorted(times)[len(times) // 2]
    end = 1.05 * max(time for time in times if time <= 10 * middle)
    reference = next((row["ratio_to"] for row in rows if row["ratio_to"]), None)
    against = f", times faster than {TITLES.get(reference, reference)}" if reference else ""
    axis.set_title(f"Batch {batch}: milliseconds per image{against}", loc="left", fontsize=10, color=INK, weight="bold")
    axis.barh(range(len(rows)), [min(time, end) for time in times], 0.68, color=[COLOURS[_kind(row)] for row in rows])
    axis.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=9, color=INK)
    for place, (label, row, time) in enumerate(zip(axis.get_yticklabels(), rows, times, strict=True)):
        label.set_fontweight("bold" if _kind(row) == "FastPipeline" else "normal")
        high = min(1000 * row["seconds_p95"] / batch, end)
        if time > end:
            axis.text(0.93 * end, place, "//", color="white", va="center", weight="bold", fontsize=12)
        elif high > time:
            axis.errorbar(time, place, xerr=[[0], [high - time]], color=INK, capsize=3, linewidth=1)
        at = (min(max(time, high), end), place)
        axis.annotate(_figures(row, time), at, (6, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axis.set_xlim(0, 1.4 * end)
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= end])
    axis.tick_params(axis="x", labelsize=8, labelcolor=PALE, length=0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=LINE)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.invert_yaxis()


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(
        handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=9, title=NOTE, title_fontsize=9
    )


def _kind(row: Mapping[str, Any]) -> str:
    if row["contender"].startswith("fastpipeline"):
        return "FastPipeline"
    return "torch and diffusers" if row["runtime"] == "torch" else "bare engines"


def _title(row: Mapping[str, Any]) -> str:
    """The contender's name, with engine, precision and steps where they tell it from others."""
    name = TITLES.get(row["contender"], row["contender"])
    engine = SHORT.get(row["runtime"], row["runtime"])
    if row["contender"] == "teacher":
        return f"teacher in diffusers, {row['num_inference_steps']} steps"
    if row["contender"] == "fastpipeline-auto":
        return f"FastPipeline (auto: {engine}, {row['precision']})"
    return _literal(f"{name}{f' on {engine}' if row['contender'] == 'fastpipeline' else ''}, {row['precision']}")


def _figures(row: Mapping[str, Any], milliseconds: float) -> str:
    """What stands beside a bar: milliseconds, and the ratio with its spread."""
    ratio = "" if row["ratio"] is None else f" · {_number(row['ratio'])}x"
    spread = "" if row["ratio_low"] is None else f" ({_number(row['ratio_low'])}-{_number(row['ratio_high'])})"
    return f"{_number(milliseconds)} ms{ratio}{spread}"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _literal(text: str) -> str:
    """Text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")
