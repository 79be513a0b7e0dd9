"""A pipeline's own scheduler: the teacher's sampler for targets, and the step table of an imported pipeline.

Both are what diffusers computes. Targets run the scheduler itself. A table is compared with the scheduler's own loop,
on a small random function in place of the network, before it is used. Other schedulers are refused by name.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.teachers.known_schedulers import (
    KNOWN,
    errors_of,
    full_config,
    make_scheduler,
    usual_steps,
)
from redif_sdk.errors import InvalidRequest, UnsupportedModel, first_line
from redif_sdk.sampling.scheduler_keys import check_keys
from redif_sdk.sampling.table import NoiseSchedule, StepTable

if TYPE_CHECKING:
    from redif_sdk.distill.teachers.base import Teacher

__all__ = ["OwnScheduler", "Sampler", "own_table", "run_table"]

#: (predict (x, t) -> f, noise (B, C, H, W), steps) -> latents (B, C, H, W)
Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, int], Tensor]

_DISCRETE_KINDS = ("epsilon", "sample", "v_prediction")
_NO_SIGNAL = 1e-6  # diffusers puts alpha = 2^-12 in place of 0 in samplers that divide by it
_TABLE_ERROR = 1e-3  # of the largest value; a level of 255 is 8e-3 of [-1, 1]


@dataclass(frozen=True)
class OwnScheduler:
    """A pipeline's scheduler, which is copied before it is used.

    Attributes:
        scheduler: diffusers' object.
        schedule, prediction_type: of `noise_process`.
        flux: the pipeline asks for K equal noise levels, as Flux' does, not for the scheduler's own.
        shift: of a flow whose scheduler shifts its times by the image's size.
    """

    scheduler: Any
    schedule: NoiseSchedule
    prediction_type: str
    flux: bool = False
    shift: float = 1.0
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", copy.deepcopy(self.scheduler))
        object.__setattr__(self, "config", full_config(self.scheduler))
        check_keys(self.name, self.config)

    @property
    def name(self) -> str:
        """The scheduler's class."""
        return type(self.scheduler).__name__

    @property
    def clips(self) -> list[str]:
        """The options that are switched on and that no step table has."""
        return [name for name in ("clip_sample", "thresholding") if self.config.get(name)]

    def deterministic(self) -> Any:
        """The scheduler that makes targets; None: DDIM on the trailing grid does."""
        target = KNOWN[self.name]
        if target is None:
            return None
        algorithm = str(self.config.get("algorithm_type", ""))
        if target == self.name and not algorithm.startswith("sde-") and not self.config.get("stochastic_sampling"):
            return self.scheduler
        quiet = {"stochastic_sampling": False, "algorithm_type": "dpmsolver++"}
        return make_scheduler(
            {**self.config, **{key: value for key, value in quiet.items() if key in self.config}}, target
        )

    def remark(self) -> str:
        """What is to be said of targets that are not the scheduler's own; "" where they are."""
        made = self.deterministic()
        if made is self.scheduler:
            return ""
        by = "DDIM on the trailing grid" if made is None else f"{type(made).__name__} with the same settings"
        if type(made).__name__ == self.name:
            by = f"{self.name} without its noise"
        return f"{self.name} draws noise at every step, and targets need one output for one noise: {by} makes them"

    def run(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        steps: int,
        *,
        scheduler: Any = None,
        seed: int | None = None,
    ) -> Tensor:
        """diffusers' own loop: latents (B, C, H, W) of ``noise``.

        Args:
            scheduler: another one in place of the pipeline's own.
            seed: step k draws its noise from torch's generator with the seed ``seed + k``.
        """
        own = copy.deepcopy(self.scheduler if scheduler is None else scheduler)  # it keeps the state of one run
        with errors_of(self.name):
            self._set_times(own, steps)
        x = noise * float(getattr(own, "init_noise_sigma", 1.0))
        more = {"eta": 0.0} if "eta" in inspect.signature(own.step).parameters else {}  # as the pipelines say it
        for k, t in enumerate(own.timesteps):
            given = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
            f = predict(given, t.to(x.device, torch.float32).expand(len(x)))
            with _seeded(None if seed is None else seed + k):
                x = own.step(f, t, x, return_dict=False, **more)[0]
        return x.to(noise.dtype)

    def _set_times(self, own: Any, steps: int) -> None:
        more: dict[str, Any] = {}
        if self.config.get("use_dynamic_shifting"):
            exponential = self.config.get("time_shift_type", "exponential") == "exponential"
            more["mu"] = math.log(self.shift) if exponential else self.shift
        if self.flux and not self.config.get("use_flow_sigmas"):
            own.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), **more)
        else:
            own.set_timesteps(steps, **more)

    def sampler(self) -> Sampler | None:
        """What samples targets; None where no deterministic scheduler does."""
        scheduler = self.deterministic()
        if scheduler is None:
            return None

        @torch.no_grad()
        def sample(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
            return self.run(predict, noise, num_inference_steps, scheduler=scheduler)

        return sample

    @torch.no_grad()
    def checked_schedule(self, steps: int, channels: int) -> NoiseSchedule:
        """The noise schedule, after a run of ``steps`` on a small function in place of the network.

        Where the schedule ends without signal, an epsilon network's is cut above the first time that is visited.

        Raises:
            UnsupportedModel: the scheduler fails with this configuration, or gives values that are not finite.
            InvalidRequest: it has fewer steps.
        """
        discrete = not self.schedule.flow and self.schedule.edm is None
        if discrete and self.prediction_type not in _DISCRETE_KINDS:
            raise UnsupportedModel(
                f"{self.name} has prediction_type {self.prediction_type!r}; use one with "
                f"{', '.join(_DISCRETE_KINDS)}, or flow_prediction on flow sigmas"
            )
        most = usual_steps(self.config, steps)
        if discrete and most < steps:
            raise InvalidRequest(
                f"{steps} teacher steps are asked for, but {self.name} has only {most}; use --teacher-steps {most}"
            )
        scheduler, times = self.deterministic(), list[float]()
        if scheduler is not None:

            def predict(x: Tensor, t: Tensor) -> Tensor:
                times.append(float(t[0]))
                return torch.tanh(x) + 0.5

            noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
            with errors_of(self.name):
                out = self.run(predict, noise, steps, scheduler=scheduler)
        cut = discrete and self.schedule.alphas[-1] < _NO_SIGNAL and self.prediction_type == "epsilon"
        if cut and (not times or max(times) > len(self.schedule) - 2):
            raise UnsupportedModel(
                f"{self.name} has rescale_betas_zero_snr and visits the last time, where an epsilon network does "
                "not give the clean image; use timestep_spacing leading, or a v_prediction network"
            )
        if scheduler is not None and not bool(torch.isfinite(out).all()):
            raise UnsupportedModel(
                f"{self.name} gives values that are not finite at {steps} steps; check its noise schedule and options"
            )
        if not cut:
            return self.schedule
        kept = math.ceil(max(times)) + 1
        return NoiseSchedule(self.schedule.alphas[:kept], self.schedule.sigmas[:kept])

    # ------------------------------------------------------------------ import

    def table(self, num_inference_steps: int) -> StepTable:
        """The step table that samples as the scheduler does, clipping aside; compared with the scheduler itself.

        Raises:
            UnsupportedModel: no table says what the scheduler does. The message names one that has a table.
        """
        try:
            table = self._read(num_inference_steps)
            with errors_of(self.name):
                error = self._table_error(table, num_inference_steps)
        except UnsupportedModel as reason:
            raise UnsupportedModel(f"{first_line(reason)}{self._advice()}") from reason
        if not error <= _TABLE_ERROR:
            raise UnsupportedModel(
                f"{self.name} at {num_inference_steps} steps is not a step table: it uses several network outputs in "
                f"one update, or an option that a table does not have{self._advice()}"
            )
        return table

    def _advice(self) -> str:
        flow, edm = self.schedule.flow, self.schedule.edm is not None
        other = "FlowMatchEulerDiscreteScheduler" if flow else "EDMEulerScheduler" if edm else "DDIMScheduler"
        return "" if self.name == other else f"; import it with --scheduler {other}"

    def _read(self, steps: int) -> StepTable:
        if self.flux and self.name == "FlowMatchEulerDiscreteScheduler":
            total = len(self.schedule) - 1
            return StepTable.flow_euler(num_inference_steps=steps, shift=self.shift, time_scale=total)
        config = self.config
        if config.get("use_dynamic_shifting") and self.name == "FlowMatchEulerDiscreteScheduler":
            total = len(self.schedule) - 1
            levels = np.linspace(1.0, 1.0 / total, steps).tolist()
            return StepTable.flow_euler(sigmas=levels, shift=self.shift, time_scale=total)
        eta = 1.0 if self.name in ("DDPMScheduler", "DDPMParallelScheduler") else 0.0
        return StepTable.from_scheduler(config, num_inference_steps=steps, eta=eta)

    @torch.no_grad()
    def _table_error(self, table: StepTable, steps: int) -> float:
        """The largest difference between table and scheduler on a small function, in units of the largest value."""
        plain = self.scheduler
        if self.clips:
            plain = type(plain).from_config(plain.config, **dict.fromkeys(self.clips, False))
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            # of the time too, so that a table with other times differs
            phase = (t.double() * 0.7).sin().to(x.dtype).view(-1, 1, 1, 1)
            return torch.tanh(0.8 * x + 0.3 * phase) + 0.4 * phase

        theirs = self.run(predict, noise, steps, scheduler=plain, seed=7)
        ours = run_table(table, predict, noise, seed=7)
        return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


def run_table(
    table: StepTable, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, seed: int | None = None
) -> Tensor:
    """Latents (B, C, H, W) by a table, whose noise is drawn as `OwnScheduler.run` draws it."""
    x = table.start(noise)
    for k, time in enumerate(table.timesteps):
        f = predict(x, torch.full((len(x),), float(time), device=x.device))
        with _seeded(None if seed is None else seed + k):
            z = torch.randn(x.shape)
        x = table.advance(k, x, table.clean(k, x, f), z.to(x.device))
    out: Tensor = x
    return out


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from torch's own generator with this seed, and leave it as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield


def own_table(teacher: Teacher, num_inference_steps: int) -> StepTable:
    """The table of a pipeline's own scheduler at K steps; of a teacher that is no pipeline, its DDIM table.

    Raises:
        UnsupportedModel: no table says what the scheduler does.
    """
    if teacher.own is None:
        return teacher.table(num_inference_steps)
    return teacher.own.table(num_inference_steps)
