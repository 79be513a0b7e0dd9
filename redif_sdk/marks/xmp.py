"""The mark of a generated image as XMP: IPTC's digital source type, and what made it.

The EU's AI Act (Regulation 2024/1689, article 50.2) asks that generated images are marked in a machine-readable way;
IPTC's ``trainedAlgorithmicMedia`` is what readers look for. Who wants to removes a mark: it says, it does not prove.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["GeneratedImage", "Mark", "mark_of", "marked", "marks_of", "options_of", "packet_of"]

#: What made an image, JSON-safe: student, digest, seed, index, num_inference_steps, prompt or class_label, ...
Mark = dict[str, Any]

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LONGEST = 1 << 16  # bytes of a file's XMP that is read
_KEY = "redif"
_MADE = re.compile(r'redif:made="([^"<>]*)"')
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:redif="urn:redif-sdk:made:1" '
    'Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="{tool}" redif:made="{made}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


class GeneratedImage(Image.Image):
    """A PIL image whose PNG, JPEG and WebP files say what made it; what is drawn from it (a crop, a copy) does not."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL's, with the mark beside what the caller gives."""
        kind = (format or Image.registered_extensions().get(_suffix(fp), "")).upper()
        super().save(fp, format, **{**options_of(self.info.get(_KEY, []), kind), **params})


def marked(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """``image`` itself, with marks that its files will have: its own, or of a sheet those of its images."""
    if marks:
        image.__class__ = GeneratedImage
        image.info[_KEY] = list(marks)
    return image


def marks_of(images: Sequence[Image.Image]) -> list[Mark]:
    """The marks of generated images in this process, one after the other."""
    return [mark for image in images for mark in image.info.get(_KEY, []) if isinstance(image, GeneratedImage)]


def options_of(marks: Sequence[Mark], kind: str) -> dict[str, Any]:
    """What `Image.save` takes for a file of ``kind`` (PNG, JPEG, WEBP) to say what made it; nothing for other kinds."""
    if not marks or kind not in ("PNG", "JPEG", "WEBP"):
        return {}
    packet = packet_of(html.escape(json.dumps(list(marks), ensure_ascii=True, separators=(",", ":")), quote=True))
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        return {"pnginfo": info}
    return {"xmp": packet.encode()} if len(packet) < LONGEST - 64 else {}


def packet_of(made: str) -> str:
    """The XMP of a file whose marks are ``made``: their JSON, escaped for an attribute."""
    return _PACKET.format(source=SOURCE_TYPE, tool=f"redif-sdk {version('redif-sdk')}", made=made)


def mark_of(image: Image.Image) -> list[Mark]:
    """The marks in a file that was opened: one, or those of a sheet's images; none, where it has none of ours."""
    packet = image.info.get("xmp") or b""
    text = packet[:LONGEST].decode(errors="replace") if isinstance(packet, bytes) else str(packet)[:LONGEST]
    found = _MADE.search(text)
    try:
        marks = json.loads(html.unescape(found[1])) if found else []
    except (ValueError, RecursionError):
        return []
    return marks if isinstance(marks, list) and all(isinstance(mark, dict) for mark in marks) else []


def _suffix(fp: Any) -> str:
    name = str(getattr(fp, "name", fp))
    return name[name.rfind(".") :].lower() if "." in name else ""
