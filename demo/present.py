"""What the page shows of a result: a line of figures, image files, and the student's card."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.render import read_card, render
from redif_sdk.card.sections import body
from redif_sdk.demo.studio import BLOCKED, Captioned, Shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from redif_sdk.marks.signature import ContentSigner

__all__ = ["ImageFiles", "card_text", "figures"]

_UNUSUAL = re.compile(r"[^A-Za-z0-9.-]+")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)[^)]*\)")


def card_text(manifest: Manifest, folder: StudentFolder | None = None) -> str:
    """A student's card for the page: without the Hub's metadata, with its images embedded.

    Args:
        manifest: the student's manifest.
        folder: the folder with its card and samples; None to write the card from the manifest.

    An image from elsewhere is shown as its description, so that the page makes no request to other servers.
    """
    written = read_card(folder.path) if folder is not None else None
    text = body(written if written is not None else render(manifest))

    def embedded(found: re.Match[str]) -> str:
        described, place = found[1], found[2]
        if folder is None or place not in folder.files("samples") or not place.endswith(".png"):
            return f"*{described}*" if described else ""
        data = base64.b64encode(folder.read(place)).decode()
        return f"![{described}](data:image/png;base64,{data})"

    return _IMAGE.sub(embedded, text)


def figures(shown: Shown) -> str:
    """Latency and images per second of the finished images, as Markdown."""
    if not shown.done:
        return "Generating the first image"
    each = shown.seconds / shown.done
    engine = f"{shown.runtime.get('runtime')}, {shown.runtime.get('precision')}, {shown.runtime.get('device')}"
    text = (
        f"**{shown.done} image{'s' * (shown.done != 1)}** in {_time(shown.seconds)}: {_time(each)} each, "
        f"**{1 / each:,.3g} per second** ({engine})"
    )
    if shown.compared and shown.teacher_seconds:
        teacher = shown.teacher_seconds / len(shown.compared)
        text += f". The comparison: {_time(teacher)} each, {teacher / each:.3g} times as long"
    if any(shown.blocked or ()):
        text += f". **{sum(shown.blocked or ())} {BLOCKED}**"
    return text + (f" ... {shown.note}" if shown.note else "")


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


class ImageFiles:
    """Writes each image to a file once. Gradio copies the files when it shows them, so the folder can go afterwards.

    Given images instead of files, Gradio would write all of them again for every new one, while browsers read them.
    With a ``signer`` every file is signed (C2PA).
    """

    def __init__(self, folder: Path, name: str, signer: ContentSigner | None = None) -> None:
        self._folder, self._name, self._signer = folder, name, signer
        self._written: dict[int, tuple[Image, str]] = {}  # by id, with the image, so that no id is reused

    def __call__(self, images: list[Captioned], kind: str = "") -> list[tuple[str, str]]:
        return [(self._file(image, f"{self._name}-{caption}-{kind}"), caption) for image, caption in images]

    def _file(self, image: Image, name: str) -> str:
        if id(image) not in self._written:
            folder = self._folder / str(len(self._written))
            folder.mkdir()
            file = folder / f"{_UNUSUAL.sub('_', name).strip('_-')[:120]}.png"
            if self._signer is None:
                image.save(file)
            else:
                self._signer.save(image, file)
            self._written[id(image)] = image, str(file)
        return self._written[id(image)][1]
