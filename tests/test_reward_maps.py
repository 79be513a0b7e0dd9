"""Rewards that judge each place of an image: `texture`, `bands`, and what a map is worth in an advantage."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from redif_sdk.distill.methods.estimators import score_direction
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.rewards import Advantage, TextureReward, texture
from redif_sdk.distill.rewards.bands import BandsReward, bands
from redif_sdk.distill.rewards.batch import Batch


def test_a_map_credits_each_place_for_what_happened_there() -> None:
    """With a reward by place the direction is far nearer to the gradient than with the image's mean, at equal draws."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(4, 1, 12, 12, generator=generator)
    xi = Exploration.white(144).antithetic(16, (4, 1, 12, 12), generator)

    def places(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return (images * w.repeat(len(images) // 4, 1, 1, 1))[:, 0]

    advantage = Advantage([(places, 1.0)], lambda latents: latents)
    actions, target = 0.01 * xi, torch.zeros(4, 1, 12, 12)
    cosines = [
        torch.nn.functional.cosine_similarity(score_direction(a, xi).flatten(), w.flatten(), dim=0)
        for a in (advantage(actions, target, None, by_place=True), advantage(actions, target, None))
    ]
    assert cosines[0] > 0.9
    assert cosines[1] < 0.5


def test_a_scalar_and_a_map_make_one_advantage() -> None:
    def scalar(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        return images.mean((1, 2, 3))

    advantage = Advantage([(scalar, 1.0), (TextureReward(), 2.0)], lambda latents: latents)
    actions = 0.1 * torch.randn(6, 3, 1, 12, 12)
    target = torch.rand(3, 1, 12, 12)
    assert advantage(actions, target, None, by_place=True).shape == (6, 3, 12, 12)
    assert advantage(actions, target, None).shape == (6, 3)


def test_texture_is_blind_to_form_and_sees_blur() -> None:
    generator = torch.Generator().manual_seed(0)
    sharp, other = torch.rand(2, 8, 1, 16, 16, generator=generator) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    reward = TextureReward()
    assert reward(Batch(sharp, sharp, None)).abs().max() == 0
    same_kind, blur = (float(reward(Batch(images, sharp, None)).mean()) for images in (other, blurred))
    assert blur < 3 * same_kind < 0


def test_texture_averages_energies_over_windows_and_compares_each_group_with_its_targets() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 4, 17, 12, generator=draw)
    pooled = torch.nn.functional.avg_pool2d(maps, texture.WINDOW, 2)
    torch.testing.assert_close(texture.pooled(maps), pooled)
    images, targets = (torch.rand(n, 1, 12, 12, generator=draw) for n in (150, 3))
    reward = TextureReward()
    torch.testing.assert_close(
        reward(Batch(images, targets, None)), reward(Batch(images, targets.repeat(50, 1, 1, 1), None))
    )


def test_bands_cannot_be_paid_in_dots() -> None:
    """A lattice on a blurred image gives texture most of the energy that it misses, and bands little."""
    draw, rows = torch.Generator().manual_seed(0), torch.arange(16)
    cloth = torch.nn.functional.avg_pool2d(torch.randn(64, 1, 18, 18, generator=draw), 3, 1)
    blurred = torch.nn.functional.avg_pool2d(cloth, 3, 1, 1)
    lattice = (-1.0) ** (rows[:, None] + rows) * cloth.std()

    def gained(judge: Any) -> float:
        """The share of the loss that the best amount of dots takes away."""

        def loss(amount: float) -> float:
            scores = judge(Batch(blurred + amount * lattice, cloth))
            return -float(sum(part.mean() for part in (scores.values() if isinstance(scores, dict) else [scores])))

        return 1 - min(loss(amount) for amount in (0.05, 0.1, 0.15, 0.2, 0.3)) / loss(0)

    assert gained(BandsReward()) < 0.2
    assert gained(TextureReward()) > 0.5


def test_bands_are_of_every_phase_and_scale() -> None:
    """A pattern shifted by a pixel has the same energies within; a coarser one has them in the coarse scale."""
    columns = torch.arange(24, dtype=torch.float32)
    for period, scale in ((2, "fine"), (8, "coarse")):
        wave = torch.cos(2 * torch.pi * columns / period + 0.4)[None, None, None].expand(1, 1, 24, 24)
        here, there = bands(wave), bands(wave.roll(1, -1))
        inside = slice(3, -3)
        for name in here:
            torch.testing.assert_close(
                here[name][..., inside, inside], there[name][..., inside, inside], atol=0.2, rtol=0
            )
        energies = {name: float(logs[..., inside, inside].amax(1).mean()) for name, logs in here.items()}
        assert max(energies, key=lambda name: energies[name]) == scale
    images, targets = (torch.rand(n, 1, 12, 12) for n in (150, 3))
    apart = BandsReward()(Batch(images, targets.repeat(50, 1, 1, 1)))
    for name, together in BandsReward()(Batch(images, targets)).items():
        torch.testing.assert_close(together, apart[name])


def test_a_far_pixel_does_not_change_the_maps_of_bands() -> None:
    images, target, reward = torch.rand(1, 1, 32, 32), torch.zeros(1, 1, 32, 32), BandsReward()
    furthest = dict.fromkeys(reward.reach, 0)
    for pixel in (16, 17):
        changed = images.clone()
        changed[..., pixel, pixel] += 0.5
        before, after = (reward(Batch(seen, target)) for seen in (images, changed))
        for name in furthest:
            rows, columns = (before[name] != after[name])[0].nonzero().T
            away = int((torch.stack([rows, columns]) * 2 + 2 - pixel).abs().max())
            furthest[name] = max(furthest[name], away)
    assert furthest == reward.reach


def test_maps_by_name_have_their_own_reach() -> None:
    class Two:
        reach: ClassVar[dict[str, int]] = {"near": 0, "far": 4}

        def __call__(self, batch: Batch) -> dict[str, Tensor]:
            spot = batch.images[:, 0].clone()
            return {"near": spot, "far": torch.zeros_like(spot)}

    actions = 0.1 * torch.randn(6, 3, 1, 12, 12)
    both = Advantage([(Two(), 1.0)], lambda latents: latents)
    values = both.values(actions.flatten(0, 1), torch.zeros(3, 1, 12, 12), None)
    assert [score.reach for score in values] == [0, 4]
    assert both(actions, torch.zeros(3, 1, 12, 12), None, by_place=True).shape == (6, 3, 12, 12)


def test_a_far_pixel_does_not_change_the_map() -> None:
    """What ``reach`` promises."""
    images = torch.rand(1, 1, 24, 24)
    changed = images.clone()
    changed[..., 12, 12] += 0.5
    reward, target = TextureReward(), torch.zeros(1, 1, 24, 24)
    rows, columns = (reward(Batch(images, target, None)) != reward(Batch(changed, target, None)))[0].nonzero().T
    stride = 2
    centres = torch.stack([rows, columns]) * stride + 2  # of a window of 5
    assert int((centres - 12).abs().max()) <= reward.reach
