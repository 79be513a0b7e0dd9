"""The demo without its page: generates images, previews and comparisons, and times them.

A `Studio` holds students by name and yields plain values. It does not depend on Gradio.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL.Image import Image

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs import refuse_arrays
from redif_sdk.inputs.images import DEFAULT_STRENGTH, all_anew
from redif_sdk.pipeline import FastPipeline, PipelineOutput
from redif_sdk.sampling.entry import steps_of

__all__ = [
    "BLOCKED",
    "NOTHING",
    "SAME_STEPS",
    "Captioned",
    "Order",
    "Shown",
    "Studio",
    "parse_seed",
    "random_seed",
    "takes_negatives",
]

BLOCKED = "blocked by the safety filter"
BATCH = 8  # images per call; each batch is shown when it is finished
NOTHING = "nothing"
SAME_STEPS = "the teacher at as few steps (DDIM)"

Captioned = tuple[Image, str]


@dataclass(frozen=True)
class Order:
    """A checked request for `number` images of (seed, index), (seed, index + 1), ..."""

    student: str
    prompt: str | None
    num_inference_steps: int
    seed: int
    index: int
    number: int
    height: int | None = None
    width: int | None = None
    previews: bool = False
    compare: str = NOTHING
    image: Image | None = None  # to start from
    mask: Image | None = None
    strength: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    @property
    def seeds(self) -> list[tuple[int, int]]:
        return [(self.seed, self.index + place) for place in range(self.number)]


@dataclass(frozen=True)
class Shown:
    """The state of a request: images, previews and comparison images with captions, and the timings."""

    images: list[Captioned] = field(default_factory=list)
    formed: list[Captioned] = field(default_factory=list)
    compared: list[Captioned] = field(default_factory=list)
    seconds: float = 0.0  # of the finished `images`, without previews
    teacher_seconds: float = 0.0
    done: int = 0
    blocked: list[bool] | None = None  # of the finished `images`; None: there is no safety filter
    runtime: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def random_seed() -> str:
    """A seed, short enough to be read out."""
    return str(secrets.randbits(32))


def parse_seed(text: str) -> tuple[int, int]:
    """(seed, first index) of "7" or "7:2". Raises InvalidRequest."""
    parts = str(text).strip().split(":")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InvalidRequest(f"the seed is {text!r:.60}; give an integer, as in 7, or 7:2 to start at its third image")
    numbers = [int(part) for part in parts]
    if max(numbers) >= 1 << 64:
        raise InvalidRequest(f"the seed is {text!r:.60}; give a number below 2^64")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0


class Studio:
    """Students by name, and the teacher that they may be compared with. Safe to use from several threads."""

    def __init__(
        self, students: Mapping[str, FastPipeline], teacher: FastPipeline | None = None, *, max_images: int = 16
    ) -> None:
        """Raises InvalidRequest without a student, or for a teacher with other images, noise or conditions."""
        if not students:
            raise InvalidRequest("no student was given; give at least one")
        self.students = dict(students)
        self.teacher = teacher
        self.max_images = max_images
        for name, pipeline in self.students.items():
            refuse_arrays(pipeline.manifest, "the demo")
            if teacher is not None and _kind(pipeline.manifest) != _kind(teacher.manifest):
                raise InvalidRequest(
                    f"{teacher.manifest.name} cannot be the teacher of {name}: image sizes, noise, classes or kinds of "
                    f"prompt differ"
                )

    def manifest(self, student: str) -> Manifest:
        if student not in self.students:
            raise InvalidRequest(f"there is no student {student!r:.60}; there are {', '.join(self.students)}")
        return self.students[student].manifest

    def warm_up(self) -> None:
        """Generate one image with each student, so that the first request is as fast as others."""
        for pipeline in [*self.students.values(), *([self.teacher] if self.teacher is not None else [])]:
            manifest = pipeline.manifest
            first: dict[str, Any] = {} if manifest.classes is None else {"class_labels": 0}
            if manifest.text is not None:
                first = {"prompt": manifest.text.examples[0]}
            pipeline(num_inference_steps=min(manifest.supported_steps), seed=0, **first, **all_anew(manifest))

    def comparisons(self) -> list[str]:
        """The choices of what to compare with."""
        if self.teacher is None:
            return [NOTHING]
        most = max(steps for pipeline in self.students.values() for steps in pipeline.manifest.supported_steps)
        own = [self._full(steps) for steps in self.teacher.manifest.supported_steps if steps > most]
        return [NOTHING, *own, SAME_STEPS]

    @staticmethod
    def _full(steps: int) -> str:
        return f"the teacher at {steps} steps"

    def order(
        self,
        student: str | None,
        prompt: str | None,
        num_inference_steps: int | None,
        seed: str | int | None,
        number: float,
        *,
        height: float | None = None,
        width: float | None = None,
        previews: bool = False,
        compare: str | None = None,
        image: Image | None = None,
        mask: Image | None = None,
        strength: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Order:
        """The checked request. Raises InvalidRequest for what the student does not support."""
        name = student or next(iter(self.students))
        manifest = self.manifest(name)
        if int(number) != number or not 1 <= number <= self.max_images:
            raise InvalidRequest(f"{number:g} images were requested; request 1 to {self.max_images}")
        table = manifest.step_table(num_inference_steps)
        first, index = parse_seed(random_seed() if seed in (None, "") else str(seed))
        if compare not in (None, "", *self.comparisons()):
            raise InvalidRequest(f"compare is {compare!r:.60}; use one of {', '.join(self.comparisons())}")
        order = Order(
            name,
            prompt if manifest.condition is not None else None,
            table.num_inference_steps,
            first,
            index,
            int(number),
            int(height) if height else None,
            int(width) if width else None,
            previews and table.num_inference_steps > 1,
            compare or NOTHING,
            image,
            mask,
            max(strength, 1 / table.num_inference_steps) if strength and image is not None and mask is None else None,
            guidance_scale,
            negative_prompt or None,
        )
        self._teachers_steps(order)
        return order

    def _teachers_steps(self, order: Order) -> int | None:
        """The teacher's steps for `order`; None without a comparison."""
        if order.compare == NOTHING or self.teacher is None:
            return None
        manifest = self.teacher.manifest
        if order.compare == SAME_STEPS:
            return manifest.step_table(order.num_inference_steps).num_inference_steps
        return next(steps for steps in manifest.supported_steps if self._full(steps) == order.compare)

    def make(self, order: Order) -> Iterator[Shown]:
        """Yield the state after each preview and each batch. Raises InvalidRequest and NonFiniteOutput."""
        pipeline = self.students[order.student]
        shown = Shown()
        batches = [order.seeds[start : start + BATCH] for start in range(0, order.number, BATCH)]
        if order.previews:
            batches = [[seed] for seed in order.seeds]
        for place, seeds in enumerate(batches):
            if order.previews:
                for step, preview in enumerate(_previews(pipeline, order, seeds[0])):
                    blocked = f", {BLOCKED}" if pipeline.safety_filter is not None and _is_black(preview) else ""
                    caption = f"step {step + 1} of {_rows(pipeline, order)}{blocked}"
                    formed = [*shown.formed, (preview, f"{place + 1}, step {step + 1}{blocked}")]
                    shown = replace(shown, formed=formed)
                    yield replace(shown, images=[*shown.images, (preview, caption)], note="forming")
            out = _render(pipeline, order, seeds, order.num_inference_steps)
            shown = replace(
                shown,
                images=[*shown.images, *_captioned(out, seeds)],
                seconds=shown.seconds + out.timings["total"],
                done=shown.done + len(seeds),
                runtime=out.runtime_info,
                blocked=None
                if out.nsfw_content_detected is None
                else [*(shown.blocked or []), *out.nsfw_content_detected],
            )
            yield shown
        if (steps := self._teachers_steps(order)) is not None and self.teacher is not None:
            for seeds in batches:
                yield replace(shown, note=f"now {order.compare}")
                out = _render(self.teacher, order, seeds, steps)
                compared = [*shown.compared, *_captioned(out, seeds)]
                shown = replace(shown, compared=compared, teacher_seconds=shown.teacher_seconds + out.timings["total"])
            yield shown


def takes_negatives(manifest: Manifest) -> bool:
    """Whether a student takes negative prompts."""
    return manifest.text is not None and manifest.guidance_at_run_time == "classifier-free"


def _kind(manifest: Manifest) -> tuple[Any, ...]:
    latents, classes = manifest.latents, manifest.classes
    asked = "prompts" if manifest.text is not None else None if classes is None else classes.num_classes
    shape = latents.channels, latents.height, latents.width
    return manifest.image_shape, shape, asked, manifest.network.inpainting


def _name(seed: tuple[int, int]) -> str:
    return f"seed {seed[0]}" + (f":{seed[1]}" if seed[1] else "")


def _captioned(out: PipelineOutput, seeds: list[tuple[int, int]]) -> list[Captioned]:
    """Images with their seeds; of those that the safety filter made black, it is said."""
    flags = out.nsfw_content_detected or [False] * len(seeds)
    return [
        (image, f"{_name(seed)}, {BLOCKED}" if flag else _name(seed))
        for image, seed, flag in zip(out.images, seeds, flags, strict=True)
    ]


def _is_black(preview: Image) -> bool:
    """Whether every value is 0, as of a preview that the safety filter flagged: `FastPipeline.stream` does not say."""
    return preview.getbbox() is None


def _arguments(pipeline: FastPipeline, order: Order) -> dict[str, Any]:
    """The condition and size of an order: a prompt, or a class by name or number."""
    arguments: dict[str, Any] = {"height": order.height, "width": order.width}
    if pipeline.manifest.text is not None:
        arguments["prompt"] = order.prompt
    elif order.prompt is not None:
        text = str(order.prompt).strip()
        arguments["class_labels"] = int(text) if text.isdecimal() else text
    if order.guidance_scale is not None:
        arguments["guidance_scale"] = order.guidance_scale
    if order.negative_prompt is not None:
        arguments["negative_prompt"] = order.negative_prompt
    if order.image is not None:
        arguments |= {"image": order.image, "mask_image": order.mask, "strength": order.strength}
    return arguments


def _previews(pipeline: FastPipeline, order: Order, seed: tuple[int, int]) -> Iterator[Image]:
    """The clean-image estimate after every step but the last: the image itself comes from the fused graph."""
    stream = pipeline.stream(num_inference_steps=order.num_inference_steps, seed=[seed], **_arguments(pipeline, order))
    for _ in range(_rows(pipeline, order) - 1):
        yield next(stream)


def _rows(pipeline: FastPipeline, order: Order) -> int:
    """The steps that an order runs."""
    table = pipeline.manifest.step_table(order.num_inference_steps)
    if order.image is None:
        return table.num_inference_steps
    return steps_of(table, order.strength, DEFAULT_STRENGTH if order.mask is None else 1.0)


def _render(pipeline: FastPipeline, order: Order, seeds: list[tuple[int, int]], steps: int) -> PipelineOutput:
    return pipeline(
        num_images_per_prompt=len(seeds), num_inference_steps=steps, seed=seeds, **_arguments(pipeline, order)
    )
