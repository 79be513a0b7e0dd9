"""What a teacher is to the distiller, and the two doors through which foreign models enter.

``Teacher.from_diffusers`` takes a diffusers folder or pipeline; ``Teacher.from_callable`` takes any function
``(x, t, condition) -> f`` with its noise schedule and prediction type. Everything behind the doors sees one thing: a
network, a schedule, a prediction type, and how latents become images. No method, reward or loop lives here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel
from redif_sdk.hub import fetch, is_hub_id
from redif_sdk.manifest import Condition, Guidance, Latents, Postprocess, calls_per_step
from redif_sdk.steps import NoiseSchedule, StepTable

SHIPPED = Path(__file__).parent / "teachers"
TEACHER_FILE = "redif_teacher.json"
HUB_FILES = (TEACHER_FILE, "model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json")

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(predict: Predict, guidance: Guidance | None, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """``predict``'s output (B, C, H, W) under ``guidance``: one call on a doubled batch."""
    if guidance is None or condition is None:
        return predict(x, t, condition)
    null = torch.full_like(condition, guidance.null_class)
    asked, unasked = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null])).chunk(2)
    mixed: Tensor = guidance.mix(asked, unasked)
    return mixed


class Denoiser(nn.Module):
    """A network behind one signature: ``(x (B, C, H, W), t (B,) float32, condition (B,) int64 or None) -> f``.

    ``f`` is the first C channels of what the network gives (learned-variance networks give 2C). ``guidance``: it is
    the guided output, at two calls of the network.
    """

    def __init__(self, network: nn.Module, *, diffusers_call: bool, guidance: Guidance | None = None) -> None:
        super().__init__()
        self.network = network
        self.diffusers_call = diffusers_call
        self.guidance = guidance

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return guided(self._call, self.guidance, x, t, condition)

    def _call(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if not self.diffusers_call:
            out = self.network(x, t, condition)
        elif condition is None:
            out = self.network(x, t).sample
        else:
            out = self.network(x, t, class_labels=condition).sample
        return out[:, : x.shape[1]]


@dataclass(frozen=True)
class Teacher:
    """A diffusion model to distil.

    ``predict`` is called with x (B, C, H, W) float32, t (B,) float32 and the condition (B,) int64 or None, and is a
    black box: no gradient is asked of it. ``make_student`` returns a fresh trainable network with the same signature.
    A teacher with ``guidance`` makes two calls a step; its student learns the guided output and makes one.
    """

    name: str
    predict: Predict
    schedule: NoiseSchedule
    prediction_type: str
    latents: Latents
    condition: Condition | None
    postprocess: Postprocess
    num_inference_steps: int
    make_student: Callable[[], nn.Module]
    network_folder: str | None = "unet"
    licence: str = "unknown"
    revision: str | None = None  # the commit, of a teacher from the Hub
    folder: Path | None = None
    scheduler_config: dict[str, Any] | None = None  # as the folder has it
    shift: float = 1.0  # of a flow's times
    fingerprint: str = ""
    guidance: Guidance | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.latents.channels, self.latents.height, self.latents.width

    @property
    def calls_per_step(self) -> int:
        """Network calls on one image for each step: two with guidance."""
        return calls_per_step(self.guidance)

    @property
    def identity(self) -> str:
        """Names this teacher's outputs: its weights and its guidance. Empty: unknown, outputs are not cached."""
        if not self.fingerprint or self.guidance is None:
            return self.fingerprint
        return f"{self.fingerprint} guidance {self.guidance.scale:g} {self.guidance.null_class}"

    def guided(self, scale: float, null_class: int | None = None) -> Teacher:
        """This teacher under classifier-free guidance of ``scale``; 1 is none.

        Args:
            null_class: the entry of the class table that means 'no class'; None: the one the teacher comes with.

        Raises:
            InvalidRequest: a scale that is not above 0, or no 'no class' entry is known.
        """
        if not 0 < scale < math.inf:
            raise InvalidRequest(f"guidance_scale must be a number above 0, not {scale:g}")
        if scale == 1:
            return replace(self, guidance=None)
        if null_class is None:
            null_class = self.extra.get("null_class")
        if self.condition is None or null_class is None:
            raise InvalidRequest(
                f"{self.name} has no 'no class' entry (null_class), so it cannot be guided; use guidance_scale 1"
            )
        return replace(self, guidance=Guidance(scale=scale, null_class=null_class))

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The teacher's output f (B, C, H, W), guided where it has guidance. Arguments as for ``predict``."""
        return guided(self.predict, self.guidance, x, t, condition)

    def table(self, num_inference_steps: int, *, eta: float = 0.0) -> StepTable:
        """DDIM with trailing spacing: the untrained student, and the teacher's own sampler. For flows it is Euler's
        method on linspace(1, 1 / K, K), shifted."""
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
        """The teacher's deterministic output (eta = 0) for ``noise`` (B, C, H, W): latents of the same shape."""
        table = self.table(num_inference_steps or self.num_inference_steps)
        x = table.init_scale * noise
        for k, t in enumerate(table.timesteps):
            f = self(x, torch.full((len(x),), float(t), device=x.device), condition)
            x = table.advance(k, x, table.clean(k, x, f))
        return x

    def images(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, C', H', W'), unclamped, in the value range of ``postprocess``."""
        factor = self.postprocess.pixel_shuffle
        return F.pixel_shuffle(latents, factor) if factor > 1 else latents

    def latents_of(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images` (a permutation)."""
        factor = self.postprocess.pixel_shuffle
        return F.pixel_unshuffle(images, factor) if factor > 1 else images

    def labels(self, index: np.ndarray) -> Tensor | None:
        """The condition of pool entry ``index``: classes in turn, so that every batch of indices is balanced."""
        return None if self.condition is None else torch.as_tensor(index % self.condition.num_classes).long()

    @classmethod
    def load(cls, source: Any) -> Teacher:
        """A shipped teacher's name, a diffusers folder or its Hub id, a pipeline, or a :class:`Teacher` itself."""
        if isinstance(source, Teacher):
            return source
        if not isinstance(source, (str, Path)):
            return cls.from_diffusers(source)
        if (SHIPPED / str(source) / TEACHER_FILE).is_file():
            return cls.from_diffusers(SHIPPED / str(source))
        if not Path(source).exists() and is_hub_id(str(source)):
            folder = fetch(str(source), HUB_FILES)
            return replace(cls.from_diffusers(folder), name=str(source), revision=folder.name)
        return cls.from_diffusers(Path(source))

    @classmethod
    def from_diffusers(cls, source: Any) -> Teacher:
        """From a diffusers folder (``unet/`` + ``scheduler/``, UNet2DModel) or a pipeline that has the two.

        ``redif_teacher.json`` beside ``model_index.json`` says what diffusers has no place for: class names, steps,
        the pixel shuffle, guidance. Without it: 50 steps, no names, latents are pixels, no guidance.

        Raises:
            InvalidRequest: the folder is not there, or is no diffusers folder.
            UnsupportedModel: a network or scheduler that this adapter does not take.
        """
        from diffusers import UNet2DModel

        if isinstance(source, (str, Path)):
            network, scheduler_config, about, folder = _read_folder(Path(source))
        else:
            folder, about = None, {}
            network, scheduler = getattr(source, "unet", None), getattr(source, "scheduler", None)
            if not isinstance(network, UNet2DModel) or scheduler is None:
                raise UnsupportedModel(
                    f"the pipeline {type(source).__name__} has no UNet2DModel and scheduler; "
                    "pass its network with Teacher.from_callable"
                )
            scheduler_config = {"_class_name": type(scheduler).__name__, **scheduler.config}
        config, size = network.config, network.config.sample_size
        if config.class_embed_type is not None:
            raise UnsupportedModel(
                f"class_embed_type {config.class_embed_type!r} is not supported; only a class table is"
            )
        height, width = (size, size) if isinstance(size, int) else size
        classes = about.get("num_classes", config.num_class_embeds)
        network = network.float().eval().requires_grad_(False)
        denoiser = Denoiser(network, diffusers_call=True)

        @torch.no_grad()
        def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            out: Tensor = denoiser.to(x.device)(x, t, condition)
            return out

        schedule, prediction_type, shift = _noise_process(scheduler_config)
        teacher = cls(
            name=about.get("name", folder.name if folder else type(source).__name__),
            predict=predict,
            schedule=schedule,
            prediction_type=prediction_type,
            shift=shift,
            latents=Latents(channels=config.in_channels, height=height, width=width),
            condition=Condition(kind="class", num_classes=classes, class_names=about.get("class_names"))
            if classes
            else None,
            postprocess=Postprocess(pixel_shuffle=about.get("pixel_shuffle", 1)),
            num_inference_steps=about.get("num_inference_steps", 50),
            make_student=lambda: Denoiser(copy.deepcopy(network).requires_grad_(True), diffusers_call=True),
            licence=about.get("licence", "unknown"),
            folder=folder,
            scheduler_config=scheduler_config if folder is not None else None,
            fingerprint=_fingerprint(network, scheduler_config),
            extra=about,
        )
        return teacher.guided(about.get("guidance_scale", 1.0))

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
        guidance: Guidance | None = None,
        shift: float = 1.0,
        num_inference_steps: int = 50,
        pixel_shuffle: int = 1,
        name: str = "callable",
        fingerprint: str | None = None,
    ) -> Teacher:
        """Any function ``(x, t, condition) -> f``: a score model, a denoiser, a network behind an API.

        Args:
            predict: ``x`` (B, C, H, W) float32, ``t`` (B,) float32, ``condition`` (B,) int64 or None -> (B, C, H, W).
            schedule: its noise schedule; ``t`` indexes it.
            prediction_type: what ``f`` is: epsilon, v_prediction, sample, score, or flow (noise minus data), whose
                schedule is ``NoiseSchedule.linear_flow()``.
            shift: of a flow's times.
            shape: (C, H, W) of x.
            student: the network to train, since a black box has no weights to copy. A diffusers ``UNet2DModel``, or any
                module called as ``student(x, t, condition)``. It is copied, never changed.
            guidance: classifier-free guidance; its ``null_class`` is what ``predict`` is asked for without a class.
            fingerprint: names this function's outputs in the cache of pairs; None: pairs are not cached on disk.
        """
        diffusers_call = type(student).__module__.startswith("diffusers.")
        if schedule.flow != (prediction_type == "flow"):
            raise InvalidRequest(
                f"the prediction type {prediction_type} and this noise schedule do not belong together; "
                "a flow has NoiseSchedule.linear_flow(), and nothing else has"
            )
        return cls(
            name=name,
            shift=shift,
            predict=torch.no_grad()(predict),
            schedule=schedule,
            prediction_type=prediction_type,
            latents=Latents(channels=shape[0], height=shape[1], width=shape[2]),
            condition=Condition(kind="class", num_classes=num_classes, class_names=None) if num_classes else None,
            postprocess=Postprocess(pixel_shuffle=pixel_shuffle),
            num_inference_steps=num_inference_steps,
            make_student=lambda: Denoiser(copy.deepcopy(student).requires_grad_(True), diffusers_call=diffusers_call),
            network_folder="unet",
            fingerprint=fingerprint or "",
            guidance=guidance,
        )


def _read_folder(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any], Path]:
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir() and p.name[0] not in "._"))
        raise InvalidRequest(
            f"{folder} is no folder and no shipped teacher; give a diffusers folder or one of: {known}"
        )
    for needed in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / needed).is_file():
            raise InvalidRequest(f"{folder} is no teacher: {needed} is missing; give a folder saved by diffusers")
    try:
        about = json.loads((folder / TEACHER_FILE).read_text()) if (folder / TEACHER_FILE).is_file() else {}
        scheduler_config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        class_name = json.loads((folder / "unet/config.json").read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{folder} is no teacher: a JSON file in it does not parse ({error})") from error
    if class_name != "UNet2DModel":
        raise UnsupportedModel(f"{folder}/unet is a {class_name}; this adapter takes UNet2DModel")
    try:
        network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(f"the weights in {folder}/unet cannot be read: {first}; copy the teacher again") from error
    return network, scheduler_config, about, folder


def _noise_process(scheduler_config: dict[str, Any]) -> tuple[NoiseSchedule, str, float]:
    """A scheduler's noise schedule, prediction type and, of a flow, its shift."""
    if "FlowMatch" not in scheduler_config.get("_class_name", ""):
        kind = scheduler_config.get("prediction_type", "epsilon")
        return NoiseSchedule.from_config(scheduler_config), kind, 1.0
    if scheduler_config.get("use_dynamic_shifting"):
        raise UnsupportedModel("the scheduler shifts its times by the image's size; set use_dynamic_shifting to false")
    schedule = NoiseSchedule.linear_flow(scheduler_config.get("num_train_timesteps", 1000))
    return schedule, "flow", float(scheduler_config.get("shift", 1.0))


def _fingerprint(network: nn.Module, scheduler_config: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(scheduler_config, sort_keys=True, default=str).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_deterministic(teacher: Teacher) -> None:
    """A teacher whose output for one input changes cannot be paired with a student.

    Raises:
        RedifError: two calls on equal inputs differ.
    """
    x = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0))
    t, condition = torch.full((2,), len(teacher.schedule) / 2), teacher.labels(np.arange(2))
    first, second = teacher(x, t, condition), teacher(x, t, condition)
    if not torch.equal(first, second):
        raise RedifError(
            f"the teacher {teacher.name} gives two outputs for one input; switch its dropout or noise off: "
            "pairs need a deterministic teacher"
        )
