"""Hollow networks: no memory, no plausible number where a weight was not read, and the right one where it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pipelines
import pytest
import torch
from torch import nn

from redif_sdk.models.hollow import computing, files_of, hollow, is_streamed, keep_mapped, original, stored, streamed


def called(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        out: torch.Tensor = network(x, torch.tensor([3.0, 700.0]), states, return_dict=False)[0]
    return out


def test_a_streamed_network_computes_what_the_network_computes_in_float32() -> None:
    network = pipelines.unet(32).half()
    wanted = called(copy.deepcopy(network).float())
    found = streamed(network)
    assert torch.equal(called(found), wanted)
    assert torch.equal(called(found), wanted)  # and once more: weights are taken out again
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in found.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


def test_weights_are_taken_out_after_an_error_too() -> None:
    network = streamed(pipelines.unet(32))
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), torch.zeros(1, 5, 7))
    assert all(bool(parameter.isnan().all()) for parameter in network.parameters())


def test_a_weight_that_is_used_without_calling_its_layer_shows() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.layer.weight

    assert bool(streamed(Tied())(torch.ones(1, 3)).isnan().all())


def test_hollow_copies_have_no_values_and_know_where_these_are() -> None:
    network = pipelines.unet(32)
    made = hollow(streamed(network), torch.float16, in_float32=["conv_in.weight"])
    ours = dict(network.named_parameters())
    for name, parameter in made.named_parameters():
        assert parameter.dtype == (torch.float32 if name == "conv_in.weight" else torch.float16)
        assert parameter.shape == ours[name].shape
        assert stored(parameter) is ours[name]
    assert not made._forward_pre_hooks
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in made.modules())


def test_what_a_streamed_part_was_made_of_is_not_copied() -> None:
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Linear:
            raise AssertionError("its weights would be copied")

    inner = nn.Linear(3, 3)
    outer = nn.Sequential(streamed(inner))
    vars(outer[0])["_redif_original"] = (Refusing(3, 3),)
    made = hollow(outer)
    assert not is_streamed(made[0])
    assert is_streamed(outer[0])
    assert stored(made[0].weight) is inner.weight


def test_integer_buffers_keep_their_values() -> None:
    encoder = pipelines.clip(pipelines.clip_tokenizer())
    made = hollow(encoder)
    (name,) = [name for name, buffer in made.named_buffers() if not buffer.is_floating_point()]
    assert made.get_buffer(name).tolist() == encoder.get_buffer(name).tolist()


def test_only_marked_networks_are_streamed_and_the_original_is_kept() -> None:
    network = pipelines.unet(32)
    assert computing(network) is network
    file = Path("weights.safetensors")
    made = computing(keep_mapped(network, [file]))
    assert is_streamed(made)
    assert (files_of(network), files_of(made)) == ((file,), ())
    assert original(made) is network
    assert original(network) is network
    assert sum(1 for _ in made.modules()) == sum(1 for _ in network.modules())
    with torch.no_grad():
        next(iter(network.parameters())).mul_(2)
    assert files_of(network) == (), "its weights are no longer those of the file"
