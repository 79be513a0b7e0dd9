"""A run's report in a browser: one axis at a time, nothing wider than the page."""

from __future__ import annotations

from typing import Any

import pytest
from test_run_report import train


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "student.training"
    train(folder)
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("width", [1280, 400])
def test_curves_are_shown_over_one_axis_at_a_time(browser: Any, address: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    curves = page.locator("main figure").count()
    assert curves > 5
    for axis in ("update", "forward_equivalents", "reward_calls"):
        page.click(f"label[for=over-{axis}]")
        assert page.locator("main .curve:visible").count() == curves
        assert page.locator(f"main .by-{axis}:visible").count() == curves
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
