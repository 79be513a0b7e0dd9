"""What names a teacher's outputs in caches: its weights, its scheduler, its prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from redif_sdk.models.hollow import stored

__all__ = ["fingerprint"]


def fingerprint(networks: Sequence[nn.Module], scheduler_config: dict[str, Any], *more: str) -> str:
    """Names what networks' weights, a scheduler and further facts make together."""
    digest = hashlib.sha256(json.dumps(scheduler_config, sort_keys=True, default=str).encode())
    for fact in more:
        digest.update(fact.encode())
    for network in networks:
        kept = network.state_dict(keep_vars=True)  # detached, a hollow tensor forgets what it stands for
        for key, value in sorted(kept.items()):
            plain = stored(value).detach().cpu().contiguous()
            plain = plain.float() if plain.is_floating_point() else plain  # the same for a file in half precision
            digest.update(key.encode())
            digest.update(plain.numpy().data)
    return digest.hexdigest()
