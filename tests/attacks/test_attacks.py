"""Every hostile student is refused, and nothing is done on the way; the good one is taken.

The cases are in `cases/`; `harness.py` runs those that are selected once, each in a watched process of its own. One
case of each kind and reader is always tried, the others with ``-m "slow or not slow"``.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .cases import CASES, Case
from .harness import READERS, Outcome, good_case, jobs, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="audit by inotify, /proc and address-space limits")

#: What a terminal, or another program that shows a message, takes for anything but a letter.
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
KINDS = 17
GOOD = good_case()


def attempts() -> list[Any]:
    """Every case with each of its readers; the first of its kind that a reader meets is not marked as slow."""
    met: set[tuple[str, str]] = set()
    found = []
    for case, reader in jobs():
        marks = [pytest.mark.slow] if (case.kind, reader) in met else []
        found.append(pytest.param(case, reader, id=f"{case.name}-{reader}", marks=marks))
        met.add((case.kind, reader))
    return found


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Outcome]:
    """Of the cases that this session has selected."""
    given = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(params["case"].name, params["reader"]) for params in given if isinstance(params.get("case"), Case)]
    return run(tiny_student, tmp_path_factory.mktemp("attacks"), wanted=wanted)


@pytest.mark.parametrize("reader", READERS)
def test_the_good_student_is_taken(outcomes: dict[tuple[str, str], Outcome], reader: str) -> None:
    """Else everything below would pass on readers that refuse everything, or a hook that sees nothing."""
    outcome = outcomes[GOOD.name, reader]
    assert outcome.errors == [], outcome.message
    assert outcome.result not in ("", "False")
    assert (outcome.events, outcome.changed, outcome.opened) == ([], [], [])


def test_there_are_cases_of_every_kind() -> None:
    kinds = Counter(case.kind for case in CASES)
    assert len(kinds) == KINDS
    assert min(kinds.values()) >= 8
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("case", "reader"), attempts())
def test_it_is_refused(outcomes: dict[tuple[str, str], Outcome], case: Case, reader: str) -> None:
    outcome = outcomes[case.name, reader]
    assert not outcome.timed_out
    if case.may_pass and not outcome.errors:
        assert outcome.result == outcomes[GOOD.name, reader].result
    else:
        assert case.error in outcome.errors, outcome.message or "it was taken"
        assert re.search(case.match, outcome.message, re.DOTALL), outcome.message
        assert not [c for c in outcome.message if unicodedata.category(c) in UNSEEN]
        assert len(outcome.message) < 3000
    assert outcome.events == []
    assert outcome.changed == []
    assert outcome.opened == []
    assert not outcome.marker
    assert not outcome.leaked


@pytest.mark.parametrize(
    ("trick", "field", "what"),
    [("writes", "changed", "written"), ("reads", "events", "secret.json"), ("native", "opened", "secret.json")],
)
def test_the_harness_notices(tmp_path: Path, tiny_student: Path, trick: str, field: str, what: str) -> None:
    """The guard itself: a reader that writes, or reads beside the folder, or does so in native code, is caught."""
    (outcome,) = run(tiny_student, tmp_path, trick=trick).values()
    assert any(what in entry for entry in getattr(outcome, field))
