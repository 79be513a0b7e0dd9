"""The published JSON Schema of redif.json: it is that of the code, and says yes and no where the code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from redif_sdk.artifact.schema import schema, text

PUBLISHED = Path(__file__).resolve().parent.parent / "docs/schema/redif-1.json"


def test_what_is_published_is_what_the_code_says() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == text(), "run make schema"
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("fixture", ["tiny_student", "plain_student", "full_student", "bare_student"])
def test_students_conform(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    jsonschema.Draft202012Validator(schema()).validate(json.loads((folder / "redif.json").read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"format_version": "2.0"},
        {"task": "anything"},
        {"step_tables": []},
        {"step_tables": [{"rows": [[1, 2]]}]},
        {"latents": {"channels": 0, "height": 14, "width": 14}},
        {"files": [{"path": "../x", "bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "x.json", "bytes": -1, "sha256": "0" * 64}]},
        {"files": [{"path": "x.json", "bytes": 1, "sha256": "0"}]},
        {"condition": {"kind": "class", "num_classes": 10**18}},
    ],
)
def test_what_no_manifest_may_hold_does_not_conform(tiny_student: Path, change: dict[str, Any]) -> None:
    document = json.loads((tiny_student / "redif.json").read_text()) | change
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(document))
