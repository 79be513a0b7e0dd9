"""What a contributor, a citation index or a program reads beside the code: forms, CITATION.cff, llms.txt, links."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
PAGES = ["README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "llms.txt", "examples/README.md", "recipes/README.md"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    gone = [link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).exists()]
    assert links
    assert gone == []


def test_llms_txt_has_the_form_that_programs_read() -> None:
    """llmstxt.org: a title, a summary in a quotation, prose without headings, sections of links, Optional last."""
    head, *sections = re.split(r"^## ", (ROOT / "llms.txt").read_text(encoding="utf-8"), flags=re.M)
    title, summary, *prose = head.strip().split("\n\n")
    assert title == "# redif-sdk"
    assert all(line.startswith("> ") for line in summary.splitlines())
    assert prose
    assert "#" not in "".join(prose)
    for section in sections:
        lines = section.strip().splitlines()[2:]
        assert lines
        assert [line for line in lines if not re.match(r"- \[[^\]]+\]\([^)]+\)", line)] == []
    assert sections[-1].startswith("Optional\n")


def test_every_page_of_the_docs_folder_is_in_llms_txt() -> None:
    """Those beside one another in docs/; deeper ones are reached from these."""
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    apart = {"docs/text-teacher.md", "docs/index.md"}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - apart
    assert sorted(page for page in pages if f"({page})" not in text) == []


@pytest.mark.parametrize("form", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_a_form_is_one_that_is_shown(form: Path) -> None:
    found = load(form)
    assert {"name", "description", "body"} <= found.keys()
    parts = found["body"]
    names = [part["id"] for part in parts if part["type"] != "markdown"]
    assert len(set(names)) == len(names) > 2
    for part in parts:
        assert part["type"] in KINDS
        needed = {"markdown": "value", "dropdown": "options", "checkboxes": "options"}.get(part["type"], "label")
        assert part["attributes"][needed]
    named = re.findall(r"[A-Za-z/]+\.md", form.read_text())
    assert all((ROOT / path).is_file() for path in named)


def test_the_citation_has_what_indexes_need() -> None:
    found = load(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= found.keys()
    assert str(found["version"]) == project["version"]
    assert found["license"] == project["license"]
    assert all("title" in reference and reference["authors"] for reference in found["references"])


def test_the_pull_request_form_names_files_and_targets_that_are_there() -> None:
    text = (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)
    named = re.findall(r"`([\w./]+(?:\.\w+|/))`", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
