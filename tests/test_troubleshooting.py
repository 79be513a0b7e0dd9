"""docs/troubleshooting.md quotes messages that the code really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = ("redif_sdk", "models", "distill", "export", "demo")
GAP = "\0"  # what differs from case to case


def texts() -> str:
    """Every string of the sources, those that stand side by side joined, one a line."""
    found: list[str] = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def quoted() -> list[str]:
    """The messages in the first column of the tables."""
    rows = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row) if " " in span]


def test_every_quoted_message_is_in_the_source() -> None:
    sources = texts()
    gone = []
    for message in quoted():
        parts = [re.escape(part) for part in re.split(r"<[^>]+>", message)]
        if not re.search("[^\n]*?".join(parts), sources):
            gone.append(message)
    assert gone == []
    assert len(quoted()) > 40


def test_the_search_finds_no_message_that_is_not_there() -> None:
    assert not re.search("this message <n> is nowhere".replace("<n>", ".*"), texts())
    assert re.search("the queue is full", texts())


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/serving.md"])
def test_the_page_is_linked(page: str) -> None:
    assert "troubleshooting.md" in (ROOT / page).read_text(encoding="utf-8")
