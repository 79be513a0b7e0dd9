"""Every method on a problem with modes and conditions: images come nearer, and no mode or class is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redif_sdk.distill import DistillConfig, pool
from redif_sdk.distill.methods import METHODS
from redif_sdk.distill.methods.times import learn_times, table_at, teacher_as_policy
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.rewards import Advantage, PixelReward
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.sampling.table import StepTable
from tests.mixture import CLASSES, MODES, SCHEDULE, Fit, denoiser, make_teacher

#: Settings of each method: each follows its own signal alone, without a warm start or a regression term.
REINFORCED = {"reward": "pixel", "warm_start": 0.0, "regression_weight": 0.0, "step_delta": 0.1}
SETTINGS: dict[str, dict[str, object]] = {
    "redif": {**REINFORCED, "exploration_rank": 0, "schedule_updates": 0, "updates": 100},
    "regression": {"updates": 100},
    "draft": {**REINFORCED, "updates": 100},
    "dmd": {
        "warm_start": 0.0,
        "regression_weight": 0.0,
        "step_delta": 0.3,
        "fake_learning_rate": 3e-3,
        "updates": 150,
    },
    "dmd2": {"fake_learning_rate": 3e-3, "fake_updates": 2, "updates": 150},
    "cdm": {"warm_start": 0.0, "fake_learning_rate": 3e-3, "updates": 200},
    "sgmd": {"warm_start": 0.0, "fake_learning_rate": 3e-3, "fake_updates": 2, "updates": 200},
    "progressive": {"updates": 200},
    "consistency": {"updates": 150},
    "grpo": {"reward": "pixel", "group_size": 8, "updates": 150},
}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


@pytest.fixture(scope="module")
def pairs(teacher: Teacher) -> pool.Pairs:
    return pool.compute(teacher, 512, "train")


@pytest.fixture(scope="module")
def start() -> Denoiser:
    return Denoiser(denoiser(), diffusers_call=False)


def fit(policy: StudentPolicy, pairs: pool.Pairs) -> tuple[Fit, float]:
    """How a policy's samples stand to the mixture, and their squared error to the teacher's."""
    slices = policy.table.noise_slices
    with torch.no_grad():
        images = policy.sample(pairs.slices(slices) if slices > 1 else pairs.noise, pairs.condition)
    assert pairs.condition is not None
    return Fit.of(images, pairs.condition), float((images - pairs.target).pow(2).mean())


def test_the_teacher_samples_every_mode_and_a_collapse_is_seen(pairs: pool.Pairs) -> None:
    """What the tests below measure: the exact teacher's share is one half, a student of one mode a class has none."""
    assert pairs.condition is not None
    whole = Fit.of(pairs.target, pairs.condition)
    assert whole.distance < 0.1
    assert whole.obeyed == 1.0
    assert whole.least > 0.4
    assert Fit.of(MODES[pairs.condition, 0], pairs.condition).least == 0.0
    assert Fit.of(pairs.target, CLASSES - 1 - pairs.condition).obeyed == 0.0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_comes_nearer_and_keeps_modes_and_conditions(
    method: str, teacher: Teacher, pairs: pool.Pairs, start: Denoiser
) -> None:
    settings = {"num_inference_steps": 1, "batch_size": 64, "learning_rate": 3e-3, **SETTINGS[method]}
    run = Trainer(teacher, DistillConfig.checked(method=method, **settings), pairs, start=start)
    before, wrong_before = fit(StudentPolicy(run.ema, run.context.policy.table), pairs)
    after, wrong = fit(run.run(), pairs)
    assert after.distance < 0.75 * before.distance
    assert wrong < 0.6 * wrong_before
    assert after.obeyed > max(0.93, before.obeyed)
    assert after.least > 0.4


def test_a_reward_of_one_mode_costs_the_other(teacher: Teacher, pairs: pool.Pairs, start: Denoiser) -> None:
    """The method goes where the reward points and nowhere else: modes are kept above since the reward is paired."""

    def first_mode(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return -(images - MODES[condition, 0]).pow(2).mean((1, 2, 3))

    settings = {"num_inference_steps": 1, "batch_size": 64, "learning_rate": 1e-2, **SETTINGS["redif"]}
    config = DistillConfig.checked(**settings | {"reward": first_mode, "step_delta": 0.3})
    after, _ = fit(Trainer(teacher, config, pairs, start=start).run(), pairs)
    assert after.least < 0.2
    assert after.obeyed > 0.9


def test_learnt_times_undo_a_bad_table(teacher: Teacher, pairs: pool.Pairs) -> None:
    """The times are learnt from the reward alone: most of the error that a bad table makes is gone."""

    def wrong(table: StepTable) -> float:
        return fit(teacher_as_policy(teacher, table), pairs)[1]

    bad = table_at(SCHEDULE, [999, 60, 20], teacher.prediction_type)
    policy = teacher_as_policy(teacher, bad)
    learnt = learn_times(policy, pairs, Advantage([(PixelReward(), 1.0)], teacher.images), 25, seed=0)
    assert wrong(learnt) < 0.7 * wrong(bad)
    assert policy.table == bad
    times = [float(t) for t in learnt.timesteps]
    assert times == sorted(times, reverse=True)
    assert all(t == int(t) for t in times)
    assert times[0] == 999.0
