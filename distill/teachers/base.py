"""The teacher protocol, and how diffusers models and callables become one.

``Teacher.from_diffusers`` takes a diffusers folder or pipeline, by the adapter that is registered for its class;
``Teacher.from_callable`` takes any function ``(x, t, condition) -> f`` with its noise schedule and prediction type.
Methods, rewards and the training loop see a `Teacher` alone: a network, a schedule, a prediction type, and how latents
become images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from redif_sdk.artifact.records import (
    ArrayCondition,
    Condition,
    Guidance,
    Latents,
    Postprocess,
    TextCondition,
    calls_per_step,
)
from redif_sdk.distill.teachers import folders
from redif_sdk.distill.teachers.asking import Asking
from redif_sdk.distill.teachers.callables import fields_of
from redif_sdk.distill.teachers.changes import Lora, merge_loras, with_decoder
from redif_sdk.distill.teachers.fingerprint import fingerprint
from redif_sdk.distill.teachers.known_schedulers import with_scheduler
from redif_sdk.distill.teachers.own_scheduler import OwnScheduler, Sampler
from redif_sdk.distill.teachers.registry import (
    Adapter,
    adapted,
    adapter_named,
    adapter_of,
    is_ours,
    no_adapter,
    register,
    supported,
)
from redif_sdk.distill.teachers.value_range import InRange
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.condition_data import ConditionData
from redif_sdk.models.copies import private_pipeline
from redif_sdk.models.denoiser import Predict, guided, guided_each, in_micro_batches
from redif_sdk.models.portable import check_pipeline, refuse_saved_adapters
from redif_sdk.models.prompts import Prompts
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from redif_sdk.sampling.table import StepTable

__all__ = [
    "Adapter",
    "Sampler",
    "Teacher",
    "adapter_of",
    "fingerprint",
    "register",
    "supported",
]

MakeStudent = Callable[[], nn.Module]
AtGuidance = Callable[[float], tuple[Predict, MakeStudent]]


@dataclass(frozen=True)
class Teacher(Asking, InRange):
    """A diffusion model to distil.

    ``predict`` is called with x (B, C, H, W) float32, t (B,) float32 and the condition (B,) int64 or None, and is a
    black box: it needs no gradient. ``make_student`` returns a fresh trainable network with the same signature.
    A teacher with ``guidance`` makes two calls a step; its student learns the guided output and makes one.
    """

    name: str
    predict: Predict
    schedule: NoiseSchedule
    prediction_type: str
    latents: Latents
    condition: Condition | TextCondition | ArrayCondition | None
    postprocess: Postprocess
    num_inference_steps: int
    make_student: MakeStudent
    network_folder: str | None = "unet"
    licence: str = "unknown"
    revision: str | None = None  # the commit, of a teacher from the Hub
    folder: Path | None = None
    scheduler_config: dict[str, Any] | None = None  # as the folder has it
    shift: float = 1.0  # of a flow's times
    fingerprint: str = ""
    guidance: Guidance | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    prompts: Prompts | None = None  # of a text-to-image teacher: a condition is a prompt's place among them
    data: ConditionData | None = None  # of a teacher on a user's own arrays: a condition is a row of these
    decode: nn.Module | None = None  # latents -> images, where they are not pixels
    sampler: Sampler | None = None  # the pipeline's own; None: by `table`
    own: OwnScheduler | None = None  # the pipeline's scheduler
    embedded_guidance: float | None = None  # the scale that the network takes as an input
    guidance_range: tuple[float, float] | None = None  # of its conditions, which have a scale each (`ranges`)
    at_guidance: Callable[[float], tuple[Predict, MakeStudent]] | None = (
        None  # `predict`, `make_student` at another one
    )
    pipeline: Any = None  # diffusers' own, whose other parts a student is saved with
    range_known: bool = True  # off: the value range is measured on outputs (`ranged_by`)
    inpainting: bool = False  # its network takes an image and a mask too: it can be imported, and not distilled
    clipped: bool = True  # off: what it makes has no range that is seen, as latents that are rewarded undecoded
    micro_batch: int = 0  # images that its network and its decoder take at once; 0: as many as there are

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its latents."""
        return self.latents.channels, self.latents.height, self.latents.width

    @property
    def calls_per_step(self) -> int:
        """Network calls on one image for each step: two with guidance."""
        return calls_per_step(self.guidance)

    @property
    def guidance_scale(self) -> float:
        """The scale of its guidance, or the one that its network is told; 1: none."""
        if self.guidance is not None:
            return self.guidance.scale
        return 1.0 if self.embedded_guidance is None else self.embedded_guidance

    @property
    def identity(self) -> str:
        """Names this teacher's outputs: its weights and its guidance. Empty: unknown, outputs are not cached."""
        told = "" if self.embedded_guidance is None else f" told {self.embedded_guidance:g}"
        told += "" if self.data is None else f" on {self.data.digest}"
        if self.guidance_range is not None:
            told += " over {:g} {:g}".format(*self.guidance_range)
        if not self.fingerprint or self.guidance is None:
            return self.fingerprint and self.fingerprint + told
        return f"{self.fingerprint}{told} guidance {self.guidance.scale:g} {self.guidance.null_class}"

    def guided(self, scale: float, null_class: int | None = None) -> Teacher:
        """This teacher under classifier-free guidance of ``scale``; 0 and 1 are none. A network that takes the scale as
        an input (Flux dev, LCM) is given it, and makes one call.

        Args:
            null_class: the entry of the class table that means 'no class'; None: the one the teacher comes with.

        Raises:
            InvalidRequest: a negative scale, or no 'no class' entry is known.
        """
        if not 0 <= scale < math.inf:
            raise InvalidRequest(f"guidance_scale is {scale:g}; give a number from 0 on; 0 and 1 mean no guidance")
        if self.guidance_range is not None:
            raise InvalidRequest(f"{self.name} is guided over a range of scales already; load it anew for one scale")
        if self.embedded_guidance is not None and self.at_guidance is not None:
            predict, make_student = self.at_guidance(scale)
            return replace(self, embedded_guidance=scale, predict=predict, make_student=make_student)
        if scale in (0, 1):
            return replace(self, guidance=None)
        if null_class is None:
            null_class = self.extra.get("null_class")
        if self.condition is None or null_class is None:
            raise InvalidRequest(
                f"{self.name} has no 'no class' entry (null_class), so it cannot be guided; use guidance_scale 1"
            )
        null = {key: self.extra[key] for key in ("null_prompt", "null_zeros") if key in self.extra}
        return replace(self, guidance=Guidance(scale=scale, null_class=null_class, **null))

    def guidance_of_calls(self) -> Guidance | None:
        """The guidance of scale 1 of an imported pipeline that is not guided, but whose calls may ask for it."""
        guided = self.extra.get("guidable") and self.embedded_guidance is None
        again = self.guided(2.0).guidance if guided else None
        return again and again.model_copy(update={"scale": 1.0})

    def at_steps(self, num_inference_steps: int) -> Teacher:
        """This teacher with so many steps for an output, after a trial of its scheduler at these.

        Raises:
            InvalidRequest: its schedule has fewer steps.
            UnsupportedModel: its scheduler fails at these, or asks for what its network does not tell.
        """
        teacher = replace(self, num_inference_steps=num_inference_steps)
        if self.own is None:
            teacher.table(num_inference_steps)
            return teacher
        return replace(teacher, schedule=self.own.checked_schedule(num_inference_steps, self.latents.channels))

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The teacher's output f (B, C, H, W), guided where it has guidance. Arguments as for ``predict``."""
        predict: Predict = partial(guided, self.predict, self.guidance)
        if self.guidance_range is not None and self.guidance is not None and condition is not None:
            predict = partial(guided_each, self.predict, self.guidance)
        return in_micro_batches(predict, self.micro_batch, x, t, condition)

    def frozen_student(self) -> nn.Module:
        """A student's network that is not to be changed, with the teacher's own weights where it has any to share."""
        network: nn.Module = getattr(self.make_student, "frozen", self.make_student)()
        return network.requires_grad_(False)

    def table(self, num_inference_steps: int, *, eta: float = 0.0) -> StepTable:
        """DDIM with trailing spacing: the untrained student, and the sampler of a teacher without one of its own. For
        flows it is Euler's method on linspace(1, 1 / K, K), shifted, for EDM on its own noise levels."""
        if self.schedule.edm is not None:
            return StepTable.edm_euler(self.schedule.edm, num_inference_steps, eta)
        if self.schedule.flow:
            return StepTable.flow_euler(
                num_inference_steps=num_inference_steps,
                shift=self.shift,
                time_scale=len(self.schedule) - 1,
                eta=eta,
            )
        return StepTable.ddim(
            self.schedule,
            num_inference_steps=num_inference_steps,
            prediction_type=self.prediction_type,
            eta=eta,
            spacing="trailing",
        )

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Tensor | None, num_inference_steps: int | None = None) -> Tensor:
        """The teacher's deterministic output for ``noise`` (B, C, H, W), by its own sampler: latents of that shape."""
        return self._run(lambda x, t: self(x, t, condition), noise, num_inference_steps or self.num_inference_steps)

    @torch.no_grad()
    def few_steps(self, noise: Tensor, condition: Tensor | None, num_inference_steps: int) -> Tensor:
        """What the untrained student would give: the teacher's network, guided, by :meth:`table`."""
        return _by_table(lambda x, t: self(x, t, condition), noise, self.table(num_inference_steps))

    def _run(self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
        if self.sampler is None:
            return _by_table(predict, noise, self.table(num_inference_steps))
        return self.sampler(predict, noise, num_inference_steps)

    @torch.no_grad()
    def grid(self) -> list[float]:
        """The times that the teacher's own sampler gives its network, in its order, each once. No call is made."""
        seen: dict[float, None] = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen.setdefault(float(t[0]))
            return torch.zeros_like(x)

        self._run(predict, torch.zeros(1, *self.shape), self.num_inference_steps)
        return list(seen)

    @torch.no_grad()
    def follow(self, noise: Tensor, condition: Tensor | None, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """:meth:`sample`'s output for ``noise`` (B, C, H, W), and what the network was given on the way.

        (B, C, H, W) and (B, len(times), C, H, W): the states at ``times``, of :meth:`grid`.
        """
        seen: dict[float, Tensor] = {}
        wanted = {float(t) for t in times}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if (time := float(t[0])) in wanted:
                seen.setdefault(time, x)
            return self(x, t, condition)

        output = self._run(predict, noise, self.num_inference_steps)
        states = [seen[float(t)] for t in times]
        return output, torch.stack(states, 1) if states else noise.new_empty(len(noise), 0, *noise.shape[1:])

    @classmethod
    def load(cls, source: Any, **options: Any) -> Teacher:
        """A shipped teacher's name, a diffusers folder or its Hub id, a pipeline, or a :class:`Teacher` itself.

        ``options`` as for :meth:`from_diffusers`.
        """
        if isinstance(source, Teacher):
            return source.in_range(options.get("value_range"))
        if not isinstance(source, (str, Path)):
            return cls.from_diffusers(source, **options)
        folder, revision = folders.locate(source)
        teacher = cls.from_diffusers(folder, **options)
        return teacher if revision is None else replace(teacher, name=str(source), revision=revision)

    @classmethod
    def from_diffusers(
        cls,
        source: Any,
        *,
        prompts: Sequence[str] | None = None,
        examples: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        value_range: tuple[float, float] | None = None,
        variant: str | None = None,
        scheduler: str | None = None,
        loras: Sequence[Lora] = (),
        decoder: str | Path | None = None,
        mapped: bool = False,
        half: torch.dtype | None = None,
        checked: bool = True,
    ) -> Teacher:
        """From a pipeline of diffusers, or its folder: Stable Diffusion, SDXL, SD3, Flux, PixArt, DiT and what
        was given to :func:`register`; or any UNet2DModel with its scheduler.

        ``redif_teacher.json`` beside ``model_index.json`` says what diffusers has no place for: class names, prompts,
        steps, the pixel shuffle, guidance. Without it: the pipeline's usual steps and guidance.

        Args:
            prompts: of a text-to-image pipeline, what the student is to draw.
            examples: prompts for a text-to-image pipeline that is not trained on any, where none are given.
            height, width: of an image in pixels, where the pipeline takes several sizes; None: its own.
            num_inference_steps: of the teacher's own sampler; None: as many as usual.
            value_range: (low, high) of its images; None: what ``redif_teacher.json`` says, else diffusers' own [-1, 1].
            variant: of the weights in a folder, such as fp16; None: the plain files, or the only variant.
            scheduler: the class of a scheduler to use in place of the pipeline's own, with its settings.
            loras: LoRAs to merge into the pipeline's weights.
            decoder: the folder or Hub id of an autoencoder to use in place of the pipeline's own, such as TAESD.
            mapped: leave the weights of a folder in its files, in the dtype that they have there. Each layer's are
                read and cast when it is called: for a teacher that is not trained from, of any size.
            half: hold a folder's network of more than `weights.LARGE` weights in this dtype: for a teacher whose
                weights are not trained. None: in float32.
            checked: try the scheduler; off for one that will not be run.

        Raises:
            InvalidRequest: the folder is not there, or is no diffusers folder; prompts or weights are missing.
            UnsupportedModel: a pipeline, network or scheduler that no adapter takes, or a network that could not be
                saved and exported again (`redif_sdk.models.portable`).
        """
        options: dict[str, Any] = {"prompts": prompts, "height": height, "width": width}
        options["num_inference_steps"] = num_inference_steps
        folder = Path(source) if isinstance(source, (str, Path)) else None
        about: dict[str, Any] = {}
        if folder is None:
            ours, pipeline = is_ours(adapter_of(source)), private_pipeline(source)
            check_pipeline(pipeline, library=ours)
        else:
            pipeline, about = cls._read(folder, variant, mapped, half)
            check_pipeline(pipeline, loaded=True, library=is_ours(adapter_of(pipeline)))
        if examples is not None and is_ours(adapter_of(pipeline)):
            about = {"prompts": list(examples), **about}
        if folder is not None or about:
            options["about"] = about
        merge_loras(pipeline, loras)
        if decoder is not None:
            with_decoder(pipeline, decoder, mapped=mapped and folder is not None)
        if scheduler is not None:
            pipeline = with_scheduler(pipeline, scheduler)
        teacher: Teacher = replace(adapted(pipeline, **options), folder=folder)
        teacher = teacher.at_steps(teacher.num_inference_steps) if checked else teacher
        return teacher.in_range(value_range if value_range is not None else about.get("value_range"))

    @staticmethod
    def _read(folder: Path, variant: str | None, mapped: bool, half: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
        """The pipeline in a folder, and what the folder says about it."""
        name = folders.pipeline_name(folder)
        refuse_saved_adapters(folder)
        if adapter := adapter_named(name):
            ours = is_ours(adapter)
            return folders.load_pipeline(folder, variant, whole=not ours, mapped=mapped and ours, half=half)
        if name and folders.unet_files(folder) is None:
            raise no_adapter(name)
        return folders.load_unet(folder, variant, mapped=mapped, half=half)

    @classmethod
    def from_callable(
        cls,
        predict: Predict,
        *,
        schedule: NoiseSchedule,
        prediction_type: str,
        shape: tuple[int, int, int],
        student: nn.Module,
        num_classes: int | None = None,
        conditions: Mapping[str, ArrayLike] | str | Path | ConditionData | None = None,
        guidance: Guidance | None = None,
        shift: float = 1.0,
        num_inference_steps: int = 50,
        pixel_shuffle: int = 1,
        value_range: tuple[float, float] | None = None,
        name: str = "callable",
        fingerprint: str | None = None,
    ) -> Teacher:
        """Any function ``(x, t, condition) -> f``: a score model, a denoiser, a network behind an API.

        Args:
            predict: ``x`` (B, C, H, W) float32, ``t`` (B,) float32, ``condition`` -> (B, C, H, W). The condition is
                None, classes (B,) int64, or of ``conditions`` tensors (B, ...) by name, float32 or int64.
            conditions: a data set of named arrays to be conditioned on, each (N, ...), such as low-resolution images:
                a mapping, an ``.npz``, or ``ConditionData.from_function``. Entry i of the pool has row i modulo N.
            schedule: its noise schedule; ``t`` indexes it.
            prediction_type: what ``f`` is: epsilon, v_prediction, sample, score, or flow (noise minus data), whose
                schedule is ``NoiseSchedule.linear_flow()``.
            shift: of a flow's times.
            shape: (C, H, W) of x.
            student: the network to train, since a black box has no weights to copy. A diffusers ``UNet2DModel``, or any
                module called as ``student(x, t, condition)``. It is copied, never changed.
            value_range: (low, high) of its data, which images map to 0..255, rewards to [-1, 1], and beyond which
                errors do not count. None: it is measured on the teacher's outputs.
            guidance: classifier-free guidance; its ``null_class`` is the condition that means 'no class'. Of
                ``conditions`` it is their ``null``.
            fingerprint: names this function's outputs in the cache of pairs; None: pairs are not cached on disk.
        """
        fields = fields_of(
            predict,
            schedule=schedule,
            prediction_type=prediction_type,
            shape=shape,
            student=student,
            num_classes=num_classes,
            conditions=conditions,
            guidance=guidance,
            pixel_shuffle=pixel_shuffle,
        )
        made = cls(
            name=name,
            shift=shift,
            num_inference_steps=num_inference_steps,
            fingerprint=fingerprint or "",
            range_known=False,
            **fields,
        )
        return made.in_range(value_range)


def _by_table(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, table: StepTable) -> Tensor:
    def clean(k: int, x: Tensor) -> Tensor:
        t = torch.full((len(x),), float(table.timesteps[k]), device=x.device)
        x0: Tensor = table.clean(k, x, predict(x, t))
        return x0

    return run_steps(table, table.start(noise), None, clean)
