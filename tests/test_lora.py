"""Students trained by adapters: few weights move, and what is saved is an ordinary network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from redif_sdk.distill import DistillConfig, distill, load_student
from redif_sdk.distill.compute.lora import adapted, merged
from redif_sdk.distill.config import applicable
from redif_sdk.distill.methods import METHODS
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import UnsupportedModel


@pytest.fixture(scope="module")
def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    return DDIMPipeline(network, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def config(method: str = "redif", **settings: object) -> DistillConfig:
    fixed = {
        "num_inference_steps": 2,
        "updates": 4,
        "batch_size": 4,
        "pool_size": 8,
        "group_size": 2,
        "reward": "pixel",
    }
    return DistillConfig.checked(
        **applicable(fixed | {"method": method, "lora_rank": 2, "schedule_updates": 0} | settings)
    )


#: One without a reward, two with one, one with networks of its own; every method has its runs in test_mixture.py.
QUICK = {"regression", "redif", "grpo", "dmd2"}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in sorted(METHODS)]
)
def test_adapters_alone_are_trained_whatever_the_method(pipeline: DDIMPipeline, method: str) -> None:
    teacher = Teacher.from_diffusers(pipeline)
    student = distill(teacher, config(method, kl=0.1 if method == "grpo" else 0.0, warm_start=0.5, keep="last"))
    before = dict(teacher.make_student().named_parameters())
    after = dict(student.network.named_parameters())
    assert before.keys() == after.keys()  # merged: no adapter is left
    changes = {name: after[name] - before[name] for name in before}
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert moved
    assert all(name.endswith(".weight") and before[name].dim() in (2, 4) for name in moved)
    flat = [changes[name].flatten(1) for name in moved]
    assert all(torch.linalg.matrix_rank(change, rtol=1e-3) <= 2 for change in flat if change.abs().max() > 1e-6)


def test_it_starts_as_the_teacher_and_merges_to_what_it_computes(pipeline: DDIMPipeline) -> None:
    teacher = Teacher.from_diffusers(pipeline)
    network = adapted(teacher.make_student(), 2, 0)
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0)
    with torch.no_grad():
        assert torch.allclose(network(x, t, None), teacher(x, t, None), atol=1e-6)
        for name, weight in network.named_parameters():
            if "lora" in name:
                weight.normal_(0, 0.1)
        assert not torch.allclose(network(x, t, None), teacher(x, t, None), atol=1e-3)
        assert torch.allclose(merged(network)(x, t, None), network(x, t, None), atol=1e-5)
    few = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert few < 0.6 * sum(weight.numel() for weight in network.parameters())
    with pytest.raises(UnsupportedModel, match="train it without LoRA"):
        adapted(torch.nn.ReLU(), 2, 0)


def test_a_cut_run_resumes_bit_for_bit_and_saves_an_ordinary_folder(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    teacher = Teacher.from_diffusers(pipeline)
    whole = distill(teacher, config(), folder=tmp_path / "whole")
    from redif_sdk.distill import pool as pairs

    pool, _ = pairs.get(teacher, 8, "train")
    cut = Trainer(teacher, config(), pool, tmp_path / "cut")
    cut.method.prepare(cut.context)
    while cut.update < 2:
        cut.step(cut.progress)
    cut.save()
    again = distill(teacher, config(), folder=tmp_path / "cut", resume=True)
    ours, theirs = whole.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again.save_pretrained(tmp_path / "student")
    loaded = load_student(tmp_path / "student").network.state_dict()
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)
