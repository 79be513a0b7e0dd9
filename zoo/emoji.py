"""The data set "emoji": 32 x 32 colour images of emoji in three styles, from three packages of npm's registry.

``python -m zoo.emoji``, from the repository's root, fetches Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0) and Fluent 3D
(MIT), puts each image on white, scales it down, and writes one file. Its classes are category and style: "Food & Drink,
Noto". A tenth of the *characters* is held out as the test split, so that no character is in both in another style.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill.evaluation.datasets import EMOJI_CATEGORIES as CATEGORIES
from redif_sdk.distill.evaluation.datasets import EMOJI_CLASSES as CLASSES
from redif_sdk.distill.evaluation.datasets import EMOJI_FILE as FILE
from redif_sdk.errors import InvalidRequest

SIZE = 32
#: style -> npm package, and the place of a character's image in it.
PACKAGES = {
    "Noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "Twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "Fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}
HELD_OUT = 10  # one in this many characters is held out


def held_out(character: str) -> bool:
    """Whether a character, by its code points, is in the test split."""
    return hashlib.sha256(character.encode()).digest()[0] % HELD_OUT == 0


def picture(data: bytes, size: int = SIZE) -> NDArray[np.uint8]:
    """One file -> (3, size, size) uint8: on white, scaled down by averaging."""
    with Image.open(io.BytesIO(data)) as image:
        coloured = image.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return np.asarray(white.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)


def read_package(path: Path, pattern: str) -> dict[str, bytes]:
    """Code points ("1f600-fe0f") -> the file, of one npm tarball; and its list of characters as "emoji.json"."""
    head, tail = pattern.split("{}")
    files: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name, handle = member.name, archive.extractfile(member)
            if handle is not None and name.startswith(head) and name.endswith(tail):
                files[name.removeprefix(head).removesuffix(tail)] = handle.read()
            elif handle is not None and name == "package/emoji.json":
                files["emoji.json"] = handle.read()
    return files


def characters(tarballs: dict[str, Path]) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """Each character in each style that has it, from the three tarballs: its entry of emoji.json, style, image file.

    Characters are whole: neither bare skin tones nor variants with one.
    """
    packages = {style: read_package(path, PACKAGES[style][1]) for style, path in tarballs.items()}
    for entry in json.loads(packages["Noto"]["emoji.json"]):
        if entry["category"] not in CATEGORIES:
            continue  # the skin tones by themselves
        codes = entry["unified"].lower()
        for style, files in packages.items():
            names = (codes, (entry["non_qualified"] or codes).lower())  # Fluent's files are named after either
            data = next((files[name] for name in names if name in files), None)
            if data is not None:
                yield entry, style, data


def build(tarballs: dict[str, Path]) -> dict[str, NDArray[Any]]:
    """The arrays of the data set from the three tarballs, by style: images, labels, characters, held_out."""
    images, labels, codes = [], [], []
    for entry, style, data in characters(tarballs):
        images.append(picture(data))
        labels.append(CLASSES.index(f"{entry['category']}, {style}"))
        codes.append(entry["unified"].lower())
    return {
        "images": np.stack(images),
        "labels": np.array(labels, np.int64),
        "characters": np.array(codes),
        "held_out": np.array([held_out(character) for character in codes]),
    }


def fetch(folder: Path) -> dict[str, Path]:
    """The three tarballs, by style, as :func:`fetch_packages` gets them."""
    paths = fetch_packages(folder, [package for package, _ in PACKAGES.values()])
    return dict(zip(PACKAGES, paths, strict=True))


def fetch_packages(folder: Path, packages: Iterable[str]) -> list[Path]:
    """npm's tarballs of ``packages``, through ``npm pack``; those already in ``folder`` are not fetched again.

    Raises:
        InvalidRequest: npm is missing or fails.
    """
    found = []
    for package in packages:
        path = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.is_file():
            try:
                subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", b"") or str(error).encode()
                raise InvalidRequest(
                    f"npm pack {package} failed ({said.decode(errors='replace').strip()[:200]}); "
                    "install npm, or put the package's .tgz into a folder and name it with --packages"
                ) from error
        found.append(path)
    return found


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for emoji-32.npz: $REDIF_DATA/emoji.")],
    packages: Annotated[Path | None, typer.Option(help="Folder with the packages' .tgz files.")] = None,
) -> None:
    """Fetch the three packages and write the data set."""
    with TemporaryDirectory(prefix="redif-") as scratch:
        arrays = build(fetch(packages or Path(scratch)))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / FILE, buffer.getvalue())
    typer.echo(f"{output / FILE}: {len(arrays['images']):,} images, {int(arrays['held_out'].sum())} of them held out")


if __name__ == "__main__":
    typer.run(main)
