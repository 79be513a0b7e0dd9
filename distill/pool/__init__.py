"""The pool of (noise, condition) and the teacher's output for each: sampled once, cached on disk, read by index."""

from redif_sdk.distill.pool.pairs import (
    BANK_FILE,
    HELD_OUT_SEED,
    PIXEL_BANK_SIZES,
    Pairs,
    compute,
    get,
    is_there,
    pool_noise,
    shipped,
    with_states,
)

__all__ = [
    "BANK_FILE",
    "HELD_OUT_SEED",
    "PIXEL_BANK_SIZES",
    "Pairs",
    "compute",
    "get",
    "is_there",
    "pool_noise",
    "shipped",
    "with_states",
]
