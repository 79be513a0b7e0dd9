"""Trains students: ``distill(teacher, DistillConfig(...))``. Torch is imported when one of these names is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.student import Student, distill, import_pipeline, load_student
    from redif_sdk.distill.teachers.base import Teacher

__all__ = ["DistillConfig", "Student", "Teacher", "distill", "import_pipeline", "load_student"]

_HOMES = {
    "DistillConfig": "config",
    "Student": "student",
    "distill": "student",
    "import_pipeline": "student",
    "load_student": "student",
    "Teacher": "teachers.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
