"""Time and memory that readers spend on the hostile students of tests/attacks before they refuse them (docs/safety.md).

    python benchmarks/attacks.py [STUDENT] [--json docs/results/attacks.json]

STUDENT is an exported student of `tests/conftest.py: build_student`; without it, one is made (a minute). Exits 1 if a
hostile student was not refused, or if a reader had another effect. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from redif_sdk.results import document, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from tests.attacks.cases import CASES  # noqa: E402
from tests.attacks.harness import MEMORY, SECONDS, Outcome, good_case, run  # noqa: E402


def good_student(place: Path) -> Path:
    """The student that the tests alter."""
    from conftest import build_student

    from redif_sdk.export import export

    folder = build_student(place / "tiny")
    export(folder)
    return folder


def refused(outcome: Outcome, lost: str | None) -> bool:
    """Whether the student was refused (or a lost race gave the good student's result), with no other effect."""
    harmless = not (outcome.events or outcome.changed or outcome.opened or outcome.marker or outcome.leaked)
    unharmed = lost is not None and not outcome.errors and outcome.result == lost
    return harmless and not outcome.timed_out and (outcome.refused or unharmed)


def summarise(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One row for each kind of attack."""
    outcomes = list(outcomes)
    good = {outcome.reader: outcome.result for outcome in outcomes if outcome.case == good_case().name}
    races = {case.name for case in CASES if case.may_pass}
    found = [outcome for outcome in outcomes if outcome.case != good_case().name]
    rows = []
    for kind in dict.fromkeys(outcome.kind for outcome in found):
        own = [outcome for outcome in found if outcome.kind == kind]
        taken = [one for one in own if not refused(one, good[one.reader] if one.case in races else None)]
        rows.append(
            {
                "kind": kind,
                "cases": len({outcome.case for outcome in own}),
                "readings": len(own),
                "refused": len(own) - len(taken),
                "worst_seconds": round(max(outcome.seconds for outcome in own), 3),
                "worst_peak_mib": round(max(outcome.peak_mib for outcome in own), 1),
                "not_refused": [f"{outcome.case} ({outcome.reader})" for outcome in taken],
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="?")
    parser.add_argument("--json", default=None)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        folder = asked.student or good_student(Path(work) / "good")
        outcomes = run(folder.resolve(), Path(work))
    taken = [outcome for outcome in outcomes.values() if outcome.case == good_case().name]
    rows = summarise(outcomes.values())
    print("| attack | cases | readings | refused | worst seconds | worst peak, MiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        columns = ("kind", "cases", "readings", "refused", "worst_seconds", "worst_peak_mib")
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    for row in rows:
        for name in row["not_refused"]:
            print(f"NOT REFUSED: {row['kind']}: {name}")
    if asked.json:
        limits = {"memory_limit_mib": MEMORY >> 20, "seconds_limit": SECONDS}
        good = [{"reader": o.reader, "seconds": round(o.seconds, 3), "peak_mib": round(o.peak_mib, 1)} for o in taken]
        write_json(asked.json, document("benchmarks/attacks.py", rows, limits=limits, good_student=good))
    whole = all(row["refused"] == row["readings"] for row in rows)
    return 0 if whole and not any(outcome.errors for outcome in taken) else 1


if __name__ == "__main__":
    sys.exit(main())
