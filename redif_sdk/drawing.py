"""How a checked request becomes images: by the fused graph, or step by step for callbacks, masks, tiles and streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.graphs import LoadedGraphs
from redif_sdk.inputs import Conditions
from redif_sdk.runtimes.finite import LEVELS, require_finite
from redif_sdk.sampling.loop import iterate_steps
from redif_sdk.sampling.table import StepTable

__all__ = ["Drawing", "OnState"]

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
        if generator is None or on_state is not None or decode_tile is not None:
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

    def previews(self) -> Iterator[NDArray[np.uint8]]:
        """The clean-image estimate after each step but the last, then the images: each (B, H, W, C)."""
        for k, x, x0 in self._steps():
            yield self.graphs.images(x if k == self.table.num_inference_steps - 1 else x0)

    def _stepped(self, on_state: OnState | None = None, decode_tile: int | None = None) -> NDArray[np.uint8]:
        """Images from single steps, each shown to `on_state`."""
        x = self.noise[0]
        for k, x, _ in self._steps():
            other = on_state(k, float(self.table.timesteps[k]), x) if on_state else None
            if other is not None:
                x[...] = other
        return self.graphs.images(x, decode_tile)

    def _steps(self) -> Iterator[tuple[int, Floats, Floats]]:
        """(k, x', x0) after each step, as `iterate_steps` yields them: the caller may write into x'."""
        denoiser, table = self.graphs["denoiser"], self.table

        def predict(k: int, x: Floats) -> Floats:
            t = np.full((len(x),), table.timesteps[k], dtype=np.float32)
            f = denoiser.run({"sample": x, "timestep": t, **self.conditions})["f"]
            clean: Floats = table.clean(k, x, f)
            return clean

        return iterate_steps(table, table.start(self.noise[0]), self.noise, predict)
