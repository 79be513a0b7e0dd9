"""Files that people write: prompts, class names, settings and keys, as editors and operating systems leave them."""

from __future__ import annotations

import codecs
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import LONGEST_PROMPT
from redif_sdk.distill import Teacher, import_pipeline
from redif_sdk.distill.presets import read
from redif_sdk.distill.teachers.facts import read_facts
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.prompts import checked, read_prompts
from redif_sdk.textfile import read_json_file, read_lines, read_text_file
from tests.pipelines import stable_diffusion, tiny_sd
from tests.test_cli import assert_one_line, redif

__all__ = ["redif"]

WANTED = ["red heart", "blue star", "naïve café", "one wide space"]
LINES = ["red heart", "  blue\tstar\t", "", "naïve café", "red heart", "one\u00a0wide \u3000space", "\u00a0\t"]
ENCODED = {
    "plain": ("utf-8", b""),
    "utf-8 mark": ("utf-8", codecs.BOM_UTF8),
    "utf-16 le": ("utf-16-le", codecs.BOM_UTF16_LE),
    "utf-16 be": ("utf-16-be", codecs.BOM_UTF16_BE),
    "utf-32": ("utf-32-le", codecs.BOM_UTF32_LE),
}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("marked", ENCODED)
def test_prompts_are_read_as_editors_save_them(tmp_path: Path, marked: str, ends: str) -> None:
    encoding, mark = ENCODED[marked]
    file = tmp_path / "prompts.txt"
    for last in ("", ends, ends * 3):
        file.write_bytes(mark + (ends.join(LINES) + last).encode(encoding))
        assert read_prompts(file) == WANTED


def test_a_mark_between_joined_files_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"b\n")
    assert read_prompts(tmp_path / "p") == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("un\ncafé\n".encode("latin-1"), "line 2: the byte 0xe9 is not UTF-8"),
        (b"a\r\nb\r\n\xff\r\n", "line 3: the byte 0xff is not UTF-8"),
        (codecs.BOM_UTF16_LE + "a\nb\n".encode("utf-16-le") + b"\x00\xd8\x20", "is not UTF-16-LE"),
        ("a\nb\n".encode("utf-16-le"), "line 1: a NUL byte"),
        (b"a\nb\0c\n", "line 2: a NUL byte"),
        (b"a\n\x1b[31mred\n", "line 2: it holds the control character U+001B"),
        (b"", "there are no prompts"),
        (codecs.BOM_UTF8 + b"\r\n \t\r\n", "there are no prompts"),
        (b"a\n" + b"x" * (LONGEST_PROMPT + 1), "line 2: a prompt has 10001 characters; give at most 10000"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    with pytest.raises(InvalidRequest) as raised:
        read_prompts(file)
    assert words in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "does not exist"),
        ("folder", "is a folder"),
        ("secret", "Permission denied"),
        ("a\0b", "cannot be read"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("a")
    (tmp_path / "secret").chmod(0)
    if name == "secret" and os.access(tmp_path / "secret", os.R_OK):
        pytest.skip("the superuser reads everything")
    with pytest.raises(InvalidRequest, match=words):
        read_prompts(tmp_path / name)


def test_devices_are_refused_and_pipes_are_read(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(InvalidRequest, match="is a device, not a file"):
            read_prompts(device)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidRequest, match="there are no prompts"):  # nobody writes: that does not hang
        read_prompts(pipe)
    reading, writing = os.pipe()
    late = threading.Timer(0.1, lambda: (os.write(writing, b"red heart\n"), os.close(writing)))
    late.start()
    assert read_prompts(f"/dev/fd/{reading}") == ["red heart"]
    os.close(reading)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # holes
    with pytest.raises(InvalidRequest, match="more than 1,000 bytes"):
        read_text_file(tmp_path / "large", "the prompts", limit=1000)


@given(st.binary(max_size=60))
def test_any_bytes_are_lines_or_one_message(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(data)
    for reader in (read_prompts, lambda path: read_lines(path, "it"), lambda path: read_json_file(path, "it"), read):
        said = ""
        try:
            reader(file)  # type: ignore[operator]
        except InvalidRequest as error:
            said = str(error)
        assert (said == "") or ("any.txt" in said and "\n" not in said)


def test_prompts_from_python_are_treated_as_those_of_a_file() -> None:
    assert checked(LINES) == WANTED
    for wrong in ("a prompt", [1], ["\x07"], ["x" * (LONGEST_PROMPT + 1)], [], [" "]):
        with pytest.raises(InvalidRequest):
            checked(wrong)  # type: ignore[arg-type]


def test_a_long_prompt_with_marks_among_the_first_is_imported(tmp_path: Path, redif: Any) -> None:
    """The limit of a prompt is one number: of the file, of the manifest, of a request."""
    pipeline = tiny_sd(tmp_path / "pipeline")
    file = tmp_path / "prompts.txt"
    lines = ["a\tb", "x " * 4000, "zero\u200bwidth", "y" * LONGEST_PROMPT, "\U0001f3f4\U000e0067\U000e007f flag"]
    file.write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    result = redif("import", pipeline, "--steps", "2", "--prompts", file, "-o", tmp_path / "student", "--quiet")
    assert result.code == 0, result.err
    text = Manifest.from_bytes((tmp_path / "student" / "redif.json").read_bytes(), "it").text
    assert text is not None
    assert text.examples == ["a b", ("x " * 4000).strip(), "y" * LONGEST_PROMPT]  # none that cannot be seen
    file.write_text("zero\u200bwidth\n", encoding="utf-8")
    result = redif("import", pipeline, "--steps", "2", "--prompts", file, "-o", tmp_path / "other")
    assert_one_line(result, 2, "every prompt holds invisible characters")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("marked", ENCODED)
def test_settings_are_read_as_editors_save_them(tmp_path: Path, marked: str) -> None:
    encoding, mark = ENCODED[marked]
    file = tmp_path / "run.yaml"
    file.write_bytes(mark + "updates:\u00a05\r\nseed: 3\t\r\n\r\n# é\r\n".encode(encoding))
    assert read(file) == {"updates": 5, "seed": 3}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"updates: 5\n\tseed: 3\n", "is not YAML"),
        (b"updates: 5\nseed: 1\nupdates: 6\n", "line 3: updates is given twice (also in line 1)"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- updates\n", "holds a list"),
        (b"1: 2\n", "holds a dict, not settings"),
        (b"seed: 2024-13-45\n", "is not YAML"),
        (b"seed: " + b"[" * 3000, "is not YAML"),
        (b"updates: 5\nname: caf\xe9\n", "line 2: the byte 0xe9"),
        (b"#" * (1 << 21), "more than 1,048,576 bytes"),
    ],
)
def test_settings_that_are_none_are_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(InvalidRequest) as raised:
        read(tmp_path / "run.yaml")
    assert words in str(raised.value)
    assert str(tmp_path / "run.yaml") in str(raised.value)


# ---------------------------------------------------------------- a teacher's own facts


@pytest.mark.parametrize("marked", ENCODED)
def test_a_teacher_s_facts_are_read_as_editors_save_them(tmp_path: Path, marked: str) -> None:
    encoding, mark = ENCODED[marked]
    file = tmp_path / "redif_teacher.json"
    names = ["T-shirt\tor\u00a0top", " \ufeffbag", "naïve"]
    content = json.dumps({"class_names": names, "num_classes": 3, "mine": [1]}, ensure_ascii=False, indent=1)
    file.write_bytes(mark + content.replace("\n", "\r\n").encode(encoding))
    assert read_facts(file) == {"class_names": ["T-shirt or top", "bag", "naïve"], "num_classes": 3, "mine": [1]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"class_names": ["a", "a "]}', "'a' is there twice"),
        ('{"class_names": ["a"], "num_classes": 2}', "1 class names for 2 classes"),
        ('{"class_names": ["a", 3]}', "class_names.1: Input should be a valid string"),
        ('{"class_names": "a"}', "class_names: Input should be a valid list"),
        ('{"class_names": ["\\u200b"]}', "class_names.0 is '\\u200b'"),
        ('{"num_classes": 2.5}', "num_classes: Input should be a valid integer"),
        ('{"guidance_scale": -1}', "guidance_scale: Input should be greater than or equal to 0"),
        ('{"guidance_scale": NaN}', "guidance_scale: Input should be a finite number"),
        ("[]", "holds a list"),
        ('{"name": "a",\n "licence" "b"}', "line 2, column 12: Expecting ':' delimiter"),
        ("[" * 100_000, "correct the JSON"),
    ],
)
def test_facts_that_are_wrong_name_the_file_and_the_field(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "redif_teacher.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidRequest) as raised:
        read_facts(tmp_path / "redif_teacher.json")
    assert words in str(raised.value)
    assert "redif_teacher.json" in str(raised.value)


def test_a_teacher_with_wrong_facts_is_one_line(redif: Any, teacher_folder: Path, copy_of: Any, tmp_path: Path) -> None:
    folder = copy_of(teacher_folder)
    (folder / "redif_teacher.json").write_bytes(b'{"num_classes": 3, "class_names": ["a", "b\xe9", "c"]}')
    result = redif("import", folder, "--steps", "2", "-o", tmp_path / "student")
    assert_one_line(result, 2, "redif_teacher.json, line 1: the byte 0xe9 is not UTF-8")


# ---------------------------------------------------------------- no guidance


@pytest.mark.parametrize("scale", ["0.0", "0", "1", "1.0"])
def test_scales_0_and_1_mean_no_guidance(redif: Any, teacher_folder: Path, tmp_path: Path, scale: str) -> None:
    output = tmp_path / "student"
    given = ("--steps", "2", "--guidance-scale", scale, "-o", output, "--quiet")
    assert redif("import", teacher_folder, *given) == (0, "", "")
    manifest = Manifest.from_bytes((output / "redif.json").read_bytes(), "it")
    assert manifest.network.guidance is None
    assert manifest.teacher is not None
    assert manifest.teacher.guidance_scale == 1


def test_no_guidance_in_a_teacher_s_facts_and_from_python(teacher_folder: Path, copy_of: Any, tmp_path: Path) -> None:
    folder = copy_of(teacher_folder)
    facts = json.loads((folder / "redif_teacher.json").read_text())
    (folder / "redif_teacher.json").write_text(json.dumps({**facts, "guidance_scale": 0.0}))
    assert Teacher.load(folder).calls_per_step == 1
    pipeline = stable_diffusion()
    manifest = import_pipeline(pipeline, tmp_path / "text", [2], guidance_scale=0.0, prompts=["a"])
    assert manifest.network.guidance is not None  # a call may ask for it
    assert (manifest.default_guidance, manifest.network.calls_per_step) == (1.0, 1)
    for wrong in (-0.5, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="0 and 1 mean no guidance"):
            Teacher.load(folder).guided(wrong)
