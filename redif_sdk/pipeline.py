"""`FastPipeline`: a student's folder in, pictures out, without torch.

It draws the noise, has prompts encoded, and runs the fused graph, or the denoiser step by step where every step is to
be seen. The graphs are in `components.py`, engines in `runtimes/`, the arithmetic of a step in `steps.py`, and what a
request may say in `request.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from redif_sdk import hub, runtimes
from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import MANIFEST_NAME, Manifest
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError
from redif_sdk.graphs import LoadedGraphs
from redif_sdk.images import to_pil
from redif_sdk.inputs import (
    OUTPUT_TYPES,
    Asked,
    Conditions,
    Labels,
    Request,
    Seeds,
    check_conditions,
    check_guidance,
    check_latents,
    check_noise,
    check_request,
)
from redif_sdk.runtimes import Runtime, RuntimeOptions
from redif_sdk.sampling.loop import iterate_steps
from redif_sdk.sampling.table import StepTable

__all__ = ["FastPipeline", "PipelineOutput"]

OnStepEnd = Callable[["FastPipeline", int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    `images`: a list of PIL pictures, or an array (B, H, W, C), by output_type. `seeds`: (seed, image index) of each,
    which as ``seed=`` give the same pictures again. `timings`: seconds by stage: noise, text (of a student that is
    asked by prompts: tokens and text encoder), network, output, total. `runtime_info`: what computed it.
    """

    images: Any
    seeds: list[tuple[int, int]]
    timings: dict[str, float]
    runtime_info: dict[str, Any]


class FastPipeline:
    """A loaded student. Safe to call from several threads; a call leaves nothing behind.

    Make one with `from_pretrained`, or from a `StudentFolder`. Raises RuntimeUnavailable, with the reason and the
    remedy, for an engine, device or precision that cannot be had; nothing else is used in its place.
    """

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
    ) -> None:
        self._student = student
        options = RuntimeOptions(
            device, num_threads, provider, engine_dir=None if engine_dir is None else Path(engine_dir)
        )
        self._remote: hub.Remote | None = None  # where the files come from that were not downloaded
        self._tables: dict[int | None, StepTable] = {t.num_inference_steps: t for t in student.manifest.tables}
        engine, self._choice = runtimes.choose(student, "generator", runtime, precision, options)
        self._components = LoadedGraphs(student, engine, options)

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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> FastPipeline:
        """Load a student from a folder, or from the Hub by its id ("org/name"): only the files that are needed.

        `runtime`: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", or "auto", the fastest as measured of those
        installed; `device`: "auto", "cpu", "cuda[:N]", "dml[:N]", "coreml", "gpu[:N]", "npu"; `precision`: "fp32",
        "fp16", "bf16", "int8", or "auto": bf16 where the processor has it and the student's gate passed, else fp32;
        `num_threads`: of the CPU, None for all that the process may use. `provider`: an execution provider of ONNX
        Runtime by its own name, or the package of a plugin one. `engine_dir`: where TensorRT engines lie, in place of
        the cache. Of the Hub: `revision`, a branch, a tag or a commit; `token`; `cache_dir`; `local_files_only`, take
        what is in the cache, as ``HF_HUB_OFFLINE`` does.

        What was taken stands in `runtime_info` and in the log, and the commit in `origin`. Raises ManifestError for
        what is no student, IntegrityError if it was altered, RuntimeUnavailable, HubError.
        """
        options: dict[str, Any] = {
            "runtime": runtime,
            "device": device,
            "precision": precision,
            "num_threads": num_threads,
            "provider": provider,
            "engine_dir": engine_dir,
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
        tried = {choice.precision for choice in runtimes.candidates(remote.manifest, runtime, precision)}
        wanted = [graph for graph in remote.manifest.graphs if graph.precision in tried]
        paths = [path for graph in wanted for path in (graph.file, *graph.data)]
        if remote.manifest.text is not None:
            paths += [tokenizer.file for tokenizer in remote.manifest.text.tokenizers]
        student = remote.student(paths)
        pipeline = cls(student, **options)
        pipeline._remote = remote
        return pipeline

    @property
    def manifest(self) -> Manifest:
        """The student's ``redif.json``."""
        return self._student.manifest

    @property
    def origin(self) -> hub.Origin | None:
        """Of a student from the Hub: repo_id, the revision that was asked for, and the commit that it stood for."""
        return self._remote.origin if self._remote is not None else None

    @property
    def runtime_info(self) -> dict[str, Any]:
        """What computes a plain call: runtime, version, provider, device, precision, component, file, num_threads.

        `choice` says why that engine and precision were taken.
        """
        return self._info(self._components.generator or self._components["denoiser"])

    def _info(self, engine: Runtime) -> dict[str, Any]:
        return asdict(engine.info) | {"choice": self._choice.reason}

    # ------------------------------------------------------------------ generation

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
        prompt_embeds: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> PipelineOutput:
        """Generate pictures.

        A text-to-image student is asked by one or more prompts (`prompt`), each `num_images_per_prompt` times; a
        class-conditional one for one or more classes, by name (`prompt`) or by number or name (`class_labels`); an
        unconditional one for `num_images_per_prompt` pictures.

        `seed`: one int, and picture i has the noise (seed, i); or one int or (seed, index) a picture; or None, drawn
        from the operating system. `latents` (B, C, H, W), standard normal, replace the starting noise.
        `height` and `width`, in pixels, of a student that was exported with free sizes; default: its own.
        `prompt_embeds`, `pooled_prompt_embeds` and `prompt_attention_mask`, all that the student takes of them, one row
        a prompt, as `encode_prompt` makes them, stand in for `prompt`. `negative_prompt` is refused, and every
        `guidance_scale` that the student has not: its guidance is in its graphs, or it has none.
        `output_type`: "pil"; "np", float32 (B, H, W, C) in [0, 1]; "uint8", uint8 (B, H, W, C).
        `callback_on_step_end(pipe, step, timestep, {"latents": x})` is called after every step, and may return
        {"latents": other}, which go on from there.

        Raises InvalidRequest for whatever the student cannot do, and names what it can.
        """
        start = time.perf_counter()
        if output_type not in OUTPUT_TYPES:
            raise InvalidRequest(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
        check_guidance(self.manifest, guidance_scale, negative_prompt)
        request = check_request(
            self.manifest,
            prompt,
            class_labels,
            num_images_per_prompt,
            num_inference_steps,
            seed,
            latents,
            height,
            width,
            _embeds(prompt_embeds, pooled_prompt_embeds, prompt_attention_mask),
        )
        noise = request.noise(self.manifest)
        ready = time.perf_counter()
        conditions = self._conditions(request)
        encoded = time.perf_counter()
        images = self._images(noise, conditions, request.table, callback_on_step_end)
        done = time.perf_counter()
        result: Any = images
        if output_type == "pil":
            result = to_pil(images)
        elif output_type == "np":
            result = images.astype(np.float32) / np.float32(255)
        end = time.perf_counter()
        text = {} if self.manifest.text is None else {"text": encoded - ready}
        timings = {"noise": ready - start, **text, "network": done - encoded, "output": end - done}
        used = self._components.generator if callback_on_step_end is None else None
        info = self._info(used or self._components["denoiser"])
        return PipelineOutput(result, request.seeds, timings | {"total": end - start}, info)

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
        prompt_embeds: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        prompt_attention_mask: ArrayLike | None = None,
    ) -> Iterator[Image.Image]:
        """One picture, as it forms: after each step, the clean-image estimate x0; the last one is the picture.

        The request is checked at once, and the prompt and the steps are computed as they are asked for.
        """
        request = check_request(
            self.manifest,
            prompt,
            class_labels,
            1,
            num_inference_steps,
            seed,
            latents,
            height,
            width,
            _embeds(prompt_embeds, pooled_prompt_embeds, prompt_attention_mask),
        )
        if len(request.seeds) != 1:
            raise InvalidRequest(f"stream makes one picture, not {len(request.seeds)}; ask for one thing")
        self._components.prepare_steps()
        return self._previews(request)

    def generate_array(
        self, noise: NDArray[np.float32], conditions: Asked = None, num_inference_steps: int | None = None
    ) -> NDArray[np.uint8]:
        """Pictures uint8 (B, H, W, C) for noise (N, B, C, H, W) float32, for evaluation.

        `conditions`: labels (B,) of a class-conditional student; the arrays of `encode_prompt` of one that is asked by
        prompts. N is at least the table's `noise_slices`. Raises InvalidRequest for other shapes and for bad labels.
        """
        table = self._tables.get(num_inference_steps) or self.manifest.step_table(num_inference_steps)
        checked = check_noise(self.manifest, noise, table)
        return self._images(checked, check_conditions(self.manifest, conditions, checked.shape[1]), table)

    def encode_prompt(self, prompt: str | Sequence[str]) -> Conditions:
        """What prompts become: the arrays that denoiser and generator take, float32, by name, a row a prompt.

        Equal prompts are encoded once. Raises InvalidRequest, and for a student that is not asked by prompts too.
        """
        if self.manifest.text is None:
            raise InvalidRequest(f"{self.manifest.name} is not asked by prompts; there is nothing to encode")
        return self._conditions(check_request(self.manifest, prompt, None, 1, None, 0, None))

    def _conditions(self, request: Request) -> Conditions:
        """The conditions of a request, its prompts encoded."""
        return request.conditions if request.prompts is None else self._components.encode(request.prompts)

    def _images(
        self,
        noise: NDArray[np.float32],
        conditions: Conditions,
        table: StepTable,
        callback: OnStepEnd | None = None,
    ) -> NDArray[np.uint8]:
        """Pictures from the fused graph, or step by step where there is none, or a callback that wants to see them."""
        generator = self._components.generator
        if generator is None or callback is not None:
            x = noise[0]
            for k, x, _ in self._steps(noise, conditions, table):
                returned = callback(self, k, float(table.timesteps[k]), {"latents": x}) if callback else None
                if returned is not None and "latents" in returned:
                    x[...] = check_latents(self.manifest, returned["latents"], len(x), x.shape[2:])
            return self._components.images(x)
        inputs: dict[str, NDArray[Any]] = {"noise": noise, "table": table.rows, "init_scale": table.scale}
        return generator.run(inputs | conditions)["images"]

    def _steps(
        self, noise: NDArray[np.float32], conditions: Conditions, table: StepTable
    ) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        """(k, x', x0) after each step, as `iterate_steps` yields them: the caller may write into x'."""
        denoiser = self._components["denoiser"]

        def predict(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
            t = np.full((len(x),), table.timesteps[k], dtype=np.float32)
            clean: NDArray[np.float32] = table.clean(
                k, x, denoiser.run({"sample": x, "timestep": t, **conditions})["f"]
            )
            return clean

        return iterate_steps(table, table.start(noise[0]), noise, predict)

    def _previews(self, request: Request) -> Iterator[Image.Image]:
        conditions, table = self._conditions(request), request.table
        for k, x, x0 in self._steps(request.noise(self.manifest), conditions, table):
            last = k == table.num_inference_steps - 1
            yield to_pil(self._components.images(x if last else x0))[0]

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Copy the student to `folder`, checking every file; the folder is there whole or not at all.

        A student from the Hub is first downloaded whole. Raises InvalidRequest if `folder` is there already, not empty,
        and not to be overwritten.
        """
        student = self._whole()
        if Path(folder).resolve().is_relative_to(student.path.resolve()):
            raise InvalidRequest(f"{folder} is inside the student's own folder; give another one")
        with atomic_folder(Path(folder), overwrite=overwrite) as new:
            student.copy_to(new)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        tags: Sequence[str] = (),
        git_tag: str | None = None,
        token: str | bool | None = None,
        allow_unverified: bool = False,
        dry_run: bool = False,
    ) -> hub.Pushed:
        """Send the student to the Hub as ``org/name``; see `redif_sdk.hub.push`, which has the same arguments.

        Raises ParityError for a student that did not pass its gate, unless `allow_unverified`, and HubError.
        """
        return hub.push(
            self._whole(),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            tags=tags,
            git_tag=git_tag,
            token=token,
            allow_unverified=allow_unverified,
            dry_run=dry_run,
        )

    def _whole(self) -> StudentFolder:
        """The student with every file. IntegrityError if it is not the one that was loaded."""
        student = self._student if self._remote is None else self._remote.whole()
        current = StudentFolder(student.path)
        if current.manifest.digest != self.manifest.digest:
            raise IntegrityError(f"{MANIFEST_NAME} of {student.path} was altered since it was loaded; load it again")
        return student


def _embeds(
    prompt_embeds: ArrayLike | None, pooled_prompt_embeds: ArrayLike | None, prompt_attention_mask: ArrayLike | None
) -> Mapping[str, ArrayLike | None]:
    return {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "prompt_attention_mask": prompt_attention_mask,
    }
