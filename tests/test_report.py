"""The quickstart's report: one page with every figure, which loads nothing and takes no text for HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redif_sdk.quickstart.report import Sheet, render

RESULTS = Path(__file__).parents[1] / "docs/results"


class Page(HTMLParser):
    """The tags, links and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))


def sheets(results: dict[str, Any]) -> list[Sheet]:
    images = np.zeros((3, 4, 4, 1), np.uint8)
    return [Sheet(steps, [("teacher <1>", images), ("student", images)]) for steps in (1, 2)]


@pytest.mark.parametrize("name", ["quickstart", "quickstart-text"])
def test_the_report_of_a_run(name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    results["machine"]["processor"] = "<script>alert(1)</script>"
    if results.get("prompts"):
        results["prompts"][0] = "red <b>heart</b>"
    page = Page(render(results, sheets(results)))
    text = " ".join(page.texts)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>alert(1)</script>" in text
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert page.tags.count("img") == 4
    assert page.tags.count("table") == 2
    assert page.tags.count("tr") == 2 + len(results["rows"]) + len(results["speed"])
    assert "svg" in page.tags
    for row in results["rows"]:
        assert f"{row['mse']:.4f}" in page.texts
        if row["method"] != "teacher":
            assert f"{row['fd_teacher']:.1f}" in page.texts
    assert ("prompts:" in text) == bool(results.get("prompts"))
    assert "redif-sdk" in text or "onnxruntime" in text
