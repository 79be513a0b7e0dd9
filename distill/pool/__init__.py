"""The pool of (noise, condition) and the teacher's output for each: sampled once, cached on disk, read by index."""

from redif_sdk.distill.pool.cache import BANK_FILE, PIXEL_BANK_SIZES, get, is_there, shipped, with_states
from redif_sdk.distill.pool.pairs import HELD_OUT_SEED, Pairs, compute, compute_by, pool_noise

__all__ = [
    "BANK_FILE",
    "HELD_OUT_SEED",
    "PIXEL_BANK_SIZES",
    "Pairs",
    "compute",
    "compute_by",
    "get",
    "is_there",
    "pool_noise",
    "shipped",
    "with_states",
]
