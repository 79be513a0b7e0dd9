"""The error tree with remedies, and every message of the code: what is found by searching the site for a message."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docs.generators.text import code, table
from redif_sdk import errors

__all__ = ["Message", "classes", "errors_page", "messages", "messages_page", "remedies"]

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("redif_sdk", "models", "distill", "export", "demo")
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
GAP = "<...>"  # what differs from case to case

#: Exit code of the command line, by class (`redif_sdk/cli/main.py`).
_GATES = ("ParityError", "TrainingDiverged")


_OPTIONS = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false"


class Message(NamedTuple):
    """A message in the code: the class that it is raised as, its text, and the file."""

    kind: str
    text: str
    file: str


class Remedy(NamedTuple):
    """A row of the page Troubleshooting."""

    message: str
    cause: str
    remedy: str


def classes() -> list[type[BaseException]]:
    """The classes of errors and warnings in `redif_sdk.errors`, in the order of the tree."""
    found = (getattr(errors, name) for name in errors.__all__)
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseException)]


def _joined(node: ast.expr) -> str | None:
    """The text of a string expression, with a gap for what is computed; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_joined(side) for side in (node.left, node.right)]
        return None if None in parts else "".join(part or "" for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return _joined(node.left)
    return None


def _raised(tree: ast.AST, names: set[str]) -> Iterator[tuple[str, str]]:
    """(class, message) of every error that is made with a text."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        text = _joined(node.args[0]) if node.args else None
        if name in names and text:
            yield name, text


@cache
def messages() -> tuple[Message, ...]:
    """Every message with which the code makes one of its errors, each once, sorted."""
    names = {kind.__name__ for kind in classes()}
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if path.relative_to(ROOT / room).parts[0] in ROOMS:  # the links inside redif_sdk/
                continue
            file = path.relative_to(ROOT).as_posix()
            for kind, text in _raised(ast.parse(path.read_text(encoding="utf-8")), names):
                found.add(Message(kind, " ".join(text.split()), file))
    return tuple(sorted(found, key=lambda message: (message.kind, re.sub(r"\W", "", message.text.lower()), message)))


@cache
def remedies() -> tuple[Remedy, ...]:
    """The rows of Troubleshooting, their links as they are from the folder reference/."""
    rows = []
    for line in TROUBLESHOOTING.read_text(encoding="utf-8").splitlines():
        cells = [part.strip() for part in line.strip("| ").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] != "message":
            rows.append(Remedy(*(re.sub(r"\]\((?=[\w-]+\.md)", "](../", text) for text in cells)))
    return tuple(rows)


def _raised_as(remedy: Remedy) -> set[str]:
    """The classes whose messages hold one of the texts that a row quotes."""
    quoted = [span for span in re.findall(r"`([^`]+)`", remedy.message) if " " in span]
    patterns = [".*?".join(map(re.escape, re.split(r"<[^>]+>", span))) for span in quoted]
    return {found.kind for found in messages() for pattern in patterns if re.search(pattern, found.text)}


def errors_page() -> str:
    """The page of the error tree: each class with its docstring and the rows of Troubleshooting that belong to it."""
    tree = (errors.__doc__ or "").split("::", 1)[1].split("\nand one warning")[0]
    by_kind = [(remedy, _raised_as(remedy)) for remedy in remedies()]
    parts = [
        "# Errors\n\nEvery error that the package raises on purpose is below `RedifError`; its message says what is "
        "wrong with which value, and what to do. On the command line it is one line on standard error. [All messages]"
        "(messages.md) lists them as they stand in the code, [Troubleshooting](../troubleshooting.md) explains those "
        f"that need more than a sentence.\n\n```text\n{inspect.cleandoc(tree)}\n```\n\n"
    ]
    for kind in classes():
        name = kind.__name__
        public = "redif_sdk" if hasattr(__import__("redif_sdk"), name) else "redif_sdk.errors"
        parts.append(f"## {name} {{#{public}.{name}}}\n\n::: {public}.{name}\n{_OPTIONS}\n\n")
        if issubclass(kind, errors.RedifError):
            exit_code = 1 if name in _GATES else 2
            count = sum(message.kind == name for message in messages())
            listed = f" {count} messages: [the list](messages.md#{name.lower()})." if count else ""
            parts.append(f"On the command line: exit code {exit_code}.{listed}\n\n")
        rows = [remedy for remedy, kinds in by_kind if name in kinds]
        if rows:
            parts.append(table(("message", "cause", "what to do"), ((r.message, r.cause, r.remedy) for r in rows)))
    return "".join(parts)


def messages_page() -> str:
    """The page of all messages, by class."""
    parts = [
        "# All messages\n\nEvery message of an error as it stands in the code; `<...>` is what differs from case to "
        "case. A message says what to do. [Troubleshooting](../troubleshooting.md) says more.\n\n"
    ]
    for kind in classes():
        own = [message for message in messages() if message.kind == kind.__name__]
        if own:
            rows = table(("message", "in"), ((code(message.text), code(message.file)) for message in own))
            parts.append(f"## {kind.__name__}\n\n{rows}")
    return "".join(parts)
