"""Teachers whose data do not lie in [-1, 1]: the range is given or measured; rewards, errors and images follow it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Student, Teacher, pool
from redif_sdk.distill.methods.regression import visible_residual
from redif_sdk.distill.rewards import make_rewards
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.teachers.value_range import measured_range
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.images import to_uint8
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from tests.networks import Tiny

SHAPE = (1, 4, 4)
SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})


def gaussian(mean: float, std: float, **more: object) -> Teacher:
    """An exact teacher of data that are N(mean, std^2) at every place."""

    def exact(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        alphas, sigmas = (torch.from_numpy(values.copy()).float() for values in (SCHEDULE.alphas, SCHEDULE.sigmas))
        alpha, sigma = alphas[t.long()].view(-1, 1, 1, 1), sigmas[t.long()].view(-1, 1, 1, 1)
        return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    torch.manual_seed(0)
    return Teacher.from_callable(
        exact,
        schedule=SCHEDULE,
        prediction_type="score",
        shape=SHAPE,
        student=Tiny(),
        num_inference_steps=16,
        **more,  # type: ignore[arg-type]
    )


def spread(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 1024).view(64, *SHAPE)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (spread(-1, 1), (-1, 1)),
        (spread(-1.02, 1.02), (-1, 1)),  # images overshoot a little
        (spread(-0.6, 0.7), (-1, 1)),  # and need not fill their range
        (spread(0, 1), (0, 1)),
        (spread(-0.5, 9.4), (-0.5, 9.4)),
        (spread(0, 255), (0, 255)),
        (spread(1e-3, 9e-3), (1e-3, 9e-3)),
        (spread(100, 110), (100, 110)),
        (spread(-3e4, 5e6), (-3e4, 5e6)),
        (torch.full((8, *SHAPE), 0.2), (-1, 1)),
        (torch.full((8, *SHAPE), 7.0), (6, 8)),
    ],
)
def test_a_range_is_measured_on_outputs(values: Tensor, wanted: tuple[float, float]) -> None:
    low, high = measured_range(values)
    assert (low, high) == pytest.approx(wanted, abs=0.02 * (wanted[1] - wanted[0]))
    assert wanted in ((-1, 1), (0, 1)) or (low <= values.min() and high >= values.max())


def test_gaussians_of_images_keep_their_range() -> None:
    draw = torch.Generator().manual_seed(0)
    for count in (8, 64, 512):
        assert measured_range(0.5 + 0.2 * torch.randn(count, *SHAPE, generator=draw)) == (-1, 1)


def test_outputs_that_are_not_finite_have_none() -> None:
    with pytest.raises(UnsupportedModel, match="not finite"):
        measured_range(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("wrong", [(1, 1), (1, -1), (0, float("inf")), (float("nan"), 1), (1,), "01", 5, (0, 1, 2)])
def test_a_range_that_cannot_be_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="value_range is"):
        gaussian(0, 1, value_range=wrong)


def test_rewards_and_errors_follow_the_range() -> None:
    """What is right in [-1, 1] is right in any range: the same images, stretched and moved, have the same rewards."""
    draw = torch.Generator().manual_seed(0)
    target, output = (torch.rand(16, 1, 12, 12, generator=draw) * 2 - 1 for _ in range(2))
    low, high = -0.5, 9.4
    plain, moved = gaussian(0, 1, value_range=(-1, 1)), gaussian(0, 1, value_range=(low, high))

    def stretched(images: Tensor) -> Tensor:
        return (images + 1) / 2 * (high - low) + low

    torch.testing.assert_close(moved.seen(stretched(output)), output, atol=1e-5, rtol=0)
    assert plain.seen(output) is not None
    assert torch.equal(plain.unit_images(output), output)
    for name in ("pixel", "texture", "feature"):
        values = []
        for teacher, images in ((plain, lambda x: x), (moved, stretched)):
            pairs = pool.Pairs(torch.randn(16, *SHAPE), images(target), None)
            ((reward, _),) = make_rewards(name, teacher, pairs, 0)
            values.append(reward(Batch(teacher.seen(images(output)), teacher.seen(images(target)), None)))
        torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-3)
    residual = visible_residual(stretched(output), stretched(target), (low, high), moved.amplitude)
    torch.testing.assert_close(residual, visible_residual(output, target, (-1.0, 1.0)), atol=1e-5, rtol=0)


def test_a_range_of_minus_one_to_one_is_what_it_was() -> None:
    """Given, or found on outputs that lie there: the same bits."""
    found = []
    for given in (None, (-1.0, 1.0)):
        torch.manual_seed(0)
        teacher = Teacher.from_callable(
            lambda x, t, c: 0.2 + 0.2 * x.tanh(),
            schedule=SCHEDULE,
            prediction_type="sample",
            shape=SHAPE,
            student=Tiny(),
            num_inference_steps=8,
            value_range=given,
        )
        config = DistillConfig(num_inference_steps=2, updates=4, batch_size=16, reward="pixel", schedule_updates=0)
        run = Trainer(teacher, config, pool.compute(teacher, 64, "train"))
        assert run.teacher.postprocess.value_range == (-1.0, 1.0)
        found.append(torch.cat([value.flatten() for value in run.run().network.state_dict().values()]))
    assert torch.equal(*found)


def test_images_map_the_range() -> None:
    teacher = gaussian(5.0, 1.0, value_range=(0, 10))
    student = Student(teacher, teacher.make_student().eval(), [teacher.table(2)], "s")
    latents = student.policy().sample(pool.pool_noise(SHAPE, 4, "held_out"), None).detach().numpy()
    ours = to_uint8(latents, student.manifest("s").postprocess)
    assert student.manifest("s").postprocess.value_range == (0, 10)
    levels = ((teacher.seen(torch.from_numpy(latents)) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - levels).max() <= 1


def test_a_given_range_that_cuts_the_outputs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    teacher = gaussian(5.0, 1.0, value_range=(-1, 1))
    config = DistillConfig(num_inference_steps=1, updates=1, batch_size=8, method="regression")
    with caplog.at_level(logging.WARNING):
        Trainer(teacher, config, pool.compute(teacher, 16, "train"))
    assert "give value_range (--value-range LOW HIGH)" in caplog.text


def test_folders_and_commands_take_a_range(teacher_folder: Path, tmp_path: Path) -> None:
    assert Teacher.load(teacher_folder).postprocess.value_range == (-1, 1)
    assert Teacher.load(teacher_folder, value_range=(0, 4)).postprocess.value_range == (0, 4)
    assert Teacher.load(Teacher.load(teacher_folder), value_range=(0, 4)).postprocess.value_range == (0, 4)
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    about = json.loads((tmp_path / "teacher" / "redif_teacher.json").read_text())
    (tmp_path / "teacher" / "redif_teacher.json").write_text(json.dumps(about | {"value_range": [0, 7]}))
    assert Teacher.load(tmp_path / "teacher").postprocess.value_range == (0, 7)
    options = ["-o", str(tmp_path / "s"), "--steps", "2", "--value-range", "-0.5", "9.4", "--quiet"]
    assert CliRunner().invoke(app, ["import", str(teacher_folder), *options]).exit_code == 0
    assert StudentFolder(tmp_path / "s").manifest.postprocess.value_range == (-0.5, 9.4)
