"""The graph "nag": a student's denoiser that takes negative prompts by normalised attention guidance.

Its inputs are those of the denoiser, the negative prompt's states (`null.encoder_hidden_states`), for SD3 and Flux its
pooled embedding (`null.pooled_projections`), and `nag_scale` (B,).
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
from redif_sdk.models.nag import negated, negatives
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
    specs = {spec.name: spec for spec in manifest.condition_inputs}
    more = [specs[name].model_copy(update={"name": NULL + name}) for name in negated(denoiser.network)]
    more.append(TensorSpec(name=NAG_SCALE, dtype="float32", shape=["batch"]))
    return traced_denoiser(denoiser, manifest, precision, more, _Nag)


class _Nag(torch.nn.Module):
    """A `GraphDenoiser` with further inputs: the negative prompt's conditions, and the scale."""

    def __init__(self, denoiser: GraphDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.kind = "nag"

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """f (B, C, H, W)."""
        names = negated(self.denoiser.network)
        *both, scale = conditions
        given, nulls = both[: -len(names)], both[-len(names) :]
        for name, null in zip(names, nulls, strict=True):
            place = self.denoiser.conditions.index(name)
            given[place] = torch.cat([given[place], null.expand_as(given[place])], 1)
        with negatives(self.denoiser.network) as attention:
            attention.scale = scale
            f: Tensor = self.denoiser(sample, timestep, *given)
            return f


def nag_example(network: torch.nn.Module, conditions: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """What the recorded images are guided away from: the prompt of the next image; every third one of nothing."""
    found: dict[str, NDArray[np.float32]] = {}
    for name in negated(network):
        given = conditions[name]
        null = given.roll(1, 0) if len(given) > 1 else given.flip(1)
        found[NULL + name] = null.contiguous().numpy()
    count = len(conditions[HIDDEN])
    return found | {NAG_SCALE: np.array([1.0 if place % 3 == 2 else DEFAULT_NAG for place in range(count)], np.float32)}


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
