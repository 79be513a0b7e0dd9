"""Students that lie beside a shipped teacher: what a GPU makes of a recipe, for those who have none.

Only what training made is kept: the network's weights in half precision, its step table, and how it was distilled; all
else is the teacher's. ``python -m redif_sdk.distill.shipped.students STUDENT`` keeps a student's folder there. One that
was reinforced after that lies beside its start, with the figures of a judge.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.artifact.records import Distillation
from redif_sdk.distill.student import Student, load_student
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest, RedifError
from redif_sdk.sampling.table import StepTable

FOLDER, WEIGHTS, ABOUT = "students", "network.safetensors", "student.json"
REINFORCED = "reinforced"
FIGURES = ("prompts", "teacher", "before", "after")  # of what was judged


def shipped_steps(teacher: Teacher) -> list[int]:
    """The numbers of steps for which a student lies beside ``teacher``."""
    if teacher.folder is None:
        return []
    names = [path.parent.name for path in (teacher.folder / FOLDER).glob(f"*/{ABOUT}")]
    return sorted(int(name) for name in names if name.isdecimal())


def shipped_student(teacher: Teacher, num_inference_steps: int) -> Student:
    """The student of so many steps that lies beside ``teacher``.

    Raises:
        InvalidRequest: there is none, it is another teacher's, or it cannot be read.
    """
    there = shipped_steps(teacher)
    if num_inference_steps not in there:
        known = f"those of {', '.join(map(str, there))} steps do" if there else "none does"
        raise InvalidRequest(
            f"no student of {num_inference_steps} step(s) comes with {teacher.name} ({known}); distil one"
        )
    assert teacher.folder is not None
    return _read(teacher, teacher.folder / FOLDER / str(num_inference_steps))[0]


def reinforced_student(teacher: Teacher, num_inference_steps: int) -> tuple[Student, dict[str, float]] | None:
    """What reinforcement made of the shipped student of so many steps, and what a judge that gave no reward says.

    Returns:
        The student and :data:`FIGURES`: shares of images whose own caption the judge puts first of a hundred, on so
        many prompts; None if there is no such student.

    Raises:
        InvalidRequest: it is another teacher's, or cannot be read.
    """
    if teacher.folder is None:
        return None
    place = teacher.folder / FOLDER / f"{num_inference_steps}-{REINFORCED}"
    if not (place / ABOUT).is_file():
        return None
    student, about = _read(teacher, place)
    try:
        return student, {name: float(about["judged"][name]) for name in FIGURES}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{place} does not say what a judge found ({error!r})") from error


def _read(teacher: Teacher, place: Path) -> tuple[Student, dict[str, Any]]:
    """The student in ``place``, and all that is said of it."""
    try:
        about = json.loads((place / ABOUT).read_text())
        if about["teacher"] != teacher.identity:
            raise InvalidRequest(f"{place} is a student of another teacher, or of other guidance; distil one")
        student = Student(
            teacher=teacher,
            network=teacher.make_student().eval().requires_grad_(False),
            tables=[StepTable.from_dict(about["step_table"])],
            name=f"{teacher.name}-{place.name}",
            distillation=Distillation.model_validate(about["distillation"]),
        )
        student.inner.load_state_dict(load_file(place / WEIGHTS))
    except RedifError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InvalidRequest(f"{place} holds no student ({error!s:.300}); distil one") from error
    return student, about


def keep(folder: Path, teacher: Teacher, judged: dict[str, float] | None = None) -> Path:
    """Put the student in ``folder`` beside its ``teacher``; returns where.

    Args:
        judged: of a reinforced student, the judge's :data:`FIGURES`.

    Raises:
        InvalidRequest: it is another teacher's, or was not distilled.
    """
    student = load_student(folder)
    own = student.teacher.fingerprint == teacher.fingerprint
    if teacher.folder is None or student.distillation is None or not own:
        raise InvalidRequest(f"{folder} is no distilled student of {teacher.name}")
    about: dict[str, Any] = {
        "teacher": teacher.identity,
        "step_table": student.tables[0].to_dict(),
        "distillation": student.distillation.model_dump(mode="json"),
    }
    name = str(student.tables[0].num_inference_steps)
    if judged is not None:
        about["judged"] = {figure: judged[figure] for figure in FIGURES}
        name = f"{name}-{REINFORCED}"
    place = teacher.folder / FOLDER / name
    place.parent.mkdir(exist_ok=True)
    weights = {name: value.to(torch.float16).contiguous() for name, value in student.inner.state_dict().items()}
    with atomic_folder(place, overwrite=True, replaceable=(ABOUT,)) as staging:
        save_file(weights, staging / WEIGHTS)
        (staging / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return place


def main() -> None:
    """The command ``python -m redif_sdk.distill.shipped.students``."""
    parser = argparse.ArgumentParser(description="Keep a student's folder beside its shipped teacher.")
    parser.add_argument("student", type=Path)
    parser.add_argument("--teacher", default="mini-sd")
    parser.add_argument(
        "--judged",
        nargs=len(FIGURES),
        type=float,
        metavar=FIGURES,
        help="Of a reinforced student: what the judge found.",
    )
    asked = parser.parse_args()
    judged = dict(zip(FIGURES, asked.judged, strict=True)) if asked.judged else None
    print(keep(asked.student, Teacher.load(asked.teacher), judged))


if __name__ == "__main__":
    main()
