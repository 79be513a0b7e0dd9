"""Real data sets by name. They are read from where they were installed; nothing is downloaded here."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest

EMOJI_FILE = "emoji-32.npz"
EMOJI_CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
EMOJI_STYLES = ("Noto", "Twemoji", "Fluent")
EMOJI_CLASSES = tuple(f"{category}, {style}" for category in EMOJI_CATEGORIES for style in EMOJI_STYLES)

#: name -> (the file by which its folder is known, how to get it).
DATA_SETS = {
    "fashion-mnist": ("train-images-idx3-ubyte.gz", "install it (Debian: apt-get install dataset-fashion-mnist)"),
    "emoji": (EMOJI_FILE, "make it (python -m zoo.emoji -o $REDIF_DATA/emoji)"),
}

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class ImageData:
    """One split: ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64, and the classes' names."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    with gzip.open(path) as handle:
        return np.frombuffer(handle.read(), np.uint8, offset=header)


def data_folder(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds ``name``'s files: the argument, ``$REDIF_DATA/name``, or Debian's place for it."""
    if name not in DATA_SETS:
        raise InvalidRequest(f"unknown data set {name!r}; known: {', '.join(DATA_SETS)}")
    file, how = DATA_SETS[name]
    root = os.environ.get("REDIF_DATA")
    places = [Path(folder)] if folder else [*([Path(root) / name] if root else []), Path("/usr/share/datasets") / name]
    for place in places:
        if (place / file).is_file():
            return place
    raise InvalidRequest(
        f"the data set {name!r} is not in {' or '.join(map(str, places))}; {how}, or name its folder with --data-dir"
    )


def load(name: str, split: str, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """Load ``split`` ("train" or "test") of the data set ``name`` ("fashion-mnist", "emoji").

    Raises:
        InvalidRequest: an unknown name or split, or the files are not installed.
    """
    place = data_folder(name, folder)
    if split not in ("train", "test"):
        raise InvalidRequest(f"unknown split {split!r}; known: train, test")
    if name == "emoji":
        with np.load(place / EMOJI_FILE, allow_pickle=False) as arrays:
            chosen = arrays["held_out"] == (split == "test")
            return ImageData(arrays["images"][chosen], arrays["labels"][chosen], EMOJI_CLASSES)
    stem = {"train": "train", "test": "t10k"}[split]
    images = _idx(place / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _idx(place / f"{stem}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return ImageData(images, labels, FASHION_MNIST_CLASSES)
