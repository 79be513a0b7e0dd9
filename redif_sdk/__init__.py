"""Run few-step diffusion students without torch: ``from redif_sdk import FastPipeline``.

This is the public face; everything is imported when it is first asked for, so that ``import redif_sdk`` costs nothing.
Only `redif_sdk.distill` and `redif_sdk.export` import torch, diffusers or transformers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from redif_sdk.errors import (
    ExportError,
    HubError,
    IntegrityError,
    InvalidRequest,
    ManifestError,
    ParityError,
    RedifError,
    RuntimeUnavailable,
    TrainingDiverged,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from redif_sdk.artifact.manifest import Manifest
    from redif_sdk.images import PipelineOutput
    from redif_sdk.pipeline import FastPipeline
    from redif_sdk.sampling.table import StepTable

    __version__: str

__all__ = [
    "ExportError",
    "FastPipeline",
    "HubError",
    "IntegrityError",
    "InvalidRequest",
    "Manifest",
    "ManifestError",
    "ParityError",
    "PipelineOutput",
    "RedifError",
    "RuntimeUnavailable",
    "StepTable",
    "TrainingDiverged",
    "UnsupportedModel",
    "__version__",
]

# No telemetry, neither ours nor of what we use: ONNX Runtime (from 1.29 on) sends what it runs to its makers, and gives
# the machine a number; the Hub's client tells which packages are installed. Both read this when first imported. Whoever
# wants it sets the variables to 0.
for _variable in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_variable, "1")

_LAZY = {
    "FastPipeline": "pipeline",
    "Manifest": "artifact.manifest",
    "PipelineOutput": "images",
    "StepTable": "sampling.table",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"redif_sdk.{_LAZY[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("redif-sdk")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
