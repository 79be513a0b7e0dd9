"""The estimators, and the traps that other implementations document: each has a test."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig, applicable
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.estimators import TrajectoryGroups, check_drift, score_direction
from redif_sdk.distill.methods.redif import ReDiF
from redif_sdk.distill.methods.regression import error, visible_residual
from redif_sdk.distill.methods.times import images_an_update, times_of
from redif_sdk.distill.policy import Exploration, StudentPolicy
from redif_sdk.distill.rewards import Advantage, PixelReward, make_rewards, reward_names
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.student import distill, sample_pool
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.calling import check_deterministic
from redif_sdk.distill.training import check as checking
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, RedifError, TrainingDiverged, UnsupportedModel
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from tests.networks import Tiny

SHAPE = (1, 4, 4)


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = Tiny().eval()
    return Teacher.from_callable(
        network,
        schedule=schedule(),
        prediction_type="v_prediction",
        shape=SHAPE,
        student=network,
        num_inference_steps=10,
        value_range=(-1, 1),
    )


@pytest.fixture
def pairs(teacher: Teacher) -> pool.Pairs:
    return pool.compute(teacher, 64, "train")


def trainer(teacher: Teacher, pairs: pool.Pairs, **settings: object) -> Trainer:
    fixed = {"num_inference_steps": 2, "updates": 4, "batch_size": 8, "reward": "pixel", "schedule_updates": 0}
    return Trainer(teacher, DistillConfig.checked(**{**applicable(fixed | settings), **settings}), pairs)


def context(teacher: Teacher, pairs: pool.Pairs, **settings: object) -> Context:
    return trainer(teacher, pairs, **settings).context


# -- exploration ------------------------------------------------------------------------------------------------------


def test_structured_log_prob_is_the_gaussian_s_own() -> None:
    residuals = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(1))
    explore = Exploration.structured(residuals, rank=5, white_part=0.3)
    covariance = explore.tau**2 * torch.eye(16) + explore.basis.T @ torch.diag(explore.scales**2) @ explore.basis
    mean, action, scale = torch.zeros(3, *SHAPE), torch.randn(3, *SHAPE), 0.1
    exact = torch.distributions.MultivariateNormal(torch.zeros(16), covariance * scale**2)
    ours = explore.log_prob(action, mean, scale) * 16
    theirs = exact.log_prob(action.flatten(1))
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("white_part", [0.0, 0.5, 1.0])
def test_exploration_has_unit_variance_on_average(white_part: float) -> None:
    residuals = torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(1))
    explore = Exploration.structured(residuals, rank=6, white_part=white_part)
    draws = explore.draw(400, (8, *SHAPE), torch.Generator().manual_seed(2))
    assert float(draws.pow(2).mean()) == pytest.approx(1.0, abs=0.1)


def test_antithetic_draws_cancel_and_follow_the_generator_alone() -> None:
    explore = Exploration.white(16)
    first = explore.antithetic(8, (3, *SHAPE), torch.Generator().manual_seed(5))
    torch.manual_seed(99)  # reseeding the global generator, as evaluation grids do, must not make exploration collapse
    again = explore.antithetic(8, (3, *SHAPE), torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert torch.equal(first[:4], -first[4:])


def test_a_low_rank_exploration_has_no_density() -> None:
    explore = Exploration.structured(torch.randn(20, *SHAPE), rank=3)
    with pytest.raises(UnsupportedModel, match="density"):
        explore.log_prob(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), 0.1)


# -- advantage --------------------------------------------------------------------------------------------------------


def test_a_reward_s_scale_does_not_matter_in_a_sum() -> None:
    def sharpness(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return images.std((1, 2, 3))

    def loud(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return 1e4 * sharpness(images, targets, condition) + 77

    outputs, target = torch.rand(6, 4, *SHAPE) - 0.5, torch.rand(4, *SHAPE) - 0.5
    quiet_sum = Advantage([(PixelReward(), 1.0), (sharpness, 1.0)], lambda x: x)(outputs, target, None)
    loud_sum = Advantage([(PixelReward(), 1.0), (loud, 1.0)], lambda x: x)(outputs, target, None)
    torch.testing.assert_close(quiet_sum, loud_sum, rtol=1e-3, atol=1e-3)


def test_groups_without_spread_are_dropped_counted_and_fatal_when_all_are() -> None:
    def half_blind(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        values = images.mean((1, 2, 3))
        values[::2] = 1.0
        return values

    advantage = Advantage([(half_blind, 1.0)], lambda x: x)
    values = advantage(torch.rand(4, 2, *SHAPE), torch.zeros(2, *SHAPE), None)
    assert advantage.dropped == 1
    assert float(values[:, 0].abs().max()) == 0.0
    assert float(values[:, 1].abs().max()) > 0
    constant = Advantage([(lambda i, t, c: torch.ones(len(i)), 1.0)], lambda x: x)
    with pytest.raises(TrainingDiverged, match="cannot tell the actions apart"):
        constant(torch.rand(4, 2, *SHAPE), torch.zeros(2, *SHAPE), None)


def test_advantages_are_clipped() -> None:
    advantage = Advantage([(lambda i, t, c: i[:, 0, 0, 0], 1.0)], lambda x: x, clip=2.0)
    outputs = torch.zeros(64, 1, *SHAPE)
    outputs[0] = 1.0
    assert float(advantage(outputs, torch.zeros(1, *SHAPE), None).max()) == 2.0


def test_a_reward_that_is_not_finite_or_of_the_wrong_shape_is_named() -> None:
    outputs, target = torch.rand(4, 2, *SHAPE), torch.zeros(2, *SHAPE)

    def broken(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return torch.full((len(images),), float("nan"))

    with pytest.raises(TrainingDiverged, match="not finite"):
        Advantage([(broken, 1.0)], lambda x: x)(outputs, target, None)
    with pytest.raises(InvalidRequest, match="shape"):
        Advantage([(lambda i, t, c: torch.zeros(1), 1.0)], lambda x: x)(outputs, target, None)


def test_rewards_see_what_a_user_sees() -> None:
    """Both sides decoded (here: unshuffled into pixels), then clamped, and never denormalised."""
    teacher = Teacher.from_callable(
        Tiny(), schedule=schedule(), prediction_type="sample", shape=(4, 2, 2), student=Tiny(), pixel_shuffle=2
    )
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        seen.append((images, targets))
        return images.mean((1, 2, 3))

    outputs, target = 2 * torch.randn(3, 4, 2, 2), 2 * torch.randn(3, 4, 2, 2)
    Advantage([(spy, 1.0)], teacher.images).score(outputs, target, None)
    ((images, targets),) = seen
    for given, latents in ((images, outputs), (targets, target)):
        assert torch.equal(given, torch.nn.functional.pixel_shuffle(latents, 2).clamp(-1, 1))
        assert given.shape == (3, 1, 4, 4)
    assert float(images.abs().max()) == 1.0


class Decoder(torch.nn.Conv2d):
    """One grey pixel for each place of the latents; it notes what it was computed in."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        self.seen = made.dtype
        return made


@pytest.mark.parametrize(("precision", "computed"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_images_for_rewards_are_decoded_in_the_precision_of_the_training(
    teacher: Teacher, precision: str, computed: torch.dtype
) -> None:
    decoder = Decoder(SHAPE[0], 1, 1).eval()
    latent = replace(teacher, decode=decoder)
    pairs = pool.compute(latent, 8, "train")
    advantage = context(latent, pairs, method="redif", reward="pixel", precision=precision).advantage
    x = pairs.target[:2].clone().requires_grad_()
    images = advantage.images(x)
    assert (decoder.seen, images.dtype) == (computed, torch.float32)
    torch.testing.assert_close(images, decoder(x).clamp(-1, 1), atol=0.02, rtol=0.02)
    images.sum().backward()
    assert x.grad is not None


def bright(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
    return images.mean((1, 2, 3))


def dark(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
    return -images.mean((1, 2, 3))


def test_a_judge_is_asked_at_checks_and_trained_on_nowhere(teacher: Teacher, tmp_path: Path) -> None:
    """It may be the reward's very opposite: the student is the same, and the log says that it falls."""
    pairs = pool.compute(teacher, 32, "train")
    settings = {"method": "redif", "reward": bright, "updates": 30, "regression_weight": 0.0, "step_delta": 0.5}
    settings |= {"check_every": 10, "log_every": 10, "keep": "last", "warm_start": 0.0, "learning_rate": 1e-2}
    runs = []
    for name, judge in (("alone", None), ("judged", dark)):
        run = Trainer(teacher, trainer(teacher, pairs, **settings, judge=judge).config, pairs, tmp_path / name)
        runs.append((run.run(), run.meter))
    (alone, plain), (judged, meter) = runs
    for ours, theirs in zip(alone.network.parameters(), judged.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert meter.reward_calls == plain.reward_calls
    assert meter.forward_equivalents == plain.forward_equivalents
    lines = [json.loads(line) for line in (tmp_path / "judged" / "log.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "judge" in line]
    assert len(seen) >= 3
    assert seen[-1]["judge"] < seen[0]["judge"] - 2 * seen[-1]["judge_error"]
    assert any("the judge falls" in line.get("warning", "") for line in seen)
    assert json.loads((tmp_path / "judged" / "run.json").read_text())["judge"] == ["dark"]


def test_unknown_reward_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"unknown reward 'beauty'; known: bands, discriminator, .*, clip:FOLDER"):
        reward_names("pixel+beauty")


# -- same-state groups ------------------------------------------------------------------------------------------------


def test_score_direction_points_along_sigma_times_the_gradient() -> None:
    """For a linear reward w.a the direction is Sigma w: structured noise preconditions the gradient."""
    generator = torch.Generator().manual_seed(3)
    explore = Exploration.structured(torch.randn(60, *SHAPE, generator=generator), rank=6, white_part=0.2)
    w = torch.randn(1, *SHAPE, generator=generator)
    xi = explore.antithetic(4000, (1, *SHAPE), generator)
    rewards = (xi * w).sum((2, 3, 4))
    direction = score_direction((rewards - rewards.mean(0)) / rewards.std(0), xi).flatten()
    sigma = explore.tau**2 * torch.eye(16) + explore.basis.T @ torch.diag(explore.scales**2) @ explore.basis
    cosine = torch.nn.functional.cosine_similarity(direction, sigma @ w.flatten(), dim=0)
    assert float(cosine) > 0.95


@pytest.mark.parametrize("exploration", [0.02, 0.1, 0.5])
def test_the_step_does_not_scale_with_the_exploration(
    teacher: Teacher, pairs: pool.Pairs, monkeypatch: pytest.MonkeyPatch, exploration: float
) -> None:
    """Gradients that scale as 1/e are a known trap: the rms step in x0 is ``step_delta`` whatever e is."""
    made = context(teacher, pairs, exploration=exploration, warm_start=0.0, regression_weight=0.0, step_delta=0.15)
    means, sample = [], made.policy.sample

    def kept(*arguments: Any) -> Tensor:
        mean = sample(*arguments)
        if mean.requires_grad:
            mean.retain_grad()
            means.append(mean)
        return mean

    monkeypatch.setattr(made.policy, "sample", kept)
    loss, _ = next(ReDiF().losses(made, pairs[:8], 0.5, torch.Generator().manual_seed(0)))
    loss.backward()
    (mean,) = means
    step = mean.grad * mean.numel() / 2  # the loss is -2 mean(d mu)
    assert float(step.pow(2).mean().sqrt()) == pytest.approx(0.15, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("intermediate_step_fraction", [0.0, 1.0])
def test_same_state_groups_raise_the_reward(
    teacher: Teacher, pairs: pool.Pairs, steps: int, intermediate_step_fraction: float
) -> None:
    run = trainer(
        teacher,
        pairs,
        num_inference_steps=steps,
        updates=60,
        warm_start=0.0,
        regression_weight=0.0,
        intermediate_step_fraction=intermediate_step_fraction,
        learning_rate=3e-3,
        exploration_rank=0,
        ema_decay=0.0,
    )
    before = run.check()["reward"]
    run.run()
    assert run.check()["reward"] > before


def test_the_pathwise_step_is_the_gradient_s(teacher: Teacher, pairs: pool.Pairs) -> None:
    made = context(teacher, pairs, estimator="pathwise", warm_start=0.0, step_delta=0.3)
    output = made.policy.sample(pairs[:8].noise, None).detach()
    gradient = made.advantage.gradient(output, pairs[:8].target, None)
    wanted = pairs[:8].target.clamp(-1, 1) - output.clamp(-1, 1)  # the pixel reward's gradient points at the target
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.999
    assert float(gradient.pow(2).mean().sqrt()) == pytest.approx(1, abs=1e-3)


def test_pathwise_training_raises_the_reward(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(
        teacher,
        pairs,
        estimator="pathwise",
        updates=60,
        warm_start=0.0,
        regression_weight=0.0,
        learning_rate=3e-3,
        ema_decay=0.0,
    )
    before = run.check()["reward"]
    run.run()
    assert run.check()["reward"] > before


def test_a_black_box_reward_has_no_path(teacher: Teacher, pairs: pool.Pairs) -> None:
    def black_box(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return torch.as_tensor(-((images.detach() - targets) ** 2).numpy().mean((1, 2, 3)))

    run = trainer(teacher, pairs, reward=black_box, estimator="pathwise", updates=1, warm_start=0.0)
    with pytest.raises(InvalidRequest, match="same-state"):
        run.run()


# -- trajectory groups ------------------------------------------------------------------------------------------------


def test_trajectory_groups_raise_the_reward(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(
        teacher,
        pairs,
        estimator="trajectory",
        updates=60,
        warm_start=0.0,
        regression_weight=0.0,
        learning_rate=3e-3,
        ema_decay=0.0,
        ppo_epochs=2,
        clip_mean_shift=0.5,
    )
    before = run.check()["reward"]
    run.run()
    assert run.check()["reward"] > before


def test_a_group_may_begin_at_several_noises(teacher: Teacher, pairs: pool.Pairs) -> None:
    """For rewards that see the prompt; one that compares with the teacher's image of a noise would say nothing."""
    settings = {"estimator": "trajectory", "group_noise": "different", "group_size": 4, "warm_start": 0.0}
    made = context(teacher, pairs, reward=lambda batch: batch.images.mean((1, 2, 3)), **settings)
    groups = TrajectoryGroups(made, Exploration.white(pairs.noise[0].numel()), None)
    states, _, _, output = groups.rollout(pairs[:3], torch.Generator().manual_seed(0))
    starts = states[0].unflatten(0, (4, 3))
    torch.testing.assert_close(starts[0], made.policy.start(pairs[:3].noise))
    flat = starts.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + 1e3 * torch.eye(12)).min() > 1
    assert output.shape == states[0].shape
    run = trainer(teacher, pairs, reward=lambda batch: batch.images.mean((1, 2, 3)), updates=40, learning_rate=3e-3,
                  regression_weight=0.0, ema_decay=0.0, clip_mean_shift=0.5, **settings)  # fmt: skip
    before = run.check()["reward"]
    run.run()
    assert run.check()["reward"] > before
    with pytest.raises(InvalidRequest, match="the reward pixel compares with the teacher's image of one noise"):
        trainer(teacher, pairs, reward="pixel", **settings)


def test_kl_has_a_gradient(teacher: Teacher, pairs: pool.Pairs) -> None:
    made = context(teacher, pairs, estimator="trajectory", kl=1.0)
    reference = copy.deepcopy(made.policy.network)
    with torch.no_grad():
        for parameter in made.policy.network.parameters():
            parameter.add_(0.01)
    groups = TrajectoryGroups(made, Exploration.white(16), reference)
    x = made.policy.start(pairs[:4].noise)
    kl = groups._kl(0, x, None, made.policy.estimate(0, x, None))
    kl.backward()
    assert kl.item() > 0
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in made.policy.network.parameters())
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("estimator", ["trajectory", "same-state"])
def test_under_a_guided_teacher_rollout_and_update_are_one_function(teacher_folder: Path, estimator: str) -> None:
    """A ratio of guided to unguided means would be biased from the start; here the student needs no guidance at all."""
    plain = Teacher.load(teacher_folder)
    guided = plain.guided(4.0)
    pairs = pool.compute(guided, 16, "train")
    assert (pairs.target - pool.compute(plain, 16, "train").target).abs().max() > 0.01  # the targets are guided
    clip = {"clip_mean_shift": 1e-3} if estimator == "trajectory" else {}
    run = trainer(guided, pairs, estimator=estimator, warm_start=0.0, group_size=4, regression_weight=0.0, **clip)
    figures = run.step(0.0)  # raises if the mean drifts between rollout and update
    assert figures.get("clip_fraction", 0.0) == 0.0  # the ratio is 1
    assert run.meter.teacher_calls == 0


def test_every_row_s_gradient_weighs_the_same(
    teacher: Teacher, pairs: pool.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows explore by different amounts c, gradients scale as 1 / c, and the last row rules. Here all explore
    x0 by the same e."""
    made = context(teacher, pairs, estimator="trajectory", regression_weight=0.0, group_size=64, num_inference_steps=4)
    means, estimate = [], made.policy.estimate

    def kept(k: int, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        mean = estimate(k, x, condition)
        if mean.requires_grad:
            mean.retain_grad()
            means.append(mean)
        return mean

    monkeypatch.setattr(made.policy, "estimate", kept)
    draw = torch.Generator().manual_seed(0)
    ((loss, _),) = TrajectoryGroups(made, Exploration.white(16), None).losses(pairs[:16], draw, check=False)
    loss.backward()
    norms = [float(mean.grad.norm()) for mean in means]
    assert len(norms) == 4
    assert max(norms) < 1.1 * min(norms)


def test_the_clip_range_is_a_change_of_the_mean(teacher: Teacher, pairs: pool.Pairs) -> None:
    """A first epoch is on-policy: nothing is clipped; a network moved far beyond ``clip_mean_shift`` is clipped."""
    made = context(teacher, pairs, estimator="trajectory", ppo_epochs=2, clip_mean_shift=0.01, regression_weight=0.0)
    groups = TrajectoryGroups(made, Exploration.white(16), None)
    losses = groups.losses(pairs[:8], torch.Generator().manual_seed(0), check=True)
    _, first = next(losses)
    assert first["clip_fraction"] == 0.0
    with torch.no_grad():
        for parameter in made.policy.network.parameters():
            parameter.add_(0.05)
    _, second = next(losses)
    assert second["clip_fraction"] > 0.5


# -- regression -------------------------------------------------------------------------------------------------------


def test_an_overshoot_that_nobody_sees_is_no_error() -> None:
    target = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.2, 1.4])
    output = torch.tensor([-1.5, 1.5, 1.5, -1.5, 0.5, 1.2], requires_grad=True)
    residual = visible_residual(output, target, (-1.0, 1.0))
    torch.testing.assert_close(residual, torch.tensor([0.0, 2.5, 0.0, -2.5, 0.3, 0.0]))
    error(residual, 0.0).backward()
    assert output.grad is not None
    assert output.grad[1] > 0  # beyond the wrong bound the gradient still points back
    torch.testing.assert_close(visible_residual(output, target, None), output - target)


def test_pseudo_huber_is_the_squared_error_near_zero_and_linear_far_away() -> None:
    small = torch.full((4,), 1e-3)
    assert error(small, 0.1).item() == pytest.approx(error(small, 0.0).item(), rel=1e-3)
    far = error(torch.full((4,), 20.0), 0.1).item() / error(torch.full((4,), 10.0), 0.1).item()
    assert far == pytest.approx(2, rel=0.02)


# -- checks that stop a run -------------------------------------------------------------------------------------------


def test_drift_before_the_first_update_stops_the_run() -> None:
    mean = torch.zeros(2, *SHAPE)
    check_drift(mean, mean + 0.009, trust_region=0.1)
    with pytest.raises(TrainingDiverged, match="drifted"):
        check_drift(mean, mean + 0.02, trust_region=0.1)
    with pytest.raises(TrainingDiverged, match="drifted"):
        check_drift(mean, mean * math.nan, trust_region=0.1)


def test_a_network_that_is_not_deterministic_is_caught_in_the_run(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(teacher, pairs, warm_start=0.0)
    network = run.context.policy.network
    network.register_forward_hook(lambda module, args, out: out + torch.rand(()))
    with pytest.raises(TrainingDiverged, match="drifted"):
        run.run()


class AlwaysDropping(Tiny):
    """Dropout that evaluation mode does not switch off."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x, t, condition), 0.5, training=True)


class StaysInTraining(Tiny):
    """Its `eval` leaves dropout on."""

    def train(self, mode: bool = True) -> StaysInTraining:
        super().train(True)
        return self


@pytest.mark.parametrize(
    ("student", "said"),
    [(AlwaysDropping(), "two outputs for one input"), (StaysInTraining(0.5), r"dropout is on in network\.body\.2")],
)
def test_a_student_that_draws_is_refused_before_the_pool_is_sampled(student: Tiny, said: str) -> None:
    calls: list[int] = []

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        return x.tanh()

    teacher = Teacher.from_callable(
        predict, schedule=schedule(), prediction_type="sample", shape=SHAPE, student=Tiny(), num_inference_steps=5
    )
    config = DistillConfig(num_inference_steps=1, updates=1, pool_size=64, batch_size=8, reward="pixel")
    with pytest.raises(UnsupportedModel, match=said):
        distill(teacher, config, student=student)
    assert sum(calls) <= 4  # the look at whether the teacher is deterministic, and no pair


def test_a_teacher_that_draws_is_refused_before_the_pool_is_sampled() -> None:
    calls: list[int] = []

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        return x + torch.rand_like(x)

    noisy = Teacher.from_callable(
        predict, schedule=schedule(), prediction_type="epsilon", shape=SHAPE, student=Tiny(), num_inference_steps=5
    )
    with pytest.raises(RedifError, match="two outputs for one input"):
        sample_pool(noisy, DistillConfig(pool_size=64, batch_size=8))
    assert sum(calls) <= 4


def test_dropout_is_off_in_the_update(pairs: pool.Pairs, teacher: Teacher) -> None:
    network = Tiny(dropout=0.5)
    noisy = Teacher.from_callable(
        network.eval(), schedule=schedule(), prediction_type="v_prediction", shape=SHAPE, student=network.train()
    )
    run = trainer(noisy, pairs)
    first = run.context.policy.sample(pairs.noise, None)
    assert torch.equal(first, run.context.policy.sample(pairs.noise, None))


def test_a_stochastic_teacher_is_refused() -> None:
    noisy = Teacher.from_callable(
        lambda x, t, c: x + torch.rand_like(x),
        schedule=schedule(),
        prediction_type="epsilon",
        shape=SHAPE,
        student=Tiny(),
    )
    with pytest.raises(RedifError, match="two outputs for one input"):
        check_deterministic(noisy)


def test_a_stochastic_table_is_refused(teacher: Teacher, pairs: pool.Pairs) -> None:
    noisy = teacher.table(4, eta=1.0)
    with pytest.raises(UnsupportedModel, match="deterministic"):
        StudentPolicy(Tiny(), noisy).sample(pairs.noise, None)
    config = DistillConfig.checked(num_inference_steps=4, batch_size=8, reward="pixel")
    with pytest.raises(UnsupportedModel, match="redif needs a deterministic one"):
        Trainer(teacher, config, pairs, start_table=noisy)


def test_a_loss_that_is_not_finite_stops_the_run(teacher: Teacher, pairs: pool.Pairs) -> None:
    broken = pool.Pairs(pairs.noise, pairs.target * math.nan, None)
    with pytest.raises(TrainingDiverged):
        trainer(teacher, broken, method="regression").run()


# -- pairing, updates, budget -----------------------------------------------------------------------------------------


def test_the_untrained_student_at_the_teacher_s_steps_is_the_teacher(teacher: Teacher, pairs: pool.Pairs) -> None:
    """Pairing: the student's noise is the very noise of the teacher's output."""
    policy = StudentPolicy(teacher.make_student(), teacher.table(10), exact=True)
    with torch.no_grad():
        torch.testing.assert_close(policy.sample(pairs.noise, None), pairs.target)


def test_training_and_evaluation_noises_are_disjoint(teacher: Teacher) -> None:
    train, held = (pool.pool_noise(SHAPE, 50, split) for split in ("train", "held_out"))
    assert not (train[:, None] == held[None]).flatten(2).all(2).any()


def test_every_update_reaches_the_optimiser(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(teacher, pairs, updates=6, warm_start=0.5)
    seen = []
    for update in range(6):
        before = [p.clone() for p in run.context.policy.network.parameters()]
        run.step(update / 6)
        seen.append(
            any(not torch.equal(a, b) for a, b in zip(before, run.context.policy.network.parameters(), strict=True))
        )
    assert seen == [True] * 6


def test_watching_does_not_change_the_run(teacher: Teacher, pairs: pool.Pairs) -> None:
    """Evaluation must not touch the draws that explore."""
    weights = []
    for every in (1, 1000):
        policy = trainer(teacher, pairs, updates=6, warm_start=0.3, check_every=every, log_every=1).run()
        weights.append(torch.cat([p.flatten() for p in policy.network.parameters()]))
    assert torch.equal(*weights)


def test_what_a_run_is_watched_on_is_not_trained_on(
    teacher: Teacher, pairs: pool.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that is large enough keeps the entries of its checks: the reward in the log is a held-out one."""
    monkeypatch.setattr(checking, "CHECK_PAIRS", 8)
    run = trainer(teacher, pairs[:64], updates=5, batch_size=16, method="regression")
    seen: list[Tensor] = []
    learn = run.method.losses

    def losses(context: Context, batch: pool.Pairs, *rest: Any) -> Any:
        assert batch.index is not None
        seen.append(batch.index)
        return learn(context, batch, *rest)

    monkeypatch.setattr(run.method, "losses", losses)
    run.run()
    assert min(int(index.min()) for index in seen) == 8
    assert set(run.check()) == {"reward", "check_mse", "recall", "contrast", "spread"}


def test_the_meter_counts_every_call(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(teacher, pairs, num_inference_steps=3, method="regression", updates=5, batch_size=8)
    run.run()
    assert run.meter.gradient_samples == 5 * 8 * 3
    assert run.meter.student_calls == 0
    assert run.meter.forward_equivalents == 3 * 120


def test_times_get_a_share_of_a_budget_of_seconds(teacher: Teacher, pairs: pool.Pairs) -> None:
    """However many updates are asked for: the rest is for training."""
    run = trainer(teacher, pairs, schedule_updates=1_000_000, updates=None, seconds=1.0)
    run.run()
    assert run.update > 0
    assert run.meter.seconds < 3
    first = trainer(teacher, pairs, schedule_updates=1_000_000, updates=None, seconds=1e-6)
    first.method.prepare(first.context)
    assert first.meter.student_calls == images_an_update() * 2  # of two steps: the one that says how many fit


@pytest.mark.parametrize("m", [[0.0], [50.0, 50.0, 50.0], [-50.0, -50.0, -50.0], [3.0, -9.0]])
def test_times_fall_strictly_whatever_the_policy_says(m: list[float]) -> None:
    times = times_of(999, torch.tensor(m))
    assert all(a > b >= 0 for a, b in itertools.pairwise(times))


# -- the any-callable door --------------------------------------------------------------------------------------------


def test_a_score_function_is_a_teacher() -> None:
    """The score of a Gaussian N(0.5, 0.2^2) is known: its samples must have that mean and spread."""
    noise_schedule = schedule()
    alphas, sigmas = (torch.tensor(a).float() for a in (noise_schedule.alphas, noise_schedule.sigmas))

    def score(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        alpha, sigma = (values[t.long()].view(-1, 1, 1, 1) for values in (alphas, sigmas))
        return -(x - alpha * 0.5) / (alpha**2 * 0.2**2 + sigma**2)

    teacher = Teacher.from_callable(
        score, schedule=noise_schedule, prediction_type="score", shape=SHAPE, student=Tiny(), num_inference_steps=100
    )
    output = pool.compute(teacher, 256, "train").target
    assert float(output.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(output.std()) == pytest.approx(0.2, abs=0.03)


def test_a_black_box_teacher_trains_a_student_of_its_own(teacher: Teacher) -> None:
    """The documented example of ``Teacher.from_callable``: the function has no weights to copy."""
    calls = []

    def black_box(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        return torch.as_tensor(np.tanh(x.numpy()))

    outside = Teacher.from_callable(
        black_box, schedule=schedule(), prediction_type="sample", shape=SHAPE, student=Tiny(), num_inference_steps=5
    )
    config = DistillConfig(
        num_inference_steps=1, updates=30, pool_size=64, batch_size=16, reward="pixel", learning_rate=3e-3
    )
    pairs = pool.compute(outside, 64, "train")
    untrained = StudentPolicy(outside.make_student(), outside.table(1))
    with torch.no_grad():
        begin = float(((untrained.sample(pairs.noise, None) - pairs.target) ** 2).mean())
    student = distill(outside, config, pairs=pairs)
    with torch.no_grad():
        end = float(((student.policy().sample(pairs.noise, None) - pairs.target) ** 2).mean())
    assert end < begin
    assert sum(calls) >= 64 * 5


def test_feature_reward_prefers_the_teacher_s_image(teacher: Teacher, pairs: pool.Pairs) -> None:
    reward, _ = make_rewards("feature", teacher, pairs, 0)[0]
    images = teacher.images(pairs.target).clamp(-1, 1)
    near, far = images + 0.02 * torch.randn_like(images), images + 0.3 * torch.randn_like(images)
    same, close, distant = (reward(Batch(x, images, None)) for x in (images, near, far))
    assert float(same.abs().max()) < 1e-6
    assert (close > distant).all()
    grouped = reward(Batch(torch.cat([near, far]), images.repeat(2, 1, 1, 1), None))
    torch.testing.assert_close(grouped, torch.cat([close, distant]))
