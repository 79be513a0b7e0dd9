"""Whether a network and a decoder take the latents that they will be given, tried without computing anything.

torch's meta device runs a network on shapes alone: a size that does not fit, a missing input or an output of another
shape shows at once, and costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from redif_sdk.errors import InvalidRequest, UnsupportedModel, first_line
from redif_sdk.models.families import all_anew, call_network

__all__ = ["check_channels", "check_decoder", "check_sizes"]

UNITS = (2, 4, 8, 16, 32, 64)  # what a network's sides may have to be a multiple of


class _Called(nn.Module):
    """A network, or an autoencoder, behind one function of tensors, so that its weights can be replaced by shapes."""

    def __init__(
        self,
        network: nn.Module,
        conditions: Mapping[str, Tensor],
        embedded: float | None,
        scale: int,
        *,
        inpainting: bool = False,
    ) -> None:
        super().__init__()
        self.network = getattr(network, "_orig_mod", network)  # of torch.compile, which would compile for shapes
        self.conditions, self.embedded, self.scale = conditions, embedded, scale
        self.inpainting = inpainting

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        if t is None:
            network: Any = self.network
            out: Tensor = network.decode(x, return_dict=False)[0]
            return out
        painted = all_anew(x) if self.inpainting else {}
        return call_network(self.network, x, t, {**self.conditions, **painted}, self.embedded, self.scale)


def check_channels(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModel unless a network makes as many channels as it takes, or twice that: a learned variance."""
    given, made = config["in_channels"], config["out_channels"]
    if made in (given, 2 * given):
        return
    what = (
        "takes an image besides the noise (image to image, super-resolution, inpainting)"
        if made < given
        else "draws more than it denoises"
    )
    raise UnsupportedModel(
        f"the network of {name} takes {given} channels and makes {made}: it {what}, which is not supported; use one "
        f"with out_channels equal to in_channels, or twice that for a learned variance"
    )


def check_sizes(
    network: nn.Module,
    shape: Sequence[int],
    conditions: Mapping[str, Sequence[int]],
    *,
    classes: bool = False,
    embedded: float | None = None,
    scale: int = 1,
    inpainting: bool = False,
) -> None:
    """Raise unless the network takes latents of this shape, and its output is as large.

    Args:
        shape: of the latents, (C, H, W).
        conditions: shapes of what it takes of a prompt, without the batch axis, by name.
        classes: it takes a class besides.
        embedded: the guidance scale that it takes as an input.
        scale: pixels a latent.
        inpainting: it takes a mask and a masked image besides.

    Raises:
        InvalidRequest: it takes other sizes; the message says which.
        UnsupportedModel: it cannot be called at all.
    """
    channels, height, width = shape
    inputs = {name: torch.empty(2, *sides, device="meta") for name, sides in conditions.items()}
    if classes:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64, device="meta")
    called = _Called(network, inputs, embedded, scale, inpainting=inpainting)
    fault = _fault(called, (channels, height, width))
    if fault is None:
        return
    for unit in UNITS:
        larger = (-(-height // unit) * unit, -(-width // unit) * unit)
        if larger != (height, width) and _fault(called, (channels, *larger)) is None:
            own, fits = (f"{side[0] * scale} x {side[1] * scale}" for side in ((height, width), larger))
            raise InvalidRequest(
                f"the network takes no images of {own}: height and width must be multiples of {unit * scale}, for "
                f"example {fits}; give --height {larger[0] * scale} --width {larger[1] * scale}"
            )
    raise UnsupportedModel(
        f"the network {type(network).__name__} cannot be called as its pipeline calls it at {height * scale} x "
        f"{width * scale}: {fault}; check its config.json"
    )


def check_decoder(autoencoder: nn.Module, shape: Sequence[int], scale: int, channels: int) -> None:
    """Raise UnsupportedModel unless the autoencoder decodes latents (C, H, W) to (channels, H scale, W scale)."""
    made = _shape(_Called(autoencoder, {}, None, scale), tuple(shape), decode=True)
    wanted = (channels, shape[1] * scale, shape[2] * scale)
    if isinstance(made, str):
        raise UnsupportedModel(f"the {type(autoencoder).__name__} cannot decode latents of {tuple(shape)}: {made}")
    if made is not None and made != wanted:
        raise UnsupportedModel(
            f"the {type(autoencoder).__name__} makes images of {made} from latents of {tuple(shape)}, and its pipeline "
            f"counts on {wanted}; check block_out_channels in its config.json"
        )


def _fault(called: _Called, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a call on latents of this shape; None: nothing, or it cannot be tried."""
    made = _shape(called, shape)
    if made is None or made == shape:
        return None
    return made if isinstance(made, str) else f"its output is {made}, not {shape}"


@torch.no_grad()
def _shape(called: _Called, shape: tuple[int, ...], decode: bool = False) -> tuple[int, ...] | str | None:
    """The shape of the output without its batch axis; or what is wrong; or None where shapes alone do not tell."""
    if hasattr(called.network, "_hf_hook"):  # offloading moves the weights at every call
        return None
    state = {name: _empty(tensor) for name, tensor in (*called.named_parameters(), *called.named_buffers())}
    kind = next((value.dtype for value in state.values() if value.dtype.is_floating_point), torch.float32)
    x = torch.empty(2, *shape, device="meta", dtype=kind)
    t = None if decode else torch.empty(2, device="meta")
    try:
        made: Tensor = functional_call(called, state, (x, t))
    except NotImplementedError:  # an operation that has no meta version
        return None
    except Exception as error:  # a network may raise anything for an input that does not fit
        return first_line(error)
    return tuple(made.shape[1:])


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
