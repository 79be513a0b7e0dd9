"""The benchmark's cells as tables and plots: ``python -m benchmarks.distillation.render [FOLDER] [-o FILE]``.

Cells are means over the seeds, with the spread (largest minus smallest) beside them; the last column is the number of
seeds. The best of each column is bold, and so is every method whose range overlaps it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from redif_sdk.artifact.atomic import atomic_write

HERE = Path(__file__).parent
START, END = "<!-- cells: made by benchmarks/distillation/render.py -->\n", "<!-- end of cells -->\n"
Row = dict[str, Any]
COLUMNS_OF_SHEET = 20
SHOWN = 12  # of them, in a grid

#: heading -> (value of a cell's row, digits shown)
COLUMNS: dict[str, tuple[Callable[[Row], float | None], int]] = {
    "FD, best gain": (lambda row: row["judged"][0]["fd_teacher_gain"], 2),
    "FD raw": (lambda row: row["judged"][0]["fd_teacher"], 2),
    "gain + unsharp": (lambda row: row["judged"][0]["fd_teacher_unsharp"], 2),
    "std match": (lambda row: row["judged"][0]["fd_teacher_std"], 2),
    "FD unpaired": (lambda row: row["judged"][0].get("fd_unpaired"), 2),
    "FD, second judge, gain": (lambda row: row["judged"][1]["fd_teacher_gain"], 2),
    "KD": (lambda row: row["judged"][0]["kd_teacher"], 5),
    "FD to real": (lambda row: row["judged"][0]["fd_real"], 1),
    "HF": (lambda row: row["high_frequency"], 2),
    "MSE": (lambda row: row["mse"], 4),
    "precision": (lambda row: row["judged"][0]["precision"], 2),
    "recall": (lambda row: row["judged"][0]["recall"], 2),
    "coverage": (lambda row: row["judged"][0].get("coverage"), 2),
    "spread": (lambda row: row["judged"][0].get("spread"), 2),
    "grid": (lambda row: row.get("grid"), 1),
    "fine detail": (lambda row: row.get("fine_energy"), 2),
    "FE": (lambda row: row["budget"].get("forward_equivalents"), 0),
    "seconds": (lambda row: row["budget"].get("seconds"), 0),
}
RANKED = tuple(COLUMNS)[:7]  # lower is better
SUMMARY = ("FD raw", "FD, best gain", "FD unpaired")
REFERENCES = (4, 8)  # steps of DDIM, below the summary


def read(folder: Path) -> list[Row]:
    """All cells. Regression's cells of equal forward-equivalents are repeated as its cells of equal seconds."""
    rows = [json.loads(path.read_text())["rows"][0] for path in sorted(folder.glob("*.json"))]
    clocked = {(row["data"], row["steps"]) for row in rows if row["kind"] == "seconds" and row["seed"] is not None}
    own = [row for row in rows if row["method"] == "regression" and (row["data"], row["steps"]) in clocked]
    return rows + [{**row, "kind": "seconds"} for row in own]


def spread(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """Mean, smallest and largest."""
    known = [value for value in values if value is not None]
    return (statistics.mean(known), min(known), max(known)) if known else None


def table(rows: list[Row], data: str, kind: str, steps: int) -> list[str]:
    """The Markdown table of the methods at K steps, with the untrained samplers at the same K."""
    mine = [row for row in rows if row["data"] == data and row["steps"] == steps]
    mine = [row for row in mine if row["seed"] is None or row["kind"] == kind]
    trained = sorted({row["method"] for row in mine if row["seed"] is not None})
    if not trained:
        return []
    found: dict[str, dict[str, tuple[float, float, float] | None]] = {}
    for method in [*trained, *sorted({row["method"] for row in mine} - set(trained))]:
        own = [row for row in mine if row["method"] == method]
        found[method] = {title: spread(map(value, own)) for title, (value, _) in COLUMNS.items()}
    best = {title: min(f[title] or (9e9,) * 3 for m, f in found.items() if m in trained) for title in RANKED}
    lines = [f"| K = {steps} | {' | '.join(COLUMNS)} | seeds |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    for method, figures in found.items():
        cells = []
        for title, (_, digits) in COLUMNS.items():
            figure = figures[title]
            if figure is None:
                cells.append("")
                continue
            mean, low, high = figure
            text = f"{mean:,.{digits}f}"
            if high > low and title in RANKED:
                text += f" ({high - low:.{digits}f})"
            overlaps = title in RANKED and method in trained and low <= best[title][2]
            cells.append(f"**{text}**" if overlaps else text)
        seeds = len({row["seed"] for row in mine if row["method"] == method and row["seed"] is not None})
        lines.append(f"| {method} | {' | '.join(cells)} | {seeds or ''} |")
    return lines


def summary(rows: list[Row], data: str, kind: str) -> list[str]:
    """Markdown: the means of ``SUMMARY`` by method and K, the best method first, and DDIM at more steps."""
    mine = [row for row in rows if row["data"] == data]
    found: dict[str, dict[int, list[Row]]] = {}
    for row in mine:
        if row["seed"] is not None and row["kind"] == kind:
            found.setdefault(row["method"], {}).setdefault(row["steps"], []).append(row)
    every = sorted({steps for own in found.values() for steps in own})

    def figures(own: list[Row]) -> str:
        means = [spread(COLUMNS[title][0](row) for row in own) for title in SUMMARY]
        return " / ".join("-" if mean is None else f"{mean[0]:.2f}" for mean in means)

    def order(method: str) -> float:
        value = COLUMNS[SUMMARY[1]][0]
        return statistics.geometric_mean(
            statistics.mean(value(row) or 1e-9 for row in own) for own in found[method].values()
        )

    lines = [f"| {', '.join(SUMMARY)} | {' | '.join(f'K = {steps}' for steps in every)} |"]
    lines.append("|---|" + "---|" * len(every))
    for method in sorted(found, key=order):
        cells = [figures(found[method][steps]) if steps in found[method] else "" for steps in every]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for steps in REFERENCES:
        own = [row for row in mine if row["seed"] is None and (row["method"], row["steps"]) == ("ddim", steps)]
        if own:
            shown = f"the teacher by DDIM at {steps}, {own[0]['network_calls']} calls: {figures(own)}"
            lines.append(f"| {shown} |" + " |" * len(every))
    return lines


def save(figure: Figure, path: Path) -> None:
    """Write an SVG; the same figure is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "redif"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def put_between(page: Path, start: str, made: str, complain: Callable[[str], object]) -> None:
    """Put ``made`` between the lines ``start`` and ``END`` of a page; ``complain`` of a page that lacks them."""
    old = page.read_text() if page.is_file() else f"# Results\n\n{start}{END}"
    if start not in old or END not in old:
        complain(f"{page} has no lines {start.strip()} and {END.strip()}; the tables go between them")
    head, tail = old.split(start)[0], old.split(END)[1]
    atomic_write(page, (head + start + made + END + tail).encode())


def plot(rows: list[Row], data: str, kind: str, path: Path) -> None:
    """Plot the distance under the gain control against NFE, and against seconds of training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    mine = [row for row in rows if row["data"] == data]
    value = COLUMNS["FD, best gain"][0]
    for method in sorted({row["method"] for row in mine}):
        own = [row for row in mine if row["method"] == method and (row["seed"] is None or row["kind"] == kind)]
        by_calls = {row["network_calls"]: [] for row in own} if own else {}
        for row in own:
            by_calls[row["network_calls"]].append(value(row))
        if not by_calls:
            continue
        calls = sorted(by_calls)
        style = {"linestyle": "--", "color": "0.5"} if own[0]["seed"] is None else {}
        left.plot(calls, [statistics.mean(by_calls[c]) for c in calls], marker=".", label=method, **style)
        if own[0]["seed"] is not None:
            right.scatter([row["budget"]["seconds"] for row in own], [value(row) for row in own], s=14, label=method)
    for axis, title in ((left, "network calls an image"), (right, "seconds of training")):
        axis.set(xlabel=title, ylabel="FD to the teacher, best gain", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"{data}, equal {kind.replace('_', '-')}")
    save(figure, path)


def grid(rows: list[Row], folder: Path, data: str, kind: str, path: Path) -> bool:
    """Write the first images of each method's student of seed 0, below the teacher's; False if there is no sheet."""
    teacher = folder / f"{data}-teacher.png"
    if not teacher.is_file():
        return False
    lines = [("teacher", teacher)]
    for row in sorted((r for r in rows if r["data"] == data), key=lambda r: (r["steps"], r["method"])):
        own = f"{data}-{kind}-{row['method']}-{row['steps']}-{row['seed']}.png"
        if row["seed"] == 0 and row["kind"] == kind and (folder / own).is_file():
            lines.append((f"{row['method']}, {row['steps']}", folder / own))
    sheets = [Image.open(place).convert("RGB") for _, place in lines]
    side = sheets[0].width // COLUMNS_OF_SHEET
    label, scale, gap = 150, 2, 3
    whole = Image.new("RGB", (label + side * scale * SHOWN, (side * scale + gap) * len(lines)), "white")
    pen = ImageDraw.Draw(whole)
    for index, ((name, _), sheet) in enumerate(zip(lines, sheets, strict=True)):
        top = index * (side * scale + gap)
        first = sheet.crop((0, 0, side * SHOWN, side))
        whole.paste(first.resize((first.width * scale, first.height * scale), Image.Resampling.NEAREST), (label, top))
        pen.text((6, top + side * scale // 2 - 8), name, fill="black", font=ImageFont.load_default(14))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path, optimize=True)
    return True


def render(folder: Path, images: Path, beside: str) -> str:
    """The Markdown of all cells in ``folder``; plots are written to ``images`` and linked as ``beside``/NAME."""
    rows = read(folder)
    parts = []
    for data in sorted({row["data"] for row in rows}):
        for kind in sorted({row["kind"] for row in rows if row["data"] == data and row["seed"] is not None}):
            parts.append(f"### {data}, equal {kind.replace('_', '-')}\n")
            parts.append("\n".join(summary(rows, data, kind)) + "\n")
            name = f"methods-{data}-{kind}.svg"
            plot(rows, data, kind, images / name)
            parts.append(f"![Distance against calls and against seconds]({beside}/{name})\n")
            sheet = f"methods-{data}-{kind}.png"
            if grid(rows, folder, data, kind, images / sheet):
                parts.append(f"![Images of every method from the same noises, seed 0]({beside}/{sheet})\n")
            for steps in sorted({row["steps"] for row in rows if row["seed"] is not None}):
                lines = table(rows, data, kind, steps)
                if lines:
                    parts.append("\n".join(lines) + "\n")
        untrained = [row for row in rows if row["data"] == data and row["seed"] is None]
        if untrained:
            parts.append(f"### {data}, the teacher with fewer steps\n")
            shown = (*RANKED, "HF", "MSE", "recall")
            parts.append(f"| sampler | steps | NFE | {' | '.join(shown)} |\n|---|---|---|" + "---|" * len(shown))
            for row in sorted(untrained, key=lambda row: (row["method"], row["steps"])):
                cells = []
                for value, digits in (COLUMNS[title] for title in shown):
                    figure = value(row)
                    cells.append("-" if figure is None else f"{figure:.{digits}f}")
                parts[-1] += f"\n| {row['method']} | {row['steps']} | {row['network_calls']} | {' | '.join(cells)} |"
            parts[-1] += "\n"
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "results")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"))
    asked = parser.parse_args(arguments)
    made = render(asked.folder, asked.output.parent / "images", "images")
    put_between(asked.output, START, made, parser.error)


if __name__ == "__main__":
    main()
