"""The command ``redif whence``: what made an image. It never imports torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.terminal import GATE_FAILED, Device, Json, Quiet, Runtime, StudentRevision, console_for, write_rows
from redif_sdk.errors import InvalidRequest, RedifError, RuntimeUnavailable

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from redif_sdk.artifact.manifest import Manifest
    from redif_sdk.marks.signature import Signature
    from redif_sdk.marks.xmp import Mark
    from redif_sdk.pipeline import FastPipeline

__all__ = ["whence_command"]

MOST = 256  # images of a sheet that are made again
LONGEST = 500  # characters of what a mark says that are shown


def whence_command(
    image: Annotated[Path, typer.Argument(metavar="FILE", help="A PNG, JPEG or WebP file.")],
    student: Annotated[
        str | None, typer.Option(metavar="DIR", help="Make the image again with this student, and compare.")
    ] = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    c2pa_trust: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates (PEM) whose C2PA signatures are trusted.")
    ] = None,
    revision: StudentRevision = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Say what made an image, by the mark in its file.

    The file's signature (C2PA) is verified, if it has one. Exit code 1: the student makes another image, or the file
    was changed since it was signed. A file without a mark may have been generated nevertheless.
    """
    from redif_sdk.inputs.images import open_image
    from redif_sdk.marks.xmp import mark_of

    opened = open_image(image, str(image))
    marks = mark_of(opened)
    console = console_for(json, quiet)
    signature = _verified(image, str(opened.format), c2pa_trust, console)
    signed = {} if signature is None else {"c2pa": asdict(signature)}
    changed = signature is not None and not signature.unchanged
    if not marks and signature is None:
        raise InvalidRequest(
            f"{image} has no mark of redif-sdk; it was made by something else, or the mark was removed"
        )
    for mark in marks:
        said = ", ".join(f"{_shown(name)} {_shown(value)}" for name, value in mark.items() if value is not None)
        console.print(said, soft_wrap=True, markup=False)
    rows = [{"file": str(image), **mark, **signed} for mark in marks or [{}]]
    if student is None:
        write_rows(json, "whence", rows)
        if changed:
            raise typer.Exit(GATE_FAILED)
        return
    from redif_sdk.pipeline import FastPipeline

    precision = str(marks[0].get("precision", "auto"))
    where: dict[str, Any] = {"runtime": runtime, "device": device, "revision": revision}
    try:
        pipe = FastPipeline.from_pretrained(student, precision=precision, **where)
    except RuntimeUnavailable:  # that it is another student says more than that it has no such graph
        manifest = FastPipeline.from_pretrained(student, **where).manifest
        for mark in marks:
            _check_student(mark, manifest)
        raise
    found = remade(opened, marks, pipe)
    write_rows(json, "whence", [row | {"same": found.same, "most": found.most} for row in rows])
    if found.same:
        console.print("it is that image, bit for bit")
        if changed:
            raise typer.Exit(GATE_FAILED)
        return
    lossy = opened.format != "PNG"
    console.print(
        f"it is not that image bit for bit: {found.different:.1%} of its values differ, by {found.most} levels at most"
        + (f" ({opened.format} does not keep them; other engines differ by 1)" if lossy else "")
    )
    raise typer.Exit(GATE_FAILED)


def _verified(file: Path, kind: str, trusted: Path | None, console: Console) -> Signature | None:
    """The signature of a file, said on the console; None if there is none, or nothing here can read it."""
    from redif_sdk.marks.signature import has_manifest, signature_of

    data = file.read_bytes()
    if trusted is None and (not has_manifest(data, kind) or find_spec("c2pa") is None):
        if has_manifest(data, kind):
            console.print('it has a C2PA manifest, which was not verified: pip install "redif-sdk[c2pa]"', markup=False)
        return None
    signature = signature_of(data, kind, trusted)
    if signature is None:
        raise InvalidRequest(f"{file} has no C2PA manifest; leave --c2pa-trust out")
    state = "unchanged since" if signature.unchanged else f"CHANGED since ({', '.join(signature.problems)})"
    trust = {None: "no certificate is trusted here, see --c2pa-trust", True: "trusted", False: "NOT trusted"}
    source = "" if signature.generated else "; it does not say that the image was generated"
    said = f"signed by {_shown(signature.signer)} ({trust[signature.trusted]}), {state}{source}"
    console.print(said, soft_wrap=True, markup=False)
    return signature


def _check_student(mark: Mark, manifest: Manifest) -> None:
    """Raise InvalidRequest if a mark is of another student."""
    if mark.get("digest") != manifest.digest:
        raise InvalidRequest(
            f"the mark is of the student {_shown(mark.get('student'))} ({_shown(mark.get('digest'))}), not of "
            f"{manifest.name} ({manifest.digest[:12]}); give --student that one"
        )


@dataclass(frozen=True)
class Comparison:
    """An image beside what its student makes now.

    Attributes:
        same: bit for bit.
        most: the largest difference, in levels of 255.
        different: the share of values that differ.
    """

    same: bool
    most: int
    different: float


def remade(image: Image, marks: Sequence[Mark], pipeline: FastPipeline) -> Comparison:
    """What ``pipeline`` makes by the ``marks``, compared with ``image``.

    Raises:
        InvalidRequest: the marks are of another student, began with an image, or are not whole.
    """
    if not 1 <= len(marks) <= MOST:
        raise InvalidRequest(f"the mark is of {len(marks)} images; it must be of 1 to {MOST}")
    import numpy as np

    from redif_sdk.images import contact_sheet, to_pil

    made = []
    for mark in marks:
        _check_student(mark, pipeline.manifest)
        if mark.get("begins_with") is not None:
            raise InvalidRequest("the image was begun with another image, which the mark does not hold")
        try:
            seed = (operator.index(mark["seed"]), operator.index(mark["index"]))
            asked: dict[str, Any] = {name: mark.get(name) for name in ("num_inference_steps", "height", "width")}
            asked |= {name: mark[name] for name in ("guidance_scale", "negative_prompt", "nag_scale") if name in mark}
            condition = {"class_labels": mark["class_label"]} if "class_label" in mark else {}
            out = pipeline(mark.get("prompt"), seed=[seed], output_type="uint8", **condition, **asked)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"the mark cannot be read ({error}); the file was altered") from error
        made.append(out.images)
    ours = contact_sheet([one for images in made for one in to_pil(images)])
    if (ours.mode, ours.size) != (image.mode, image.size):
        raise RedifError(
            f"the image has {image.width} x {image.height} pixels ({image.mode}), and what the mark says "
            f"{ours.width} x {ours.height} ({ours.mode})"
        )
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(image).astype(int))
    return Comparison(not apart.any(), int(apart.max()), float((apart > 0).mean()))


def _shown(value: object) -> str:
    """What a file says, for a terminal: short, and without control characters."""
    return "".join(c for c in str(value)[:LONGEST] if c.isprintable())
