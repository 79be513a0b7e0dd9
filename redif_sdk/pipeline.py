"""`FastPipeline`: loads a student's folder and generates images, without torch.

It draws the noise and encodes prompts; `drawing.py` runs the fused graph, or the denoiser step by step. The
graphs are in `graphs.py`, engines in `runtimes/`, the step arithmetic in `sampling/`, request checks in `inputs/`.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from redif_sdk import hub, runtimes
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.drawing import Drawing, OnState, shown_to, started
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError
from redif_sdk.graphs import LoadedGraphs
from redif_sdk.hub.saved import SavedStudent
from redif_sdk.images import PipelineOutput, converted, timings_of, to_pil
from redif_sdk.inputs import (
    EMBEDS,
    NAG_SCALE,
    NEGATIVE_EMBEDS,
    Asked,
    Conditions,
    GenerationRequest,
    Labels,
    Seeds,
    check_conditions,
    check_guidance,
    check_noise,
    check_output,
    check_request,
    precision_of,
)
from redif_sdk.inputs.images import Given, Start
from redif_sdk.runtimes import RuntimeInfo, RuntimeOptions
from redif_sdk.safety import SafetyFilter, filtered
from redif_sdk.sampling.table import StepTable

__all__ = ["FastPipeline", "PipelineOutput"]

NOT_EXACT = '; images differ slightly from fp32: precision="exact" gives the same image for a seed everywhere'

OnStepEnd = Callable[["FastPipeline", int, float, dict[str, Any]], dict[str, Any] | None]

_FIELDS = ("_student", "_asked", "_remote", "_tables", "_choice", "_components")


class FastPipeline(SavedStudent):
    """A loaded student. Thread-safe; a call keeps no state; copies share the graphs.

    Other processes can use it: a forked one loads the graphs again (OpenVINO and GPUs refuse, and name "spawn"), and it
    pickles by its source (the folder, or the commit on the Hub) with the options it was loaded with, without a token.

    Load one with `from_pretrained`, or from a `StudentFolder`. Raises RuntimeUnavailable, with reason and remedy, if
    the runtime, device or precision is not available; nothing else is used instead.
    """

    marked = True  # PIL images say in their files that they were generated, and by what (`redif_sdk.marks`)

    def __init__(
        self,
        student: StudentFolder,
        *,
        runtime: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        num_threads: int | None = None,
        provider: str | None = None,
        engine_dir: str | Path | None = None,
        low_memory: bool = False,
        safety_filter: SafetyFilter | None = None,
    ) -> None:
        self._student, self.safety_filter = student, safety_filter
        self._asked: dict[str, Any] = {
            "runtime": runtime,
            "device": device,
            "precision": precision,
            "num_threads": num_threads,
        }
        self._asked |= {"provider": provider, "engine_dir": engine_dir, "low_memory": low_memory}
        options = RuntimeOptions(
            device, num_threads, provider, engine_dir=None if engine_dir is None else Path(engine_dir)
        )
        self._remote: hub.Remote | None = None  # source of the files that were not downloaded
        self._tables: dict[int | None, StepTable] = {t.num_inference_steps: t for t in student.manifest.tables}
        engine, self._choice = runtimes.choose(student, "generator", runtime, precision, options)
        self._components = LoadedGraphs(student, engine, options, low_memory=low_memory)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        runtime: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        num_threads: int | None = None,
        provider: str | None = None,
        engine_dir: str | Path | None = None,
        low_memory: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        torch_dtype: Any = None,
        safety_filter: str | Path | SafetyFilter | None = None,
    ) -> FastPipeline:
        """Load a student from a folder, or from the Hub by its id ("org/name"); only the files that are needed.

        Args:
            source: folder, or id on the Hub.
            runtime: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", or "auto", the fastest installed one.
            device: "auto", "cpu", "cuda[:N]", "dml[:N]", "coreml", "gpu[:N]" or "npu".
            precision: "fp32", "fp16", "bf16", "int8", "int8wo" or "int4wo"; "auto": bf16 where the processor has it
                and the student's bf16 graph passed its gate, else fp32; "exact": fp32 arithmetic throughout (no TF32 or
                bf16), so that a seed gives the same image, within one level of 255, on every runtime and device.
            num_threads: CPU threads; None for all cores that the process may use.
            provider: an execution provider of ONNX Runtime, or the package of a plugin provider.
            engine_dir: folder of TensorRT engines, instead of the cache.
            low_memory: free text encoder, network and decoder after their use; each call loads and checks them again.
            revision: branch, tag or commit on the Hub; `token`, `cache_dir`, `local_files_only` are the Hub's too.
            torch_dtype: diffusers' name for `precision`: torch.float16 is "fp16", and so on.
            safety_filter: an ONNX classifier that is asked about every image; see `redif_sdk.safety`.

        Returns:
            The pipeline. `runtime_info` and the log say what was chosen; `origin` has the commit.

        Raises ManifestError if `source` is not a student, IntegrityError if a file was altered, RuntimeUnavailable if
        runtime, device or precision is not available, and HubError.
        """
        options: dict[str, Any] = {
            "runtime": runtime,
            "device": device,
            "precision": precision_of(precision, torch_dtype),
            "num_threads": num_threads,
            "provider": provider,
            "engine_dir": engine_dir,
            "low_memory": low_memory,
            "safety_filter": SafetyFilter.of(safety_filter),
        }
        if Path(source).is_dir():
            hub.check_local(
                source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
            return cls(StudentFolder(source), **options)
        if not hub.is_hub_id(str(source)):
            raise ManifestError(f"{source} is neither a folder nor the id of a student on the Hub (org/name)")
        remote = hub.Remote(
            str(source), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        tried = {c.precision for c in runtimes.candidates(remote.manifest, runtime, options["precision"])}
        wanted = [graph for graph in remote.manifest.graphs if graph.precision in tried]
        paths = [path for graph in wanted for path in (graph.file, *graph.data)]
        if remote.manifest.text is not None:
            paths += [tokenizer.file for tokenizer in remote.manifest.text.tokenizers]
        if remote.manifest.arrays is not None:
            paths.append(remote.manifest.arrays.examples)
        student = remote.student(paths)
        pipeline = cls(student, **options)
        pipeline._remote = remote
        return pipeline

    def __reduce__(self) -> tuple[Any, ...]:
        remote = self._remote
        source, found = (
            (self._student.path.absolute(), {}) if remote is None else (remote.origin.repo_id, remote.again())
        )
        own = {name: value for name, value in vars(self).items() if name not in _FIELDS}
        return _load_again, (type(self), str(source), self.manifest.digest, {**self._asked, **found}), own or None

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    @property
    def manifest(self) -> Manifest:
        """The student's ``redif.json``."""
        return self._student.manifest

    @property
    def origin(self) -> hub.Origin | None:
        """For a student from the Hub: repo_id, requested revision, and the commit it resolved to; else None."""
        return self._remote.origin if self._remote is not None else None

    @property
    def runtime_info(self) -> dict[str, Any]:
        """What computes a call: runtime, version, provider, device, precision, component, file, num_threads.

        `exact` is True for fp32 arithmetic throughout: all exact pipelines give the same image for a seed, within one
        level of 255. `choice` says why this runtime and precision were chosen.
        """
        return self._info(self._components.info())

    def _info(self, info: RuntimeInfo) -> dict[str, Any]:
        exact = runtimes.is_exact(info)
        return asdict(info) | {"exact": exact, "choice": self._choice.reason + ("" if exact else NOT_EXACT)}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Labels | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        seed: Seeds = None,
        latents: ArrayLike | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        prompt_embeds: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        nag_scale: float | None = None,
        negative_prompt_embeds: ArrayLike | None = None,
        negative_pooled_prompt_embeds: ArrayLike | None = None,
        negative_prompt_attention_mask: ArrayLike | None = None,
        output_type: str = "pil",
        decode_tile: int | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generator: Any = None,
        conditions: Mapping[str, ArrayLike] | None = None,
    ) -> PipelineOutput:
        """Generate images.

        Args:
            prompt: text of a text-to-image student, or a class name; one, or a list.
            class_labels: classes of a class-conditional student, by number or name; one, or a list.
            num_images_per_prompt: images for each prompt or class; the number of images of an unconditional student.
            num_inference_steps: steps; None for the student's default.
            seed: an int (image i uses the noise (seed, i)); an int or (seed, index) per image; None for a random one.
            latents: starting noise (B, C, H, W), standard normal, instead of the seed's.
            height, width: in pixels, for students exported with free sizes; default: the student's own.
            image: to start from: PIL, an array (H, W, C) of uint8 or floats in [0, 1]; or a list, one a prompt.
            mask_image: of the size of `image`; white is painted anew, the rest stays. An inpainting student needs both.
            strength: of K steps the last floor(strength K) are run, from `image`; default .8, with a mask 1.
            prompt_embeds: like the two after it what `encode_prompt` returns, a row a prompt; replaces `prompt`.
            negative_prompt: what images are guided away from (one, or one a prompt), or encoded as the three
                `negative_*_embeds` after it. Students of one call a step need the graph of `redif export --nag`.
            guidance_scale: 0 or 1 for none; None for the student's own. Distilled students take no other.
            nag_scale: how far such a student goes away from the negative prompt.
            output_type: "pil"; "np", float32 (B, H, W, C) in [0, 1]; "uint8", uint8 (B, H, W, C); "pt", a torch tensor
                (B, C, H, W) in [0, 1]; "latent", what the decoder would take, float32 (B, C, H, W).
            decode_tile: decode latents in tiles of this side, for large images in little memory (`sampling/tiles.py`).
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": x})`` after every step; may
                return {"latents": other} to continue from those.
            callback_on_step_end_tensor_inputs: the latents alone; `generator` is refused, give `seed`.
            conditions: arrays (B, ...) by name, of a student that is conditioned on some, such as {"image": x}.

        Raises:
            InvalidRequest: the student does not support the request; the message names what it supports.
            NonFiniteOutput, UnsafeContent: images hold NaN or infinite values, or the safety filter refuses them.
        """
        start = time.perf_counter()
        check_output(output_type, generator, callback_on_step_end_tensor_inputs, self.safety_filter)
        self._components.check_tile(decode_tile)
        begin = Start.of(self.manifest, image, mask_image, strength, height, width)
        size = begin.size if begin else (height, width)
        asked = (prompt, class_labels, num_images_per_prompt, num_inference_steps, seed, latents, *size)
        embeds = (prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)
        nulls = (negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_attention_mask)
        request = self._checked(asked, embeds, (guidance_scale, negative_prompt, nag_scale), nulls, conditions)
        given = begin.fitted(self.manifest, request) if begin else None
        drawing, on_state, times = self._drawing(request, given, shown_to(callback_on_step_end, self, self.manifest))
        made = drawing.latents(on_state) if (raw := output_type == "latent") else drawing.images(on_state, decode_tile)
        done = time.perf_counter()
        made, flagged = filtered(self.safety_filter, made)
        stepped = raw or on_state is not None or decode_tile is not None
        info = self._info(self._components.info(stepped=stepped, nag=NAG_SCALE in drawing.conditions))
        marks = request.marks(self.manifest, info["precision"], given.kind if given else None) if self.marked else ()
        images = converted(made, output_type, marks)
        timings = timings_of(start, *times, done, time.perf_counter(), encodes=self.manifest.text is not None)
        return PipelineOutput(images, request.seeds, timings, info, flagged)

    async def agenerate(self, *args: Any, **kwargs: Any) -> PipelineOutput:
        """A call in a thread of its own, while the event loop goes on; the arguments are those of a call."""
        return await asyncio.to_thread(self, *args, **kwargs)

    def close(self) -> None:
        """Free the graphs, of copies too. A call afterwards raises RuntimeUnavailable."""
        self._components.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        steps = ", ".join(map(str, self.manifest.supported_steps))
        info = self._components.info()
        engine = f"{info.runtime} {info.precision} on {info.device}"
        return f"<{type(self).__name__} {self.manifest.name}: {self.manifest.task}, {steps} steps, {engine}>"

    def stream(
        self,
        prompt: str | None = None,
        *,
        class_labels: Labels | None = None,
        num_inference_steps: int | None = None,
        seed: Seeds = None,
        latents: ArrayLike | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        prompt_embeds: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        nag_scale: float | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
    ) -> Iterator[Image.Image]:
        """Yield one image as it forms: the clean-image estimate x0 after each step, and last the image itself.

        The arguments are those of a call. The request is checked at once, each step is computed when it is asked for.
        Raises InvalidRequest, and NonFiniteOutput at a step whose estimate holds NaN or infinite values.
        """
        begin = Start.of(self.manifest, image, mask_image, strength, height, width)
        size = begin.size if begin else (height, width)
        asked = (prompt, class_labels, 1, num_inference_steps, seed, latents, *size)
        embeds = (prompt_embeds, pooled_prompt_embeds, prompt_attention_mask)
        request = self._checked(asked, embeds, (guidance_scale, negative_prompt, nag_scale), arrays=conditions)
        if len(request.seeds) != 1:
            raise InvalidRequest(f"stream generates one image, not {len(request.seeds)}; give one prompt or class")
        given = begin.fitted(self.manifest, request) if begin else None
        self._components.prepare_steps()
        return self._previews(request, given)

    def _checked(
        self,
        asked: tuple[Any, ...],
        embeds: tuple[Any, ...],
        guidance: tuple[Any, Any, Any],
        nulls: Any = (None,) * 3,
        arrays: Mapping[str, ArrayLike] | None = None,
    ) -> GenerationRequest:
        """The checked request, from the arguments of `check_request`, encoded prompts, what guides it, and arrays."""
        arguments = (*asked, dict(zip(EMBEDS, embeds, strict=True)), arrays)
        request = check_request(self.manifest, *arguments)
        scale, negative, nag = guidance
        negatives = dict(zip(NEGATIVE_EMBEDS, nulls, strict=True))
        return check_guidance(self.manifest, request, scale, negative, negatives, nag)

    def _drawing(
        self, request: GenerationRequest, given: Given | None, on_state: OnState | None = None
    ) -> tuple[Drawing, OnState | None, tuple[float, float]]:
        """What generates a request's images, what sees each state, and when noise and prompts were ready."""
        noise = request.noise(self.manifest)
        ready = time.perf_counter()
        drawing = Drawing(self._components, noise, self._components.conditions(request), request.table)
        encoded = time.perf_counter()
        if given:
            drawing, on_state = started(self.manifest, drawing, given, on_state)
        return drawing, on_state, (ready, encoded)

    def _previews(self, request: GenerationRequest, given: Given | None) -> Iterator[Image.Image]:
        drawing, on_state, _ = self._drawing(request, given)
        for images in drawing.previews(on_state):
            yield to_pil(filtered(self.safety_filter, images)[0])[0]

    def generate_array(
        self, noise: NDArray[np.float32], conditions: Asked = None, num_inference_steps: int | None = None
    ) -> NDArray[np.uint8]:
        """Images uint8 (B, H, W, C) for given noise, for evaluation.

        Args:
            noise: float32 (N, B, C, H, W); N is at least the table's `noise_slices`.
            conditions: labels (B,) of a class-conditional student; arrays by name, as `encode_prompt` returns them.
            num_inference_steps: steps; None for the student's default.

        Raises:
            InvalidRequest: wrong shapes or labels.
            NonFiniteOutput: images hold NaN or infinite values.
        """
        table = self._tables.get(num_inference_steps) or self.manifest.step_table(num_inference_steps)
        checked = check_noise(self.manifest, noise, table)
        given = check_conditions(self.manifest, conditions, checked.shape[1])
        given = self._components.guided(given, checked.shape[1])
        return Drawing(self._components, checked, given, table).images()

    def encode_prompt(self, prompt: str | Sequence[str], *, weighted: bool = False, long: bool = False) -> Conditions:
        """Encode prompts: the arrays, by name, that denoiser and generator take, with one row per prompt.

        Args:
            prompt: one, or a list. Equal ones are encoded once.
            weighted: prompts are in compel's syntax, "a (red heart)1.4 on a table-", for `prompt_embeds`.
            long: prompts of any length: in chunks, whose states lie one after another, for `prompt_embeds` of students
                that were exported with `--long-prompts`. Otherwise what is beyond the text encoder's length is cut.

        Raises:
            InvalidRequest: also for a student that is not text-to-image, or whose text encoders are not CLIP's.
        """
        if self.manifest.text is None:
            raise InvalidRequest(f"{self.manifest.name} is not a text-to-image model; there is no prompt to encode")
        request = check_request(self.manifest, prompt, None, 1, None, 0, None)
        if weighted or long:
            return self._components.encode_chunked(request.prompts or [], weighted=weighted, long=long)
        return self._components.conditions(request)


def _load_again(kind: type[FastPipeline], source: str, digest: str, options: dict[str, Any]) -> FastPipeline:
    """What a pickled pipeline becomes. Raises IntegrityError if the student was changed meanwhile."""
    pipeline = kind.from_pretrained(source, **options)
    if pipeline.manifest.digest != digest:
        raise IntegrityError(f"the student {source} was changed since its pipeline was pickled; load it again")
    return pipeline
