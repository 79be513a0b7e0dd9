"""Images say in their files that they were generated, and by what; `redif whence` tells, and looks whether it is so."""

from __future__ import annotations

import io
import pickle
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.cli.main import app
from redif_sdk.errors import InvalidRequest
from redif_sdk.marks.xmp import SOURCE_TYPE, mark_of, options_of
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


@pytest.fixture(scope="module")
def pipe(full_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime", num_threads=1)


def written(image: Image.Image, kind: str, **more: Any) -> Image.Image:
    data = io.BytesIO()
    image.save(data, kind, **more)
    return Image.open(io.BytesIO(data.getvalue()))


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def source_type(image: Image.Image) -> str | None:
    """As another program reads it."""
    packet = image.info.get("xmp")
    if packet is None:
        return None
    text = packet.decode() if isinstance(packet, bytes) else packet
    found = [node.attrib[IPTC] for node in ElementTree.fromstring(text.strip()).iter() if IPTC in node.attrib]
    return found[0] if found else None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_say_that_they_were_generated_and_by_what(pipe: FastPipeline, kind: str) -> None:
    out = pipe(class_labels=[1, 2], seed=7, num_inference_steps=3)
    found = written(out.images[1], kind)
    assert source_type(found) == SOURCE_TYPE
    (mark,) = mark_of(found)
    assert mark["student"] == pipe.manifest.name
    assert mark["digest"] == pipe.manifest.digest
    assert (mark["seed"], mark["index"], mark["class_label"], mark["num_inference_steps"]) == (7, 1, 2, 3)
    if kind == "PNG":
        assert np.array_equal(np.asarray(found), np.asarray(out.images[1]))
    begun = pipe(class_labels=1, seed=7, image=np.asarray(out.images[0])).images[0]
    assert mark_of(written(begun, kind))[0]["begins_with"] == "image"


def test_only_the_image_itself_is_marked(pipe: FastPipeline, tmp_path: Path) -> None:
    image = pipe(class_labels=1, seed=7).images[0]
    image.save(tmp_path / "one.png")
    assert mark_of(opened(tmp_path / "one.png"))
    image.save(tmp_path / "one.bmp")
    assert mark_of(written(pickle.loads(pickle.dumps(image)), "PNG"))
    for other in (image.copy(), image.crop((0, 0, 4, 4)), image.resize((9, 9))):
        assert source_type(written(other, "PNG")) is None
    own = PngInfo()
    own.add_text("Title", "mine")
    assert written(image, "PNG", pnginfo=own).info == {"Title": "mine"}  # what the caller gives, goes
    silent = FastPipeline.from_pretrained(pipe._student.path, runtime="onnxruntime")
    silent.marked = False
    plain = silent(class_labels=1, seed=7).images[0]
    assert type(plain) is Image.Image
    assert source_type(written(plain, "PNG")) is None


def test_quotes_and_other_scripts_come_back(pipe: FastPipeline) -> None:
    mark = {"student": 's"<&>', "prompt": "naïve café 東京 😀 \"quoted\" 'it' <b> &amp; \\ \n"}
    for kind in ("PNG", "JPEG", "WEBP"):
        found = written(Image.new("RGB", (8, 8)), kind, **options_of([mark], kind))
        assert mark_of(found) == [mark]
        assert source_type(found) == SOURCE_TYPE


def test_whence_tells_and_makes_it_again(full_student: Path, tmp_path: Path, pipe: FastPipeline) -> None:
    run = CliRunner()
    command = [
        "generate",
        str(full_student),
        "--class-label",
        "2",
        "--seed",
        "9",
        "--runtime",
        "onnxruntime",
        "--quiet",
    ]
    for more, file in ((["-o"], "one.png"), (["-n", "3", "-o"], "sheet.png")):
        assert run.invoke(app, [*command, *more, str(tmp_path / file)]).exit_code == 0
        asked = ["whence", str(tmp_path / file), "--student", str(full_student), "--runtime", "onnxruntime"]
        done = run.invoke(app, asked)
        assert (done.exit_code, "it is that image, bit for bit" in done.output) == (0, True), done.output
        assert "student tiny" in done.output
    assert run.invoke(app, [*command, "-n", "2", "-o", f"{tmp_path / 'each'}/"]).exit_code == 0
    assert [mark_of(opened(tmp_path / f"each/{n}.png"))[0]["index"] for n in range(2)] == [0, 1]

    altered = opened(tmp_path / "one.png")
    marks = mark_of(altered)
    altered.putpixel((3, 3), 0 if altered.getpixel((3, 3)) else 255)
    altered.save(tmp_path / "altered.png", **options_of(marks, "PNG"))
    done = run.invoke(app, ["whence", str(tmp_path / "altered.png"), "--student", str(full_student)])
    assert done.exit_code == 1
    assert "it is not that image bit for bit" in done.output
    assert "does not keep them" not in done.output  # a PNG does


def test_what_whence_cannot_say_is_one_line(
    full_student: Path, plain_student: Path, tmp_path: Path, pipe: FastPipeline
) -> None:
    run = CliRunner()
    command = ["generate", str(full_student), "--class-label", "2", "--seed", "9", "--quiet"]
    assert run.invoke(app, [*command, "--no-marks", "-o", str(tmp_path / "plain.png")]).exit_code == 0
    assert run.invoke(app, [*command, "-o", str(tmp_path / "one.png")]).exit_code == 0
    begun = pipe(class_labels=1, seed=7, image=np.asarray(pipe(class_labels=1, seed=7).images[0])).images[0]
    begun.save(tmp_path / "begun.png")
    for arguments, said in (
        ([tmp_path / "plain.png"], "has no mark of redif-sdk"),
        ([tmp_path / "one.png", "--student", plain_student], "the mark is of the student tiny"),
        ([tmp_path / "begun.png", "--student", full_student], "was begun with another image"),
        ([tmp_path / "none.png"], "cannot be read"),
    ):
        done = run.invoke(app, ["whence", *map(str, arguments)])
        assert isinstance(done.exception, InvalidRequest), done.output
        assert said in str(done.exception)


@pytest.mark.parametrize(
    "packet",
    [
        "",
        "<x/>",
        'redif:made="',
        'redif:made="not json"',
        'redif:made="{}"',
        'redif:made="[1, 2]"',
        f'redif:made="{"[" * 50_000}"',
        'redif:made="[{&quot;seed&quot;: ' + "9" * 5000 + '}]"',
        "<!DOCTYPE a [<!ENTITY b '" + "c" * 90_000 + "'>]><a>&b;</a>",
    ],
)
def test_a_mark_that_is_none_is_no_mark(packet: str) -> None:
    image = Image.new("L", (4, 4))
    image.info["xmp"] = packet.encode()
    assert mark_of(image) == []
    image.info["xmp"] = packet
    assert mark_of(image) == []


def test_a_mark_cannot_write_to_the_terminal(tmp_path: Path, full_student: Path) -> None:
    mark = {"student": "\x1b[2Jtiny\x07", "prompt": "a" * 10_000, "digest": "x"}
    Image.new("L", (4, 4)).save(tmp_path / "evil.png", **options_of([mark], "PNG"))
    done = CliRunner().invoke(app, ["whence", str(tmp_path / "evil.png")])
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert len(done.output) < 2000
    done = CliRunner().invoke(app, ["whence", str(tmp_path / "evil.png"), "--student", str(full_student)])
    assert "\x1b" not in str(done.exception)


@pytest.mark.parametrize("kept", [True, False])
def test_the_servers_files_are_marked(pipe: FastPipeline, kept: bool) -> None:
    with running({"tiny": pipe}, ServeSettings(marks=kept)) as address:
        for kind in ("png", "jpeg", "webp"):
            body = {"prompt": "d", "seed": 4, "n": 2, "output_format": kind}
            data = httpx.post(f"{address}/v1/images/generations", json=body, timeout=60).json()["data"]
            files = [Image.open(io.BytesIO(b64decode(entry["b64_json"]))) for entry in data]
            assert [source_type(file) for file in files] == [SOURCE_TYPE if kept else None] * 2
            assert [(mark["seed"], mark["index"]) for file in files for mark in mark_of(file)] == [
                (4, 0),
                (4, 1),
            ] * kept
