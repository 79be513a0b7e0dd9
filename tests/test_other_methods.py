"""The methods beside ReDiF and regression: each learns what its paper says, is counted, and resumes bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from redif_sdk.distill import pool
from redif_sdk.distill.compute import device as precision
from redif_sdk.distill.config import COMMON, DistillConfig
from redif_sdk.distill.evaluation.examine import examine_teacher
from redif_sdk.distill.methods import METHODS, Loss, grpo
from redif_sdk.distill.methods.consistency import boundary
from redif_sdk.distill.methods.estimators import TrajectoryGroups
from redif_sdk.distill.methods.progressive import Progressive, stage_steps, two_steps
from redif_sdk.distill.options import MODELS
from redif_sdk.distill.policy import Exploration, StudentPolicy
from redif_sdk.distill.student import distill, load_student
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.denoising import clean_at, levels, noised
from redif_sdk.distill.teachers.saving import scheduler_of
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.sampling.loop import sample
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import NoiseSchedule, StepTable
from tests.gaussian import (
    MEAN,
    SCHEDULE,
    SHAPE,
    STD,
    Small,
    exact,
    exact_flow,
    make_flow_teacher,
    make_teacher,
    trainer,
    weights,
)


@pytest.fixture
def teacher() -> Teacher:
    return make_teacher()


@pytest.mark.parametrize("name", [*sorted(METHODS), "redif with dmd", "redif with segments"])
def test_a_run_that_was_cut_gives_the_same_bits(teacher: Teacher, tmp_path: Path, name: str) -> None:
    """What a method keeps (a fake score and its optimiser, a stage's teacher, a reference) is in the checkpoint."""
    method = name.split()[0]
    settings: dict[str, object] = {"kl": 0.1, "num_inference_steps": 1} if method == "grpo" else {}
    if name == "redif with dmd":
        settings = {"dmd_weight": 1.0, "dmd_fraction": 0.7}
    elif method != name:
        settings = {"segments": 0.6, "warm_start": 0.8}
    whole = trainer(teacher, method, tmp_path / "whole", **settings)
    whole.run()
    first = trainer(teacher, method, tmp_path / "cut", **settings)
    first.method.prepare(first.context)
    first.follow()
    while first.update < 4:
        first.step(first.progress)
    first.save()
    second = trainer(teacher, method, tmp_path / "cut", **settings)
    second.run(resume=True)
    assert torch.equal(weights(whole), weights(second))
    assert not torch.equal(weights(whole), weights(trainer(teacher, method, **settings)))
    counted = [run.meter.forward_equivalents for run in (whole, second)]
    assert counted[0] == counted[1] > 0


def test_regression_along_the_trajectory_supervises_every_row_by_itself(teacher: Teacher) -> None:
    run = trainer(teacher, "regression", num_inference_steps=3, supervision="per_step", updates=200)
    run.step(run.progress)
    assert run.meter.student_calls == 2 * 16  # the states of the rows after the first
    assert run.meter.gradient_samples == 3 * 16
    policy, pairs = run.context.policy, run.pairs

    def errors() -> Tensor:
        with torch.no_grad():
            states = policy.states(pairs.noise, None)
            rows = [policy.estimate(k, state, None) - pairs.target for k, state in enumerate(states)]
        return torch.stack([row.pow(2).mean() for row in rows])

    before = errors()
    run.run()
    assert (errors() < 0.7 * before).all()


@pytest.mark.parametrize("method", ["redif", "draft"])
def test_gradients_of_the_last_rows_alone_cost_less(teacher: Teacher, method: str) -> None:
    chosen = {"schedule_updates": 0} if method == "redif" else {}
    run = trainer(teacher, method, num_inference_steps=3, backprop_last_k=1, **chosen)
    policy, batch = run.context.policy, run.pairs[:16]
    run.meter.student_calls = run.meter.gradient_samples = 0
    truncated = policy.sample(batch.noise, None, 1)
    assert torch.equal(truncated, policy.sample(batch.noise, None))
    states = policy.states(batch.noise, None)
    (own,) = torch.autograd.grad(truncated.sum(), next(policy.network.parameters()), retain_graph=True)
    last = policy.finish(2, states[2].detach(), policy.estimate(2, states[2].detach(), None), None)
    (wanted,) = torch.autograd.grad(last.sum(), next(policy.network.parameters()))
    assert torch.allclose(own, wanted)
    run.meter.student_calls = run.meter.gradient_samples = 0
    run.step(0.5)
    if method == "draft":
        assert (run.meter.student_calls, run.meter.gradient_samples) == (2 * 16, 16)
    else:
        assert run.meter.gradient_samples == 16


def test_matching_is_in_a_share_of_redifs_updates(teacher: Teacher) -> None:
    """The supervised term finds the distribution that the reward says nothing of, at the cost of its share."""
    settings: dict[str, object] = {
        "num_inference_steps": 1,
        "updates": 250,
        "regression_weight": 0.0,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "fake_learning_rate": 3e-3,
        "step_delta": 0.01,
        "fake_updates": 1,
    }
    run = trainer(teacher, "redif", dmd_weight=0.3, dmd_fraction=0.5, **settings)

    def distance() -> float:
        with torch.no_grad():
            output = run.context.policy.sample(run.pairs.noise, None)
        return float((output.mean() - MEAN).abs())

    before = distance()
    run.run()
    assert distance() < 0.5 * before
    matched = run.meter.teacher_calls / 64
    assert 95 < matched < 155
    assert run.meter.gradient_samples == 64 * (250 + matched)


def test_progressive_halves_the_steps(teacher: Teacher) -> None:
    assert stage_steps(1, 50) == [16, 8, 4, 2, 1]
    assert stage_steps(4, 50) == [16, 8, 4]
    assert stage_steps(4, 4) == [4]
    run = trainer(teacher, "progressive", updates=6, num_inference_steps=2)
    method = run.method
    assert isinstance(method, Progressive)
    assert stage_steps(2, 16) == [8, 4, 2]
    parents = []
    for _ in range(6):
        run.step(run.progress)
        parents.append((method.stage, method.parent))
    assert [stage for stage, _ in parents] == [0, 0, 1, 1, 2, 2]
    assert parents[0][1] is None  # the teacher itself
    assert parents[2][1] is parents[3][1] is not parents[4][1]
    # two teacher calls a sample in the first stage, none later
    assert run.meter.teacher_calls == 2 * 2 * 16
    assert run.meter.student_calls == 4 * 2 * 16
    assert run.meter.gradient_samples == 6 * 16


def test_progressives_target_leads_where_two_steps_lead(teacher: Teacher) -> None:
    fine, coarse = teacher.table(8), teacher.table(4)
    z = torch.randn(3, *SHAPE)

    def estimate(k: int, x: Tensor, condition: Tensor | None) -> Tensor:
        clean: Tensor = fine.clean(k, x, teacher(x, torch.full((len(x),), float(fine.timesteps[k])), None))
        return clean

    for k in range(4):
        wanted = z
        for row in (2 * k, 2 * k + 1):
            wanted = fine.advance(row, wanted, estimate(row, wanted, None))
        target = two_steps(z, k, fine, coarse, estimate, None)
        assert torch.allclose(coarse.advance(k, z, target), wanted, atol=1e-5)
        assert coarse.timesteps[k] == fine.timesteps[2 * k]


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample", "score"])
def test_clean_images_of_every_prediction_type(teacher: Teacher, kind: str) -> None:
    from dataclasses import replace

    run = trainer(replace(teacher, prediction_type=kind), "dmd")
    clean = torch.randn(8, *SHAPE)
    t, x = noised(run.teacher, clean, torch.Generator().manual_seed(0))
    alpha, sigma = levels(run.teacher, t)
    epsilon = (x - alpha * clean) / sigma
    output = {
        "v_prediction": alpha * epsilon - sigma * clean,
        "epsilon": epsilon,
        "sample": clean,
        "score": -epsilon / sigma,
    }[kind]
    assert torch.allclose(clean_at(run.teacher, t, x, output), clean, atol=2e-3)


def test_draft_follows_the_reward_and_needs_its_gradient(teacher: Teacher) -> None:
    def brightness(images: Tensor, wanted: Tensor, condition: Tensor | None) -> Tensor:
        return images.mean((1, 2, 3))

    run = trainer(teacher, "draft", reward=brightness, updates=200, regression_weight=0.0, num_inference_steps=1)
    pairs = run.pairs
    with torch.no_grad():
        before = run.context.policy.sample(pairs.noise, None).mean()
    run.run()
    with torch.no_grad():
        assert run.context.policy.sample(pairs.noise, None).mean() > before + 0.1

    def black_box(images: Tensor, wanted: Tensor, condition: Tensor | None) -> Tensor:
        return torch.from_numpy(np.asarray(images.detach()).mean((1, 2, 3)))

    with pytest.raises(InvalidRequest, match="black_box has no gradient"):
        trainer(teacher, "draft", reward=black_box).run()
    trainer(teacher, "grpo", reward=black_box).run()  # which reinforcement does not need


def test_consistency_finds_the_end_of_the_path_from_everywhere_on_it(teacher: Teacher) -> None:
    run = trainer(teacher, "consistency", num_inference_steps=2, updates=600, learning_rate=5e-3, batch_size=64)
    pairs = run.pairs

    def distance() -> float:
        table = run.context.policy.table
        with torch.no_grad():
            return float((run.context.policy.sample(pairs.slices(table.noise_slices), None).mean() - MEAN).abs())

    before, counted = distance(), run.meter.student_calls
    policy = run.run()
    spent = run.meter.student_calls - counted
    assert policy.table.sampler == "consistency"
    assert run.meter.teacher_calls == run.meter.gradient_samples == spent == 600 * 64
    assert distance() < 0.2 * before
    with pytest.raises(UnsupportedModel, match="draws noise"):
        policy.sample(pairs.noise, None)


def test_a_consistency_table_runs_by_numpy_and_as_lcm_as_in_training(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise between the rows is index-keyed: what training draws is what a deployer draws for the same seeds."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    run = trainer(teacher, "consistency", num_inference_steps=4, updates=1)
    policy = run.run()
    held, _ = pool.get(teacher, 6, "held_out")
    noise = held.slices(policy.table.noise_slices)
    assert torch.equal(noise[0], held.noise)
    assert not torch.equal(noise[1], noise[2])
    with torch.no_grad():
        ours = policy.sample(noise, None)

    def network(x: np.ndarray, t: np.ndarray, condition: object) -> np.ndarray:
        with torch.no_grad():
            out: np.ndarray = policy.network(torch.from_numpy(x), torch.from_numpy(t), None).numpy()
        return out

    theirs = sample(network, policy.table, draw([(pool.HELD_OUT_SEED, i) for i in range(6)], SHAPE, slices=5))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
    scheduler = scheduler_of(teacher, policy.table)
    again = StepTable.from_scheduler(scheduler, timesteps=[int(t) for t in policy.table.timesteps])
    np.testing.assert_allclose(again.rows, policy.table.rows, atol=1e-3)


def test_grpo_acts_within_its_window_alone(teacher: Teacher) -> None:
    run = trainer(teacher, "grpo", num_inference_steps=4)
    white = Exploration.white(16)
    batch = run.pairs[:3]
    generator = torch.Generator().manual_seed(0)
    groups = TrajectoryGroups(run.context, white, None, range(2, 3), teacher.table(4, eta=0.7))
    states, actions, means, output = groups.rollout(batch, generator)
    assert len(states) == len(actions) == len(means) == 1
    together = states[0].unflatten(0, (4, 3))
    assert torch.equal(together[0], together[1])  # nothing was drawn before row 2
    assert not torch.equal(*output.unflatten(0, (4, 3))[:2])
    windowed = trainer(teacher, "grpo", num_inference_steps=4, sde_window=1, updates=3)
    windowed.run()
    assert windowed.meter.gradient_samples == 3 * 16 * 4  # one noisy row, four trajectories a start


def test_grpos_trajectories_are_those_of_the_stochastic_sampler(teacher: Teacher) -> None:
    """Noise on the clean estimate is the SDE's noise on the next state: the same mean and spread at each row."""
    run = trainer(teacher, "grpo", num_inference_steps=3, group_size=2000)
    sde = teacher.table(3, eta=0.7)
    groups = TrajectoryGroups(run.context, Exploration.white(16), None, range(2), sde)
    states, actions, means, _ = groups.rollout(run.pairs[:1], torch.Generator().manual_seed(0))
    for row in range(2):
        x, action = states[row], actions[row]
        after = sde.rows[row, 3] * action + sde.rows[row, 4] * x
        mean = sde.rows[row, 3] * means[row] + sde.rows[row, 4] * x
        assert float((after - mean).std()) == pytest.approx(abs(float(sde.rows[row, 5])), rel=0.05)
    assert torch.allclose(states[1], sde.rows[0, 3] * actions[0] + sde.rows[0, 4] * states[0], atol=1e-5)
    assert sde.rows[2, 5] == 0


def test_a_consistency_students_image_is_its_state_at_time_0(teacher: Teacher) -> None:
    skip, out = boundary(torch.tensor([0.0, 1.0, 999.0]).double())
    assert (skip[0], out[0]) == (1.0, 0.0)
    assert torch.allclose(skip + out**2, torch.ones(3).double())
    run = trainer(teacher, "consistency", num_inference_steps=2)
    run.method.prepare(run.context)
    table, plain = (
        run.context.policy.table,
        StepTable.consistency(
            teacher.schedule,
            [round(float(t)) for t in run.context.policy.table.timesteps],
            prediction_type="v_prediction",
        ),
    )
    x, f = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    for row, t in enumerate(table.timesteps):
        skip, out = boundary(torch.tensor([float(t)]).double())
        wanted = float(skip) * x + float(out) * plain.clean(row, x, f)
        assert torch.allclose(table.clean(row, x, f), wanted, atol=1e-6)


def test_progressive_has_a_learning_rate_cycle_for_each_stage(teacher: Teacher) -> None:
    run = trainer(teacher, "progressive", num_inference_steps=2)  # stages of 8, 4 and 2 steps
    found = [run.method.cycle(run.context, progress) for progress in (0.0, 1 / 6, 0.33, 1 / 3, 0.5, 2 / 3, 0.99)]
    assert found == pytest.approx([0.0, 0.5, 0.99, 0.0, 0.5, 0.0, 0.97], abs=1e-6)


@pytest.mark.parametrize(("size", "places"), [(1, {0, 1, 2}), (2, {0, 1}), (0, {0})])
def test_grpo_moves_its_window_over_all_rows(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, size: int, places: set[int]
) -> None:
    """The method's own draws: every place is visited, the window has its size, and the update alone decides."""
    run = trainer(teacher, "grpo", num_inference_steps=4, sde_window=size)
    windows: list[range] = []

    class Noted(TrajectoryGroups):
        def losses(self, *arguments: Any, **options: Any) -> Iterator[Loss]:
            windows.append(self.rows)
            yield from ()

    monkeypatch.setattr(grpo, "TrajectoryGroups", Noted)
    for update in [*range(40), *range(40)]:
        list(run.method.losses(run.context, run.pairs[:3], 0.5, torch.Generator().manual_seed(update)))
    assert {window.start for window in windows} == places
    assert {len(window) for window in windows} == {size or 3}, "the last step is deterministic"
    assert windows[:40] == windows[40:]


def test_a_gain_that_is_too_low_is_found_and_undone(teacher: Teacher) -> None:
    """The output's gain is learnt at the end, within the budget, and lies in the table, so every backend has it."""
    run = trainer(teacher, "redif", calibration=64)
    student = StudentPolicy(run.ema, run.context.policy.table)
    pool = run.pairs

    def faded(noise: Tensor, condition: Tensor | None) -> Tensor:
        return student.table.rows[-1, 3].item() * pool.target[: len(noise)] / 1.15

    # a student that is known to be faded, whatever its network: mypy does not let a method be replaced
    student.sample = faded  # type: ignore[method-assign]
    run.context.pairs = pool[:64]
    run.method.finish(run.context, student)
    assert student.table.rows[-1, 3] == pytest.approx(1.15, abs=0.04)
    with pytest.raises(InvalidRequest, match="all go to the calibration"):
        trainer(teacher, "redif", calibration=64, forward_equivalents=100.0)
    budget = run.method.reserve(run.context) + 20_000
    policy = trainer(teacher, "redif", calibration=64, forward_equivalents=budget, updates=None).run()
    assert 1 <= policy.meter.forward_equivalents / budget < 1.001
    assert policy.table.rows[-1, 4] == 0


@pytest.fixture
def flow_teacher() -> Teacher:
    return make_flow_teacher()


def test_a_flow_teacher_samples_as_diffusers_does(flow_teacher: Teacher) -> None:
    start = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 16, 16).tolist())
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(exact_flow(x, t.expand(len(x)), None), t, x).prev_sample
    torch.testing.assert_close(flow_teacher.sample(start, None), x, atol=2e-5, rtol=0)
    kept = scheduler_of(flow_teacher, flow_teacher.table(2))
    assert (type(kept).__name__, kept.config.shift) == ("FlowMatchEulerDiscreteScheduler", 3.0)


#: Of each kind one; that every method learns is seen in test_mixture.py.
QUICK_ON_FLOWS = {"redif", "consistency", "dmd2", "grpo"}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK_ON_FLOWS)) for name in sorted(METHODS)]
)
def test_every_method_learns_from_a_flow_teacher(flow_teacher: Teacher, method: str) -> None:
    settings = {"updates": 150, "learning_rate": 1e-2, "schedule_updates": 4, "exploration": 0.1, "step_delta": 0.05}
    settings = {name: value for name, value in settings.items() if name in {*COMMON, *MODELS[method].model_fields}}
    if method in ("consistency", "grpo"):
        settings["updates"] = 600  # they learn slowly
    run = trainer(flow_teacher, method, None, batch_size=32, **settings)

    def wrong(policy: StudentPolicy) -> float:
        with torch.no_grad():
            slices = policy.table.noise_slices
            output = policy.sample(run.pairs.slices(slices) if slices > 1 else run.pairs.noise, None)
        return float((output.mean() - MEAN) ** 2 + (output.std() - STD) ** 2)

    before = wrong(StudentPolicy(flow_teacher.make_student(), flow_teacher.table(2)))
    # of progressive the last stage alone ends the run, and its weights favour what is nearly clean
    assert wrong(run.run()) < (0.3 if method == "progressive" else 0.2) * before
    assert run.context.policy.table.prediction_type == "flow"


def test_a_flow_needs_its_own_noise_schedule(flow_teacher: Teacher) -> None:
    with pytest.raises(InvalidRequest, match="do not belong together"):
        Teacher.from_callable(exact, schedule=SCHEDULE, prediction_type="flow", shape=SHAPE, student=Small())
    with pytest.raises(InvalidRequest, match="alpha \\+ sigma != 1"):
        NoiseSchedule(SCHEDULE.alphas, SCHEDULE.sigmas, flow=True)


def test_a_flow_student_is_saved_and_read_again(tmp_path: Path) -> None:
    """From a diffusers folder with a flow scheduler to a student that every runtime can run."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    network.save_pretrained(tmp_path / "teacher" / "unet")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path / "teacher" / "scheduler")
    config = DistillConfig(updates=2, batch_size=4, pool_size=8, method="regression", num_inference_steps=2)
    student = distill(tmp_path / "teacher", config)
    student.save_pretrained(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert again.tables[0] == student.tables[0] == StepTable.flow_euler(num_inference_steps=2, shift=2.0)
    assert again.teacher.schedule.flow
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again.policy().sample(start, None), student.policy().sample(start, None))


def test_the_doctor_knows_flows(flow_teacher: Teacher) -> None:
    """It sees that the type fits, and that it does not where noise and data are taken the other way round."""
    rows = {row["subject"]: row["status"] for row in examine_teacher(flow_teacher, reward="pixel")}
    assert rows["prediction type"] == "ok"
    backwards = dataclasses.replace(flow_teacher, predict=lambda x, t, condition: -exact_flow(x, t, condition))
    rows = {row["subject"]: row["status"] for row in examine_teacher(backwards, reward="pixel")}
    assert rows["prediction type"] != "ok"


def test_progressive_gives_every_stage_the_same_share(teacher: Teacher) -> None:
    """A baseline whose stages get a handful of updates each is no baseline."""
    run = trainer(teacher, "progressive", num_inference_steps=2, updates=12)
    seen = []
    while not run.finished:
        run.step(run.progress)
        assert isinstance(run.method, Progressive)
        seen.append(run.method.stage)
    assert [seen.count(stage) for stage in range(3)] == [4, 4, 4]
