"""What a distillation run is asked to do: one frozen, validated object.

All methods share the fields of :class:`DistillConfig`; what one method reads and others do not is in its ``options``
(``options.py``). Settings are given and written flat, as ``DistillConfig(method="draft", step_delta=1.2)``.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from redif_sdk.distill.options import NAMES, MethodOptions, Options, SameStateOptions, model_of
from redif_sdk.errors import InvalidRequest

DEFAULT_UPDATES = 600
BUDGETS = ("updates", "seconds", "forward_equivalents")
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

#: Methods that can train a student over a range of guidance scales.
RANGED = ("redif", "regression", "draft", "grpo", "progressive", "consistency")

#: Methods that follow a reward, and the settings of phases in which they follow the teacher's outputs alone.
REINFORCED, TOWARDS_TEACHER = ("redif", "draft", "grpo"), ("warm_start", "segments", "calibration")

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class DistillConfig(BaseModel):
    """A run's settings: those that all methods share, and the ``options`` of its method.

    Of the budgets ``updates``, ``seconds`` and ``forward_equivalents`` the first to be spent ends the run. Phases and
    learning rate follow ``updates`` or ``forward_equivalents`` where one is given; ``seconds`` beside them are a safety
    net, which cuts the run and says so. Settings are
    given flat; one that the method does not read is refused. ``config.exploration`` reads through to the options.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    num_inference_steps: int = Field(4, ge=1, le=64, description="Network calls of the student for an image, K.")
    options: Options = Field(default_factory=SameStateOptions, description="The settings of the method.")
    updates: int | None = Field(None, ge=1, description="Budget: optimiser updates.")
    seconds: float | None = Field(None, gt=0, description="Budget: wall seconds of training; beside updates, a limit.")
    forward_equivalents: float | None = Field(
        None, gt=0, description="Budget: cost of training in forward passes of the student on one image."
    )
    teacher_calls: int | None = Field(None, ge=1, description="Budget: network calls of the teacher for the pool.")
    teacher_steps: int | None = Field(
        None, ge=1, le=1000, description="Steps of the teacher's sampler for each of its outputs; default: its own."
    )
    guidance_range: tuple[float, float] | None = Field(
        None, description="Guidance scales (low, high) that the student learns and takes as an input; default: one."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of every random draw.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N; auto = a GPU if there is one."
    )

    targets: Literal["teacher", "start"] = Field(
        "teacher",
        description="Whose output a pair holds: the teacher's; or the start's own, at few calls: then regression is "
        "a leash to the start.",
    )
    pool_size: int = Field(4096, ge=8, description="Pairs of (noise, teacher's output) to train on.")
    batch_size: int = Field(64, ge=2, description="Pairs in an update.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate: a short warm-up, then a cosine to 0.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="Decay of the weights' moving average, per update.")
    lora_rank: int | None = Field(
        None,
        ge=0,
        description="Rank of low-rank adapters (peft) to train; 0 = train all weights; default: by the network's size.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="In which networks compute while training; auto = bf16 where the hardware has it."
    )
    micro_batch_size: int | None = Field(
        None, ge=0, description="Images that networks take at once; 0 = all of a batch; default: by the network's size."
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Compute activations again instead of keeping them; default: by the network's size."
    )
    shard: bool = Field(False, description="Several processes: each keeps a part of the weights (FSDP2).")

    checkpoint_seconds: float = Field(30.0, ge=0, description="Seconds between checkpoints.")
    log_every: int = Field(10, ge=1, description="Updates between lines of the log.")
    check_every: int = Field(100, ge=1, description="Updates between checks of recall and error on the pool.")
    keep: Literal["best", "last"] = Field(
        "best", description="Weights that a run ends with: its best on pairs kept from training, or its last."
    )
    early_stop: int = Field(
        0, ge=0, description="Stop after this many checks in a row without a better reward; 0 = never."
    )
    tracker: Literal["tensorboard"] | None = Field(None, description="Also write figures and images for a tracker.")

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None: ...

    else:  # flat access to what the method reads

        def __getattr__(self, name: str) -> Any:
            options = self.__dict__.get("options")
            if options is not None and name in type(options).model_fields:
                return getattr(options, name)
            if options is not None and name in NAMES:
                raise AttributeError(f"{_title(type(options))} does not read {name}")
            return super().__getattr__(name)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.options.method

    @model_validator(mode="before")
    @classmethod
    def _sorted(cls, values: Any) -> Any:
        """Flat settings into the common ones and the method's options; a default budget if none is given."""
        if not isinstance(values, dict):
            return values
        values = current_names(values)
        if "options" not in values:
            values = _with_options(values)
        return (
            values if any(values.get(name) is not None for name in BUDGETS) else values | {"updates": DEFAULT_UPDATES}
        )

    @model_validator(mode="after")
    def _guided_over(self) -> DistillConfig:
        if self.guidance_range is not None:
            check_range(*self.guidance_range, self.method)
        return self

    @model_validator(mode="after")
    def _leashed(self) -> DistillConfig:
        if self.targets == "teacher":
            return self
        if self.method not in REINFORCED:
            raise InvalidRequest(
                f"the method {self.method} has nothing to learn from the start's own outputs (targets: start); use one "
                f"of {', '.join(REINFORCED)}"
            )
        if phases := [name for name in TOWARDS_TEACHER if self.get(name)]:
            raise InvalidRequest(
                f"targets is start, whose outputs the student gives already; set {' and '.join(phases)} to 0"
            )
        return self

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in handler(self).items():
            flat |= value if name == "options" else {name: value}
        return flat

    @classmethod
    def checked(cls, **settings: Any) -> DistillConfig:
        """The config, or one clear :class:`InvalidRequest` in place of pydantic's report."""
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "value_error":
                raise InvalidRequest(message) from error
            raise InvalidRequest(f"{first['loc'][-1]}: {message}, not {first['input']!r}") from error

    def settings(self) -> dict[str, Any]:
        """All settings that the run reads, flat, by name."""
        common = {name: getattr(self, name) for name in COMMON}
        return {**common, **{name: getattr(self.options, name) for name in type(self.options).model_fields}}

    def get(self, name: str, default: Any = None) -> Any:
        """A setting by name; ``default`` where the method does not read it."""
        if name in COMMON:
            return getattr(self, name)
        return getattr(self.options, name) if name in type(self.options).model_fields else default

    def options_as(self, kind: type[OptionsT]) -> OptionsT:
        """The options, which must be of this kind.

        Raises:
            TypeError: the method of this run has other options.
        """
        if not isinstance(self.options, kind):
            raise TypeError(f"{_title(type(self.options))} has no {kind.__name__}")
        return self.options

    def replaced(self, **changes: Any) -> DistillConfig:
        """A copy with these settings changed. With another method, settings that it does not read are left out.

        Raises:
            InvalidRequest: a changed setting is wrong, or is not read.
        """
        changes = current_names(changes)
        kept = applicable({**self.settings(), **{k: v for k, v in changes.items() if k in ("method", "estimator")}})
        return self.checked(**{**kept, **changes})


def check_range(low: float, high: float, method: str = "regression") -> None:
    """Raise InvalidRequest unless ``method`` can train a student over these guidance scales."""
    if not 1 <= low < high < math.inf:
        raise InvalidRequest(
            f"guidance_range is {low:g} to {high:g}; give two guidance scales, the lower first, from 1 (no guidance) on"
        )
    if method not in RANGED:
        raise InvalidRequest(
            f"the method {method} cannot learn a range of guidance scales (guidance_range); use one of "
            f"{', '.join(RANGED)}, or one guidance_scale"
        )


#: The settings that all methods share.
COMMON = tuple(name for name in DistillConfig.model_fields if name != "options")


def setting_names() -> list[str]:
    """Every setting of every method, sorted."""
    return sorted({*COMMON, *NAMES})


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """The message for a setting that is not among the ``known`` ones; it names the most similar."""
    similar = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    return f"unknown setting {name!r}; {hint}known: {', '.join(known)}"


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under their current names; each former one is a DeprecationWarning.

    Raises:
        InvalidRequest: a setting is given under both its former name and its current one.
    """
    found: dict[str, Any] = {}
    for former, value in settings.items():
        name = RENAMED.get(former, former)
        if name != former:
            _warn_renamed(f"the setting {former!r} is now called {name!r}")
            if name in settings:
                raise InvalidRequest(f"{former} and {name} are one setting; give {name} alone")
        if isinstance(value, str) and (name, value) in RENAMED_VALUES:
            _warn_renamed(f"{name}={value!r} is now {name}={RENAMED_VALUES[name, value]!r}")
            value = RENAMED_VALUES[name, value]
        found[name] = value
    return found


def applicable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of current names of settings, those that the method among them reads: for settings that many methods share."""
    model = _model(settings)
    return {name: value for name, value in settings.items() if name in COMMON or name in model.model_fields}


def _model(settings: Mapping[str, Any]) -> type[MethodOptions]:
    return model_of(settings.get("method", "redif"), settings.get("estimator", "same-state"))


def _with_options(values: dict[str, Any]) -> dict[str, Any]:
    model = _model(values)
    unknown = [name for name in values if name not in COMMON and name not in NAMES]
    if unknown:
        raise ValueError(unknown_setting(unknown[0], setting_names()))
    unread = [name for name in values if name not in COMMON and name not in model.model_fields]
    if unread:
        own = ", ".join(sorted({*model.model_fields} - {"method"})) or "no setting of its own"
        raise ValueError(
            f"{_title(model)} does not read {', '.join(unread)}; beside the settings of every method it reads {own}"
        )
    tags = {name: model.model_fields[name].default for name in ("method", "estimator") if name in model.model_fields}
    options = tags | {name: value for name, value in values.items() if name not in COMMON}
    return {name: value for name, value in values.items() if name in COMMON} | {"options": options}


def _title(model: type[MethodOptions]) -> str:
    fields = model.model_fields
    estimator = f" with the estimator {fields['estimator'].default}" if "estimator" in fields else ""
    return f"the method {fields['method'].default}{estimator}"


def _warn_renamed(message: str) -> None:
    warnings.warn(f"{message}; the former name goes with the next release", DeprecationWarning, stacklevel=3)
