"""How a checked request becomes images: by the fused graph, or step by step for callbacks, masks, tiles and streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import MASK_LATENTS, MASKED_LATENTS, Manifest
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.graphs import LoadedGraphs
from redif_sdk.images import pixel_unshuffle
from redif_sdk.inputs import NAG_SCALE, Conditions, check_latents
from redif_sdk.inputs.images import Given
from redif_sdk.runtimes.finite import LEVELS, require_finite
from redif_sdk.sampling.entry import from_row, levels
from redif_sdk.sampling.loop import iterate_steps
from redif_sdk.sampling.table import StepTable

__all__ = ["Drawing", "OnState", "shown_to", "started"]

_log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
#: Called with the step, its time and the state (B, C, H, W); returns a state to go on with, or None.
OnState = Callable[[int, float, Floats], Floats | None]


@dataclass(frozen=True)
class Drawing:
    """B images of one table, on one student's graphs.

    Attributes:
        graphs: The student's.
        noise: (N, B, C, H, W).
        conditions: Of the batch.
        table: The sampler.
    """

    graphs: LoadedGraphs
    noise: Floats
    conditions: Conditions
    table: StepTable

    def images(self, on_state: OnState | None = None, decode_tile: int | None = None) -> NDArray[np.uint8]:
        """Images (B, H, W, C), from the fused graph; step by step with an argument, or where there is no fused graph.

        Raises:
            NonFiniteOutput: Images hold NaN or infinite values.
        """
        generator = self.graphs.generator
        if generator is None or on_state is not None or decode_tile is not None or NAG_SCALE in self.conditions:
            return self._stepped(on_state, decode_tile)
        inputs: dict[str, NDArray[Any]] = {
            "noise": self.noise,
            "table": self.table.rows,
            "init_scale": self.table.scale,
        }
        outputs = generator.run(inputs | self.conditions)
        images = outputs["images"]
        if LEVELS in outputs:
            require_finite(outputs[LEVELS])
        elif (images == images[:, :1, :1, :1]).all(axis=(1, 2, 3)).any():  # uint8 alone: NaN would show as a constant
            try:
                self._stepped()
            except RuntimeUnavailable as error:
                _log.warning("constant images were not checked for NaN: %s", error)
        return images

    def latents(self, on_state: OnState | None = None) -> Floats:
        """The latents (B, C, H, W) that the images would be decoded from, step by step.

        Raises:
            NonFiniteOutput: They hold NaN or infinite values.
        """
        x = self._last(on_state)
        require_finite(x)
        return x

    def previews(self, on_state: OnState | None = None) -> Iterator[NDArray[np.uint8]]:
        """The clean-image estimate after each step but the last, then the images: each (B, H, W, C)."""
        for k, x, x0 in self._steps():
            self._show(on_state, k, x)
            yield self.graphs.images(x if k == self.table.num_inference_steps - 1 else x0)

    def _stepped(self, on_state: OnState | None = None, decode_tile: int | None = None) -> NDArray[np.uint8]:
        """Images from single steps, each shown to `on_state`."""
        return self.graphs.images(self._last(on_state), decode_tile)

    def _last(self, on_state: OnState | None) -> Floats:
        """The state after the last step; each is shown to `on_state`."""
        x: Floats = self.noise[0]
        for k, x, _ in self._steps():
            self._show(on_state, k, x)
        return x

    def _show(self, on_state: OnState | None, k: int, x: Floats) -> None:
        """Show the state after step ``k``, and take over the one that is returned."""
        other = on_state(k, float(self.table.timesteps[k]), x) if on_state else None
        if other is not None:
            x[...] = other

    def _steps(self) -> Iterator[tuple[int, Floats, Floats]]:
        """(k, x', x0) after each step, as `iterate_steps` yields them: the caller may write into x'."""
        denoiser, table = self.graphs["nag" if NAG_SCALE in self.conditions else "denoiser"], self.table

        def predict(k: int, x: Floats) -> Floats:
            t = np.full((len(x),), table.timesteps[k], dtype=np.float32)
            f = denoiser.run({"sample": x, "timestep": t, **self.conditions})["f"]
            clean: Floats = table.clean(k, x, f)
            return clean

        return iterate_steps(table, table.start(self.noise[0]), self.noise, predict)


@dataclass(frozen=True)
class Known:
    """An image to start from.

    Attributes:
        latents: Its own, (B, C, H, W).
        noise: (B, C, H, W).
        kept: bool, broadcast to the latents: where they stay as they are; None: nowhere.
    """

    latents: Floats
    noise: Floats
    kept: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, graphs: LoadedGraphs, given: Given, noise: Floats) -> Known:
        """Of the images that a caller gave."""
        latents = graphs.latents(given.images)
        if given.masks is None:
            return cls(latents, noise)
        if (masks := given.masks[:, None]).shape[2:] != latents.shape[2:]:
            factor = masks.shape[2] // latents.shape[2]
            if latents.shape[1] == given.images.shape[3] * factor**2:  # latents are blocks of pixels
                masks = pixel_unshuffle(masks.repeat(given.images.shape[3], 1), factor)
            else:
                masks = masks[:, :, ::factor, ::factor]  # as torch's nearest neighbour
        return cls(latents, noise, ~masks)

    def at(self, level: NDArray[np.float64]) -> Floats:
        """The latents at a noise level (alpha, sigma)."""
        alpha, sigma = level.astype(np.float32)
        found: Floats = alpha * self.latents + sigma * self.noise
        return found

    def blending(self, ends: NDArray[np.float64], then: OnState | None) -> OnState | None:
        """What puts the known latents back after each step, at the level that it ends at, and calls ``then``."""
        kept = self.kept
        if kept is None:
            return then

        def blend(step: int, timestep: float, x: Floats) -> Floats | None:
            np.copyto(x, self.at(ends[step]), where=kept)
            return None if then is None else then(step, timestep, x)

        return blend


def started(
    manifest: Manifest, drawing: Drawing, given: Given, on_state: OnState | None
) -> tuple[Drawing, OnState | None]:
    """``drawing`` and its ``on_state`` from the images on that a caller gave: the table's last rows, at the first one's
    level. An inpainting network sees image and mask, so that nothing is put back, and all rows start from noise, as in
    diffusers."""
    if manifest.network.inpainting:
        drawing = replace(drawing, conditions=drawing.conditions | _painted(drawing, given))
        if given.steps == drawing.table.num_inference_steps:
            return drawing, on_state
        given = replace(given, masks=None)
    known = Known.of(drawing.graphs, given, drawing.noise[0])
    row = drawing.table.num_inference_steps - given.steps
    noise, begins = drawing.noise.copy(), levels(drawing.table)[row:]
    noise[0] = known.at(begins[0])
    begun = replace(drawing, noise=noise, table=from_row(drawing.table, row))
    return begun, known.blending(np.concatenate([begins[1:], [[1.0, 0.0]]]), on_state)


def _painted(drawing: Drawing, given: Given) -> Conditions:
    """What an inpainting network takes of an image and its mask. The mask is scaled as torch's nearest neighbour."""
    masks = given.masks
    assert masks is not None
    factor = masks.shape[1] // drawing.noise.shape[3]
    return {
        MASK_LATENTS: np.ascontiguousarray(masks[:, None, ::factor, ::factor], np.float32),
        MASKED_LATENTS: drawing.graphs.latents(given.images, masks),
    }


def shown_to(callback: Callable[..., Any] | None, pipeline: Any, manifest: Manifest) -> OnState | None:
    """What shows each state to a caller's ``callback(pipeline, step, timestep, {"latents": x})``."""
    if callback is None:
        return None

    def show(step: int, timestep: float, x: Floats) -> Floats | None:
        returned = callback(pipeline, step, timestep, {"latents": x})
        if returned is None or "latents" not in returned:
            return None
        return check_latents(manifest, returned["latents"], len(x), x.shape[2:])

    return show
