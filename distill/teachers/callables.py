"""Any function as a teacher: what `Teacher.from_callable` puts together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.artifact.records import ArrayCondition, Condition, Guidance, Latents, Postprocess
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.condition_data import ConditionData
from redif_sdk.models.copies import private_copy
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.models.portable import is_library_network
from redif_sdk.sampling.noise_schedule import NoiseSchedule

__all__ = ["EXAMPLES_FILE", "fields_of", "with_data", "write_examples"]

EXAMPLES_FILE = "conditions/examples.npz"  # in a student's folder
MOST_EXAMPLES = 16  # rows in it
LARGEST_EXAMPLES = 64 << 20  # bytes of them, before they are compressed


def fields_of(
    predict: Any,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    shape: tuple[int, int, int],
    student: nn.Module,
    num_classes: int | None,
    conditions: Any,
    guidance: Guidance | None,
    pixel_shuffle: int,
) -> dict[str, Any]:
    """The fields of a `Teacher` that need work; the arguments are those of `Teacher.from_callable`.

    Raises:
        InvalidRequest: the prediction type and the schedule, or the conditions and the rest, do not belong together.
    """
    own = private_copy(student, "the student")
    if schedule.flow != (prediction_type == "flow"):
        raise InvalidRequest(
            f"the prediction type {prediction_type} and this noise schedule do not belong together; "
            "a flow has NoiseSchedule.linear_flow(), and nothing else has"
        )
    if num_classes and conditions is not None:
        raise InvalidRequest("num_classes and conditions exclude each other; a class can be one of the conditions")
    data = None if conditions is None else ConditionData.of(conditions)
    found: dict[str, Any] = {
        "predict": torch.no_grad()(predict if data is None else with_data(predict, data)),
        "schedule": schedule,
        "prediction_type": prediction_type,
        "latents": Latents(channels=shape[0], height=shape[1], width=shape[2]),
        "condition": Condition(kind="class", num_classes=num_classes, class_names=None) if num_classes else None,
        "postprocess": Postprocess(pixel_shuffle=pixel_shuffle),
        "make_student": lambda: Denoiser(
            copy.deepcopy(own).requires_grad_(True), diffusers_call=is_library_network(own), rows=data
        ),
        "guidance": guidance,
    }
    if data is None:
        return found
    if is_library_network(own):
        raise InvalidRequest(
            f"the student is a {type(own).__name__} of diffusers, which takes no conditions by name; put it into "
            "a module of yours that is called as student(x, t, conditions)"
        )
    if guidance is not None and not data.has_null:
        raise InvalidRequest(
            "guidance needs conditions for its unconditional half; give them: ConditionData.of(arrays, null={...})"
        )
    null = {"null_class": data.null}
    return found | {
        "condition": ArrayCondition(kind="arrays", tensors=data.specs(), examples=EXAMPLES_FILE),
        "data": data,
        "guidance": guidance and guidance.model_copy(update=null),
        "extra": null if data.has_null else {},
    }


def with_data(predict: Any, data: ConditionData) -> Any:
    """A function of (x, t, arrays by name) as one of (x, t, index)."""

    def by_index(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        given: Mapping[str, Tensor] = {} if condition is None else data(condition)
        found: Tensor = predict(x, t, given)
        return found

    return by_index


def write_examples(data: ConditionData, folder: Path) -> None:
    """Write a few rows of the data into a student's folder: what it is exported, checked and shown with."""
    most = max(1, min(MOST_EXAMPLES, LARGEST_EXAMPLES // data.row_bytes))
    (folder / EXAMPLES_FILE).parent.mkdir()
    arrays: dict[str, Any] = {f"conditions.{name}": value for name, value in data.examples(most).items()}
    np.savez_compressed(folder / EXAMPLES_FILE, **arrays)
