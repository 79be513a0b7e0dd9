"""What makes pictures for the HTTP application: one protocol, followed by the batcher of one process and by Ray Serve.

The unit is one picture, and never a request: a picture depends on nothing but its own fields, so pictures of several
requests share a batch, and one that was lost with its worker is simply made again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import Manifest

__all__ = ["Backend", "Picture"]


@dataclass(frozen=True)
class Picture:
    """One picture, as it was asked for. Two equal ones are the same picture, bit for bit, in whatever batch.

    `model` names the student, `label` its class (None: it has none), (`seed`, `index`) the noise, `height` and `width`
    are in pixels, and `prompt` is what a text-to-image student is asked (None: it is no such).
    """

    model: str
    label: int | None
    seed: int
    index: int
    num_inference_steps: int
    height: int
    width: int
    prompt: str | None = None


class Backend(Protocol):
    """Makes pictures. Every method is called from one event loop."""

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """The students by name, the default one first."""
        ...

    def ready(self) -> bool:
        """Whether a picture that is asked for now would be made."""
        ...

    async def start(self) -> None:
        """Load what is needed, and make one picture of each student, so that the first request does not wait for it."""
        ...

    async def stop(self) -> None:
        """Finish what was accepted, and let go of everything."""
        ...

    async def generate(self, picture: Picture) -> NDArray[np.uint8]:
        """The picture, uint8 (H, W, C). Cancelling it takes it out of the queue if it was not begun."""
        ...

    def stream(self, picture: Picture) -> AsyncIterator[NDArray[np.uint8]]:
        """The picture as it forms: after every step the clean-image estimate, uint8 (H, W, C); last, the picture."""
        ...
