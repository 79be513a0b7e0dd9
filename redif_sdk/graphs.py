"""The graphs of one student in one engine and one precision, each loaded when it is first needed.

What they are run for, in which order, is `pipeline.py`'s business; how an engine is chosen, that of `runtimes/`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from redif_sdk import runtimes
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Component, Graph
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.images import to_uint8
from redif_sdk.inputs import Conditions
from redif_sdk.runtimes import Runtime, RuntimeOptions

if TYPE_CHECKING:
    from redif_sdk.tokenizer import PromptTokenizer

__all__ = ["Components"]

#: What cannot be done without a graph.
_NEEDED_BY = {"text_encoder": "prompts need", "decoder": "latents need"}


class Components:
    """Safe to use from several threads. `first` is loaded already, and says engine, precision and device of all."""

    def __init__(self, student: StudentFolder, first: Runtime, options: RuntimeOptions) -> None:
        """Raises RuntimeUnavailable where a graph is missing that a plain call needs, IntegrityError or ManifestError
        for tokenizers that are not what they should be."""
        self._student = student
        self._info = first.info
        self._options = replace(options, device=first.info.device)
        self._lock = Lock()
        self._loaded: dict[str, Runtime] = {first.info.component: first}
        for component in self._needed(stepped=self.generator is None):
            self._graph(component)
        self._tokenizer: PromptTokenizer | None = None
        if student.manifest.text is not None:
            from redif_sdk.tokenizer import PromptTokenizer  # a package that other students need not load

            self._tokenizer = PromptTokenizer(student)

    @property
    def generator(self) -> Runtime | None:
        """The fused graph, where this student has one and this engine is given it."""
        return self._loaded.get("generator")

    def __getitem__(self, component: Component) -> Runtime:
        """A loaded graph. Raises RuntimeUnavailable where there is none in this precision: no other stands in."""
        with self._lock:
            if component not in self._loaded:
                graph = self._graph(component)
                self._loaded[component] = runtimes.load(self._info.runtime, self._student, graph, self._options)
            return self._loaded[component]

    def replaced(self, component: Component, runtime: Runtime) -> Components:
        """The same with another runtime for one of them."""
        other = copy.copy(self)
        other._loaded = self._loaded | {component: runtime}
        return other

    def prepare_steps(self) -> None:
        """Load whatever single steps need."""
        for component in self._needed(stepped=True):
            self[component]

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """What denoiser and generator take for prompts, a row each. Equal prompts are encoded once."""
        assert self._tokenizer is not None
        places: dict[str, int] = {}
        rows = [places.setdefault(prompt, len(places)) for prompt in prompts]
        arrays = self["text_encoder"].run(self._tokenizer(list(places)))
        return {spec.name: arrays[spec.name][rows] for spec in self._student.manifest.condition_tensors}

    def pictures(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents (B, C, H, W) to pictures (B, H', W', C'), by the decoder where there is one."""
        postprocess = self._student.manifest.postprocess
        if postprocess.decoder is not None:
            latents = self["decoder"].run({"latents": latents})["sample"]
        return to_uint8(latents, postprocess)

    def _needed(self, *, stepped: bool) -> Iterator[Component]:
        """The graphs that a call by single steps needs, or by the fused one."""
        manifest = self._student.manifest
        if manifest.text is not None:
            yield "text_encoder"
        if stepped:
            yield "denoiser"
            if manifest.postprocess.decoder is not None:
                yield "decoder"

    def _graph(self, component: Component) -> Graph:
        precision = self._info.precision
        graph = self._student.manifest.graph(component, precision)
        if graph is None:
            raise RuntimeUnavailable(
                f"{self._student.path} has no graph of its {component} in {precision}, which "
                f"{_NEEDED_BY.get(component, 'single steps need')}; "
                f"run redif export {self._student.path} --precision {precision}"
            )
        return graph
