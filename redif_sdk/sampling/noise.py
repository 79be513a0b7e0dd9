"""The one definition of noise: (seed, image index, slot) -> standard normal numbers, the same bits everywhere.

It is counter-based, so that an image's noise depends only on its seed and index, and consists of exactly rounded
operations, so that every language with IEEE 754 doubles and 32-bit integers reproduces it. Nothing here holds state.

**The definition.** For the numbers of (seed, index, slot), block b = 0, 1, ... gives four of them:

1. Philox4x32-10 (Salmon et al. 2011) with the key (seed mod 2^32, seed div 2^32) and the counter
   (b, slot, index mod 2^32, index div 2^32) gives the words w0, w1, w2, w3.
2. The pair (w0, w1) gives numbers 4b and 4b + 1, the pair (w2, w3) numbers 4b + 2 and 4b + 3, by Box-Muller::

       radius = sqrt(-2 ln((u + 1/2) / 2^32)),  angle = v / 2^32 of a turn    for the pair (u, v)
       first = radius cos(angle),  second = radius sin(angle)

3. All of it in float64 by + - * / and sqrt, each rounded to nearest, without fused multiply-add, in the order that
   :func:`_log_uniform` and :func:`_cos_sin_turn` state; then each number is rounded to float32, ties to even.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest

__all__ = ["TRAINING_SLOT", "noise", "normals", "philox4x32"]

TRAINING_SLOT = 1 << 16
"""Slots from here on are training's; deployment and evaluation use 0 up to here."""

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_ROUNDS = 10
_HIGH_SHIFT = np.uint64(32)

_LN2 = math.log(2.0)  # 0x1.62e42fefa39efp-1
_SQRT_HALF = math.sqrt(0.5)  # 0x1.6a09e667f3bcdp-1
_RADIANS = 2.0 * math.pi / 2.0**32  # 0x1.921fb54442d18p-30
# Highest power first, as Horner's rule takes them; each is one correctly rounded division.
_ATANH = tuple(1.0 / n for n in range(21, 0, -2))
_SIN = tuple((-1.0) ** (n // 2) / math.factorial(n) for n in range(17, 0, -2))
_COS = tuple((-1.0) ** (n // 2) / math.factorial(n) for n in range(16, -1, -2))

_CHUNK = 1 << 13  # blocks at once: the temporaries stay in the processor's cache

Words = NDArray[np.uint32]
Floats = NDArray[np.float64]


def philox4x32(counter: Words, key: Words) -> Words:
    """Philox4x32-10: uint32 counters (..., 4) and keys (2,) or (..., 2) to uint32 words (..., 4)."""
    leading = counter.shape[:-1]
    keys = np.broadcast_to(key.astype(np.uint32, copy=False), (*leading, 2)).reshape(-1, 2)
    words = counter.astype(np.uint32, copy=False).reshape(-1, 4)
    even, odd = _philox(words[:, ::2].T, words[:, 1::2].T, keys.T)
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=-1).reshape(*leading, 4)


def normals(seed: int, index: int, slot: int, count: int) -> NDArray[np.float32]:
    """The first ``count`` standard normal numbers of (seed, image index, slot), float32 (count,).

    A longer draw starts with the numbers of a shorter one.

    Args:
        seed: In [0, 2^64).
        index: In [0, 2^64).
        slot: In [0, 2^32).
        count: How many numbers.

    Raises:
        InvalidRequest: A number out of range.
    """
    _within("count", count, 1 << 34)
    slots = np.array([_within("slot", slot, 1 << 32)], dtype=np.uint32)
    return _draw([(seed, index)], slots, count).reshape(count)


def noise(
    seeds: Sequence[tuple[int, int]], shape: tuple[int, int, int], *, slices: int = 1, first_slot: int = 0
) -> NDArray[np.float32]:
    """The noise of a batch, float32 (slices, B, C, H, W).

    An image's noise depends neither on the other images nor on the number of slices.

    Args:
        seeds: (seed, image index) of each image, both in [0, 2^64).
        shape: (C, H, W), in whose C order the numbers are.
        slices: Slices to draw.
        first_slot: Slice n holds the numbers of slot ``first_slot + n``; slots are in [0, 2^32).

    Raises:
        InvalidRequest: No seeds, an empty shape, or a number out of range.
    """
    if len(seeds) == 0:
        raise InvalidRequest("no seeds were given; give one (seed, index) per image")
    if len(shape) != 3 or min(shape) < 1:
        raise InvalidRequest(f"an image's shape is {shape}; give (channels, height, width), each at least 1")
    if slices < 1:
        raise InvalidRequest(f"slices is {slices}; give at least 1")
    _within("slot", first_slot, 1 << 32)
    _within("slot", first_slot + slices - 1, 1 << 32)
    slots = np.arange(first_slot, first_slot + slices, dtype=np.uint32)
    return _draw(seeds, slots, math.prod(shape)).reshape(slices, len(seeds), *shape)


def _draw(seeds: Sequence[tuple[int, int]], slots: Words, count: int) -> NDArray[np.float32]:
    """Numbers for every slot and image, float32 (slots, images, count)."""
    images = np.array([_split(seed, index) for seed, index in seeds], dtype=np.uint32)
    blocks = -(-count // 4)
    lanes = len(slots) * len(images) * blocks
    numbers = np.empty((lanes, 4), dtype=np.float32)
    for start in range(0, lanes, _CHUNK):
        lane = np.arange(start, min(start + _CHUNK, lanes))
        stream, block = np.divmod(lane, blocks)
        slot, image = np.divmod(stream, len(images))
        key_low, key_high, index_low, index_high = images[image].T
        even = np.stack([block.astype(np.uint32), index_low])
        odd = np.stack([slots[slot], index_high])
        first, second = _box_muller(*_philox(even, odd, np.stack([key_low, key_high])))
        numbers[start : start + _CHUNK, ::2] = first.T
        numbers[start : start + _CHUNK, 1::2] = second.T
    return np.ascontiguousarray(numbers.reshape(len(slots), len(images), blocks * 4)[:, :, :count])


def _philox(even: Words, odd: Words, key: Words) -> tuple[Words, Words]:
    """Ten rounds on counter words 0 and 2 (`even`), 1 and 3 (`odd`), and two key words, each of shape (2, ...)."""
    multipliers = _MULTIPLIERS.reshape(2, *[1] * (even.ndim - 1))
    weyl = _WEYL.reshape(multipliers.shape)
    for _ in range(_ROUNDS):
        product = even * multipliers  # 64 bits
        even = (product >> _HIGH_SHIFT).astype(np.uint32)[::-1] ^ odd ^ key
        odd = product.astype(np.uint32)[::-1]  # the low words
        key = key + weyl  # modulo 2^32
    return even, odd


def _box_muller(u: Words, v: Words) -> tuple[Floats, Floats]:
    """Two independent standard normal numbers from two words, float64."""
    radius = np.sqrt(-2.0 * _log_uniform(u))
    cosine, sine = _cos_sin_turn(v)
    return radius * cosine, radius * sine


def _log_uniform(word: Words) -> Floats:
    """ln((word + 1/2) / 2^32), to 1e-15 relative.

    word + 1/2 = m 2^e with m in [sqrt(1/2), sqrt(2)), which is exact; then with z = (m - 1) / (m + 1)::

        ln m = 2 atanh(z) = 2 z (1 + z^2/3 + z^4/5 + ... + z^20/21),    result = (e - 32) ln 2 + (2 z) (series)
    """
    mantissa, exponent = np.frexp(word.astype(np.float64) + 0.5)
    small = mantissa < _SQRT_HALF
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    exponent = (exponent - small).astype(np.float64)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    return (exponent - 32.0) * _LN2 + (z + z) * _horner(_ATANH, z * z)


def _cos_sin_turn(word: Words) -> tuple[Floats, Floats]:
    """Cosine and sine of word / 2^32 of a turn, to 2e-16.

    The nearest quarter turn q = (word + 2^29) div 2^30 is taken off in integers, and the rest r = word - q 2^30, in
    [-2^29, 2^29), is an angle a = r (2 pi / 2^32) of at most pi/4, for which Taylor's polynomials serve::

        cos a = 1 - a^2/2! + ... + a^16/16!,    sin a = a (1 - a^2/3! + ... + a^16/17!)

    For q mod 4 = 0 to 3 the pair (cosine, sine) is (cos a, sin a), (-sin a, cos a), (-cos a, -sin a), (sin a, -cos a).
    """
    turned = word + np.uint32(1 << 29)  # modulo 2^32: a whole turn is none
    quarter = turned >> np.uint32(30)
    rest = (turned & np.uint32((1 << 30) - 1)).astype(np.float64) - float(1 << 29)
    angle = rest * _RADIANS
    square = angle * angle
    cosine, sine = _horner(_COS, square), angle * _horner(_SIN, square)
    odd = (quarter & np.uint32(1)) == 1
    horizontal, vertical = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    horizontal = np.where((quarter == 1) | (quarter == 2), -horizontal, horizontal)
    vertical = np.where(quarter >= 2, -vertical, vertical)
    return horizontal, vertical


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """((c0 x + c1) x + c2) x + ..., each operation rounded."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        np.multiply(total, x, out=total)
        np.add(total, coefficient, out=total)
    return total


def _split(seed: int, index: int) -> tuple[int, int, int, int]:
    """(seed low, seed high, index low, index high), 32-bit words."""
    seed, index = _within("seed", seed, 1 << 64), _within("image index", index, 1 << 64)
    return seed & 0xFFFFFFFF, seed >> 32, index & 0xFFFFFFFF, index >> 32


def _within(name: str, value: int, end: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < end:
        raise InvalidRequest(f"{name} is {value!r}; give a whole number from 0 to {end - 1}")
    return number
