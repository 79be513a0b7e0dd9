"""Where a run's settings come from: a preset, over it a YAML file, over it what is given by hand.

The presets are one recipe of three lengths, chosen on the benchmark's validation protocol (docs/results.md):
regression, then reinforcement by groups of a reward of the texture's bands, which needs no gradient of it, and at the
end the gain. Text-to-image models keep the reward that was measured on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from redif_sdk.distill.config import (
    BUDGETS,
    TOWARDS_TEACHER,
    DistillConfig,
    applicable,
    current_names,
    setting_names,
    unknown_setting,
)
from redif_sdk.errors import InvalidRequest
from redif_sdk.textfile import read_text_file

#: Updates by the largest K that they are for; beyond the last, the last.
UPDATES: dict[str, dict[int, int]] = {
    "fast": {1: 350, 2: 240, 4: 60},
    "balanced": {1: 2000, 2: 1400, 4: 200},
    "best": {1: 4000, 2: 3000, 4: 600},
}
RECIPE: dict[str, Any] = {
    "method": "redif",
    "reward": "bands",
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warm_start": 0.5,
    "group_size": 64,
    "exploration": 0.06,
    "exploration_rank": 0,
    "schedule_updates": 6,
    "calibration": 512,
    "huber": 0.3,
}
#: By the largest K that they are for; beyond the last, the last. At more steps less is left to put right, and gradients
#: through the last row alone are worth more than their length: the earlier rows are the teacher's.
BY_STEPS: dict[int, dict[str, Any]] = {
    1: {"step_delta": 2.5},
    2: {"warm_start": 0.7, "step_delta": 1.0, "backprop_last_k": 1},
    4: {"warm_start": 0.7, "step_delta": 0.6, "backprop_last_k": 1, "regression_last_k": 1, "calibration": 0},
}
#: Of "fast" alone: the quickstart's student of two steps begins with the weights of the one of one step, so its first
#: step is trained already, and the time goes into more updates instead.
SHORT: dict[int, dict[str, Any]] = {2: {"regression_last_k": 1}}
#: Text to image: most of a run follows the teacher's own path, and the reward sees latents (docs/text-to-image.md).
TEXT_UPDATES: dict[str, dict[int, int]] = {
    "fast": {1: 350, 2: 500, 4: 630},
    "balanced": {1: 1000, 2: 1500, 4: 1900},
    "best": {1: 3500, 2: 5000, 4: 6300},
}
TEXT: dict[str, Any] = {
    "reward": "texture",
    "learning_rate": 4e-4,
    "schedule_updates": 20,
    "segments": 0.7,
    "warm_start": 0.85,
    "regression_last_k": 0,
    "step_delta": 0.4,
    "reward_space": "latents",
    "calibration": 0,
}
TEXT_POOL = {"fast": 2048, "balanced": 6144, "best": 16384}  # a small pool would be learnt by heart
LARGEST_FILE = 1 << 20  # bytes


def _for(steps: int, by_steps: Mapping[int, Any]) -> Any:
    """The entry of the smallest key that is at least ``steps``, or of the largest."""
    return by_steps[min((key for key in by_steps if steps <= key), default=max(by_steps))]


def preset(name: str, num_inference_steps: int, *, text: bool = False) -> dict[str, Any]:
    """The settings of a preset for K steps.

    Args:
        name: "fast", "balanced" or "best".
        num_inference_steps: the student's network calls an image, K.
        text: the teacher is a text-to-image model.

    Raises:
        InvalidRequest: there is no such preset.
    """
    if name not in UPDATES:
        raise InvalidRequest(f"unknown preset {name!r}; known: {', '.join(UPDATES)}")
    settings = {**RECIPE, **_for(num_inference_steps, BY_STEPS), "num_inference_steps": num_inference_steps}
    if text:
        updates = _for(num_inference_steps, TEXT_UPDATES[name])
        return {**settings, **TEXT, "pool_size": TEXT_POOL[name], "updates": updates}
    short = SHORT.get(num_inference_steps, {}) if name == "fast" else {}
    return {**settings, **short, "updates": _for(num_inference_steps, UPDATES[name])}


def read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by their current names; ``preset`` may be among them.

    Raises:
        InvalidRequest: the file cannot be read, is no mapping, or names an unknown setting.
    """
    text = read_text_file(path, "the configuration", limit=LARGEST_FILE).replace("\u00a0", " ")
    text = re.sub(r"(?<=\S)( *)\t+", r"\1 ", text)  # YAML has them as white space, its reader here does not
    try:
        _check_repeated(path, yaml.compose(text, Loader=yaml.SafeLoader))
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        said = " ".join(str(error).split())
        raise InvalidRequest(f"the configuration {path} is not YAML: {said:.300}; give 'name: value' lines") from error
    if found is None:
        raise InvalidRequest(f"the configuration {path} is empty; give 'name: value' lines")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}, not settings; give 'name: value' lines")
    found = current_names(found)
    known = ["preset", *setting_names()]
    for name in found:
        if name not in known:
            raise InvalidRequest(f"{path}: {unknown_setting(name, known)}")
    return found


def _check_repeated(path: Path, root: yaml.Node | None) -> None:
    """Raise InvalidRequest if a setting stands twice in the file: YAML would take the last."""
    lines: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else []:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in lines:
            raise InvalidRequest(f"{path}, line {line}: {name:.60} is given twice (also in line {lines[name]})")
        lines[name] = line


def resolve(
    given: Mapping[str, Any], *, file: Path | None = None, name: str | None = None, text: bool = False
) -> DistillConfig:
    """The run's config: ``given`` by hand over ``file`` over the preset.

    A preset is a default: what the chosen method does not read of it is left out, while a setting that was given by
    hand or in the file is refused. A budget that is given at one place takes the place of those below it: a preset's
    updates do not end a run that was given seconds.

    Args:
        text: the teacher is a text-to-image model, which has presets of its own.

    Raises:
        InvalidRequest: a setting is wrong or not read by the method, or there is no such preset or file.
    """
    written = read(file) if file else {}
    name = name or written.pop("preset", None)
    written.pop("preset", None)
    given = current_names(given)
    asked = {**written, **given}
    steps = asked.get("num_inference_steps", 4)
    recipe = preset(name, steps, text=text) if name and isinstance(steps, int) else {}
    chosen: dict[str, Any] = {key: asked[key] for key in ("method", "estimator") if key in asked}
    try:
        values = applicable({**recipe, **chosen})
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    for layer in (written, given):
        if any(layer.get(budget) is not None for budget in BUDGETS):
            values = {key: value for key, value in values.items() if key not in BUDGETS}
        values |= layer
    if asked.get("targets") == "start":  # a preset's phases that follow the teacher are left out
        read_here = applicable({**dict.fromkeys(TOWARDS_TEACHER, 0), **chosen})
        values |= {phase: 0 for phase in TOWARDS_TEACHER if phase in read_here and phase not in asked}
    return DistillConfig.checked(**values)


def as_yaml(config: DistillConfig) -> str:
    """The config as a file that makes the same run; rewards that are no names are written as what they are called."""
    text: str = yaml.safe_dump(config.model_dump(mode="json", fallback=str), sort_keys=False)
    return text
