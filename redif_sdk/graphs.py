"""The graphs of one student in one engine and one precision, each loaded when it is first needed.

`pipeline.py` runs them; `runtimes/` chooses the engine.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from redif_sdk import runtimes
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Component, Graph
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.images import from_uint8, to_uint8
from redif_sdk.inputs import NAG_SCALE, Conditions, GenerationRequest, guiding_inputs, own_nulls
from redif_sdk.inputs.chunks import equally_long, takes_chunks
from redif_sdk.inputs.weighting import Fragment, joined, parsed, without
from redif_sdk.runtimes import Runtime, RuntimeInfo, RuntimeOptions
from redif_sdk.runtimes.finite import require_finite
from redif_sdk.runtimes.guided import NULL
from redif_sdk.sampling.tiles import LEAST_TILE, decode_in_tiles

if TYPE_CHECKING:
    from redif_sdk.tokenizer import PromptTokenizer

__all__ = ["LoadedGraphs"]

#: What needs a graph, for the message that it is missing.
_NEEDED_BY = {
    "text_encoder": "prompts need",
    "decoder": "decoding latents needs",
    "encoder": "starting from an image needs",
    "nag": "negative prompts need",
}

_living: WeakSet[LoadedGraphs] = WeakSet()


class LoadedGraphs:
    """A student's graphs, safe to use from several threads, and in processes that are forked afterwards.

    The threads of an engine do not outlive a fork. So a child process loads its graphs again, when it first runs them;
    an engine that cannot be loaded there raises RuntimeUnavailable.

    Args:
        student: The student's folder.
        first: A graph that is loaded already; the others use its engine, precision and device.
        options: How `first` was loaded.
        low_memory: A graph is freed after its use, and loaded again when a call needs it.

    Raises:
        RuntimeUnavailable: A graph that every call needs is missing.
        IntegrityError: A tokenizer was altered.
        ManifestError: A tokenizer's file is not a tokenizer.
    """

    def __init__(
        self, student: StudentFolder, first: Runtime, options: RuntimeOptions, *, low_memory: bool = False
    ) -> None:
        self._student = student
        self._low_memory = low_memory
        self._info = first.info
        self._options = replace(options, device=first.info.device)
        self._lock = Lock()
        self._loaded: dict[str, Runtime] = {first.info.component: first}
        self._infos: dict[str, RuntimeInfo] = {first.info.component: first.info}
        self._fused = first.info.component == "generator"
        self._forked = self._closed = False
        _living.add(self)
        for component in self._needed(stepped=self.generator is None):
            self._graph(component)
        self._null: Conditions | None = None  # of one image, when it was needed
        self._tokenizer: PromptTokenizer | None = None
        if student.manifest.text is not None:
            from redif_sdk.tokenizer import PromptTokenizer  # a package that other students need not load

            self._tokenizer = PromptTokenizer(student)

    @property
    def generator(self) -> Runtime | None:
        """The fused graph, if it is loaded; else the denoiser is run step by step."""
        return self["generator"] if self._fused else None

    def __getitem__(self, component: Component) -> Runtime:
        """A loaded graph. Raises RuntimeUnavailable if there is none in this precision; no other is used instead."""
        if (loaded := self._loaded.get(component)) is not None:
            return loaded
        with self._lock:
            if self._closed:
                raise RuntimeUnavailable(f"the pipeline of {self._student.path} was closed; load it again")
            if component not in self._loaded:
                if self._forked and self._options.device != "cpu":
                    raise RuntimeUnavailable(
                        f"{self._options.device} cannot be used in a process that was forked from one that used it; "
                        f'start it with multiprocessing\'s "spawn", or load the pipeline in it'
                    )
                graph = self._graph(component)
                loaded = runtimes.load(self._info.runtime, self._student, graph, self._options)
                self._loaded[component], self._infos[component] = loaded, loaded.info
            return self._loaded[component]

    def info(self, *, stepped: bool = False, nag: bool = False) -> RuntimeInfo:
        """What computes images: the fused graph, or the denoiser (`stepped`, or where there is no fused graph)."""
        component: Component = "nag" if nag else "generator" if self._fused and not stepped else "denoiser"
        return self._infos[component] if component in self._infos else self[component].info

    def close(self) -> None:
        """Forget all graphs; they are freed when no thread runs them any more."""
        with self._lock:
            self._loaded.clear()
            self._closed = True

    def _done(self, component: Component) -> None:
        """With `low_memory`, forget a graph after its use. It is freed when no thread runs it any more."""
        if self._low_memory:
            with self._lock:
                self._loaded.pop(component, None)

    def replaced(self, component: Component, runtime: Runtime) -> LoadedGraphs:
        """A copy that uses `runtime` for one component."""
        other = copy.copy(self)
        other._loaded = self._loaded | {component: runtime}
        other._fused = self._fused or component == "generator"
        _living.add(other)
        return other

    def _after_fork(self) -> None:
        """Forget the parent's engines, which would wait for threads that this process does not have."""
        # Not freed either: that waits, too.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._loaded))
        self._lock, self._loaded, self._forked = Lock(), {}, True

    def prepare_steps(self) -> None:
        """Load the graphs that sampling step by step needs, unless memory is to be low."""
        for component in () if self._low_memory else self._needed(stepped=True):
            self[component]

    def conditions(self, request: GenerationRequest) -> Conditions:
        """The conditions of a request's images, with its prompts encoded and what guides them."""
        guiding, prompts = request.guiding, request.prompts or []
        negatives = (guiding and guiding.negatives) or []
        encoded = self.encode([*prompts, *negatives]) if prompts or negatives else {}
        own = request.conditions or {name: value[: len(prompts)] for name, value in encoded.items()}
        if guiding is None:
            return own
        nulls = guiding.embeds or {name: value[len(prompts) :] for name, value in encoded.items() if negatives}
        if guiding.nag is not None:
            negative = {NULL + name: nulls[name] for name in self._nag_inputs()}
            own = own | negative | {NAG_SCALE: np.full((len(request.seeds),), guiding.nag, dtype=np.float32)}
        return self.guided(own, len(request.seeds), guiding.scale, nulls)

    def guided(
        self, own: Conditions, batch: int, scale: float | None = None, nulls: Conditions | None = None
    ) -> Conditions:
        """The conditions of a batch with what guides it (`guidance`). Prompts and null prompts become equally long."""
        conditions = own | self.guidance(batch, scale, nulls)
        text, guidance = self._student.manifest.text, self._student.manifest.network.guidance
        if text is None or not text.long_prompts:
            return conditions
        states = text.tensors[0].name

        def filler() -> NDArray[np.float32]:
            empty: NDArray[np.float32] = self.encode([""])[states][0]
            return np.zeros_like(empty) if guidance is not None and guidance.null_zeros and not nulls else empty

        return equally_long(conditions, states, filler)

    def guidance(self, batch: int, scale: float | None = None, nulls: Conditions | None = None) -> Conditions:
        """What guides a batch, beside its conditions; empty for a student whose graphs take no guidance.

        Args:
            batch: Number of images.
            scale: None: the student's own.
            nulls: The null conditions, a row an image; None or empty: the student's own.
        """
        return guiding_inputs(self._student.manifest, batch, scale, nulls or self._nulls)

    def _nag_inputs(self) -> list[str]:
        """The conditions whose negative the graph "nag" takes."""
        return [spec.name.removeprefix(NULL) for spec in self._graph("nag").inputs if spec.name.startswith(NULL)]

    def _nulls(self) -> Conditions:
        """The student's own null condition, for one image."""
        if self._null is None:
            self._null = own_nulls(self._student.manifest, self.encode)
        return self._null

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """The conditions of prompts, one row a prompt. Equal prompts are encoded once."""
        assert self._tokenizer is not None
        places: dict[str, int] = {}
        rows = [places.setdefault(prompt, len(places)) for prompt in prompts]
        arrays = self["text_encoder"].run(self._tokenizer(list(places)))
        self._done("text_encoder")
        return {spec.name: arrays[spec.name][rows] for spec in self._student.manifest.condition_tensors}

    def encode_chunked(self, prompts: Sequence[str], *, weighted: bool, long: bool) -> Conditions:
        """The conditions of prompts, one row a prompt.

        Args:
            prompts: Any.
            weighted: They are in compel's syntax (`inputs/weighting.py`).
            long: Of any length, in chunks (`inputs/chunks.py`); all prompts have as many as the longest.

        Raises:
            InvalidRequest: The text encoders are not CLIP's alone, or a prompt is not of that syntax.
        """
        manifest, tokenizer = self._student.manifest, self._tokenizer
        assert tokenizer is not None
        assert manifest.text is not None
        if not takes_chunks(manifest):
            kinds = ", ".join(encoder.class_path.rpartition(".")[2] for encoder in manifest.text.encoders)
            raise InvalidRequest(
                f"{'weights in prompts' if weighted else 'prompts in chunks'} are not supported by {manifest.name}, "
                f"whose text encoders are {kinds}; those of Stable Diffusion and SDXL have them"
            )
        read = [parsed(prompt) if weighted else [Fragment(prompt, 1.0)] for prompt in prompts]
        variants = [[fragments, *without(fragments)] for fragments in read]
        chunks = tokenizer.chunked([*chain.from_iterable(variants), [Fragment("", 1.0)]], long=long)
        plain = tokenizer([" ".join(fragment.text for fragment in fragments) for fragments in read], warn=not long)
        inputs = {name: np.concatenate([value, plain[name]]) for name, value in chunks.ids.items()}
        arrays = self["text_encoder"].run(inputs)
        self._done("text_encoder")
        states = manifest.condition_tensors[0].name
        found = {spec.name: arrays[spec.name][len(chunks.owners) :] for spec in manifest.condition_tensors}
        found[states] = joined(read, arrays[states][: len(chunks.owners)], chunks)
        return found

    def images(self, latents: NDArray[np.float32], decode_tile: int | None = None) -> NDArray[np.uint8]:
        """Latents float32 (B, C, H, W) to images uint8 (B, H', W', C'), by the decoder where there is one.

        Raises NonFiniteOutput.
        """
        postprocess = self._student.manifest.postprocess
        if postprocess.decoder is not None:
            self._done("denoiser")
            self._done("nag")
            latents = decode_in_tiles(self._decode, latents, decode_tile or max(latents.shape[2:]))
            self._done("decoder")
        require_finite(latents)
        return to_uint8(latents, postprocess)

    def latents(self, images: NDArray[np.uint8], hidden: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Images uint8 (B, H', W', C') to latents float32 (B, C, H, W), by the encoder where latents are not pixels.

        Where `hidden` (B, H', W') is true, the encoder sees the middle of the value range, as in diffusers' inpainting.
        """
        postprocess = self._student.manifest.postprocess
        values = from_uint8(images, postprocess)
        if hidden is not None:
            values = np.where(hidden[:, None], np.float32(sum(postprocess.value_range) / 2), values)
        if postprocess.decoder is None:
            return values
        latents = self["encoder"].run({"image": values})["latents"]
        self._done("encoder")
        require_finite(latents)
        return latents

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self["decoder"].run({"latents": latents})["sample"]

    def check_tile(self, decode_tile: int | None) -> None:
        """Raise InvalidRequest for a tile that the decoder does not take."""
        if decode_tile is None:
            return
        manifest = self._student.manifest
        if manifest.postprocess.decoder is None:
            raise InvalidRequest(f"decode_tile is not supported: {manifest.name} has no decoder")
        if len(manifest.latents.dynamic) < 2:
            raise InvalidRequest(
                f"decode_tile is not supported: the decoder of {manifest.name} takes one size; run redif export "
                "--sizes with sizes that differ on both axes"
            )
        unit = max(LEAST_TILE, manifest.latents.multiple)
        if type(decode_tile) is not int or decode_tile < unit or decode_tile % manifest.latents.multiple:
            raise InvalidRequest(
                f"decode_tile is {decode_tile}; give the side of a tile in latents, at least {unit} and a multiple of "
                f"{manifest.latents.multiple}"
            )

    def _needed(self, *, stepped: bool) -> Iterator[Component]:
        """The graphs that a call needs, step by step (`stepped`) or with the fused graph."""
        manifest = self._student.manifest
        if manifest.text is not None:
            yield "text_encoder"
        if manifest.network.inpainting:
            yield "encoder"
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
                f"{_NEEDED_BY.get(component, 'sampling step by step needs')}; "
                f"run redif export {self._student.path} --precision {precision}"
            )
        return graph


def _forget_engines() -> None:
    for graphs in list(_living):
        graphs._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_engines)
