"""What a distillation run is asked to do: one frozen, validated object. The command line's options are its fields."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from redif_sdk.errors import InvalidRequest

DEFAULT_UPDATES = 600
#: Former names of settings, and the current ones. Accepted with a DeprecationWarning for one release.
RENAMED = {
    "earlier_rows": "intermediate_step_fraction",
    "gradient_rows": "backprop_last_k",
    "regression_rows": "regression_last_k",
    "anchor": "regression_weight",
    "matching": "dmd_weight",
    "matching_share": "dmd_fraction",
    "delta_over_e": "clip_mean_shift",
}
RENAMED_VALUES = {("supervision", "trajectory"): "per_step"}


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under their current names; each old one is a DeprecationWarning.

    Raises:
        InvalidRequest: a setting is given under both its old name and its new one.
    """
    found: dict[str, Any] = {}
    for old, value in settings.items():
        name = RENAMED.get(old, old)
        if name != old:
            _warn_renamed(f"the setting {old!r} is now called {name!r}")
            if name in settings:
                raise InvalidRequest(f"{old} and {name} are one setting; give {name} alone")
        if isinstance(value, str) and (name, value) in RENAMED_VALUES:
            _warn_renamed(f"{name}={value!r} is now {name}={RENAMED_VALUES[name, value]!r}")
            value = RENAMED_VALUES[name, value]
        found[name] = value
    return found


def _warn_renamed(message: str) -> None:
    warnings.warn(f"{message}; the old name goes with the next release", DeprecationWarning, stacklevel=3)


class DistillConfig(BaseModel):
    """A run's settings. Of the budgets (``updates``, ``seconds``,
    ``forward_equivalents``, ``teacher_calls``) the first to be spent ends it."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    num_inference_steps: int = Field(4, ge=1, le=64, description="The student's network calls an image, K.")
    method: str = Field("redif", description="redif, regression, progressive, consistency, dmd2, draft or grpo.")
    reward: Any = Field("feature", description="A name, an address, 'a+b', a callable, a list, or {reward: weight}.")
    reward_space: Literal["images", "latents"] = Field(
        "images", description="What rewards see: pictures, or a latent model's latents, undecoded."
    )
    updates: int | None = Field(None, ge=1, description="Optimiser updates.")
    seconds: float | None = Field(None, gt=0, description="Wall seconds of training.")
    forward_equivalents: float | None = Field(None, gt=0, description="Training's cost; the pool's is not in it.")
    teacher_calls: int | None = Field(None, ge=1, description="Teacher network calls for the pool of pairs.")
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Where to train; auto: a GPU if any.")

    pool_size: int = Field(4096, ge=8, description="Pairs of (noise, teacher's output).")
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-3, gt=0, description="Peak; a short warm-up, then a cosine to 0 over the run.")
    shard: bool = Field(False, description="Several processes: each keeps a part of the weights (FSDP2).")
    lora_rank: int = Field(0, ge=0, description="Train low-rank adapters of this rank (peft); 0: all weights.")
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(0.99, ge=0, lt=1)

    schedule_updates: int = Field(20, ge=0, description="redif: policy-gradient updates of the step table's times.")
    calibration: int = Field(0, ge=0, description="redif: pool entries on which the output's gain is learnt; 0: none.")
    warm_start: float = Field(0.7, ge=0, le=1, description="redif, draft, dmd2: share of the run that is regression.")
    estimator: Literal["same-state", "pathwise", "trajectory"] = "same-state"
    group_size: int = Field(16, ge=2, description="Actions a state (even), or trajectories a start.")
    exploration: float = Field(0.1, gt=0, description="e, the std of an action, in units of x0.")
    exploration_rank: int = Field(40, ge=0, description="Principal components of residuals; 0: white.")
    step_delta: float = Field(0.15, gt=0, description="redif, draft, dmd2: rms step of x0 along the direction.")
    supervision: Literal["rollout", "per_step"] = Field(
        "rollout", description="regression: of the output, or of every step's clean image."
    )
    segments: float = Field(
        0.0, ge=0, le=1, description="regression, warm starts: share that is by rows, along the teacher's own path."
    )
    huber: float = Field(0.0, ge=0, description="Width of the pseudo-Huber loss; 0: the squared error.")
    regression_weight: float = Field(1.0, ge=0, description="Weight of the squared error to the teacher's output.")
    dmd_weight: float = Field(0.0, ge=0, description="redif: weight of DMD's term beside the reinforcement; 0: none.")
    dmd_fraction: float = Field(1.0, gt=0, le=1, description="redif: fraction of the updates that have DMD's term.")
    regression_last_k: int = Field(
        0, ge=0, description="regression, warm starts: backpropagate through the last k steps; 0: all."
    )
    backprop_last_k: int = Field(
        0, ge=0, description="redif, draft, dmd2: backpropagate through the last k steps; 0: all."
    )
    intermediate_step_fraction: float = Field(
        0.0, ge=0, le=1, description="same-state: fraction of the updates that explore at a step before the last."
    )
    clip_mean_shift: float = Field(
        0.01, gt=0, description="trajectory: clip range, as an rms change of the mean in units of e."
    )
    kl: float = Field(0.0, ge=0, description="trajectory: weight of the KL to the network that the phase began with.")
    ppo_epochs: int = Field(1, ge=1, description="trajectory: optimiser steps on each batch of trajectories.")

    sde_window: int = Field(0, ge=0, description="grpo: noisy rows a trajectory, at a random place; 0: all.")
    fake_updates: int = Field(
        2, ge=1, description="dmd2, dmd_weight: updates of the fake score for one of the student."
    )
    gan_weight: float = Field(0.0, ge=0, description="dmd2: weight of a discriminator's loss; 0: none.")
    fake_learning_rate: float = Field(2e-4, gt=0, description="dmd2: of the fake score.")

    checkpoint_seconds: float = Field(30.0, ge=0)
    log_every: int = Field(10, ge=1)
    early_stop: int = Field(0, ge=0, description="Checks in a row that are no better, or look hacked; 0: never.")
    tracker: Literal["tensorboard"] | None = Field(None, description="accelerate's tracker, beside the log.")
    check_every: int = Field(100, ge=1, description="Updates between looks at recall and held-out error.")

    @model_validator(mode="before")
    @classmethod
    def _budget(cls, values: Any) -> Any:
        budgets = ("updates", "seconds", "forward_equivalents")
        if not isinstance(values, dict):
            return values
        values = current_names(values)
        return values | {"updates": DEFAULT_UPDATES} if all(values.get(name) is None for name in budgets) else values

    @model_validator(mode="after")
    def _even_group(self) -> DistillConfig:
        if self.estimator == "same-state" and self.group_size % 2:
            raise ValueError("group_size must be even: the actions are antithetic pairs")
        return self

    @model_validator(mode="after")
    def _segments_of_regression(self) -> DistillConfig:
        regression = {"regression": 1.0} | dict.fromkeys(("redif", "draft", "dmd2"), self.warm_start)
        share = regression.get(self.method, 0.0)
        if self.segments > share:
            raise ValueError(
                f"segments is {self.segments:g}, but {self.method} spends {share:g} of a run on regression; lower it"
                + (", or raise warm_start" if share else " to 0")
            )
        return self

    @classmethod
    def checked(cls, **values: Any) -> DistillConfig:
        """The config, or one clear :class:`InvalidRequest` in place of pydantic's report."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "the settings"
            given = f", not {first['input']!r}" if first["loc"] else ""
            raise InvalidRequest(f"{name}: {first['msg'].removeprefix('Value error, ')}{given}") from error
