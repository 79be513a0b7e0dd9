"""Requests and responses: OpenAI's images API, and the few fields that we add."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs import DEFAULT_NAG, LONGEST_PROMPT, check_guidance, check_request
from redif_sdk.inputs.images import Start, open_image
from redif_sdk.marks.xmp import Mark
from redif_sdk.serving.backend import ImageJob, Source

__all__ = ["ImageRequest", "jobs_of", "mark_of_job", "model_card"]

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_CREATED = 0  # of models: a manifest has no date

SeedPair = tuple[Annotated[int, Field(strict=True)], Annotated[int, Field(strict=True)]]


class ImageRequest(BaseModel):
    """The body of ``POST /v1/images/generations``.

    As in OpenAI's API, except: `prompt` is the text of a text-to-image student, a class name of a class-conditional
    one, and empty for an unconditional one; `seed` (one number, or one number or [seed, index] per image),
    `num_inference_steps`, `class_label`, `guidance_scale`, `negative_prompt` and `nag_scale` are ours (``extra_body``
    in OpenAI's client). `quality`, `style`, `moderation` and `user` have no effect; a transparent background and
    unknown fields are refused.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, max_length=LONGEST_PROMPT)
    model: str | None = Field(None, max_length=200)
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    size: str | None = Field(None, max_length=20)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100, strict=True)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3, strict=True)] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(None, max_length=20)
    style: str | None = Field(None, max_length=20)
    moderation: str | None = Field(None, max_length=20)
    user: str | None = Field(None, max_length=1000)
    seed: Annotated[int, Field(strict=True)] | Annotated[list[SeedPair | int], Field(max_length=1000)] | None = None
    num_inference_steps: Annotated[int, Field(strict=True)] | None = None
    class_label: Annotated[int, Field(strict=True)] | str | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = Field(None, max_length=LONGEST_PROMPT)
    nag_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def jobs_of(
    request: ImageRequest, name: str, manifest: Manifest, *, most: int, pixels: int, source: Source | None = None
) -> list[ImageJob]:
    """The images that a request asks for, from the student `name`; of an edit, from the image `source`.

    Raises InvalidRequest for more than `most` images, for more than `pixels` pixels in one, and for what the student
    does not support.
    """
    n = 1 if request.n is None else request.n
    if n > most:
        raise InvalidRequest(f"n is {n}; this server allows at most {most} images per request")
    height, width = _size(request.size)
    start = None
    if source is None and manifest.network.inpainting:
        raise InvalidRequest(f"{name} is an inpainting model: send image and mask to POST /v1/images/edits")
    if source is not None:
        mask = None if source.mask is None else open_image(source.mask, "mask")
        image = open_image(source.image, "image")
        start = Start.of(manifest, image, mask, source.strength, height, width)
        height, width = (height, width) if start is None else start.size
    prompt, label = _asked(request, manifest)
    checked = check_request(manifest, prompt, label, n, request.num_inference_steps, request.seed, None, height, width)
    check_guidance(manifest, checked, request.guidance_scale, request.negative_prompt, None, request.nag_scale)
    scale = manifest.postprocess.scale
    height, width = (extent * scale for extent in checked.size)
    if height * width > pixels:
        raise InvalidRequest(f"size is {width}x{height}; this server allows at most {pixels} pixels per image")
    run = None if start is None else start.steps(checked.table)
    steps = checked.table.num_inference_steps
    labels: list[Any] = checked.conditions["class_labels"].tolist() if manifest.classes is not None else [None] * n
    prompts: list[str] | list[None] = checked.prompts or [None] * n
    guidance = (request.guidance_scale, request.negative_prompt, request.nag_scale)
    return [
        ImageJob(name, label, seed, index, steps, height, width, prompt, source, run, *guidance)
        for label, prompt, (seed, index) in zip(labels, prompts, checked.seeds, strict=True)
    ]


def mark_of_job(job: ImageJob, manifest: Manifest) -> Mark:
    """What an image's file says of how it was made."""
    mark: Mark = {"student": manifest.name, "digest": manifest.digest, "seed": job.seed, "index": job.index}
    mark |= {"num_inference_steps": job.num_inference_steps, "height": job.height, "width": job.width}
    if job.prompt is not None:
        mark["prompt"] = job.prompt
    if job.label is not None:
        mark["class_label"] = job.label
    if job.guidance_scale not in (None, manifest.default_guidance):
        mark["guidance_scale"] = job.guidance_scale
    if job.negative_prompt is not None:
        mark["negative_prompt"] = job.negative_prompt
        if manifest.takes_nag:
            mark["nag_scale"] = DEFAULT_NAG if job.nag_scale is None else job.nag_scale
    if job.source is not None:
        mark["begins_with"] = "image" if job.source.mask is None else "mask"
    return mark


def _asked(request: ImageRequest, manifest: Manifest) -> tuple[str | None, int | None]:
    """(prompt, class label) of a request; a class name counts as a prompt."""
    if manifest.text is not None:
        if request.class_label is not None:
            raise InvalidRequest(
                f"{manifest.name} is a text-to-image model; class_label is not supported, give a prompt"
            )
        return request.prompt, None
    label = request.class_label if request.class_label is not None else request.prompt or None
    if request.class_label is not None and request.prompt and request.prompt != str(request.class_label):
        raise InvalidRequest("prompt and class_label both name the class; give one of them")
    if manifest.classes is None and request.class_label is not None:
        raise InvalidRequest(f"{manifest.name} is unconditional; class_label is not supported")
    return (label, None) if isinstance(label, str) else (None, label)


def _size(size: str | None) -> tuple[int | None, int | None]:
    """(height, width) of "WIDTHxHEIGHT"; None of "auto"."""
    if size in (None, "auto"):
        return None, None
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise InvalidRequest(f"size is {size!r:.50}; give auto, or WIDTHxHEIGHT as in 28x28")
    return int(match[2]), int(match[1])


def model_card(name: str, manifest: Manifest) -> dict[str, Any]:
    """A student as ``/v1/models`` lists it: OpenAI's fields, and what the student supports."""
    height, width, _ = manifest.image_shape
    classes, text = manifest.classes, manifest.text
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "redif-sdk",
        "task": manifest.task,
        "licence": manifest.licence,
        "digest": manifest.digest,
        "num_inference_steps": manifest.supported_steps,
        "size": f"{width}x{height}",
        "free_sizes": bool(manifest.latents.dynamic),
        "num_classes": classes.num_classes if classes else None,
        "class_names": classes.class_names if classes else None,
        "example_prompts": text.examples if text else None,
        "guidance_scale": manifest.default_guidance if manifest.guidance_at_run_time else None,
        "guidance_range": manifest.network.guidance_range,
        "inpainting": manifest.network.inpainting,
    }
