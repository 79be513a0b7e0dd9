"""ReDiF's critic: it learns what a black box prefers in a group, and is followed only as far as it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.methods.critic import TRUSTED, CriticGroups
from redif_sdk.distill.methods.redif import ReDiF
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.classifier import Classifier
from redif_sdk.distill.rewards.critic import Critic, Judged
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import TrainingDiverged
from tests.mixture import CLASSES, make_teacher

SETTINGS: dict[str, Any] = {
    "num_inference_steps": 2, "estimator": "critic", "group_size": 4, "group_noise": "different", "batch_size": 16,
    "schedule_updates": 0, "warm_start": 0.0, "regression_weight": 0.0, "learning_rate": 1e-3, "ema_decay": 0.0,
    "critic_learning_rate": 2e-3, "keep": "last",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


@pytest.fixture(scope="module")
def pairs(teacher: Teacher) -> pool.Pairs:
    return pool.compute(teacher, 128, "train")


def by_class(batch: Batch) -> Tensor:
    """A reward without a gradient that sees the condition: class 0 is to be light, class 1 to be dark."""
    assert batch.condition is not None
    signs = torch.tensor([1.0, -1.0])[batch.condition]
    return torch.tensor((signs * batch.images.detach().mean((1, 2, 3))).tolist())


def trainer(teacher: Teacher, pairs: pool.Pairs, folder: Path | None = None, **more: Any) -> Trainer:
    return Trainer(teacher, DistillConfig.checked(**{**SETTINGS, "reward": by_class, **more}), pairs, folder)


def groups_of(teacher: Teacher, count: int, seed: int) -> Judged:
    draw = torch.Generator().manual_seed(seed)
    latents = 0.5 * torch.randn(count, 4, *teacher.shape, generator=draw)
    latents = latents + torch.randn(count, 4, 1, 1, 1, generator=draw) / 2
    condition = torch.arange(count) % CLASSES
    values = torch.tensor([1.0, -1.0])[condition][:, None] * latents.mean((2, 3, 4))
    centred = values - values.mean(1, keepdim=True)
    return Judged(latents, centred / centred.std(1, keepdim=True), condition)


def test_it_learns_which_image_of_a_group_the_reward_prefers(teacher: Teacher, pairs: pool.Pairs) -> None:
    critic = Critic(trainer(teacher, pairs).context)
    assert critic.agreement == 0
    draw = torch.Generator().manual_seed(0)
    agreed = [critic.see(groups_of(teacher, 16, seed), draw)["critic_agreement"] for seed in range(60)]
    assert agreed[0] == 0  # an untrained one prefers nothing
    assert critic.agreement > 0.7
    latents, condition = torch.zeros(2, *teacher.shape), torch.tensor([0, 1])
    light, dark = critic.gradient(latents, condition, draw).mean((1, 2, 3)).tolist()
    assert light > 0 > dark  # it knows for whom


def test_what_it_has_learnt_by_heart_is_not_agreement(teacher: Teacher, pairs: pool.Pairs) -> None:
    """Rewards that are chance: it may fit those it has seen, and says that it knows nothing of new ones."""
    critic = Critic(trainer(teacher, pairs).context)
    draw = torch.Generator().manual_seed(1)
    for seed in range(40):
        judged = groups_of(teacher, 16, seed)
        chance = torch.randn(judged.advantages.shape, generator=draw)
        critic.see(Judged(judged.latents, chance - chance.mean(1, keepdim=True), judged.condition), draw)
    assert abs(critic.agreement) < TRUSTED


@pytest.mark.parametrize("group_noise", ["different", "same"])
def test_training_raises_a_black_box_reward(teacher: Teacher, pairs: pool.Pairs, group_noise: str) -> None:
    run = trainer(teacher, pairs, updates=80, group_noise=group_noise, exploration=0.2)
    before = run.check()["reward"]
    run.run()
    assert run.check()["reward"] > before + 0.2


def test_until_it_is_trusted_the_student_stays(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(teacher, pairs, updates=3)
    before = [weight.clone() for weight in run.context.policy.network.parameters()]
    run.run()
    assert all(torch.equal(a, b) for a, b in zip(before, run.context.policy.network.parameters(), strict=True))


def test_the_memory_keeps_whole_groups_and_the_last(teacher: Teacher, pairs: pool.Pairs) -> None:
    critic = Critic(trainer(teacher, pairs, critic_memory=64).context)
    draw, seen = torch.Generator().manual_seed(0), [groups_of(teacher, 6, seed) for seed in range(4)]
    for judged in seen:
        critic.see(judged, draw)
    assert critic.memory is not None
    assert len(critic.memory) == 16  # groups of four
    torch.testing.assert_close(critic.memory.latents[-6:], seen[-1].latents)
    torch.testing.assert_close(critic.memory.advantages[-12:-6], seen[-2].advantages)


def test_a_cut_run_goes_on_exactly(teacher: Teacher, pairs: pool.Pairs, tmp_path: Path) -> None:
    whole = trainer(teacher, pairs, updates=24).run()

    class CutError(Exception):
        pass

    def cut(share: float, figures: dict[str, float]) -> None:
        if share >= 0.5:
            raise CutError

    first = trainer(teacher, pairs, tmp_path, updates=24, checkpoint_seconds=0)
    first.on_progress = cut
    with pytest.raises(CutError):
        first.run()
    second = trainer(teacher, pairs, tmp_path, updates=24, checkpoint_seconds=0).run(resume=True)
    pairs_of = zip(whole.network.parameters(), second.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of)
    assert second.meter.forward_equivalents == whole.meter.forward_equivalents


def test_what_it_costs_is_counted(teacher: Teacher, pairs: pool.Pairs) -> None:
    run = trainer(teacher, pairs, updates=1, critic_updates=3)
    run.run()
    assert run.meter.reward_calls == 64
    assert isinstance(run.method, ReDiF)
    assert run.method.critic is not None
    judged = (
        (64 + 3 * 3 * 128) * run.method.critic.cost / run.context.unit
    )  # once to see how right it was, then three updates
    assert run.meter.auxiliary_calls == pytest.approx(judged)


def test_a_reward_that_says_the_same_of_all_is_an_error(teacher: Teacher, pairs: pool.Pairs) -> None:
    with pytest.raises(TrainingDiverged, match="every group's rewards are equal"):
        trainer(teacher, pairs, updates=2, reward=lambda batch: torch.ones(len(batch))).run()


def test_a_classifier_may_end_the_call_that_it_looks_into() -> None:
    after: list[str] = []

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid_block, self.last = nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mid_block(x)
            after.append("came after")
            return self.last(x)

    network = Parts()
    head = Classifier(network.mid_block, 5)
    x = torch.randn(2, 3)
    whole = head(lambda: network(x))
    assert after == ["came after"]
    torch.testing.assert_close(head(lambda: network(x), cut=True), whole)
    assert after == ["came after"]
    assert not network.mid_block._forward_hooks


def test_groups_of_one_noise_are_sampled_once(teacher: Teacher, pairs: pool.Pairs) -> None:
    context = trainer(teacher, pairs, group_noise="same").context
    groups = CriticGroups(context, Exploration.white(16), Critic(context))
    list(groups.losses(pairs[:16], torch.Generator().manual_seed(0), check=False))
    assert context.meter.student_calls == 32  # sixteen, two steps
