"""The experiment's cells as a table, curves and a grid: ``python -m benchmarks.reinforcement.show [FOLDER] [-o FILE]``.

They go between two lines of FILE. What an arm with several seeds shows is their mean; beside the judge's share is the
largest less the smallest of them, in brackets and in points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.distillation.render import COLUMNS_OF_SHEET, put_between, save
from benchmarks.reinforcement.run import PROMPTS, Cell

HERE = Path(__file__).parent
START = "<!-- cells: made by benchmarks/reinforcement/show.py -->\n"
Row = dict[str, Any]
#: The rows of the sheet: the teacher and the starts, the arm with the highest share, and a black box.
ON_SHEET = (
    "teacher", "start", "same-state", "draft, longer", "ddim, unguided", "same-state from DDIM", "draft from DDIM"
)  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}".replace("%", " %")


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


#: heading -> (value of a cell's row, how it is shown)
COLUMNS: dict[str, tuple[Callable[[Row], float | None], Callable[[float | None], str]]] = {
    "judge, first of 100": (lambda row: row["top1"], _share),
    "among five": (lambda row: row["top5"], _share),
    "scorer": (lambda row: row["scorer_top1"], _share),
    "log-probability": (lambda row: row["score"], "{:.2f}".format),
    "trained on": (lambda row: row.get("trained_on", {}).get("top1"), _share),
    "new subjects": (lambda row: row["new_subjects"]["top1"], _share),
    "compositions": (lambda row: row["held_out"]["top1"], _share),
    "FD to real": (lambda row: row["fd_real"], "{:,.0f}".format),
    "spread": (lambda row: row["spread"], "{:.1f}".format),
    "grid": (lambda row: row["grid"], "{:.1f}".format),
    "forward-equivalents": (lambda row: row.get("budget", {}).get("forward_equivalents"), _count),
    "reward calls": (lambda row: row.get("budget", {}).get("reward_calls"), _count),
}


def read(folder: Path) -> list[Row]:
    """All cells."""
    return [json.loads(path.read_text())["rows"][0] for path in sorted(folder.glob("*.json"))]


def at(rows: list[Row], steps: int) -> list[Row]:
    """The cells of students of ``steps``, and the teacher, whose own number of steps is the same beside all."""
    own = [row for row in rows if row["steps"] == steps]
    return own if any(row["arm"] == "teacher" for row in own) else own + [r for r in rows if r["arm"] == "teacher"][:1]


def table(rows: list[Row], steps: int) -> str:
    """Markdown: what is not trained first, then the arms, each by the judge's share."""
    arms: dict[str, list[Row]] = {}
    for row in at(rows, steps):
        arms.setdefault(row["arm"], []).append(row)

    def place(arm: str) -> tuple[bool, float]:
        return "curve" in arms[arm][0], statistics.mean(row["top1"] for row in arms[arm])

    lines = [f"| K = {steps} | {' | '.join(COLUMNS)} | seeds |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    for arm in sorted(arms, key=place):
        own, cells = arms[arm], []
        for value, shown in COLUMNS.values():
            known = [found for found in map(value, own) if found is not None]
            cells.append(shown(statistics.mean(known)) if known else "")
        judged = [row["top1"] for row in own]
        if len(judged) > 1:
            cells[0] += f" ({100 * (max(judged) - min(judged)):.1f})"
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(own) if 'curve' in own[0] else ''} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], steps: int, path: Path) -> None:
    """The judge's and the scorer's shares over forward-equivalents, and the judge's over reward calls."""
    trained = [row for row in rows if row["steps"] == steps and row.get("curve")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    views = (
        ("forward_equivalents", "top1", "judge, first of 100"),
        ("forward_equivalents", "scorer_top1", "scorer, first of 100"),
        ("reward_calls", "top1", "judge, first of 100"),
    )
    for axis, (across, up, label) in zip(axes, views, strict=True):
        for index, row in enumerate(sorted(trained, key=lambda row: (row["arm"], row["seed"]))):
            points = [(point[across], point[up]) for point in row["curve"] if point[across]]
            if points:
                name = f"{row['arm']}, seed {row['seed']}"
                axis.plot(*zip(*points, strict=True), marker=".", label=name, color=f"C{index}")
        axis.set(xlabel=across.replace("_", " "), ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"K = {steps}, on {trained[0]['curve'][0]['prompts']} held-out prompts a point")
    save(figure, path)


def grid(rows: list[Row], folder: Path, steps: int, path: Path) -> bool:
    """The images of ON_SHEET, of seed 0, one under the other, for the same prompts and noises, below their prompts;
    False if there is no sheet."""
    shown = {row["arm"]: row["steps"] for row in at(rows, steps) if row["seed"] == 0}
    sheets = [(arm, folder / f"{Cell(arm, shown[arm], 0).name}.png") for arm in ON_SHEET if arm in shown]
    opened = [(arm, Image.open(file).convert("RGB")) for arm, file in sheets if file.is_file()]
    if not opened:
        return False
    side, gap, label, above = opened[0][1].width // COLUMNS_OF_SHEET, 6, 150, 52
    lines = opened[0][1].height // side
    block = above + len(opened) * side + gap
    prompts = (folder / PROMPTS).read_text().splitlines()
    whole = Image.new("RGB", (label + side * COLUMNS_OF_SHEET, block * lines), "white")
    pen = ImageDraw.Draw(whole)
    for line in range(lines):
        for column, prompt in enumerate(prompts[line * COLUMNS_OF_SHEET :][:COLUMNS_OF_SHEET]):
            text = "\n".join(textwrap.wrap(prompt, 12)[:4])
            pen.text((label + column * side + 2, line * block), text, fill="black", font=ImageFont.load_default(9))
        for place, (arm, sheet) in enumerate(opened):
            top = line * block + above + place * side
            whole.paste(sheet.crop((0, line * side, sheet.width, (line + 1) * side)), (label, top))
            pen.text((6, top + side // 2 - 8), arm, fill="black", font=ImageFont.load_default(14))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path, optimize=True)
    return True


def render(folder: Path, images: Path, beside: str) -> str:
    """The Markdown of all cells in ``folder``; plots are written to ``images`` and linked as ``beside``/NAME."""
    rows, parts = read(folder), []
    for steps in sorted({row["steps"] for row in rows}):
        parts.append(table(rows, steps))
        if any(row.get("curve") for row in rows if row["steps"] == steps):
            name = f"reinforcement-{steps}.svg"
            plot(rows, steps, images / name)
            parts.append(f"![Judge and scorer over the budget, K = {steps}]({beside}/{name})\n")
        name = f"reinforcement-{steps}.png"
        if grid(rows, folder, steps, images / name):
            parts.append(f"![The same prompts and noises, K = {steps}]({beside}/{name})\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "results")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/reinforcement.md"))
    asked = parser.parse_args(arguments)
    made = render(asked.folder, asked.output.parent.parent / "images", "../images")
    put_between(asked.output, START, made, parser.error)


if __name__ == "__main__":
    main()
