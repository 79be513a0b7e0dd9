"""The methods that match scores: the gradients that they follow, the distributions that they find, their calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods.cdm import Cdm
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.distill.student import distill, load_student
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.denoising import clean_at, levels, noised
from tests.gaussian import MEAN, SHAPE, STD, Small, exact, make_teacher, trainer


@pytest.fixture
def teacher() -> Teacher:
    return make_teacher()


def test_distribution_matching_finds_the_distribution(teacher: Teacher) -> None:
    """Without a regression term: nothing but the difference of the scores says where the data are."""
    run = trainer(
        teacher,
        "dmd",
        num_inference_steps=1,
        updates=250,
        regression_weight=0.0,
        batch_size=64,
        learning_rate=3e-3,
        fake_learning_rate=3e-3,
        step_delta=0.3,
    )
    pairs = run.pairs

    def distance() -> float:
        with torch.no_grad():
            output = run.context.policy.sample(pairs.noise, None)
        return float((output.mean() - MEAN).abs())

    before = distance()
    run.run()
    assert distance() < 0.25 * before
    # real, fake and their noise: each network call of an update is counted
    assert run.meter.teacher_calls == 250 * 64
    assert run.meter.gradient_samples == 250 * 64 * 3


@pytest.mark.parametrize("method", ["cdm", "sgmd"])
def test_matching_by_scores_finds_the_teachers_distribution(teacher: Teacher, method: str) -> None:
    """Without a paired output: the mean of the student's samples becomes the data's, and the spread nearer to it."""
    run = trainer(
        teacher,
        method,
        num_inference_steps=2,
        updates=400,
        batch_size=64,
        learning_rate=3e-3,
        fake_learning_rate=3e-3,
        fake_updates=2,
    )

    def sampled() -> tuple[float, float]:
        with torch.no_grad():
            output = run.context.policy.sample(run.pairs.noise, None)
        return abs(float(output.mean()) - MEAN), abs(float(output.std(0).mean()) - STD)

    before = sampled()
    run.run()
    after = sampled()
    assert after[0] < 0.3 * before[0]
    assert after[1] < before[1]


def test_cdm_jumps_along_a_rows_own_estimate(teacher: Teacher) -> None:
    """To its own time it comes back to its state; with the exact teacher as student it stays on the teacher's path."""
    run = trainer(teacher, "cdm", num_inference_steps=2, schedule_steps=3)
    anchor = Cdm().rollout(run.context, run.pairs[:16], torch.Generator().manual_seed(1))
    assert torch.allclose(anchor.jump(teacher, anchor.t), anchor.x, atol=1e-4)
    ahead = torch.full_like(anchor.t, 300)
    alpha, sigma = levels(teacher, ahead)
    own_alpha, own_sigma = levels(teacher, anchor.t)
    noise = (anchor.x - own_alpha * anchor.clean) / own_sigma
    assert torch.allclose(anchor.jump(teacher, ahead), alpha * anchor.clean + sigma * noise, atol=1e-5)
    lengths = set()
    for seed in range(30):
        run.meter.student_calls = 0
        Cdm().rollout(run.context, run.pairs[:16], torch.Generator().manual_seed(seed))
        lengths.add(run.meter.student_calls // 16)
    assert lengths == {1, 2, 3}


def test_a_cdm_student_takes_any_number_of_steps(teacher: Teacher, tmp_path: Path) -> None:
    config = DistillConfig.checked(method="cdm", num_inference_steps=2, updates=2, batch_size=8, pool_size=16)
    student = distill(teacher, config, progress=False)
    assert [table.num_inference_steps for table in student.tables] == [2, 1, 4]
    student.save_pretrained(tmp_path / "student")
    again = load_student(tmp_path / "student", network=Small())
    noise = torch.randn(2, *SHAPE)
    for steps in (1, 2, 4):
        assert torch.allclose(
            again.policy(steps).sample(noise, None), student.policy(steps).sample(noise, None), atol=1e-5
        )


def test_cdm_follows_guidance_as_a_term_of_its_own() -> None:
    """Of a guided teacher: two more calls a sample, of conditions and of 'no class'."""
    asked: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        asked.append(condition)
        return exact(x, t, None) - 0.1 * condition.view(-1, 1, 1, 1).float()

    plain = make_teacher(predict, num_classes=4, fingerprint=None)
    guided = plain.guided(3.0, null_class=3)
    spent = {}
    for name, one in (("plain", plain), ("guided", guided)):
        run = trainer(one, "cdm", schedule_steps=1)
        run.meter.teacher_calls = 0
        asked.clear()
        run.step(0.5)
        spent[name] = run.meter.teacher_calls
        assert (name == "guided") == any(bool((labels == 3).all()) for labels in asked)
    assert spent == {"plain": 2 * 16, "guided": 4 * 16}


def test_sgmds_gradient_is_that_of_the_fisher_divergence(teacher: Teacher) -> None:
    """Without the correction: of |mu - m|^2 / (2 n) through the fake score's input; with c = 1 no mu is left."""
    run = trainer(teacher, "sgmd", num_inference_steps=1)
    fake = FakeScore.make(run.context)
    outputs = (0.3 * torch.randn(8, *SHAPE)).requires_grad_()
    (found,) = torch.autograd.grad(fake.fisher(outputs, None, torch.Generator().manual_seed(5), 0.0), outputs)

    inputs = outputs.detach().requires_grad_()
    t, x = noised(teacher, inputs, torch.Generator().manual_seed(5))
    mu = clean_at(teacher, t, x, fake.network(x, t.float(), None))
    with torch.no_grad():
        real = clean_at(teacher, t, x, teacher(x, t.float(), None))
        n = (inputs - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    (wanted,) = torch.autograd.grad(((mu - real) ** 2 / (2 * n)).mean(), inputs)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert all(weight.requires_grad and weight.grad is None for weight in fake.network.parameters())

    (sampled,) = torch.autograd.grad(fake.fisher(outputs, None, torch.Generator().manual_seed(5), 1e9), outputs)
    inputs = outputs.detach().requires_grad_()
    t, x = noised(teacher, inputs, torch.Generator().manual_seed(5))
    mu = clean_at(teacher, t, x, fake.network(x, t.float(), None))
    (wanted,) = torch.autograd.grad((((inputs - real) / n).detach() * mu).mean(), inputs)
    assert torch.allclose(sampled, wanted, atol=1e-6)
