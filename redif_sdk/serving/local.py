"""Images generated in this process: a `FastPipeline` and a batcher for each student."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import NonFiniteOutput, RuntimeUnavailable, UnsafeContent
from redif_sdk.inputs import refuse_arrays
from redif_sdk.inputs.images import all_anew, open_image
from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.backend import ImageJob, Source
from redif_sdk.serving.encode import encode
from redif_sdk.serving.microbatch import MicroBatcher
from redif_sdk.serving.settings import ServeSettings

__all__ = ["LocalBackend", "Rendered", "batch_key", "first_job", "previews", "render"]

Pixels = NDArray[np.uint8]
#: An image, or why there is none.
Rendered = Pixels | NonFiniteOutput | UnsafeContent


def batch_key(job: ImageJob) -> tuple[int, int, int, str, str]:
    """Jobs of one student with equal keys can be computed in one batch. Keys can be sorted."""
    source = job.source
    begins = "" if source is None else f"strength {source.strength}, mask {source.mask is not None}"
    guided = f"guidance {job.guidance_scale}, nag {job.nag_scale}, negative {job.negative_prompt is not None}"
    return job.num_inference_steps, job.height, job.width, begins, guided


def first_job(name: str, manifest: Manifest) -> ImageJob:
    """A job that warms up the student `name`."""
    height, width, _ = manifest.image_shape
    label = None if manifest.classes is None else 0
    prompt = None if manifest.text is None else manifest.text.examples[0]
    files = {argument: encode(np.atleast_3d(image)) for argument, image in all_anew(manifest).items()}
    source = Source(files["image"], files["mask_image"]) if files else None
    return ImageJob(name, label, 0, 0, manifest.supported_steps[0], height, width, prompt, source)


def render(pipeline: FastPipeline, jobs: Sequence[ImageJob]) -> list[Rendered]:
    """Generate the images of jobs with equal `batch_key` in one engine call, each uint8 (H, W, C).

    An image that holds NaN or infinite values, or that the safety filter flags, has its error in place of the image. If
    the pipeline raises it, the others are computed again without that image.
    """
    try:
        return _images(pipeline, jobs) if jobs else []
    except (NonFiniteOutput, UnsafeContent) as error:
        bad = set(error.images)
        sound = iter(render(pipeline, [job for place, job in enumerate(jobs) if place not in bad]))
        return [type(error)([0], 1) if place in bad else next(sound) for place in range(len(jobs))]


def _images(pipeline: FastPipeline, jobs: Sequence[ImageJob]) -> list[Rendered]:
    first = jobs[0]
    prompts = [job.prompt for job in jobs if job.prompt is not None]
    labels = [job.label for job in jobs if job.label is not None]
    out = pipeline(
        prompts or None,
        class_labels=labels or None,
        num_images_per_prompt=1 if prompts or labels else len(jobs),
        num_inference_steps=first.num_inference_steps,
        seed=[(job.seed, job.index) for job in jobs],
        height=first.height,
        width=first.width,
        guidance_scale=first.guidance_scale,
        nag_scale=first.nag_scale,
        negative_prompt=[job.negative_prompt for job in jobs if job.negative_prompt is not None] or None,
        output_type="uint8",
        **_starts([job.source for job in jobs if job.source is not None]),
    )
    flags = out.nsfw_content_detected or [False] * len(jobs)
    return [UnsafeContent([0], 1) if flag else image for image, flag in zip(out.images, flags, strict=True)]


def _starts(sources: Sequence[Source]) -> dict[str, Any]:
    """The arguments of a call that starts from images; none, for one that starts from noise."""
    if not sources:
        return {}
    each = list(dict.fromkeys(sources))  # a request for several images has one
    decoded = {source: open_image(source.image, "image") for source in each}
    painted = {source: open_image(source.mask, "mask") for source in each if source.mask is not None}
    images, masks = [decoded[source] for source in sources], [painted[source] for source in sources if source.mask]
    return {"image": images, "mask_image": masks or None, "strength": sources[0].strength}


def previews(pipeline: FastPipeline, job: ImageJob) -> Callable[[], Pixels]:
    """A function that computes one step per call and returns the clean-image estimate after it, uint8 (H, W, C)."""
    steps = pipeline.stream(
        job.prompt,
        class_labels=job.label,
        num_inference_steps=job.num_inference_steps,
        seed=[(job.seed, job.index)],
        height=job.height,
        width=job.width,
        guidance_scale=job.guidance_scale,
        negative_prompt=job.negative_prompt,
        nag_scale=job.nag_scale,
        **_starts([job.source] if job.source is not None else []),
    )

    def step() -> Pixels:
        pixels = np.asarray(next(steps), dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    return step


class LocalBackend:
    """The `Backend` of one process. Calls `observe(model, batch, seconds)` after every engine call."""

    def __init__(
        self,
        pipelines: Mapping[str, FastPipeline],
        settings: ServeSettings,
        observe: Callable[[str, int, float], None] = lambda model, batch, seconds: None,
    ) -> None:
        self._pipelines = dict(pipelines)
        for pipeline in self._pipelines.values():
            refuse_arrays(pipeline.manifest, "redif serve")
        self._settings = settings
        self._observe = observe
        self._batchers: dict[str, MicroBatcher[ImageJob, Pixels]] = {}

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        return {name: pipeline.manifest for name, pipeline in self._pipelines.items()}

    def ready(self) -> bool:
        return bool(self._batchers)

    async def start(self) -> None:
        batchers = {name: self._batcher(name, pipeline) for name, pipeline in self._pipelines.items()}
        for name, pipeline in self._pipelines.items():
            await batchers[name].submit(first_job(name, pipeline.manifest))
        self._batchers = batchers

    def _batcher(self, name: str, pipeline: FastPipeline) -> MicroBatcher[ImageJob, Pixels]:
        return MicroBatcher(
            lambda jobs: render(pipeline, jobs),
            key=batch_key,
            max_batch=self._settings.max_batch,
            max_wait_s=self._settings.max_wait_ms / 1000,
            concurrency=self._settings.concurrency,
            observe=lambda size, seconds: self._observe(name, size, seconds),
        )

    async def stop(self) -> None:
        batchers, self._batchers = self._batchers, {}
        for batcher in batchers.values():
            await batcher.stop()

    def _of(self, job: ImageJob) -> MicroBatcher[ImageJob, Pixels]:
        if job.model not in self._batchers:
            raise RuntimeUnavailable("the server is starting or stopping; try again")
        return self._batchers[job.model]

    async def generate(self, job: ImageJob) -> Pixels:
        return await self._of(job).submit(job)

    async def stream(self, job: ImageJob) -> AsyncIterator[Pixels]:
        """Previews by single steps; the last image by the fused graph like every other, so that it is the same."""
        batcher, pipeline = self._of(job), self._pipelines[job.model]
        step = await batcher.run(lambda: previews(pipeline, job))  # may load the graphs of single steps
        for _ in range(job.steps_run - 1):
            yield await batcher.run(step)
        yield await batcher.submit(job)
