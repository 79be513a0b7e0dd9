"""The command ``redif generate``: images from a student. It never imports torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    C2paCert,
    C2paKey,
    Device,
    Json,
    NoMarks,
    Precision,
    Quiet,
    Runtime,
    SafetyFilterFile,
    StudentRevision,
    Threads,
    console_for,
    show_transfers,
    signer_of,
    write_rows,
)
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from redif_sdk.images import PipelineOutput
    from redif_sdk.marks.signature import ContentSigner

__all__ = ["generate_command"]

Prompts = Annotated[
    list[str] | None, typer.Argument(help="Prompts, or names of classes of a class-conditional student.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Inference steps; default: the first that the student supports.")
]
ClassLabels = Annotated[list[str] | None, typer.Option(help="A class by number or name; may be repeated.")]
Output = Annotated[
    str, typer.Option("-o", "--output", help="A file for all images, or a folder (DIR/) for one file each.")
]
Provider = Annotated[
    str | None, typer.Option(help="ONNX Runtime's execution provider, or the package of a plugin provider.")
]
Images = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="An image to start from; may be repeated, one a prompt.")
]
Mask = Annotated[Path | None, typer.Option(metavar="FILE", help="White is painted anew, the rest of the image stays.")]
Strength = Annotated[
    float | None, typer.Option(help="Share of the steps that are run from the image; default: 0.8, with a mask 1.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Guidance scale, where the student takes one; 1: none. Default: its own.")
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What the images are guided away from, where the student takes it.")
]
NagScale = Annotated[
    float | None,
    typer.Option(help="How far a student of one call a step goes away from the negative prompt (export --nag)."),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--condition",
        metavar="NAME=FILE",
        help="An array of a student that takes some: a .npy file, an image, or a number; 'example': the student's own.",
    ),
]


def generate_command(
    student: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the student, or its id on the Hub.")],
    prompt: Prompts = None,
    class_label: ClassLabels = None,
    number: Annotated[int, typer.Option("-n", "--num-images", help="Images for each prompt or class.")] = 1,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed: the same one gives the same images.")] = None,
    output: Output = "out.png",
    height: Annotated[int | None, typer.Option(help="Image height in pixels, if the student supports it.")] = None,
    width: Annotated[int | None, typer.Option(help="Image width in pixels, if the student supports it.")] = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    nag_scale: NagScale = None,
    image: Images = None,
    mask: Mask = None,
    strength: Strength = None,
    condition: Conditions = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    provider: Provider = None,
    engine_dir: Annotated[Path | None, typer.Option(help="Folder of TensorRT engines; default: the cache.")] = None,
    threads: Threads = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Keep one graph in memory at a time.")] = False,
    safety_filter: SafetyFilterFile = None,
    no_marks: NoMarks = False,
    c2pa_cert: C2paCert = None,
    c2pa_key: C2paKey = None,
    revision: StudentRevision = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Generate images."""
    from redif_sdk.cli.conditions import read_conditions
    from redif_sdk.hub import is_hub_id
    from redif_sdk.pipeline import FastPipeline

    if is_hub_id(student) and not Path(student).is_dir():
        show_transfers(json, quiet)
    signer = _signer(c2pa_cert, c2pa_key, output)
    images, masks = _opened(image or []), _opened([mask] if mask else [])
    labels = [int(label) if label.lstrip("-").isdecimal() else label for label in class_label or []]
    pipe = FastPipeline.from_pretrained(
        student,
        runtime=runtime,
        device=device,
        precision=precision,
        num_threads=threads,
        provider=provider,
        engine_dir=engine_dir,
        low_memory=low_memory,
        revision=revision,
        safety_filter=safety_filter,
    )
    pipe.marked = not no_marks
    out = pipe(
        prompt or None,
        class_labels=labels or None,
        num_images_per_prompt=number,
        num_inference_steps=steps,
        seed=seed,
        height=height,
        width=width,
        image=images or None,
        mask_image=masks or None,
        strength=strength,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        nag_scale=nag_scale,
        conditions=read_conditions(pipe.student, condition or []),
    )
    files = _save(out.images, output, signer)
    flags = out.nsfw_content_detected or []
    write_rows(json, "generate", _rows(out, files), device=out.runtime_info["device"])
    console_for(json, quiet).print(
        f"{', '.join(dict.fromkeys(files))}: {len(files)} image(s), seed {out.seeds[0][0]}, "
        f"{out.timings['total']:.3f} s on {out.runtime_info['device']}"
        + (f"; {sum(flags)} black: flagged by the safety filter" if any(flags) else ""),
        soft_wrap=True,
    )


def _opened(files: Sequence[Path]) -> list[Image]:
    from redif_sdk.inputs.images import open_image

    return [open_image(file, str(file)) for file in files]


def _rows(out: PipelineOutput, files: Sequence[str]) -> list[dict[str, Any]]:
    """One result an image."""
    used: dict[str, Any] = {key: out.runtime_info[key] for key in ("runtime", "precision", "device", "component")}
    used["seconds"] = out.timings["total"] / len(files)
    rows = [
        {"file": file, "seed": seed, "index": index, **used}
        for file, (seed, index) in zip(files, out.seeds, strict=True)
    ]
    for row, flag in zip(rows, out.nsfw_content_detected or [], strict=False):
        row["nsfw_content_detected"] = flag
    return rows


def _signer(certificate: Path | None, key: Path | None, output: str) -> ContentSigner | None:
    """What signs the files; checked before anything is generated."""
    signer = signer_of(certificate, key)
    if signer is None:
        return None
    from redif_sdk.marks.signature import MEDIA_TYPES

    path = Path(output)
    if not (output.endswith(("/", "\\")) or path.is_dir()) and _format(path) not in MEDIA_TYPES:
        raise InvalidRequest(f"{output} cannot be signed; use a name that ends in .png, .jpg or .webp")
    return signer


def _save(images: Sequence[Image], output: str, signer: ContentSigner | None) -> list[str]:
    """Write all images as one sheet, or each into a folder; every file is written whole. Returns each image's file."""
    from redif_sdk.artifact.atomic import atomic_write
    from redif_sdk.images import contact_sheet
    from redif_sdk.marks.xmp import marked, marks_of

    path = Path(output)
    as_folder = output.endswith(("/", "\\")) or path.is_dir()
    files = [path / f"{index}.png" for index in range(len(images))] if as_folder else [path]
    sheets = list(images) if as_folder else [marked(contact_sheet(images), marks_of(images))]
    encoded = []
    for sheet, file in zip(sheets, files, strict=True):
        buffer = io.BytesIO()
        try:
            sheet.save(buffer, format=_format(file))
        except (KeyError, ValueError) as error:
            raise InvalidRequest(
                f"{file} is not a valid output file name ({error}); use one that ends in .png"
            ) from error
        data = buffer.getvalue()
        encoded.append(data if signer is None else signer.sign(data, _format(file)))
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, data in zip(files, encoded, strict=True):
        atomic_write(file, data)
    return [str(file) for file in files] if as_folder else [output] * len(images)


def _format(file: Path) -> str:
    from PIL import Image

    return Image.registered_extensions().get(file.suffix.lower(), file.suffix)
