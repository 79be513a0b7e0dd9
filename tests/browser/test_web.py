"""The page of `redif export --target web` in a real browser: its pictures are Python's, and it does what it offers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.export.web import build_page
from tests.browser.conftest import Opener, static_server

Until = Callable[..., Any]
Look = Callable[[Any, str], None]


@pytest.fixture(scope="module")
def folder(tiny_student: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("no npm here, which brings the browser's engine: install Node.js")
    return build_page(tiny_student, tmp_path_factory.mktemp("page") / "web", engines=("wasm",))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with static_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def pipe(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", precision="fp32")


def ready(page: Any, until: Until) -> None:
    until(page, lambda: page.is_enabled("#generate") or page.is_visible("#error"))
    assert not page.is_visible("#error"), page.inner_text("#error")


def finished(page: Any, until: Until) -> str:
    return str(until(page, lambda: " in " in (said := page.inner_text("#status")) and said))


def saved(page: Any, place: int) -> bytes:
    """The file that a visitor gets who opens the n-th image of the gallery and saves it."""
    page.locator("#gallery button").nth(place).click()
    page.locator("#save[href^=blob]").wait_for()
    with page.expect_download() as waiting:
        page.click("#save")
    data = Path(waiting.value.path()).read_bytes()
    page.click("#close")
    return data


def downloaded(page: Any, place: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(saved(page, place))).convert("L"))


def levels_off(picture: np.ndarray, wanted: np.ndarray) -> int:
    return int(np.abs(picture.astype(int) - wanted[:, :, 0].astype(int)).max())


@pytest.mark.parametrize(
    ("steps", "previews"),
    [
        *((2, False), (3, True)),  # the fused graph; the single steps, with noise between them
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((2, True), (3, False))),
    ],
)
def test_its_pictures_are_pythons(
    url: str, pipe: FastPipeline, open_page: Opener, until: Until, steps: int, previews: bool
) -> None:
    """The fused graph and the single steps, without noise between the steps and with it: fp32, within one level."""
    page = open_page(url)
    ready(page, until)
    page.select_option("#class-select", label="c")
    page.select_option("#steps", str(steps))
    page.fill("#count", "2")
    page.fill("#seed", "12345678901234567890:3")
    page.set_checked("#previews", previews)
    page.click("#generate")
    assert finished(page, until).startswith("2 images in ")
    seeds = [(12345678901234567890, 3), (12345678901234567890, 4)]
    wanted = pipe(["c", "c"], num_inference_steps=steps, seed=seeds, output_type="uint8").images
    for place in range(2):
        assert levels_off(downloaded(page, place), wanted[place]) <= 1


def test_steps_are_shown_as_the_picture_forms(url: str, pipe: FastPipeline, open_page: Opener, until: Until) -> None:
    page = open_page(f"{url}#class=d&steps=3&seed=5&n=1")  # a link: the pictures are made without a click
    finished(page, until)
    page.click("#gallery button")
    assert page.locator("#strip li").count() == 3
    first = page.evaluate(
        "() => { const c = document.querySelector('#strip canvas');"
        " return Array.from(c.getContext('2d').getImageData(0, 0, 28, 28).data) }"
    )
    shown = np.array(first, dtype=np.uint8).reshape(28, 28, 4)[:, :, :1]
    wanted = np.asarray(next(iter(pipe.stream("d", num_inference_steps=3, seed=5))))[:, :, None]
    assert levels_off(shown[:, :, 0], wanted) <= 1


@pytest.mark.slow  # images are compared with Python's above
def test_the_recorded_pictures_pass(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    ready(page, until)
    page.click("summary")
    page.click("#verify")
    said = until(page, lambda: page.inner_text("#verified"))
    assert "2 recorded images" in said
    assert "the right images" in said
    assert int(page.get_attribute("#verified", "data-largest")) <= 1


def test_cancelling_keeps_what_is_there(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    ready(page, until)
    page.fill("#count", "64")
    page.click("#generate")
    until(page, lambda: page.locator("#gallery button:enabled").count() >= 2)
    page.click("#cancel")
    said = until(page, lambda: (text := page.inner_text("#status")).startswith("Cancelled") and text)
    kept = page.locator("#gallery li").count()
    assert 2 <= kept < 64
    assert f"{kept} images" in said
    page.fill("#count", "1")
    page.click("#generate")  # and the page goes on
    assert finished(page, until).startswith("1 image in ")


def test_bad_input_is_told_what_to_give(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    ready(page, until)
    for field, value, good, said in (
        ("#seed", "minus one", "0", 'The seed is "minus one"; give a whole number below 2^64'),
        ("#seed", str(1 << 64), "0", "give a whole number below 2^64"),
        ("#count", "65", "1", 'Images is "65"; give a whole number from 1 to 64.'),
        ("#count", "", "1", "give a whole number from 1 to 64."),
    ):
        page.fill(field, value)
        page.click("#generate")
        assert said in page.inner_text("#error")
        page.fill(field, good)
    assert page.locator("#gallery li").count() == 0
    page.click("#generate")
    finished(page, until)
    assert not page.is_visible("#error")


def test_the_keyboard_is_enough(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    ready(page, until)
    page.focus("#count")
    page.keyboard.press("Control+A")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    finished(page, until)
    page.locator("#gallery button").first.focus()
    page.keyboard.press("Enter")
    assert page.is_visible("#viewer")
    before = page.inner_text("#viewer-title")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-title") != before
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")


@pytest.mark.slow
def test_a_phone_and_the_dark(url: str, open_page: Opener, until: Until, look: Look) -> None:
    for name, context in (
        ("desktop", {"viewport": {"width": 1280, "height": 800}}),
        ("phone", {"viewport": {"width": 375, "height": 720}}),
        ("dark", {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"}),
    ):
        page = open_page(f"{url}#seed=1&n=8", **context)
        finished(page, until)
        look(page, name)
        wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"{name}: the page is wider than the window"
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 22)"
        assert dark == (name == "dark")


@pytest.mark.parametrize(
    "damage", ["altered", *(pytest.param(name, marks=pytest.mark.slow) for name in ("missing", "longer"))]
)
def test_a_graph_that_is_not_the_exported_one_is_not_run(
    folder: Path, open_page: Opener, until: Until, tmp_path: Path, damage: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "web"))
    graph = copy / "model/generator.fp32.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        graph.unlink()
    else:
        graph.write_bytes(data if damage == "altered" else data + b"x")
    with static_server(copy) as url:
        page = open_page(url)
        said = until(page, lambda: page.is_visible("#error") and page.inner_text("#error"))
    wanted = {"altered": "SHA-256 differs", "missing": "the server answers 404", "longer": "is longer than it was"}
    assert wanted[damage] in said
    assert not page.is_enabled("#generate")


def test_an_unconditional_student_and_free_sizes(
    plain_student: Path, full_student: Path, open_page: Opener, until: Until, tmp_path: Path, folder: Path
) -> None:
    for student, fragment, request in (
        (plain_student, "#seed=4&n=1", {"seed": 4}),
        (full_student, "#seed=4&n=1&class=b&height=36", {"seed": 4, "prompt": "b", "height": 36}),
    ):
        with static_server(build_page(student, tmp_path / student.name, engines=("wasm",))) as url:
            page = open_page(url + fragment)
            finished(page, until)
            picture = downloaded(page, 0)
        pipe = FastPipeline.from_pretrained(student, runtime="onnxruntime", precision="fp32")
        assert levels_off(picture, pipe(**request, output_type="uint8").images[0]) <= 1


def test_what_it_says_of_the_student_cannot_be_markup(
    folder: Path, open_page: Opener, until: Until, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "web"))
    config = json.loads((copy / "student.json").read_text())
    config["name"] = config["classNames"][0] = "<img src=x onerror=alert(1)>"
    (copy / "student.json").write_text(json.dumps(config))
    with static_server(copy) as url:
        page = open_page(f"{url}#seed=1&n=1")
        finished(page, until)
        assert page.locator("img").count() == 0
        assert page.inner_text("#name") == config["name"]
