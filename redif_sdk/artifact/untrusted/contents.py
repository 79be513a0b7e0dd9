"""Which check goes with which of a student's files: safetensors, npz, JSON, configurations, tokenizers.

A file whose hash is right may still be hostile, since its author also wrote the hash. All checks take bytes of any
content, use memory in proportion to them, and raise IntegrityError or ManifestError. ONNX graphs are checked in
`onnx.py`, together with what the manifest says of them.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.artifact.untrusted.configs import check_config, check_index, check_tokenizer
from redif_sdk.artifact.untrusted.npz import npz_arrays
from redif_sdk.artifact.untrusted.safetensors import safetensors_header, safetensors_header_size

__all__ = ["LIMITS", "check", "limit_of"]

_MIB = 1 << 20
#: Most bytes of a file of a kind that is read at one go; the others are hashed piece by piece.
LIMITS = {".json": 32 * _MIB, ".npz": 256 * _MIB, ".onnx": 2048 * _MIB, ".txt": 32 * _MIB, ".model": 32 * _MIB}


def limit_of(path: str) -> int | None:
    """Most bytes of a file of that kind, or None where it is never held in memory whole."""
    return LIMITS.get(PurePosixPath(path).suffix.lower())


def check(path: str, data: bytes, where: str) -> None:
    """Look into the bytes of a file by its kind. Raises IntegrityError or ManifestError, naming `where`."""
    name = PurePosixPath(path)
    if name.suffix == ".safetensors":
        size = safetensors_header_size(data[:8], len(data), where)
        safetensors_header(data[8 : 8 + size], len(data) - 8 - size, where)
    elif name.suffix == ".npz":
        npz_arrays(data, where)
    elif name.suffix == ".json":
        document = strict_json.parse(data, where, finite=False)
        if name.name == "tokenizer.json":
            check_tokenizer(document, where)
        elif name.name in ("config.json", "scheduler_config.json"):
            check_config(document, where)
        elif name.name.endswith(".index.json"):
            check_index(document, where)
