"""Trains students: ``distill(teacher, DistillConfig(...))``. Torch is imported when one of these names is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.student import Student, distill, import_pipeline, load_student
    from redif_sdk.distill.teachers.base import Teacher
    from redif_sdk.models.condition_data import ConditionData

__all__ = ["ConditionData", "DistillConfig", "Student", "Teacher", "distill", "import_pipeline", "load_student"]

_HOMES = {
    "ConditionData": "models.condition_data",
    "DistillConfig": "distill.config",
    "Student": "distill.student",
    "distill": "distill.student",
    "import_pipeline": "distill.student",
    "load_student": "distill.student",
    "Teacher": "distill.teachers.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"redif_sdk.{_HOMES[name]}"), name)
