"""Compile a student's network to graphs, and check graphs against their source.

`verify` needs numpy and an inference engine only, so that a deployer can run it; torch is imported when `export` is
called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.export.verify import verify
from redif_sdk.manifest import Manifest

if TYPE_CHECKING:
    import torch

__all__ = ["export", "verify"]


def export(
    folder: str | Path,
    targets: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    *,
    network: torch.nn.Module | None = None,
) -> Manifest:
    """Add compiled graphs to a student's folder; see `redif_sdk.export.build.export`."""
    try:
        from redif_sdk.export.build import export as build
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable(f'export needs {error.name}; pip install "redif-sdk[export]"') from error
    return build(folder, targets, precisions, network=network)
