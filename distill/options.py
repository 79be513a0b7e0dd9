"""The settings of each method: one options model a method (and estimator), so that what it does not read is refused.

To add a method: its model here and its line in ``Options`` and ``MODELS``; its file in ``methods/``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "CdmOptions",
    "ConsistencyOptions",
    "CriticOptions",
    "DistributionTerm",
    "Dmd2Options",
    "DmdOptions",
    "DraftOptions",
    "FakeScoreOptions",
    "GroupNoise",
    "GrpoOptions",
    "MethodOptions",
    "Options",
    "PathwiseOptions",
    "ProgressiveOptions",
    "RedifOptions",
    "RegressionOptions",
    "Rewarded",
    "SameStateOptions",
    "SgmdOptions",
    "Stepped",
    "Supervised",
    "Trajectories",
    "TrajectoryOptions",
    "WarmStarted",
    "model_of",
]


class MethodOptions(BaseModel):
    """What all options models have in common: they are frozen, and refuse unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    method: str


class Rewarded(MethodOptions):
    """Of the methods that follow a reward."""

    reward: Any = Field("feature", description="A name, an address, 'a+b', a callable, a list, or {reward: weight}.")
    reward_space: Literal["images", "latents"] = Field(
        "images", description="What rewards see: decoded images, or the latents of a latent diffusion model."
    )
    judge: Any = Field(
        None,
        description="A reward that nothing is trained on: checks ask it, and warn if it falls while the reward rises.",
    )


class Supervised(MethodOptions):
    """Of regression to the teacher's outputs: the whole run, or the warm start of another method."""

    supervision: Literal["rollout", "per_step"] = Field(
        "rollout", description="Regress the final output (rollout), or the clean image of every step (per_step)."
    )
    segments: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the run in which each step learns its own part of the teacher's trajectory.",
    )
    regression_last_k: int = Field(
        0, ge=0, description="Regression backpropagates through the last k steps of the rollout; 0 = all."
    )
    huber: float = Field(0.0, ge=0, description="Width c of the pseudo-Huber loss, in units of x0; 0 = squared error.")


class WarmStarted(Supervised):
    """Of the methods that begin with regression."""

    warm_start: float = Field(0.7, ge=0, le=1, description="Fraction of the run that is regression, at its beginning.")

    @model_validator(mode="after")
    def _segments_of_regression(self) -> WarmStarted:
        if self.segments > self.warm_start:
            raise ValueError(
                f"segments is {self.segments:g}, but {self.method} spends {self.warm_start:g} of a run on regression; "
                "lower it, or raise warm_start"
            )
        return self


class Stepped(MethodOptions):
    """Of the methods that move the output along a direction of a given length."""

    step_delta: float = Field(
        0.15, gt=0, description="Step size in x0 (rms) along the reward gradient or its estimate."
    )
    regression_weight: float = Field(1.0, ge=0, description="Weight of the regression to the teacher's output.")
    backprop_last_k: int = Field(
        0, ge=0, description="Backpropagate through the last k steps of the rollout (DRaFT-K); 0 = all."
    )


class FakeScoreOptions(MethodOptions):
    """Of the fake score: the term of DMD, and the reward "distribution"."""

    fake_updates: int = Field(2, ge=1, description="Updates of the fake score for each update of the student.")
    fake_learning_rate: float = Field(2e-4, gt=0, description="Learning rate of the fake score.")


class DistributionTerm(FakeScoreOptions):
    """Of the estimators that may have DMD's term beside the reward."""

    dmd_weight: float = Field(0.0, ge=0, description="Weight of the distribution matching term (DMD); 0 = none.")
    dmd_fraction: float = Field(1.0, gt=0, le=1, description="Fraction of the updates that have the DMD term.")


class Grouped(MethodOptions):
    """Of the estimators that compare groups."""

    group_size: int = Field(16, ge=2, description="Actions for each state, or trajectories for each initial noise.")


class Explored(Grouped):
    """Of the estimators that draw actions around the student's output."""

    exploration: float = Field(0.1, gt=0, description="Standard deviation of an action, in units of x0.")


class GroupNoise(Grouped):
    """Of the estimators whose groups may be of several initial noises."""

    group_noise: Literal["same", "different"] = Field(
        "same",
        description="A group's trajectories begin at one noise, or each at its own: for rewards that see the prompt.",
    )


class Trajectories(GroupNoise):
    """Of clipped policy gradient on whole stochastic trajectories."""

    regression_weight: float = Field(1.0, ge=0, description="Weight of the regression to the teacher's output.")
    huber: float = Field(0.0, ge=0, description="Width c of the pseudo-Huber loss, in units of x0; 0 = squared error.")
    clip_mean_shift: float = Field(
        0.01, gt=0, description="PPO's clip range, as an rms shift of the mean in units of `exploration`."
    )
    kl: float = Field(
        0.0, ge=0, description="Weight of the KL, a mean over elements, to the network that reinforcement began with."
    )
    ppo_epochs: int = Field(1, ge=1, description="Optimiser steps on each batch of trajectories.")


class RedifOptions(Rewarded, WarmStarted):
    """Of ``redif``, whatever the estimator."""

    method: Literal["redif"] = "redif"
    estimator: str
    schedule_updates: int = Field(
        20,
        ge=0,
        description="Policy-gradient updates of the step table's times, at most: they get a fifth of a budget of "
        "forward-equivalents or of seconds. 0 = the teacher's spacing.",
    )
    calibration: int = Field(0, ge=0, description="Samples used to fit a scalar output scale; 0 = off.")


class SameStateOptions(RedifOptions, Stepped, DistributionTerm, Explored):
    """Of ``redif`` with groups of actions at one state."""

    estimator: Literal["same-state"] = "same-state"
    exploration_rank: int = Field(40, ge=0, description="Rank of the exploration covariance; 0 = isotropic.")
    intermediate_step_fraction: float = Field(
        0.0, ge=0, le=1, description="Fraction of the updates that explore at a step before the last."
    )

    @model_validator(mode="after")
    def _even_group(self) -> SameStateOptions:
        if self.group_size % 2:
            raise ValueError(f"group_size must be even, not {self.group_size}: the actions are antithetic pairs")
        return self


class PathwiseOptions(RedifOptions, Stepped, DistributionTerm):
    """Of ``redif`` along the reward's own gradient."""

    estimator: Literal["pathwise"] = "pathwise"


class TrajectoryOptions(RedifOptions, Explored, Trajectories, FakeScoreOptions):
    """Of ``redif`` with groups of whole trajectories."""

    estimator: Literal["trajectory"] = "trajectory"
    exploration_rank: int = Field(40, ge=0, description="Rank of the exploration covariance; 0 = isotropic.")


class CriticOptions(RedifOptions, Stepped, DistributionTerm, Explored, GroupNoise):
    """Of ``redif`` with a critic that learns the reward."""

    estimator: Literal["critic"] = "critic"
    group_size: int = Field(4, ge=2, description="Images of each prompt, or of each state, that are compared.")
    critic_updates: int = Field(2, ge=1, description="Updates of the critic for each update of the student.")
    critic_learning_rate: float = Field(3e-4, gt=0, description="Learning rate of the critic.")
    critic_memory: int = Field(8192, ge=0, description="Judged images that the critic goes on learning from.")
    critic_noise: float = Field(
        0.5, gt=0.02, le=0.98, description="Largest time at which the critic looks, as a share of the schedule."
    )


class RegressionOptions(Supervised):
    """Of ``regression``."""

    method: Literal["regression"] = "regression"


class ProgressiveOptions(MethodOptions):
    """Of ``progressive``: none of its own."""

    method: Literal["progressive"] = "progressive"


class ConsistencyOptions(MethodOptions):
    """Of ``consistency``."""

    method: Literal["consistency"] = "consistency"
    huber: float = Field(0.0, ge=0, description="Width c of the pseudo-Huber loss, in units of x0; 0 = squared error.")


class DmdOptions(WarmStarted, Stepped, FakeScoreOptions):
    """Of ``dmd``."""

    method: Literal["dmd"] = "dmd"
    gan_weight: float = Field(0.0, ge=0, description="Weight of a discriminator's loss; 0 = none.")


class Dmd2Options(WarmStarted, FakeScoreOptions):
    """Of ``dmd2``, which has no regression unless it is begun with it."""

    method: Literal["dmd2"] = "dmd2"
    warm_start: float = Field(0.0, ge=0, le=1, description="Fraction of the run that is regression, at its beginning.")
    fake_updates: int = Field(5, ge=1, description="Updates of the fake score for each update of the student.")
    gan_weight: float = Field(0.003, ge=0, description="Weight of the student's loss against the classifier; 0 = none.")
    guidance_weight: float = Field(0.01, ge=0, description="Weight of the classifier's loss in the fake score's.")


class CdmOptions(WarmStarted, Stepped, FakeScoreOptions):
    """Of ``cdm``, which is not held to the teacher's outputs unless asked."""

    method: Literal["cdm"] = "cdm"
    regression_weight: float = Field(0.0, ge=0, description="Weight of the regression to the teacher's output.")
    schedule_steps: int | None = Field(
        None, ge=1, le=64, description="Steps of the random schedules, at most; default: twice the student's."
    )
    cdm_weight: float = Field(1.0, ge=0, description="Weight of the matching off the trajectory.")
    norm_floor: float = Field(
        0.1, ge=0, description="Least distance of an output to the real score's, in units of x0, that is divided by."
    )
    fake_pull: float = Field(
        0.001, ge=0, le=1, description="Share of the student that is merged into the fake score at each of its updates."
    )


class SgmdOptions(WarmStarted, FakeScoreOptions):
    """Of ``sgmd``, which is not held to the teacher's outputs unless asked."""

    method: Literal["sgmd"] = "sgmd"
    step_delta: float = Field(0.15, gt=0, description="Weight of the Fisher divergence beside the regression.")
    regression_weight: float = Field(0.0, ge=0, description="Weight of the regression to the teacher's output.")
    fake_updates: int = Field(1, ge=1, description="Updates of the fake score for each update of the student.")
    correction: float = Field(0.1, ge=0, description="Weight lambda of the correction for a fake score that lags.")


class DraftOptions(Rewarded, WarmStarted, Stepped, FakeScoreOptions):
    """Of ``draft``."""

    method: Literal["draft"] = "draft"


class GrpoOptions(Rewarded, Trajectories, FakeScoreOptions):
    """Of ``grpo``, which is not held to the teacher's outputs unless asked."""

    method: Literal["grpo"] = "grpo"
    regression_weight: float = Field(0.0, ge=0, description="Weight of the regression to the teacher's output.")
    kl: float = Field(
        0.04, ge=0, description="Weight of the KL, a mean over elements, to the network that the run began with."
    )
    eta: float = Field(0.7, gt=0, le=1, description="Noise between steps while training, DDIM's eta.")
    sde_window: int = Field(
        0, ge=0, description="Number of stochastic steps per trajectory (random window); 0 = all steps."
    )


Redif = Annotated[
    SameStateOptions | PathwiseOptions | TrajectoryOptions | CriticOptions, Field(discriminator="estimator")
]
Options = Annotated[
    Redif
    | RegressionOptions
    | ProgressiveOptions
    | ConsistencyOptions
    | DmdOptions
    | Dmd2Options
    | CdmOptions
    | SgmdOptions
    | DraftOptions
    | GrpoOptions,
    Field(discriminator="method"),
]

ESTIMATORS: dict[str, type[RedifOptions]] = {
    "same-state": SameStateOptions,
    "pathwise": PathwiseOptions,
    "trajectory": TrajectoryOptions,
    "critic": CriticOptions,
}
#: The options of each method; of ``redif`` those of its default estimator.
MODELS: dict[str, type[MethodOptions]] = {
    "redif": SameStateOptions,
    "regression": RegressionOptions,
    "progressive": ProgressiveOptions,
    "consistency": ConsistencyOptions,
    "dmd": DmdOptions,
    "dmd2": Dmd2Options,
    "cdm": CdmOptions,
    "sgmd": SgmdOptions,
    "draft": DraftOptions,
    "grpo": GrpoOptions,
}
#: Every setting that some method reads and others do not.
NAMES = frozenset(name for model in (*MODELS.values(), *ESTIMATORS.values()) for name in model.model_fields)


def model_of(method: str = "redif", estimator: str = "same-state") -> type[MethodOptions]:
    """The options model of a method; ``estimator`` chooses among those of ``redif``.

    Raises:
        ValueError: there is no such method or estimator; the message lists those there are.
    """
    if method not in MODELS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(sorted(MODELS))}")
    if method != "redif":
        return MODELS[method]
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[estimator]
