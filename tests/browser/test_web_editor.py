"""Images to start from in the page of `redif export --target web`, its mask editor, and the marks of its files."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.cli.main import app
from redif_sdk.export.web import build_page
from redif_sdk.marks.xmp import SOURCE_TYPE, mark_of
from tests.browser.conftest import Opener, static_server
from tests.browser.test_web import Look, Until, downloaded, finished, levels_off, ready, saved
from tests.test_marks import source_type

SEED = 12345678901234567890
READ_MASK = (
    "() => { const c = document.querySelector('#mask');"
    " return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).filter((_, i) => i % 4 === 3) }"
)


@pytest.fixture(scope="module")
def folder(full_student: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("no npm here, which brings the browser's engine: install Node.js")
    return build_page(full_student, tmp_path_factory.mktemp("page") / "web", engines=("wasm",))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with static_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def pipe(full_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime", precision="fp32")


def drawn(height: int, width: int) -> Image.Image:
    """An image in which every pixel differs from its neighbours."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def upload(page: Any, image: Image.Image | bytes, name: str = "photo.png") -> None:
    data = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(data, "PNG")
    content = data.getvalue() if isinstance(image, Image.Image) else image
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def mask_of(page: Any, height: int = 28, width: int = 28) -> NDArray[np.bool_]:
    """Where the page shows paint: there its alpha is the paint's, and the brush's where that is."""
    return np.array(page.evaluate(READ_MASK), dtype=np.uint8).reshape(height, width) == 150


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """With the mouse over the mask, between places that are shares of its sides."""
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()
    page.mouse.move(1, 1)


def asked(page: Any, until: Until, url: str, steps: int, previews: bool) -> None:
    ready(page, until)
    page.select_option("#class-select", label="c")
    page.select_option("#steps", str(steps))
    page.fill("#count", "1")
    page.fill("#seed", f"{SEED}:3")
    page.set_checked("#previews", previews)


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(("steps", "rows", "previews"), [(3, 2, False), slow(3, 2, True), slow(2, None, False)])
def test_images_from_an_image_are_pythons(
    url: str, pipe: FastPipeline, open_page: Opener, until: Until, steps: int, rows: int | None, previews: bool
) -> None:
    """A photograph in colours and of another shape, by the fused graph and by single steps, with a strength and not."""
    page, photo = open_page(url), drawn(57, 91)
    asked(page, until, url, steps, previews)
    upload(page, photo)
    page.locator("#editor").wait_for()
    page.fill("#height", "28")  # it chose the image's own
    if rows:
        page.focus("#strength")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#strength-text") == "0.667: the last 2 of 3 steps"
    page.click("#generate")
    finished(page, until)
    strength = rows / steps if rows else None
    wanted = pipe("c", image=photo, strength=strength, height=28, num_inference_steps=steps, seed=[(SEED, 3)])
    assert levels_off(downloaded(page, 0), np.asarray(wanted.images[0])[..., None]) <= 1
    assert "seed" not in page.url  # a link would make another image
    assert not page.is_visible("#share")


@pytest.mark.parametrize("previews", [False, slow(True)])
def test_what_the_mask_leaves_out_is_the_image_to_the_bit(
    url: str, pipe: FastPipeline, open_page: Opener, until: Until, previews: bool, look: Look
) -> None:
    page, photo = open_page(url), drawn(36, 28).convert("L")
    asked(page, until, url, 3, previews)
    upload(page, photo)
    page.locator("#editor").wait_for()
    assert page.input_value("#height") == "36"
    drag(page, (0.2, 0.3), (0.7, 0.6))
    look(page, "painted")
    mask = mask_of(page, 36)
    assert 20 < mask.sum() < 500
    assert page.inner_text("#strength-text") == "1: all 3 steps"
    page.click("#generate")
    finished(page, until)
    found = downloaded(page, 0)
    assert np.array_equal(found[~mask], np.asarray(photo)[~mask])
    assert not np.array_equal(found[mask], np.asarray(photo)[mask])
    wanted = pipe("c", image=photo, mask_image=mask, num_inference_steps=3, seed=[(SEED, 3)], output_type="uint8")
    assert levels_off(found, wanted.images[0]) <= 1


def test_a_finger_paints_and_does_not_scroll(url: str, open_page: Opener, until: Until) -> None:
    page = open_page(url, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    ready(page, until)
    upload(page, drawn(28, 28))
    page.locator("#mask").scroll_into_view_if_needed()
    box, before = page.locator("#mask").bounding_box(), page.evaluate("() => scrollY")
    finger = page.context.new_cdp_session(page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in places]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (0.5, 0.9))
    for y in (0.7, 0.5, 0.3, 0.1):
        touch("touchMove", (0.5, y))
    touch("touchEnd")
    mask = mask_of(page)
    assert mask[3:25, 14].all()
    assert not mask[:, :9].any()
    assert page.evaluate("() => scrollY") == before
    wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0


def test_the_editor_by_keyboard(url: str, open_page: Opener, until: Until) -> None:
    """Tab reaches everything; arrows, Space and Delete paint; the buttons clear the mask and remove the image."""
    page = open_page(url)
    ready(page, until)
    upload(page, drawn(28, 28))
    page.locator("#editor").wait_for()
    upload(page, b"not an image", "letter.png")
    said = until(page, lambda: page.is_visible("#error") and page.inner_text("#error"))
    assert said == "letter.png is no image that this browser reads, or is damaged; choose a PNG, JPEG or WebP file."
    assert page.is_visible("#editor")  # with the one before
    page.focus("#file")
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id"))
    assert reached == ["mask", "brush", "erase", "strength", "remove", "seed", "random"]  # there is nothing to clear
    page.focus("#mask")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#status").startswith("Ready")  # Enter sent nothing
    page.keyboard.press("Tab")
    mask = mask_of(page)
    assert mask[14, 13:20].all()
    assert 16 <= mask.sum() <= 40
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    assert 0 < mask_of(page).sum() < mask.sum()
    page.focus("#unmask")
    page.keyboard.press("Enter")
    assert not mask_of(page).any()
    page.focus("#remove")
    page.keyboard.press("Enter")
    assert not page.is_visible("#editor")
    assert page.evaluate("() => document.activeElement.id") == "file"


def test_students_without_the_ability_show_no_controls(
    url: str, full_student: Path, open_page: Opener, until: Until, tmp_path: Path
) -> None:
    """Without the graph of single steps there is no mask; and a page that is told of neither shows nothing."""
    student = Path(shutil.copytree(full_student, tmp_path / "student"))
    manifest = StudentFolder(student).manifest
    graphs = [graph for graph in manifest.graphs if graph.component != "denoiser"]
    write_manifest(student, manifest.model_copy(update={"graphs": graphs}))
    made = build_page(student, tmp_path / "fused", engines=("wasm",))
    with static_server(made) as address:
        page = open_page(address)
        ready(page, until)
        upload(page, drawn(28, 28))
        page.locator("#strength").wait_for()
        assert not page.is_visible("#paint")
        assert not page.is_visible("#unmask")
        config = json.loads((made / "student.json").read_text())
        (made / "student.json").write_text(json.dumps(config | {"startsFrom": []}))
        page.reload()
        ready(page, until)
        assert not page.is_visible("#start")


def test_downloads_say_what_made_them(
    url: str, full_student: Path, open_page: Opener, until: Until, tmp_path: Path
) -> None:
    """One image, a sheet and one from an image, as `redif whence` reads them."""
    page = open_page(f"{url}#class=c&steps=3&seed={SEED}:3&n=3")
    finished(page, until)
    (tmp_path / "one.png").write_bytes(saved(page, 0))
    with page.expect_download() as waiting:
        page.click("#sheet")
    (tmp_path / "sheet.png").write_bytes(Path(waiting.value.path()).read_bytes())
    upload(page, drawn(28, 28))
    page.locator("#editor").wait_for()
    page.fill("#count", "1")
    page.click("#generate")
    until(page, lambda: page.inner_text("#status").startswith("1 image in "))
    begun = Image.open(io.BytesIO(saved(page, 0)))
    assert mark_of(begun)[0]["begins_with"] == "image"
    one = Image.open(io.BytesIO((tmp_path / "one.png").read_bytes()))
    assert (one.mode, one.size, source_type(one)) == ("L", (28, 28), SOURCE_TYPE)
    for name, count in (("one", 1), ("sheet", 3)):
        arguments = ["whence", str(tmp_path / f"{name}.png"), "--student", str(full_student), "--json", "-"]
        done = CliRunner().invoke(app, [*arguments, "--runtime", "onnxruntime"])
        rows = json.loads(done.stdout)["rows"]
        assert [(row["seed"], row["index"], row["class_label"]) for row in rows] == [
            (SEED, 3 + place, 2) for place in range(count)
        ]
        assert {row["student"] for row in rows} == {"tiny"}
        assert max(row["most"] for row in rows) <= 1  # another engine's rounding
