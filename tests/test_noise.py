"""Noise: the published vectors of Philox, our own golden bits, and what a batch must not change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.noise import TRAINING_SLOT, _cos_sin_turn, _log_uniform, noise, normals, philox4x32

words64 = st.integers(0, 2**64 - 1)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


# Random123's kat_vectors for philox4x32-10
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_its_published_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(expected).tolist()


def test_philox_takes_many_counters_and_keys_at_once() -> None:
    counters = np.stack([words(c) for c, _, _ in KNOWN_ANSWERS]).reshape(3, 1, 4)
    keys = np.stack([words(k) for _, k, _ in KNOWN_ANSWERS]).reshape(3, 1, 2)
    expected = np.stack([words(w) for _, _, w in KNOWN_ANSWERS]).reshape(3, 1, 4)
    assert np.array_equal(philox4x32(counters, keys), expected)
    one_key = philox4x32(counters, words("0 0"))
    assert np.array_equal(one_key[0], expected[0])
    assert not np.array_equal(one_key[1], expected[1])


# Made with this definition, and equal bit for bit to an independent implementation in JavaScript. Never to change.
GOLDEN = [
    ((0, 0, 0), "3f7dbb33 bf6cb6b0 bf1e1b9f bef6d1b2 be1d5357 3e392a6d 3f54ec98 3e4a2da3"),
    ((42, 7, 1), "bce5826f bd2b389c be452d32 be2ba9ec 40186b9e bfa82dbb bfeb7add bfaa1919"),
    ((2**64 - 1, 2**64 - 1, 2**32 - 1), "be6e646d be85de2b 3e9bf979 3f5038c7 bf36bd36 3e8d1829 3f12fa8e 3e9545e6"),
    (
        (0x0123456789ABCDEF, 2**32 + 3, TRAINING_SLOT),
        "400f5a3e 3f9d4227 3ed7abdb 3f476931 bf9412ac 3f0b9a9e bfb25ef8 3f743288",
    ),
]


@pytest.mark.parametrize(("stream", "bits"), GOLDEN)
def test_golden_bits(stream: tuple[int, int, int], bits: str) -> None:
    assert normals(*stream, 8).view(np.uint32).tolist() == words(bits).tolist()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(words64, words64), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 2**31))
def test_an_image_s_noise_is_its_own(images: list[tuple[int, int]], slices: int, first_slot: int) -> None:
    shape = (3, 5, 7)  # 105 numbers: not a multiple of four
    batch = noise(images, shape, slices=slices, first_slot=first_slot)
    assert batch.shape == (slices, len(images), *shape)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    for b, (seed, index) in enumerate(images):
        for n in range(slices):
            alone = normals(seed, index, first_slot + n, 105).reshape(shape)
            assert np.array_equal(batch[n, b], alone)
    assert np.array_equal(noise(images[::-1], shape, slices=slices, first_slot=first_slot), batch[:, ::-1])


def test_neither_batch_nor_length_moves_where_the_work_is_cut() -> None:
    large = noise([(1, i) for i in range(50)], (1, 28, 28), slices=2)
    assert np.array_equal(large[1, 49].ravel(), normals(1, 49, 1, 784))
    long = normals(5, 6, 7, 100_003)
    assert np.array_equal(long[:50_001], normals(5, 6, 7, 50_001))
    assert normals(5, 6, 7, 0).shape == (0,)


def test_every_seed_index_and_slot_has_its_own_noise() -> None:
    edges = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    slots = [0, 1, TRAINING_SLOT, 2**32 - 1]
    streams = [(seed, index, slot) for seed in edges for index in edges for slot in slots]
    drawn = {normals(*stream, 4).tobytes() for stream in streams}
    assert len(drawn) == len(streams)


def test_numbers_are_standard_normal_and_uncorrelated() -> None:
    batch = noise([(2026, i) for i in range(256)], (1, 28, 28), slices=2)
    flat = batch.astype(np.float64).ravel()
    error = 1 / np.sqrt(flat.size)
    assert abs(flat.mean()) < 4 * error
    assert abs(flat.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((flat**4).mean() - 3) < 4 * np.sqrt(96) * error
    assert stats.kstest(flat, "norm").pvalue > 0.01
    pairs = {
        "neighbours": (flat[:-1], flat[1:]),
        "of one block": (flat[0::4], flat[2::4]),
        "slots": (batch[0].ravel(), batch[1].ravel()),
        "images": (batch[:, 0::2].ravel(), batch[:, 1::2].ravel()),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a)), name


def test_logarithm_and_angle_are_exact_to_1e_12() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    eighths = (np.arange(8)[:, None] * 2**29 + np.arange(-3, 4)) % 2**32
    powers = 2 ** np.arange(32)[:, None] + np.arange(-1, 2)
    word = np.concatenate([random, eighths.ravel().astype(np.uint32), powers.ravel().astype(np.uint32)])
    np.testing.assert_allclose(_log_uniform(word), np.log((word + 0.5) / 2.0**32), rtol=1e-12, atol=0)
    cosine, sine = _cos_sin_turn(word)
    angle = word * (2 * np.pi / 2.0**32)
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sine, np.sin(angle), rtol=0, atol=1e-12)
    np.testing.assert_allclose(cosine**2 + sine**2, 1.0, rtol=0, atol=1e-15)


def test_numbers_follow_from_the_words_by_box_muller() -> None:
    seed, index, slot = 2**40 + 5, 2**50 + 9, 3
    blocks = np.arange(1000, dtype=np.uint32)
    counter = np.stack([blocks, *(np.full(1000, w) for w in (slot, index % 2**32, index >> 32))], axis=-1)
    w = philox4x32(counter.astype(np.uint32), np.array([seed % 2**32, seed >> 32], dtype=np.uint32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((w[:, [0, 2]] + 0.5) / 2.0**32))
    angle = 2 * np.pi * w[:, [1, 3]] / 2.0**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
    np.testing.assert_allclose(normals(seed, index, slot, 4000), expected, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("wrong", [-1, 2**64, 1.0, "1", None])
def test_seeds_that_are_none_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="seed is"):
        normals(wrong, 0, 0, 4)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="image index is"):
        noise([(0, wrong)], (1, 2, 2))  # type: ignore[list-item]


def test_other_wrong_requests_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="slot is 4294967296"):
        noise([(0, 0)], (1, 2, 2), slices=2, first_slot=2**32 - 1)
    with pytest.raises(InvalidRequest, match="slot is -1"):
        normals(0, 0, -1, 4)
    with pytest.raises(InvalidRequest, match="count is -4"):
        normals(0, 0, 0, -4)
    with pytest.raises(InvalidRequest, match="no seeds"):
        noise([], (1, 2, 2))
    with pytest.raises(InvalidRequest, match="shape is"):
        noise([(0, 0)], (1, 0, 2))
    with pytest.raises(InvalidRequest, match="slices is 0"):
        noise([(0, 0)], (1, 2, 2), slices=0)
