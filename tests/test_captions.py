"""The captioned emoji: what is called what, captions by key, and what is held out."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from redif_sdk.errors import InvalidRequest
from zoo import captions, emoji
from zoo.captions import HELD_OUT, HELD_OUT_EVERYWHERE, KEYS, STYLES, Subject

# code points -> Unicode's name, short names, category, subcategory, keywords
CHARACTERS: dict[str, tuple[str, list[str], str, str, list[str]]] = {
    "2764-FE0F": ("red heart", ["heart"], "Smileys & Emotion", "heart", ["love", "black", "like"]),
    "1F9E1": ("orange heart", ["orange_heart"], "Smileys & Emotion", "heart", ["love"]),
    "1F499": ("blue heart", ["blue_heart"], "Smileys & Emotion", "heart", ["love", "red heart"]),
    "1F7E2": ("green circle", ["large_green_circle"], "Symbols", "geometric", ["round"]),
    "2B1B": ("black large square", ["black_large_square"], "Symbols", "geometric", ["shape"]),
    "1F4D5": ("closed book", ["closed_book"], "Objects", "book-paper", ["read", "2d"]),
    "1F697": ("automobile", ["car", "red_car"], "Travel & Places", "transport-ground", ["vehicle", "blue car"]),
    "1F436": ("dog face", ["dog"], "Animals & Nature", "animal-mammal", ["pet", "Pup", "shit"]),
    "1F415": ("dog", ["dog2"], "Animals & Nature", "animal-mammal", ["pet"]),
    "1F469-200D-1F9B0": ("woman red hair", ["red_haired_woman"], "People & Body", "person", ["hairstyle"]),
    "1FA85": ("piñata", ["pinata"], "Activities", "game", ["party"]),
    "1F1EB-1F1F7": ("flag France", ["flag-fr"], "Flags", "country-flag", ["flag"]),
}


def write_package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_packages(folder: Path) -> None:
    """The five packages as npm packs them, with a dot for each character."""
    entries = [
        {"unified": codes, "non_qualified": None, "short_names": short, "category": category, "subcategory": sub}
        for codes, (_, short, category, sub, _) in CHARACTERS.items()
    ]
    for colour, (style, (package, pattern)) in enumerate(emoji.PACKAGES.items()):
        size = 256 if style == "Fluent" else 64
        picture = Image.new("RGBA", (size, size))
        picture.paste((80 * colour, 0, 0, 255), (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP" if style == "Fluent" else "PNG", lossless=True)
        files = {pattern.format(codes.lower()): buffer.getvalue() for codes in CHARACTERS}
        files["package/emoji.json"] = json.dumps(entries).encode()
        write_package(folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"), files)

    def text(codes: str) -> str:
        return "".join(chr(int(code, 16)) for code in codes.split("-"))

    names = {text(codes): {"name": name} for codes, (name, *_) in CHARACTERS.items()}
    words = {text(codes): ["a_slug", *found] for codes, (*_, found) in CHARACTERS.items()}
    write_package(folder / "unicode-emoji-json-0.9.0.tgz", {captions.NAMES[1]: json.dumps(names).encode()})
    write_package(folder / "emojilib-4.0.3.tgz", {captions.KEYWORDS[1]: json.dumps(words).encode()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("captions")
    write_packages(made)
    app = typer.Typer()
    app.command()(captions.main)
    result = CliRunner().invoke(app, ["-o", str(made / "out"), "--packages", str(made)])
    assert result.exit_code == 0, result.output
    assert "33 images of 11 subjects, 7 of them held out" in " ".join(result.output.split())
    return made / "out"


def test_pictures_are_64_pixels_on_white_and_say_what_they_are(folder: Path) -> None:
    data = captions.load(folder)
    assert data.images.shape == (33, 3, 64, 64)
    assert data.images.dtype == np.uint8
    assert np.all(data.images[:, :, 0, 0] == 255)
    assert np.all(data.images[:, 1:, 32, 32] == 0)
    assert Counter(data.styles) == dict.fromkeys(STYLES, 11)
    assert "1f1eb-1f1f7" not in data.characters
    assert data.prompt(0) == "red heart, noto style"


def test_names_say_colours_and_no_name_is_used_twice(folder: Path) -> None:
    data = captions.load(folder)
    subjects = {subject.name: subject for subject in data.subjects}
    assert subjects["red heart"] == Subject("red heart", ("heart",), ("love", "like"))  # not "black"
    assert subjects["blue heart"].keywords == ("love",)  # not another's name
    assert subjects["green circle"].aliases == ("large green circle",)
    assert subjects["red book"].aliases == ("closed book",)
    assert subjects["car"] == Subject("car", ("red car",), ("vehicle",))  # not "blue car"
    assert subjects["dog face"] == Subject("dog face", (), ("pet", "pup"))  # "dog" is the other one
    assert {"black square", "woman with red hair", "pinata", "dog"} <= set(subjects)


def draw_all(subject: Subject, style: str, count: int = 3000) -> list[str]:
    keys = np.random.default_rng(0).integers(0, KEYS, count).tolist()
    return [captions.caption(subject, style, key) for key in keys]


def test_captions_are_a_function_of_their_key_and_vary() -> None:
    heart = Subject("red heart", ("heart",), ("love", "like"))
    drawn = draw_all(heart, "Fluent")
    assert drawn == draw_all(heart, "Fluent")
    counted = Counter(drawn)
    assert {
        "red heart", "a red heart", "an emoji of a heart, fluent 3d style", "red heart emoji", "love, like", "love",
        "red heart, love in fluent 3d style", "heart, fluent 3d style",
    } <= set(counted)  # fmt: skip
    styled = sum(count for text, count in counted.items() if STYLES["Fluent"] in text)
    assert 0.45 < styled / len(drawn) < 0.55
    assert not any(other in text for text in counted for other in (STYLES["Noto"], STYLES["Twemoji"]))
    assert 0.1 < (counted["red heart"] + counted["red heart, fluent 3d style"]) / len(drawn) < 0.5
    assert set(draw_all(Subject("owl"), "Noto", 500)) >= {"an owl", "owl", "owl, owl", "an emoji of an owl, noto style"}
    with_none = [text for text in draw_all(heart, "Noto") if "noto" not in text]
    assert {captions.plain(heart, key) for key in range(0, KEYS, KEYS // 997)} & set(with_none)


def test_every_word_of_a_caption_is_announced() -> None:
    subjects = [Subject("red heart", ("heart",), ("love", "like")), Subject("two hearts", (), ("like",))]
    announced = {word.strip(",") for text in captions.texts(subjects) for word in text.split()}
    announced.add("emoji")
    for subject in subjects:
        for style in STYLES:
            for text in draw_all(subject, style, 500):
                assert {word.strip(",") for word in text.split()} <= announced


@pytest.mark.parametrize(
    ("name", "called"),
    [("owl", "an owl"), ("heart", "a heart"), ("two hearts", "two hearts"), ("1st place medal", "1st place medal"),
     ("cactus", "a cactus"), ("dress", "a dress"), ("a button", "a button"), ("grapes", "grapes")],
)  # fmt: skip
def test_articles(name: str, called: str) -> None:
    assert captions.with_article(name) == called


def test_texts_are_cleaned_of_what_would_join_a_comma() -> None:
    assert captions.cleaned("Woman’s  Boot!") == "woman's boot"
    assert captions.cleaned("A button (blood type)") == "a button blood type"
    assert captions.cleaned("Piñata") == "pinata"


def test_what_is_held_out_is_in_no_training_split(folder: Path) -> None:
    data = captions.load(folder)
    pairs = {(subject.name, style) for subject, style in zip(data.subjects, data.styles, strict=True)}
    trained = {(s.name, style) for s, style in zip(data.training.subjects, data.training.styles, strict=True)}
    left = {("orange heart", style) for style in STYLES} | {("green circle", "Noto"), ("blue heart", "Twemoji")}
    left |= {("red book", "Fluent"), ("dog face", "Fluent")}
    left &= pairs
    assert pairs - trained == left
    assert len(data.training) + int(data.held_out.sum()) == len(data)
    assert not data.training.held_out.any()


def test_each_colour_shape_and_style_of_a_composition_is_trained_on() -> None:
    """A colour that is held out of one shape is seen in others, in the same style, and so is the shape."""
    shapes = ("heart", "circle", "square", "book")
    for style, names in HELD_OUT.items():
        assert style in STYLES
        assert len(names) == len(set(names)) == 9
        for name in names:
            colour, _, shape = name.rpartition(" ")
            if shape in shapes and colour in captions.COLOURS:
                others = [other for other in shapes[:3] if other != shape]
                assert any(not captions.held_out(f"{colour} {other}", style) for other in others)
                assert sum(captions.held_out(f"{c} {shape}", style) for c in captions.COLOURS) < 4
    for name in HELD_OUT_EVERYWHERE:
        assert not any(name in names for names in HELD_OUT.values())
        assert all(captions.held_out(name, style) for style in STYLES)
    assert not captions.held_out("red heart", "Fluent")


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"python -m zoo\.captions"):
        captions.load(tmp_path)
    monkeypatch.setenv("REDIF_DATA", str(tmp_path))
    (tmp_path / "captions").symlink_to(folder)
    assert len(captions.load()) == 33
    with pytest.raises(InvalidRequest, match=r"unicode-emoji-json-0\.9\.0\.tgz has no package/other\.json"):
        captions.read_json(folder.parent / "unicode-emoji-json-0.9.0.tgz", "package/other.json")
    entry: dict[str, Any] = {"unified": "1F436", "short_names": ["dog"]}
    with pytest.raises(InvalidRequest, match="no name for 1F436"):
        captions.subjects_of([entry], {}, {})
