"""The hostile students: each function turns a copy of a good one into one that must be refused.

Whoever makes a student writes its hashes too, so every case is signed anew (`Student.sign`) where that is possible.
`@case(kind, readers, match)` names the readers (see `harness.py`) that must refuse, and what their message says.
"""

from __future__ import annotations

from .student import CASES, Case, Student, case, each

# isort: off
# Each module adds its cases to CASES when it is imported: in this order.
from . import (  # noqa: F401
    paths,
    links,
    programs,
    weights,
    graphs,
    documents,
    arrays,
    configurations,
    texts,
    races,
)
# isort: on

__all__ = ["CASES", "Case", "Student", "case", "each"]

assert len({case.name for case in CASES}) == len(CASES)
