"""Markdown that all generators write: tables, and plain text of docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

__all__ = ["cell", "code", "markdown", "table"]

#: Roles of reStructuredText in docstrings, which Markdown does not have.
ROLE = re.compile(r":(?:class|meth|func|data|mod|attr):(`~?[^`]+`)")


def cell(value: object) -> str:
    """A value as the text of one cell: on one line, with its pipes escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")


def code(value: object) -> str:
    """A value in the code face; nothing for an empty one."""
    text = " ".join(str(value).split())
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with a blank line behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines) + "\n\n"


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: double backticks become single ones, roles are left out."""
    text = ROLE.sub(r"\1", inspect.cleandoc(docstring or ""))
    return text.replace("``", "`")
