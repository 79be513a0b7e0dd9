"""The third act of ``redif quickstart --text``: a shipped student before and after reinforcement, from the same noises.

It imports ``distill`` and ``export`` when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.pipeline import FastPipeline
from redif_sdk.quickstart.images import exported
from redif_sdk.quickstart.report import Sheet

if TYPE_CHECKING:
    from redif_sdk.distill.teachers.base import Teacher

#: images uint8 (N, H, W, C) of a pipeline, for the sheet's prompts and seeds, at so many steps
Draw = Callable[[FastPipeline, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Reinforced:
    """Two students in folders of their own, and what the judge says of them.

    Attributes:
        judged: see `redif_sdk.distill.shipped.students.reinforced_student`.
        verification: the rows of their exports' checks.
    """

    steps: int
    before: Path
    after: Path
    judged: dict[str, float]
    verification: list[dict[str, Any]]

    def sheet(self, teacher: tuple[str, NDArray[np.uint8]], draw: Draw) -> Sheet:
        """The teacher's row of another sheet, the student before and the student after."""
        before, after = (FastPipeline.from_pretrained(folder) for folder in (self.before, self.after))
        return Sheet(
            steps=self.steps,
            rows=[
                teacher,
                (f"before: {self.steps} calls", draw(before, self.steps)),
                (f"reinforced: {self.steps} calls", draw(after, self.steps)),
            ],
        )

    def said(self) -> str:
        """One line for the terminal."""
        before, after, teacher = (f"{self.judged[name]:.1%}" for name in ("before", "after", "teacher"))
        return (
            f"reinforced by a reward that sees the prompt: a judge that gave no reward finds the caption of {after} of"
            f" its images ({before} before, teacher {teacher}); reinforced-{self.steps}.png shows them"
        )

    def record(self) -> dict[str, Any]:
        """For ``results.json``."""
        return {"num_inference_steps": self.steps, "before": self.before.name, "after": self.after.name, **self.judged}


def reinforced(teacher: Teacher, steps: Sequence[int], output: Path, *, trained: bool) -> Reinforced | None:
    """Export the first of ``steps`` that came with its teacher reinforced, and its start; None if there is none.

    Args:
        trained: the start is in ``output`` already: its student of so many steps.

    Raises:
        InvalidRequest: a shipped student cannot be read.
        ParityError: an exported network does not compute what torch computes.
    """
    from redif_sdk.distill.shipped.students import reinforced_student, shipped_student

    for count in steps:
        found = reinforced_student(teacher, count)
        if found is None:
            continue
        after, judged = found
        before = f"student-{count}" if trained else f"before-{count}"
        students = {f"reinforced-{count}": after}
        if not trained:
            students[before] = shipped_student(teacher, count)
        for name, student in students.items():
            student.save_pretrained(output / name, overwrite=True)
        rows = exported(output, students)
        return Reinforced(count, output / before, output / f"reinforced-{count}", judged, rows)
    return None
