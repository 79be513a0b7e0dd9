"""Segments: each row learns its own part of the teacher's path; the path and the pool on disk; who judges times."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redif_sdk.artifact.records import Guidance
from redif_sdk.distill import DistillConfig, pool
from redif_sdk.distill.methods.times import on_grid, teacher_as_policy
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import cache as pool_cache
from redif_sdk.distill.pool import pairs as pool_pairs
from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.table import StepTable
from tests.gaussian import exact, make_flow_teacher, make_teacher, trainer


def stood(pairs: pool.Pairs) -> Tensor:
    assert pairs.states is not None
    return pairs.states


@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_segments_teach_each_row_its_part_of_the_teachers_own_path(
    kind: str,
) -> None:
    """On the teacher's states, one gradient sample a pair whatever K, and the whole rollout gains by it."""
    model = make_teacher() if kind == "discrete" else make_flow_teacher()
    run = trainer(model, "regression", num_inference_steps=4, segments=1.0, updates=1000, learning_rate=5e-3)
    untrained = StudentPolicy(model.make_student(), model.table(4), model.schedule)
    run.follow()
    grid, times = model.grid(), [float(t) for t in run.context.policy.table.timesteps]
    assert len(grid) == 16
    assert set(times) <= set(grid)
    run.step(0.0)
    assert (run.meter.student_calls, run.meter.gradient_samples) == (0, 16)

    def errors(policy: StudentPolicy) -> Tensor:
        states = stood(run.pairs)
        ends = torch.cat([states[:, 1:], run.pairs.target[:, None]], 1)
        rows = [policy.table.advance(k, states[:, k], policy.estimate(k, states[:, k], None)) for k in range(4)]
        return torch.stack([(row - ends[:, k]).pow(2).mean() for k, row in enumerate(rows)])

    untrained.table = run.context.policy.table
    student = run.run()
    with torch.no_grad():
        before = errors(untrained)
        assert (errors(student) < 0.35 * before).all()
        wrong = (student.sample(run.pairs.noise, None) - run.pairs.target).pow(2).mean()
        with_old = untrained.sample(run.pairs.noise, None) - run.pairs.target
        assert wrong < 0.5 * with_old.pow(2).mean()


def test_states_are_where_the_teacher_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own network goes from each to the next; they are kept on disk for the times that were asked for."""
    calls: list[int] = []

    def counted(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        return exact(x, t, condition)

    named = dataclasses.replace(make_teacher(), predict=counted, fingerprint="states")
    pairs, _ = pool.get(named, 8, "train", cache=tmp_path / "apart")
    grid, table = named.grid(), named.table(16)
    assert grid == [float(t) for t in table.timesteps]
    calls.clear()
    states = stood(pool.with_states(named, pairs, grid, cache=tmp_path / "apart"))
    assert sum(calls) == 8 * 16
    assert torch.equal(states[:, 0], pairs.noise.half().float())
    for k, t in enumerate(grid):
        x0 = table.clean(k, states[:, k], exact(states[:, k], torch.full((8,), t), None))
        wanted = states[:, k + 1] if k < 15 else pairs.target
        torch.testing.assert_close(table.advance(k, states[:, k], x0), wanted, atol=4e-3, rtol=0)
    few = [grid[0], grid[7]]
    calls.clear()
    again, _ = pool.get(named, 8, "train", cache=tmp_path, path=True)
    again = pool.with_states(named, again, few, cache=tmp_path)
    assert sum(calls) == 8 * 16  # the path is kept as the pairs are made
    assert torch.equal(stood(again), states[:, [0, 7]])
    assert torch.equal(stood(again[2:5]), stood(again)[2:5])
    other = pool.get(named, 8, "train", seed=1, cache=tmp_path)[0]
    assert not torch.equal(stood(pool.with_states(named, other, few, cache=tmp_path)), stood(again))
    monkeypatch.setattr(pool_cache, "LARGEST_PATH", 1)  # too large to be kept whole: the asked times alone
    apart = pool.with_states(named, pairs, few, cache=tmp_path / "large")
    assert torch.equal(stood(apart), stood(again))
    assert sum(file.stat().st_size for file in (tmp_path / "large").iterdir()) < 8 * 2 * 16 * 2 + 200


def test_a_pool_that_was_cut_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sampled is kept piece by piece, and a larger pool shares the pieces of a smaller one."""
    monkeypatch.setattr(pool_pairs, "CHUNK", 8)
    done: list[int] = []

    def cut(count: int) -> None:
        done.append(count)
        if sum(done) >= 16:
            raise KeyboardInterrupt

    named = dataclasses.replace(make_teacher(), fingerprint="pieces")
    with pytest.raises(KeyboardInterrupt):
        pool.get(named, 24, "train", cache=tmp_path, on_batch=cut)
    done.clear()
    whole, calls = pool.get(named, 24, "train", cache=tmp_path, on_batch=done.append)
    assert done == [8, 8]  # the first piece was kept
    assert calls == 24 * 16
    done.clear()
    part, _ = pool.get(named, 16, "train", cache=tmp_path, on_batch=done.append)
    assert done == []
    assert torch.equal(part.target, whole.target[:16])
    assert torch.equal(whole.target, pool.compute(named, 24, "train").target)


def test_segments_need_a_path_of_as_many_steps() -> None:
    assert on_grid([999, 750, 500, 250], [990, 980, 970, 960, 950]) == [990, 970, 960, 950]
    assert on_grid([999, 30, 20, 10], [999, 500, 300, 100, 50]) == [999, 300, 100, 50]
    run = trainer(
        dataclasses.replace(make_teacher(), num_inference_steps=3), "regression", num_inference_steps=4, segments=1.0
    )
    with pytest.raises(InvalidRequest, match="too few for 4 segments"):
        run.run()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("redif", "spends 0.5 of a run on regression; lower it, or raise warm_start"),
        ("grpo", "the method grpo does not read segments, warm_start"),
    ],
)
def test_segments_beyond_the_regression_are_refused(method: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        DistillConfig.checked(method=method, segments=0.6, warm_start=0.5)


def test_learning_times_leaves_most_of_a_budget_to_the_training() -> None:
    """Twenty updates of three steps would cost 11,520 forward-equivalents: more than there are."""
    run = trainer(make_teacher(exact), "redif", num_inference_steps=3, schedule_updates=20, updates=None,
                  forward_equivalents=6000.0)  # fmt: skip
    run.method.prepare(run.context)
    assert run.meter.forward_equivalents == pytest.approx(2 * 8 * 24 * 3, rel=0.01)  # a third update is beyond a fifth


def test_a_guided_teacher_judges_times_itself() -> None:
    """The student's network knows nothing of guidance before it is trained: its best times are not the student's."""
    far = 3.0

    def shifted(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return exact(x, t, None) + torch.where(condition == 1, 0.0, far * t / 1000).view(-1, 1, 1, 1)

    guided = make_teacher(shifted, num_classes=2, guidance=Guidance(scale=2.0, null_class=1))
    run = trainer(guided, "redif", num_inference_steps=3, schedule_updates=5)
    run.method.prepare(run.context)
    assert run.meter.student_calls == 0
    assert run.meter.teacher_calls == 5 * 8 * 24 * 3 * 2  # updates, candidates, pairs, rows, calls a step

    def wrong(table: StepTable) -> Tensor:
        with torch.no_grad():
            output = teacher_as_policy(guided, table).sample(run.pairs.noise, run.pairs.condition)
        return (output - run.pairs.target).pow(2).mean()

    assert wrong(run.context.policy.table) < wrong(guided.table(3))
