"""Rewards that are learnt beside the student, and those of pretrained networks: each says what it should, and is
charged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pipelines
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill import pool
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.config import DistillConfig, applicable
from redif_sdk.distill.rewards import Batch, Discriminator, PixelReward, make_rewards
from redif_sdk.distill.rewards.feature import FeatureNetwork, FeatureReward, prompt_vectors, train_on
from redif_sdk.distill.rewards.mmd import MmdReward
from redif_sdk.distill.rewards.perceptual import LpipsReward
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, TrainingDiverged
from redif_sdk.models.prompts import Prompts
from tests.gaussian import MEAN, SHAPE, Small, exact, weights
from tests.gaussian import SCHEDULE as SCHEDULE

LEARNT = ("discriminator", "distribution", "mmd")


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_callable(
        exact, schedule=SCHEDULE, prediction_type="v_prediction", shape=SHAPE, student=Small(), num_inference_steps=16
    )


def trainer(teacher: Teacher, reward: object, folder: Path | None = None, **settings: object) -> Trainer:
    fixed = {"num_inference_steps": 1, "updates": 6, "batch_size": 16, "warm_start": 0.0, "group_size": 8}
    config = DistillConfig.checked(
        **(applicable(fixed | {"exploration_rank": 0, "reward": reward} | settings) | settings)
    )
    pairs, _ = pool.get(teacher, 64, "train")
    return Trainer(teacher, config, pairs, folder)


@pytest.mark.parametrize("reward", LEARNT)
@pytest.mark.parametrize("method", ["redif", "draft", "grpo"])
def test_a_run_with_a_learnt_reward_that_was_cut_gives_the_same_bits(
    teacher: Teacher, tmp_path: Path, reward: str, method: str
) -> None:
    whole = trainer(teacher, reward, method=method)
    whole.run()
    first = trainer(teacher, reward, tmp_path, method=method)
    first.method.prepare(first.context)
    while first.update < 4:
        first.step(first.progress)
    first.save()
    second = trainer(teacher, reward, tmp_path, method=method)
    second.run(resume=True)
    assert torch.equal(weights(whole), weights(second))
    assert whole.meter.forward_equivalents == second.meter.forward_equivalents


def test_distribution_matching_as_a_reward_finds_the_distribution(teacher: Teacher) -> None:
    """No gradient but the groups' own, and no pair: the reward alone says where the teacher's pictures are."""
    run = trainer(
        teacher,
        "distribution",
        updates=250,
        regression_weight=0.0,
        batch_size=64,
        group_size=16,
        learning_rate=3e-3,
        fake_learning_rate=3e-3,
        step_delta=0.3,
    )

    def distance() -> float:
        with torch.no_grad():
            return float((run.context.policy.sample(run.pairs.noise, None).mean() - MEAN).abs())

    before = distance()
    run.run()
    assert distance() < 0.25 * before
    assert run.meter.teacher_calls == 250 * 64  # the groups ask nothing more of the networks
    with pytest.raises(InvalidRequest, match="learnt from alone"):
        run.context.advantage.rewards[0][0](Batch(torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE)))


@pytest.mark.parametrize("name", ["discriminator", "mmd"])
def test_a_learnt_reward_prefers_the_teachers_pictures(teacher: Teacher, name: str) -> None:
    run = trainer(teacher, name)
    reward = run.context.advantage.rewards[0][0]
    wrong = -run.pairs.target[:16]  # dark where the teacher's are bright
    for update in range(60):
        reward.learn(run.context, wrong, run.pairs[:16], torch.Generator().manual_seed(update))  # type: ignore[attr-defined]
    of_teacher = reward(Batch(run.pairs.target[16:32], wrong, None))
    assert of_teacher.mean() > reward(Batch(-run.pairs.target[16:32], wrong, None)).mean() + 0.05


def test_auxiliary_networks_are_charged_by_their_cost(teacher: Teacher) -> None:
    plain, judged = (trainer(teacher, reward, updates=3) for reward in ("pixel", "discriminator"))
    plain.run(), judged.run()
    assert plain.meter.auxiliary_calls == 0
    reward = judged.context.advantage.rewards[0][0]
    assert isinstance(reward, Discriminator)
    # an update: 2 x 16 pictures learnt from at three passes, 8 x 16 actions judged
    calls = 3 * (3 * 32 + 8 * 16) * reward.cost / judged.context.unit
    assert judged.meter.auxiliary_calls == pytest.approx(calls, rel=1e-3)
    assert judged.meter.forward_equivalents == pytest.approx(plain.meter.forward_equivalents + calls, rel=1e-3)
    assert flops(torch.nn.Linear(8, 4), torch.zeros(2, 8)) == 2 * 2 * 8 * 4


def test_what_a_reward_computes_once_is_charged_once(teacher: Teacher) -> None:
    """Such as the encodings of all prompts that it knows, which its first call makes and keeps."""
    texts = torch.nn.Linear(1000, 1000)
    once, each = 2 * 1000 * 1000 * 500, 2 * 8 * 8

    class Encoding(PixelReward):
        kept: Tensor | None = None

        def __call__(self, batch: Batch) -> Tensor:
            if self.kept is None:
                self.kept = texts(torch.zeros(500, 1000))
            return super().__call__(batch) + torch.zeros(8, 8) @ torch.zeros(8) @ torch.zeros(8)

    charged: list[float] = []
    made = trainer(teacher, Encoding()).context.advantage
    made.charge = charged.append
    targets = torch.zeros(16, 1, 8, 8)
    for _ in range(4):
        made.score(targets, targets, None)
    assert max(charged) == pytest.approx(once, rel=1e-3)
    assert sum(charged) == pytest.approx(once + 4 * each, rel=1e-3)


@pytest.mark.parametrize("method", ["redif", "grpo"])
def test_no_reward_is_called_twice_for_the_same_images(teacher: Teacher, method: str) -> None:
    """A reward may be people who vote, or a paid service. What it costs is counted in real calls."""
    seen: list[bytes] = []

    class Counting(PixelReward):
        def __call__(self, batch: Batch) -> Tensor:
            seen.append(batch.images.numpy().tobytes())
            return super().__call__(batch)

    trainer(teacher, Counting(), method=method, updates=3).run()
    assert len(seen) >= 4  # three updates and a check
    assert len(set(seen)) == len(seen)


def test_a_reward_that_learns_must_say_what_a_checkpoint_keeps(teacher: Teacher) -> None:
    class Forgetful(PixelReward):
        def learn(self, *arguments: object) -> dict[str, float]:
            return {}

    with pytest.raises(InvalidRequest, match="pixel has `learn`, but no `state_dict`"):
        trainer(teacher, Forgetful())


class Unsure(PixelReward):
    """Cannot judge every `nth` image."""

    def __init__(self, nth: int) -> None:
        self.nth, self.asked, self.unjudged = nth, 0, 0

    def __call__(self, batch: Batch) -> Tensor:
        self.unjudged += (self.asked + len(batch)) // self.nth - self.asked // self.nth
        self.asked += len(batch)
        return super().__call__(batch)


@pytest.mark.parametrize(("nth", "warned"), [pytest.param(200, 0, marks=pytest.mark.slow), (50, 1)])
def test_images_that_a_reward_cannot_judge_are_logged_and_warned_of(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture, nth: int, warned: int
) -> None:
    reward = Unsure(nth)
    trainer(teacher, reward, tmp_path, updates=4, log_every=1).run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["unjudged"] for row in rows][-2:] == sorted(row["unjudged"] for row in rows)[-2:]
    assert 0 < rows[-1]["unjudged"] <= reward.unjudged
    said = [record.getMessage() for record in caplog.records if "could not judge" in record.getMessage()]
    assert len(said) == warned  # once a run
    trainer(
        teacher, reward, tmp_path / "again", updates=1, log_every=1
    ).run()  # its count goes on, the run's begins anew
    again = json.loads((tmp_path / "again" / "log.jsonl").read_text().splitlines()[-1])
    assert again["unjudged"] < rows[-1]["unjudged"]
    plain = trainer(teacher, "pixel", tmp_path / "plain", updates=1)
    plain.run()
    assert "unjudged" not in (tmp_path / "plain" / "log.jsonl").read_text()


def test_a_reward_that_cannot_judge_a_fifth_of_the_images_ends_the_run(teacher: Teacher) -> None:
    with pytest.raises(TrainingDiverged, match=r"could not judge \d+ of \d+ images \(25%\); look at its log"):
        trainer(teacher, Unsure(4), updates=4).run()


def test_a_budget_in_forward_equivalents_ends_a_run(teacher: Teacher) -> None:
    run = trainer(teacher, "pixel", updates=None, forward_equivalents=500, method="regression")
    run.run()
    assert 500 <= run.meter.forward_equivalents < 500 + 3 * 16
    assert run.update == 11  # 48 each


def test_lpips_ranks_a_shift_of_colour_behind_a_little_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.rand(4, 3, 32, 32, generator=draw) * 2 - 1
    near = target + 0.05 * torch.randn(target.shape, generator=draw)
    values = LpipsReward()(Batch(torch.cat([target, near, -target]), target.repeat(3, 1, 1, 1))).view(3, 4)
    assert torch.all(values[0] > -1e-4)
    assert torch.all(values[0] > values[1])
    assert torch.all(values[1] > values[2])


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_pretrained_encoders_from_a_folder(teacher: Teacher, tmp_path: Path, kind: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "clip":
        clip = CLIPVisionConfig(**tiny, intermediate_size=16, projection_dim=8)
        CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "m")
    else:
        Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "m")
    ((reward, _),) = make_rewards(f"{kind}:{tmp_path / 'm'}", teacher, pool.get(teacher, 64, "train")[0], 0)
    target = torch.rand(3, 3, 32, 32) * 2 - 1
    values = reward(Batch(torch.cat([target, -target]), target.repeat(2, 1, 1, 1), None)).view(2, 3)
    assert torch.allclose(values[0], torch.ones(3), atol=1e-5)
    assert torch.all(values[1] < values[0])
    with pytest.raises(InvalidRequest, match="holds no model"):
        make_rewards(f"{kind}:{tmp_path / 'none'}", teacher, pool.get(teacher, 64, "train")[0], 0)


def test_the_mmd_witness_has_a_gradient(teacher: Teacher) -> None:
    run = trainer(teacher, "mmd", method="draft", updates=2)
    reward = run.context.advantage.rewards[0][0]
    assert isinstance(reward, MmdReward)
    images: Tensor = run.pairs.target[:4].clone().requires_grad_()
    reward(Batch(images, images.detach(), None)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_features_of_a_text_teacher_learn_which_prompt_a_picture_belongs_to() -> None:
    """Not one class a prompt: what the text encoder says of it is matched, so unseen prompts are told apart too."""
    colours = {"red": 0, "green": 1, "blue": 2}
    texts = [f"{colour} {thing}" for colour in colours for thing in ("heart", "star", "cat")]

    def encode(asked: Sequence[str]) -> dict[str, Tensor]:
        """(B, 4, 6): a place a word, the words in a space of six."""
        states = torch.zeros(len(asked), 4, 6)
        for row, text in enumerate(asked):
            for place, word in enumerate(text.split()):
                states[row, place, [*colours, "heart", "star", "cat"].index(word)] = 1.0
        return {"encoder_hidden_states": states}

    vectors = prompt_vectors(Prompts(texts, encode), torch.arange(9).repeat(20))
    assert vectors.shape == (180, 6)
    assert torch.allclose(vectors.std(0), torch.ones(6), atol=1e-3)
    draw = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn((180, 3, 16, 16), generator=draw)
    for place in range(180):
        images[place, colours[texts[place % 9].split()[0]]] += 0.5
    torch.manual_seed(0)
    network = FeatureNetwork(3, 6)
    train_on(network, images, vectors, 0, 80, 32)
    with torch.no_grad():
        nearest = (F.normalize(network(images), dim=1) @ F.normalize(vectors[:9], dim=1).T).argmax(1)
    right = [texts[int(found)].split()[0] == texts[place % 9].split()[0] for place, found in enumerate(nearest)]
    assert sum(right) > 150


def test_the_feature_reward_of_a_text_to_image_teacher_knows_no_classes() -> None:
    teacher = Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=pipelines.PROMPTS)
    found = FeatureReward.fit(teacher, pool.compute(teacher, 8, "train"), 0, updates=2, batch=4)
    assert found.network.head.out_features == 32  # the text encoder's width
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.equal(found(Batch(images, images)), torch.zeros(4))
    assert bool((found(Batch(images, images.flip(0))) < 0).all())
