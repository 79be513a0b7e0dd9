"""`redif doctor --distill`: a good teacher passes, and each kind of broken one is told what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redif_sdk.distill.evaluation.examine import examine_teacher
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.sampling.table import NoiseSchedule
from tests.networks import Tiny

SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})
SHAPE = (1, 4, 4)


def exact(kind: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The output of that type, for data that are N(0, .4^2) at every place."""

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        alpha, sigma = (
            torch.from_numpy(values.copy()).float()[t.long()].view(-1, 1, 1, 1)
            for values in (SCHEDULE.alphas, SCHEDULE.sigmas)
        )
        clean = alpha * 0.16 / (alpha**2 * 0.16 + sigma**2) * x
        return {"v_prediction": (alpha * x - clean) / sigma, "epsilon": (x - alpha * clean) / sigma, "sample": clean}[
            kind
        ]

    return predict


def teacher(kind: str = "v_prediction", student: nn.Module | None = None) -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_callable(
        exact(kind),
        schedule=SCHEDULE,
        prediction_type=kind,
        shape=SHAPE,
        student=student or Tiny(),
        num_inference_steps=20,
    )


def problems(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["subject"]: row["detail"] for row in rows if row["status"] != "ok"}


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_a_good_teacher_passes(kind: str) -> None:
    rows = examine_teacher(teacher(kind), reward="pixel")
    assert problems(rows) == {}
    assert {"deterministic", "prediction type", "pairing", "reward pixel", "gradient", "time"} <= {
        row["subject"] for row in rows
    }


@pytest.mark.parametrize(
    ("kind", "declared"),
    [
        ("epsilon", "sample"),
        ("epsilon", "v_prediction"),
        ("v_prediction", "epsilon"),
        ("sample", "epsilon"),
        ("v_prediction", "sample"),
    ],
)
def test_a_wrong_prediction_type_is_found(kind: str, declared: str) -> None:
    found = problems(examine_teacher(replace(teacher(kind), prediction_type=declared), reward="pixel"))
    assert f"declared as {declared}" in found["prediction type"]
    assert kind in found["prediction type"].partition("consistent as")[2].partition(")")[0]


def test_a_teacher_that_draws_is_found() -> None:
    noisy = replace(teacher(), predict=lambda x, t, condition: exact("v_prediction")(x, t, None) + torch.randn_like(x))
    found = problems(examine_teacher(noisy, reward="pixel"))
    assert "gives two outputs for one input" in found["deterministic"]


def test_an_untrained_teacher_is_found() -> None:
    network = Tiny().eval()
    found = problems(examine_teacher(replace(teacher(), predict=torch.no_grad()(network)), reward="pixel"))
    assert "are the network's weights trained?" in found["prediction type"]


def test_a_wrong_range_a_flat_reward_and_samples_that_are_not_finite_are_found() -> None:
    def flat(images: Tensor, wanted: Tensor, condition: Tensor | None) -> Tensor:
        return torch.zeros(len(images))

    assert "every group's rewards are equal" in problems(examine_teacher(teacher(), reward=flat))["reward flat"]
    large = replace(teacher(), range_known=True, predict=lambda x, t, condition: -20 * torch.ones_like(x))
    assert "is the value range right" in problems(examine_teacher(large, reward="pixel"))["value range"]
    broken = replace(teacher(), predict=lambda x, t, condition: x * float("inf"))
    assert "not finite" in problems(examine_teacher(broken, reward="pixel"))["samples"]


def test_the_command(teacher_folder: Any) -> None:
    code = "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--distill", str(teacher_folder), "--reward", "pixel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "prediction type" in done.stdout
    assert done.returncode == 1  # its weights are random, and that is found
    assert done.stderr.strip().splitlines()[-1].startswith("redif: there are problems with")
