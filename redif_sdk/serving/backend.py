"""The backend protocol: what generates images for the HTTP application, in this process or on Ray Serve.

The unit is one image, not a request: an image depends on its own fields alone, so images of several requests share a
batch, and one that was lost with its worker is generated again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import Manifest

__all__ = ["Backend", "ImageJob", "Source"]


@dataclass(frozen=True)
class Source:
    """What an image starts from.

    Attributes:
        image: an image file's bytes.
        mask: an image file's bytes; white is painted anew. None: everything is.
        strength: share of the steps that are run; None: the usual one.
    """

    image: bytes
    mask: bytes | None = None
    strength: float | None = None


@dataclass(frozen=True)
class ImageJob:
    """One image to generate. Equal jobs give the same image, bit for bit, in any batch.

    Attributes:
        model: name of the student.
        label: class, or None for a student without classes.
        seed: with `index`, what the noise is drawn from.
        index: see `seed`.
        num_inference_steps: steps.
        height: in pixels.
        width: in pixels.
        prompt: text of a text-to-image student, else None.
        source: the image that it starts from; None: noise.
        last_steps: with a source, how many of the steps are run: the last ones.
        guidance_scale: None: the student's own.
        negative_prompt: what it is guided away from.
        nag_scale: how far, for students of one call a step; None: the usual.
    """

    model: str
    label: int | None
    seed: int
    index: int
    num_inference_steps: int
    height: int
    width: int
    prompt: str | None = None
    source: Source | None = None
    last_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    nag_scale: float | None = None

    @property
    def steps_run(self) -> int:
        """How many steps are run."""
        return self.num_inference_steps if self.last_steps is None else self.last_steps


class Backend(Protocol):
    """Generates images. Every method is called from one event loop."""

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """The students by name, the default one first."""
        ...

    def ready(self) -> bool:
        """Whether an image that is requested now would be generated."""
        ...

    async def start(self) -> None:
        """Load everything and generate one image with each student, so that the first request is as fast as others."""
        ...

    async def stop(self) -> None:
        """Finish what was accepted, and release everything."""
        ...

    async def generate(self, job: ImageJob) -> NDArray[np.uint8]:
        """The image, uint8 (H, W, C). Cancelling takes it out of the queue unless it was begun.

        Raises NonFiniteOutput, and UnsafeContent if the safety filter flags it.
        """
        ...

    def stream(self, job: ImageJob) -> AsyncIterator[NDArray[np.uint8]]:
        """Yield the image as it forms, uint8 (H, W, C): the clean-image estimate of every step that is run but
        the last, and then the image."""
        ...
