"""Training a network of billions of weights: what its size decides, and what micro-batches leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from networks import Tiny
from torch import Tensor

from redif_sdk.distill import DistillConfig, Teacher, distill, load_student, pool
from redif_sdk.distill.config import applicable
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.distill.student import check_run
from redif_sdk.distill.teachers import large, weights
from redif_sdk.distill.teachers.large import half_of, sized
from redif_sdk.distill.training.checkpoint import CHECKPOINT
from redif_sdk.distill.training.estimate import _phases, estimate
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.denoiser import inner_of
from redif_sdk.models.hollow import is_streamed

SETTINGS = {
    "num_inference_steps": 2,
    "updates": 2,
    "schedule_updates": 0,
    "pool_size": 8,
    "batch_size": 4,
    "group_size": 4,
    "reward": "pixel",
    "warm_start": 0.0,
    "precision": "fp32",
}


def config(method: str = "redif", **settings: Any) -> DistillConfig:
    return DistillConfig.checked(**applicable({"method": method} | SETTINGS | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("large") / "pipeline"
    pipelines.stable_diffusion().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher.from_diffusers(folder, prompts=pipelines.PROMPTS, num_inference_steps=4)


@pytest.fixture
def tiny_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (large, weights):
        monkeypatch.setattr(module, "LARGE", 1000)


def pairs_of(teacher: Teacher) -> pool.Pairs:
    return pool.get(teacher, 8, "train")[0]


def test_the_size_decides_what_is_left_open_and_nothing_else(teacher: Teacher, tiny_is_large: None) -> None:
    decided, split = sized(config(), teacher)
    assert (decided.lora_rank, decided.micro_batch_size, decided.gradient_checkpointing) == (64, 1, True)
    assert split.micro_batch == 1
    asked, whole = sized(config(lora_rank=0, micro_batch_size=0, gradient_checkpointing=False), teacher)
    assert (asked.lora_rank, asked.micro_batch_size, asked.gradient_checkpointing, whole.micro_batch) == (
        0,
        0,
        False,
        0,
    )


def test_small_networks_are_trained_whole(teacher: Teacher) -> None:
    decided, _ = sized(config(), teacher)
    assert (decided.lora_rank, decided.micro_batch_size, decided.gradient_checkpointing) == (0, 0, False)


@pytest.mark.parametrize(
    "method",
    ["redif", "dmd2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("regression", "grpo", "draft"))],
)
def test_micro_batches_and_checkpointing_give_the_same_gradients(teacher: Teacher, method: str) -> None:
    """Of every method that can train a large network: the weights after two updates."""
    found: list[list[Tensor]] = []
    for settings in (
        {"micro_batch_size": 0, "gradient_checkpointing": False},
        {"micro_batch_size": 1, "gradient_checkpointing": True},
        {"micro_batch_size": 3, "gradient_checkpointing": False},
    ):
        trainer = Trainer(teacher, config(method, **settings), pairs_of(teacher))
        trainer.method.prepare(trainer.context)
        for _ in range(2):
            trainer.step(0.0)
        found.append([weight.detach() for weight in trainer.context.policy.network.parameters()])
    for weights_ in found[1:]:
        for ours, theirs in zip(weights_, found[0], strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4), float((ours - theirs).abs().max())


def test_checkpointing_keeps_fewer_activations(teacher: Teacher) -> None:
    """Bytes that autograd keeps for the backward pass: of a network with blocks to check-point, and of one without."""
    own = Tiny()
    callable_ = Teacher.from_callable(
        lambda x, t, condition: x,
        schedule=teacher.schedule,
        prediction_type="epsilon",
        shape=(1, 4, 4),
        student=own,
        value_range=(-1, 1),
    )
    for one in (teacher, callable_):
        kept: dict[bool, int] = {}
        for on in (False, True):
            trainer = Trainer(one, config("regression", gradient_checkpointing=on), pairs_of(one))
            seen: dict[int, int] = {}

            def keep(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                trainer.context.policy.sample(trainer.pairs.noise, trainer.pairs.condition)
            own_weights = {w.untyped_storage().data_ptr() for w in trainer.context.policy.network.parameters()}
            kept[on] = sum(size for place, size in seen.items() if place not in own_weights)
        assert kept[True] < 0.5 * kept[False], (one.name, kept)


def test_teacher_student_average_and_fake_score_share_the_weights_that_are_not_trained(teacher: Teacher) -> None:
    trainer = Trainer(teacher, config("dmd2", lora_rank=2), pairs_of(teacher))
    labels = trainer.pairs.condition
    assert labels is not None
    before = teacher(trainer.pairs.noise[:2], torch.full((2,), 500.0), labels[:2])
    fake = FakeScore.make(trainer.context)
    theirs = {weight.data_ptr() for weight in teacher.frozen_student().parameters()}
    for network in (trainer.context.policy.network, trainer.ema, fake.network):
        named = dict(network.named_parameters())
        own = {name for name, weight in named.items() if weight.data_ptr() not in theirs}
        assert own
        assert all(".lora_" in name for name in own)
        assert {weight.data_ptr() for name, weight in named.items() if name not in own} == theirs
    for _ in range(2):
        trainer.step(0.0)
    after = teacher(trainer.pairs.noise[:2], torch.full((2,), 500.0), labels[:2])
    assert torch.equal(before, after), "the teacher was trained too"
    pairs = zip(trainer.ema.parameters(), fake.network.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("method", ["grpo", "consistency", pytest.param("progressive", marks=pytest.mark.slow)])
def test_a_checkpoint_holds_the_adapters_alone(teacher: Teacher, tmp_path: Path, method: str) -> None:
    settings = {"lora_rank": 1, "kl": 0.1, "updates": 3}
    trainer = Trainer(teacher, config(method, **settings), pairs_of(teacher), tmp_path)
    trainer.run()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    every = [*_tensors(state["network"]), *_tensors(state["ema"]), *_tensors(state["method"])]
    adapters = sum(weight.numel() for weight in trainer.context.policy.network.parameters() if weight.requires_grad)
    assert all(".lora_" in name for name in (*state["network"], *state["ema"]))
    assert sum(tensor.numel() for tensor in every) <= 3 * adapters
    again = Trainer(teacher, config(method, **settings), pairs_of(teacher), tmp_path)
    resumed = again.run(resume=True)
    straight = Trainer(teacher, config(method, **settings), pairs_of(teacher)).run()
    for ours, theirs in zip(resumed.network.parameters(), straight.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _tensors(value)]
    return [state] if isinstance(state, Tensor) else []


def test_frozen_weights_are_held_in_bf16_and_the_student_is_saved_in_float32(
    folder: Path, tmp_path: Path, tiny_is_large: None
) -> None:
    asked = config(precision="bf16", lora_rank=2, teacher_steps=2)
    assert half_of(asked) == torch.bfloat16
    assert half_of(config(precision="bf16", lora_rank=0)) is None, "weights that are trained are float32"
    teacher = Teacher.from_diffusers(folder, prompts=pipelines.PROMPTS, num_inference_steps=2, half=half_of(asked))
    trainer = Trainer(teacher, asked, pairs_of(teacher))
    kinds = {weight.requires_grad: weight.dtype for weight in trainer.context.policy.network.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    student = distill(folder, asked, prompts=pipelines.PROMPTS, progress=False)
    student.save_pretrained(tmp_path / "student")
    network = inner_of(load_student(tmp_path / "student").network)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    plain = Teacher.from_diffusers(folder, prompts=pipelines.PROMPTS, num_inference_steps=2)
    x, t, condition = torch.randn(2, *plain.shape), torch.full((2,), 500.0), torch.tensor([0, 1])
    ours, theirs = (one.guided(1.0)(x, t, condition) for one in (teacher, plain))
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_a_large_text_encoder_stays_in_its_files_and_gives_the_same_conditions(
    folder: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGE", 1000)
    mapped = Teacher.from_diffusers(folder, prompts=pipelines.PROMPTS, num_inference_steps=4)
    assert mapped.prompts is not None
    assert teacher.prompts is not None
    encode: Any = mapped.prompts._encode
    encoders = encode.encoders
    assert all(is_streamed(encoder) for encoder in encoders)
    index = torch.tensor([0, 3])
    ours, theirs = mapped.prompts(index), teacher.prompts(index)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_what_cannot_fit_is_refused_with_the_numbers(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tiny_is_large: None
) -> None:
    count = sum(weight.numel() for weight in teacher.frozen_student().parameters())
    monkeypatch.setattr(large, "free_memory", lambda: 10 * count)
    monkeypatch.setattr(large, "gib", lambda size: f"{size:.0f} bytes")
    with pytest.raises(
        InvalidRequest, match=rf"all its weights takes {20 * count} bytes .*{10 * count} bytes are free; "
    ):
        check_run(teacher, config(lora_rank=0))
    check_run(teacher, config(lora_rank=2))


def test_the_estimate_of_a_large_run_samples_no_teacher(teacher: Teacher, tiny_is_large: None) -> None:
    """Two calls time one, and what the run spends is told before it starts."""
    calls = []

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        return teacher.predict(x, t, condition)

    import dataclasses

    asked = config("regression", lora_rank=2, updates=4)
    told = estimate(dataclasses.replace(teacher, predict=predict), asked, 8, pool_is_there=False)
    assert len(calls) == 2
    run = Trainer(teacher, asked, pairs_of(teacher))
    run.run()
    assert told.forward_equivalents == pytest.approx(run.meter.forward_equivalents, rel=0.01)
    assert told.check_seconds > 0
    assert told.pool_seconds > 0
    assert told.peak_memory_mb > 100


def test_the_estimate_weighs_the_phases_by_their_updates() -> None:
    """Three updates of a run whose second half is reinforced: two are regression."""
    assert _phases(config(updates=3, warm_start=0.5)) == [(0.0, pytest.approx(2 / 3)), (0.5, pytest.approx(1 / 3))]
    assert _phases(config(updates=1, warm_start=0.5)) == [(0.0, 1.0)]
    assert _phases(config(updates=100, warm_start=0.7, segments=0.2)) == [
        (0.0, pytest.approx(0.2)),
        (0.2, pytest.approx(0.5)),
        (0.7, pytest.approx(0.3)),
    ]
    assert _phases(config("consistency", updates=7)) == [(0.0, 1.0)]
    assert _phases(config(updates=None, seconds=9.0, warm_start=0.25)) == [(0.0, 0.25), (0.25, 0.75)]
