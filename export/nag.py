"""The graph "nag": a student's denoiser that takes negative prompts by normalised attention guidance.

Its inputs are those of the denoiser, the negative prompt's states (`null.encoder_hidden_states`) and `nag_scale` (B,).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.errors import UnsupportedModel
from redif_sdk.export.onnx import GraphDenoiser, traced_denoiser
from redif_sdk.export.weights import LazyModel
from redif_sdk.inputs.guiding import DEFAULT_NAG, NAG_SCALE
from redif_sdk.models.families import HIDDEN
from redif_sdk.models.nag import negatives
from redif_sdk.runtimes.guided import NULL

__all__ = ["check_takes_nag", "nag_example", "nag_model", "nag_reference"]


def check_takes_nag(manifest: Manifest, network: torch.nn.Module) -> None:
    """Check that a student can have a graph with negative prompts.

    Raises:
        UnsupportedModel: It takes no prompts, takes negative prompts already, or its network's attention is another.
    """
    if manifest.text is None:
        raise UnsupportedModel(f"{manifest.name} takes no prompts, so it has no use for negative ones; leave nag out")
    if manifest.guidance_at_run_time == "classifier-free":
        raise UnsupportedModel(f"{manifest.name} takes negative prompts by its guidance; leave nag out")
    with negatives(network):
        pass


def nag_model(denoiser: GraphDenoiser, manifest: Manifest, precision: str) -> LazyModel:
    """The graph: sample, timestep, conditions, the negative prompt's states and nag_scale -> f.

    Raises:
        ExportError: torch's exporter failed.
    """
    assert manifest.text is not None
    states = next(spec for spec in manifest.condition_tensors if spec.name == HIDDEN)
    more = [
        states.model_copy(update={"name": NULL + HIDDEN}),
        TensorSpec(name=NAG_SCALE, dtype="float32", shape=["batch"]),
    ]
    return traced_denoiser(denoiser, manifest, precision, more, _Nag)


class _Nag(torch.nn.Module):
    """A `GraphDenoiser` with two more inputs."""

    def __init__(self, denoiser: GraphDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.kind = "nag"

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """f (B, C, H, W)."""
        *given, null, scale = conditions
        place = self.denoiser.conditions.index(HIDDEN)
        given[place] = torch.cat([given[place], null.expand_as(given[place])], 1)
        with negatives(self.denoiser.network) as attention:
            attention.scale = scale
            f: Tensor = self.denoiser(sample, timestep, *given)
            return f


def nag_example(conditions: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """What the recorded images are guided away from: the prompt of the next image; every third one of nothing."""
    states = conditions[HIDDEN]
    scales = [1.0 if index % 3 == 2 else DEFAULT_NAG for index in range(len(states))]
    null = states.roll(1, 0) if len(states) > 1 else states.flip(1)
    return {NULL + HIDDEN: null.contiguous().numpy(), NAG_SCALE: np.array(scales, np.float32)}


def nag_reference(
    denoiser: GraphDenoiser,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Tensor],
    example: Mapping[str, NDArray[np.float32]],
) -> NDArray[np.float32]:
    """f (B, C, H, W) in torch."""
    given = [*conditions.values(), *(torch.from_numpy(value) for value in example.values())]
    with torch.no_grad():
        f: NDArray[np.float32] = _Nag(denoiser)(x, t, *given).numpy()
    return f
