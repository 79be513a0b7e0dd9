"""Pictures made in this process: a `FastPipeline` a student, and a batcher before each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.backend import Picture
from redif_sdk.serving.microbatch import MicroBatcher
from redif_sdk.serving.settings import ServeSettings

__all__ = ["LocalBackend", "previews", "render"]

Pixels = NDArray[np.uint8]


def render(pipeline: FastPipeline, pictures: Sequence[Picture]) -> list[Pixels]:
    """The pictures, which are of one size and number of steps, each uint8 (H, W, C), by one call of the engine."""
    first = pictures[0]
    prompts = [picture.prompt for picture in pictures if picture.prompt is not None]
    labels = [picture.label for picture in pictures if picture.label is not None]
    out = pipeline(
        prompts or None,
        class_labels=labels or None,
        num_images_per_prompt=1 if prompts or labels else len(pictures),
        num_inference_steps=first.num_inference_steps,
        seed=[(picture.seed, picture.index) for picture in pictures],
        height=first.height,
        width=first.width,
        output_type="uint8",
    )
    return list(out.images)


def previews(pipeline: FastPipeline, picture: Picture) -> Callable[[], Pixels]:
    """A function that computes one more step at each call: the clean-image estimate after it, uint8 (H, W, C)."""
    steps = pipeline.stream(
        picture.prompt,
        class_labels=picture.label,
        num_inference_steps=picture.num_inference_steps,
        seed=[(picture.seed, picture.index)],
        height=picture.height,
        width=picture.width,
    )

    def step() -> Pixels:
        pixels = np.asarray(next(steps), dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    return step


class LocalBackend:
    """The `Backend` of one process. `observe(model, batch, seconds)` is told of every call of an engine."""

    def __init__(
        self,
        pipelines: Mapping[str, FastPipeline],
        settings: ServeSettings,
        observe: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self._pipelines = dict(pipelines)
        self._settings = settings
        self.observe = observe
        self._batchers: dict[str, MicroBatcher[Picture, Pixels]] = {}

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        return {name: pipeline.manifest for name, pipeline in self._pipelines.items()}

    def ready(self) -> bool:
        return bool(self._batchers)

    async def start(self) -> None:
        batchers = {name: self._batcher(name, pipeline) for name, pipeline in self._pipelines.items()}
        for name, pipeline in self._pipelines.items():
            manifest = pipeline.manifest
            height, width, _ = manifest.image_shape
            label = None if manifest.classes is None else 0
            prompt = None if manifest.text is None else manifest.text.examples[0]
            first = Picture(name, label, 0, 0, manifest.supported_steps[0], height, width, prompt)
            await batchers[name].submit(first)
        self._batchers = batchers

    def _batcher(self, name: str, pipeline: FastPipeline) -> MicroBatcher[Picture, Pixels]:
        def observe(size: int, seconds: float) -> None:
            if self.observe is not None:
                self.observe(name, size, seconds)

        return MicroBatcher(
            lambda pictures: render(pipeline, pictures),
            key=lambda picture: (picture.num_inference_steps, picture.height, picture.width),
            max_batch=self._settings.max_batch,
            max_wait_s=self._settings.max_wait_ms / 1000,
            concurrency=self._settings.concurrency,
            observe=observe,
        )

    async def stop(self) -> None:
        batchers, self._batchers = self._batchers, {}
        for batcher in batchers.values():
            await batcher.stop()

    def _of(self, picture: Picture) -> MicroBatcher[Picture, Pixels]:
        if picture.model not in self._batchers:
            raise RuntimeUnavailable("the server is starting or stopping; try again")
        return self._batchers[picture.model]

    async def generate(self, picture: Picture) -> Pixels:
        return await self._of(picture).submit(picture)

    async def stream(self, picture: Picture) -> AsyncIterator[Pixels]:
        """Previews by single steps; the last picture by the fused graph like every other, so that it is the same."""
        batcher, pipeline = self._of(picture), self._pipelines[picture.model]
        step = await batcher.run(lambda: previews(pipeline, picture))  # which may load the engines of single steps
        for _ in range(picture.num_inference_steps - 1):
            yield await batcher.run(step)
        yield await batcher.submit(picture)
