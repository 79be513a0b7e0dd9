"""`redif demo`, a process of its own, in a real browser: what a visitor does, and that the pictures are right."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from tests.browser.conftest import Opener
from tests.prompted import build_prompted
from tests.test_demo import demo_of

Until = Callable[..., Any]
Look = Callable[[Any, str], None]
REDIF = (sys.executable, "-c", "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main; main()")


@pytest.fixture(scope="module")
def url(
    tiny_student: Path, plain_student: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A demo of "tiny", with itself as its teacher, and of "second", the same under another name."""
    second = Path(shutil.copytree(tiny_student, tmp_path_factory.mktemp("second") / "second"))
    write_manifest(second, StudentFolder(second).manifest.model_copy(update={"name": "second"}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [
            *REDIF,
            "demo",
            *map(str, (tiny_student, second)),
            "--teacher",
            str(tiny_student),
            "--port",
            str(port),
            *["--max-images", "200", "--runtime", "onnxruntime"],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tiny, second at "), process.communicate()[1]
    yield line.split()[3]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def pipe(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")


def shown_images(page: Any, gallery: str = "images") -> int:
    return int(page.locator(f"#{gallery} .thumbnail-lg img").count())


def finished(page: Any, until: Until, number: int) -> str:
    """The report of `number` images."""
    wanted = f"{number} image"
    return str(
        until(page, lambda: (said := page.inner_text("#report")).startswith(wanted) and "now" not in said and said)
    )


def shown(page: Any, place: int, gallery: str = "images") -> np.ndarray:
    """The n-th picture of the gallery as its file, which the visitor would download."""
    source = page.locator(f"#{gallery} .thumbnail-lg img").nth(place).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("L"))


def number_of_images(page: Any, value: int) -> None:
    page.locator("input[aria-label='number input for Images']").fill(str(value))
    page.keyboard.press("Tab")


def keep(page: Any, seed: str) -> None:
    page.get_by_label("Seed").first.fill(seed)
    page.get_by_label("Keep this seed").check()


def choose(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=value, exact=True).click()


def opened(page: Any, until: Until) -> None:
    """Wait for the page to have read its address, or it would overwrite what is filled in meanwhile."""
    page.locator("#generate").wait_for()
    until(page, lambda: page.get_by_label("Seed").first.input_value() != "0")


@pytest.mark.slow  # it waits for another's canvas
def test_a_visitor_paints_over_what_is_to_be_made_anew(
    url: str, pipe: FastPipeline, open_page: Opener, until: Until, look: Look, tmp_path: Path
) -> None:
    """An image is uploaded, its middle painted over; what is drawn keeps the rest to the bit."""
    height, width, _ = pipe.manifest.image_shape
    given = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    page = open_page(url)
    opened(page, until)
    choose(page, "Class", "c")
    page.get_by_role("radio", name="3").check()
    number_of_images(page, 1)
    keep(page, "7")
    page.get_by_text("Start from an image").click()
    page.locator("#editor canvas").first.wait_for()
    until(page, lambda: "Upload an image" in page.inner_text("#editor"))
    page.wait_for_timeout(1500)  # Gradio's editor breaks where a file comes before its canvas has settled
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "given.png")
    until(page, lambda: "Upload an image" not in page.inner_text("#editor"))
    page.wait_for_timeout(1500)  # the canvas grows into its place
    box = page.locator("#editor canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 20, middle[1], steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)
    look(page, "painted")
    page.click("#generate")
    finished(page, until, 1)
    found = shown(page, 0)
    changed = np.argwhere(found != given)
    assert 2 < len(changed) < given.size / 4
    assert np.abs(changed - [height / 2, width / 2]).max() < height / 3  # around the middle
    assert np.array_equal(found[:4], given[:4])
    assert not np.array_equal(found, pipe("c", num_inference_steps=3, seed=7, output_type="uint8").images[0, ..., 0])


def test_a_visit(url: str, pipe: FastPipeline, open_page: Opener, until: Until) -> None:
    """A class, steps, a seed; the teacher beside it; the steps in between; a picture on the disk."""
    page = open_page(url)
    opened(page, until)
    choose(page, "Class", "c")
    page.get_by_role("radio", name="3").check()
    number_of_images(page, 2)
    keep(page, "12345678901234567890")
    page.get_by_label("Show every step").check()
    choose(page, "Compare with", "the teacher at as few steps (DDIM)")
    page.click("#generate")
    report = finished(page, until, 2)
    assert re.search(r"2 images in .* each, [\d.,]+ per second \(onnxruntime, fp32, cpu\)", report)
    wanted = pipe(["c", "c"], num_inference_steps=3, seed=12345678901234567890, output_type="uint8").images[..., 0]
    until(page, lambda: shown_images(page, "compared") == 2 and shown_images(page, "formed") == 4)
    for place in range(2):
        assert np.array_equal(shown(page, place), wanted[place])
        assert np.array_equal(shown(page, place, "compared"), wanted[place])
    first = next(iter(pipe.stream("c", num_inference_steps=3, seed=12345678901234567890)))
    assert np.array_equal(shown(page, 0, "formed"), np.asarray(first))
    page.locator("#images .thumbnail-lg").first.click()
    with page.expect_download() as waiting:
        page.locator("#images").get_by_label("Download", exact=True).first.click()
    saved = Path(waiting.value.path())
    assert np.array_equal(np.asarray(Image.open(saved).convert("L")), wanted[0])
    assert "tiny-c-seed_12345678901234567890" in waiting.value.suggested_filename


def test_a_link_makes_its_pictures(url: str, pipe: FastPipeline, open_page: Opener, until: Until) -> None:
    page = open_page(f"{url}/?student=second&prompt=D&steps=3&seed=7:4&n=2")
    finished(page, until, 2)
    wanted = pipe(["d", "d"], num_inference_steps=3, seed=[(7, 4), (7, 5)], output_type="uint8").images[..., 0]
    assert np.array_equal(np.stack([shown(page, 0), shown(page, 1)]), wanted)
    page.get_by_role("radio", name="2").check()
    page.click("#generate")  # the seed of a link is kept
    until(page, lambda: "steps=2" in page.url)
    assert "student=second&prompt=d&steps=2&seed=7%3A4&n=2" in page.url
    page.get_by_text("Copy a link to these images").click()
    until(page, lambda: page.locator("#link textarea, #link input").input_value() == page.url)


@pytest.mark.slow  # how seeds are read is in test_demo.py; that one is kept, in a link's test
def test_seeds_are_drawn_or_kept(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    opened(page, until)
    number_of_images(page, 1)
    seed = page.get_by_label("Seed").first
    before = seed.input_value()
    page.click("#generate")
    finished(page, until, 1)
    drawn = until(page, lambda: (now := seed.input_value()) != before and now)
    page.get_by_label("Keep this seed").check()
    page.click("#generate")
    until(page, lambda: f"seed={drawn}" in page.url)
    assert seed.input_value() == drawn
    page.get_by_role("button", name="Random").click()
    until(page, lambda: seed.input_value() != drawn)
    seed.fill("31")
    seed.press("Enter")  # the keyboard is enough
    until(page, lambda: "seed=31" in page.url)


def test_examples_are_ready_to_click(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    opened(page, until)
    page.get_by_role("row").filter(has_text="b").first.click()
    finished(page, until, 4)
    assert page.get_by_label("Class", exact=True).input_value() == "b"
    assert page.get_by_label("Seed").first.input_value() == "2"


def test_cancelling_keeps_what_is_finished(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    opened(page, until)
    number_of_images(page, 200)
    page.get_by_role("radio", name="3").check()
    page.get_by_label("Show every step").check()
    page.click("#generate")
    until(page, lambda: shown_images(page) >= 2, 180)
    page.click("#cancel")
    until(page, lambda: page.inner_text("#report").startswith("Cancelled"), 180)
    page.wait_for_timeout(600)
    kept = shown_images(page)
    assert 1 <= kept < 200
    assert page.inner_text("#report").startswith("Cancelled")  # nothing came after it
    number_of_images(page, 1)
    page.get_by_label("Show every step").uncheck()
    page.click("#generate")
    finished(page, until, 1)


def test_what_cannot_be_made_is_said(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    opened(page, until)
    keep(page, "minus one")
    page.click("#generate")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "the seed is 'minus one'; give an integer, as in 7, or 7:2" in toast.inner_text()
    page.get_by_test_id("toast-close").click()
    keep(page, "1")
    field = page.get_by_label("Class", exact=True)
    field.fill("<b>zebra</b>")
    field.press("Enter")
    page.click("#generate")
    until(page, lambda: "'<b>zebra</b>' is not a class of tiny; use 0 to 9 (a, b, c" in toast.inner_text())
    assert toast.locator("b").count() == 0


def test_figures_and_the_card(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url)
    opened(page, until)
    page.get_by_role("tab", name="Figures").click()
    until(page, lambda: "redif eval DIR --save" in page.inner_text("body"))
    page.get_by_role("tab", name="Card").click()
    until(page, lambda: "How to use it" in page.inner_text("#card"))
    assert page.locator("#card img[src^='data:image/png']").count() == 2  # one for 2 steps and one for 3


@pytest.mark.slow
def test_a_phone_and_the_dark(url: str, open_page: Opener, until: Until, look: Look) -> None:
    for name, context in (
        ("desktop", {"viewport": {"width": 1280, "height": 900}}),
        ("phone", {"viewport": {"width": 375, "height": 720}}),
        ("dark", {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}),
    ):
        page = open_page(f"{url}/?seed=1&n=8", **context)
        finished(page, until, 8)
        for tab in ("Figures", "Card", "Generate"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(200)
            wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0, f"{name}, {tab}: the page is wider than the window"
        look(page, name)
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128
        assert light == (name != "dark")


@pytest.fixture(scope="module")
def prompted_url(tiny_student: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A demo of "prompted", which takes prompts, and of "tiny", which has classes."""
    folder = build_prompted(tmp_path_factory.mktemp("prompted") / "prompted")
    with demo_of(folder, tiny_student) as url:
        yield url


def test_a_prompt_is_typed(prompted_url: str, open_page: Opener, until: Until, look: Look) -> None:
    """A prompt and Enter; an example; a link; and then the other student, whose class is typed in the same box."""
    page = open_page(prompted_url)
    opened(page, until)
    number_of_images(page, 1)
    prompt = page.get_by_label("Prompt", exact=True)
    assert prompt.input_value() == "red heart"
    prompt.fill("a purple cow")
    prompt.press("Enter")
    finished(page, until, 1)
    until(page, lambda: "prompt=a+purple+cow" in page.url)
    look(page, "typed")
    page.get_by_role("row").filter(has_text="blue star").first.click()
    finished(page, until, 4)
    assert prompt.input_value() == "blue star"
    again = open_page(f"{prompted_url}/?student=prompted&prompt=a+purple+cow&steps=2&seed=7&n=2")
    finished(again, until, 2)
    assert again.get_by_label("Prompt", exact=True).input_value() == "a purple cow"
    choose(page, "Student", "tiny")
    field = page.get_by_label("Class").first  # the label has the classes' names below it
    until(page, lambda: field.input_value() == "a")
    until(page, lambda: page.get_by_role("row").filter(has_text="c").count() > 0)
    page.click("#generate")
    finished(page, until, 4)
    look(page, "classes")
