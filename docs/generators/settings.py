"""Every setting of a distillation run, from the pydantic models, and what the presets make of them."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.generators.text import code, table
from redif_sdk.distill.config import COMMON, RENAMED, DistillConfig
from redif_sdk.distill.options import ESTIMATORS, MODELS, MethodOptions
from redif_sdk.distill.presets import UPDATES, preset

__all__ = ["models", "page", "settings"]

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def models() -> dict[str, type[MethodOptions]]:
    """The options models by the title of their section: a method, of redif one for each estimator."""
    found: dict[str, type[MethodOptions]] = {f"redif, {name}": model for name, model in ESTIMATORS.items()}
    return found | {name: model for name, model in MODELS.items() if name != "redif"}


def settings() -> set[str]:
    """The names of all settings."""
    return {*COMMON} | {name for model in models().values() for name in model.model_fields}


def _kind(annotation: Any) -> str:
    """A type as a person writes it: int, "auto" or "fp32", number."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_kind(part) for part in typing.get_args(annotation) if part is not type(None))
    if annotation is Any:
        return "any"
    name = str(annotation.__name__)
    return {"float": "number", "bool": "true or false", "str": "text"}.get(name, name)


def _bounds(field: FieldInfo) -> str:
    """The bounds of a number, as in "≥ 0, < 1"."""
    found = []
    for rule in field.metadata:
        for name, sign in _BOUNDS.items():
            value = getattr(rule, name, None)
            if value is not None:
                found.append(f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}")
    return ", ".join(found)


def _default(field: FieldInfo) -> str:
    if field.default is None or field.default is PydanticUndefined:
        return "not set"
    return code(str(field.default).lower() if isinstance(field.default, bool) else field.default)


def _rows(fields: Mapping[str, FieldInfo]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, field in fields.items():
        kind = ", ".join(part for part in (_kind(field.annotation), _bounds(field)) if part)
        rows.append((code(name), kind, _default(field), field.description or ""))
    return rows


def _presets() -> str:
    """What each preset sets, at 1, 2 and 4 steps, for pixels and for text to image."""
    steps = (1, 2, 4)
    text = ""
    for title, of_text in (("Class-conditional and unconditional teachers", False), ("Text to image", True)):
        columns = [(name, k, preset(name, k, text=of_text)) for name in UPDATES for k in steps]
        names = sorted({key for *_, found in columns for key in found} - {"num_inference_steps"})
        rows = []
        for key in names:
            values = [found.get(key, "") for *_, found in columns]
            rows.append([code(key), *(code(value) if value != "" else "" for value in values)])
        head = ["setting", *(f"{name}, {k}" for name, k, _ in columns)]
        text += f"### {title}\n\n" + table(head, rows)
    return text


def page() -> str:
    """The page of the settings."""
    common = {name: DistillConfig.model_fields[name] for name in COMMON}
    head = ("setting", "type", "default", "meaning")
    parts = [
        "# Settings of a run\n\n"
        "These are the fields of `DistillConfig`. On the command line: `--set NAME=VALUE`, `--NAME VALUE`, or a line "
        "`NAME: VALUE` in the file of `--config`. `redif distill --list-settings` prints them too. A setting that the "
        "chosen method does not read is refused; of a [preset](#presets) it is left out.\n\n"
        "## Every method\n\n" + table(head, _rows(common)),
    ]
    parts.append("## By method\n\nWhat one method reads beside the settings above.\n\n")
    for title, model in models().items():
        own = {name: field for name, field in model.model_fields.items() if name not in ("method", "estimator")}
        choice = " ".join(
            f"`{name}: {model.model_fields[name].default}`"
            for name in ("method", "estimator")
            if name in model.model_fields
        )
        rows = table(head, _rows(own)) if own else "No setting of its own.\n\n"
        parts.append(f"### {title}\n\nChosen by {choice}.\n\n{rows}")
    parts.append(
        "## Presets\n\n`--preset NAME`, by the number of steps (beyond 4: as 4). What they leave out has the "
        "default above.\n\n" + _presets()
    )
    renamed = table(("former name", "name"), ((code(old), code(new)) for old, new in RENAMED.items()))
    parts.append("## Renamed\n\nFormer names work for one release, with a warning.\n\n" + renamed)
    return "".join(parts)
