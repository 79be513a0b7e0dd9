"""What the recipes take: memory and arithmetic of an update, from the networks' true shapes, without weights or a GPU.

    python -m benchmarks.recipe_figures --json docs/results/recipes.json

An update of each recipe (forward and backward through one step, by its batch, micro-batch, adapters, precision and
checkpointing) is made on fake tensors, which have shape and dtype and no values. Counted beside it: the optimiser, the
moving average, the pool, and the fp32 copy that adapters are merged into at the end. Not counted: rewards, the decoder,
the allocator's slack, the CUDA context. `--dry-run` on the machine itself measures what this estimates.
"""

from __future__ import annotations

import argparse
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_shapes import SHAPES
from redif_sdk.distill.compute.lora import adapted
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.presets import resolve
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.results import document, write_json

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
HEADER = re.compile(r"^# ([a-z]+): (.+)$", re.M)


@dataclass(frozen=True)
class Shape:
    """A published network: how it is made without weights, its latents, and the conditions it takes for an image."""

    make: Callable[[], nn.Module]
    channels: int
    scale: int  # pixels a latent
    conditions: dict[str, tuple[int, ...]]
    guided: bool = True  # the teacher makes two calls a step
    embedded: float | None = None


def _part(shape: str, name: str) -> Callable[[], nn.Module]:
    return lambda: SHAPES[shape]()[1][name]


def _flux_dev() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def _transformer(kind: str, **more: Any) -> nn.Module:
    import diffusers

    common = {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
    }
    common |= {
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
    }
    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, kind)(**common, **more)
    return made


def _pixart() -> nn.Module:
    return _transformer(
        "PixArtTransformer2DModel", sample_size=64, cross_attention_dim=1152, caption_channels=4096,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip


def _dit() -> nn.Module:
    return _transformer(
        "DiTTransformer2DModel", sample_size=32, norm_type="ada_norm_zero", norm_elementwise_affine=False
    )


def _cifar() -> nn.Module:
    from diffusers import UNet2DModel

    with torch.device("meta"):
        return UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        )  # fmt: skip


HIDDEN, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
KNOWN = {
    "sd15": Shape(_part("sd15", "unet"), 4, 8, {HIDDEN: (77, 768)}),
    "sdxl": Shape(_part("sdxl", "unet"), 4, 8, {HIDDEN: (77, 2048), POOLED: (1280,)}),
    "sd3": Shape(_part("sd3", "transformer"), 16, 8, {HIDDEN: (333, 4096), POOLED: (2048,)}),
    "flux": Shape(_flux_dev, 16, 8, {HIDDEN: (512, 4096), POOLED: (768,)}, guided=False, embedded=3.5),
    "pixart": Shape(_pixart, 4, 8, {HIDDEN: (120, 4096), MASK: (120,)}),
    "dit": Shape(_dit, 4, 8, {"class_labels": ()}),
    "unet2d": Shape(_cifar, 3, 1, {}, guided=False),
}


@dataclass(frozen=True)
class Figures:
    """Of a recipe; bytes, and floating-point operations in units of 10^12.

    Attributes:
        update_bytes: the most that is held at once in an update, weights and optimiser included.
        merge_bytes: the most that is held when adapters are merged at the end.
        pool_bytes: of noise, outputs and path states, which lie beside both.
        update_tflop: of one update of regression through one step.
        pool_tflop: of sampling the teacher for the pool.
    """

    recipe: str
    weights: int
    trained: int
    update_bytes: int
    merge_bytes: int
    pool_bytes: int
    update_tflop: float
    pool_tflop: float

    @property
    def peak_gib(self) -> float:
        return (max(self.update_bytes, self.merge_bytes) + self.pool_bytes) / 2**30


def facts(path: Path) -> dict[str, str]:
    """The lines ``# name: value`` at the head of a recipe."""
    return dict(HEADER.findall(path.read_text(encoding="utf-8")))


def figures(path: Path) -> Figures:
    """What a recipe takes, as far as its shapes tell."""
    about = facts(path)
    shape, side = KNOWN[about["shape"]], int(about["pixels"])
    config = resolve({}, file=path, text=HIDDEN in shape.conditions)
    dtype = torch.bfloat16 if config.precision == "bf16" and config.lora_rank else torch.float32
    latents = (shape.channels, side // shape.scale, side // shape.scale)
    call = Denoiser(shape.make(), diffusers_call=True, embedded_guidance=shape.embedded, scale=shape.scale)
    weights = sum(value.numel() for value in call.parameters())
    call.requires_grad_(not config.lora_rank)
    call.micro_batch = config.micro_batch_size or 0
    call.prompts = _prompts(shape)  # type: ignore[assignment]
    network = adapted(call, config.lora_rank, 0) if config.lora_rank else call
    if config.gradient_checkpointing:
        inner: Any = call.network
        if getattr(inner, "_supports_gradient_checkpointing", False):
            inner.enable_gradient_checkpointing()
        else:
            call.recompute = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill(network, dtype)
        flop = _flop_of_a_call(network, latents, shape)
        update, trained = _update(network, config, latents, shape)
    states = config.num_inference_steps if config.get("segments") else 0
    pool = config.pool_size * (2 + states) * 4 * torch.Size(latents).numel()
    calls = (config.teacher_steps or 50) * (2 if shape.guided else 1) * config.pool_size
    merge = (dtype.itemsize + 4) * weights + 20 * trained if config.lora_rank else 0
    backward = 3 + bool(config.gradient_checkpointing)  # forwards that a forward and its backward are worth
    batch = flop * config.batch_size * backward
    return Figures(path.stem, weights, trained, update, merge, pool, batch / 1e12, flop * calls / 1e12)


def _fill(network: nn.Module, dtype: torch.dtype) -> None:
    """Put fake tensors in place of those without a device; what is not trained in ``dtype``."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=torch.float32 if value.requires_grad else dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind)


def _prompts(shape: Shape) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """Stand-ins for encoded prompts, which `Denoiser` asks for by their places."""
    if HIDDEN not in shape.conditions:
        return None
    return lambda places: {name: torch.ones(len(places), *size) for name, size in shape.conditions.items()}


def _inputs(shape: Shape, latents: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    condition = torch.zeros(batch, dtype=torch.long) if shape.conditions else None
    return torch.zeros(batch, *latents), torch.full((batch,), 500.0), condition


def _flop_of_a_call(network: nn.Module, latents: tuple[int, ...], shape: Shape) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network(*_inputs(shape, latents, 1))
    return float(counted.get_total_flops())


def _update(network: nn.Module, config: DistillConfig, latents: tuple[int, ...], shape: Shape) -> tuple[int, int]:
    """(peak bytes, trained weights) of a forward and backward of a batch, beside AdamW's state and the average.

    Every micro-batch of a batch holds as much as the second does beside the first, until the backward pass.
    """
    own = sum(value.numel() for value in network.parameters() if value.requires_grad)
    size = config.micro_batch_size or config.batch_size
    one = _peak(network, size, latents, shape)
    count = math.ceil(config.batch_size / size)
    more = (_peak(network, 2 * size, latents, shape) - one) * (count - 1) if count > 1 else 0
    return one + more + 3 * 4 * own, own


def _peak(network: nn.Module, batch: int, latents: tuple[int, ...], shape: Shape) -> int:
    """The most bytes of weights, gradients and activations at once."""
    network.train()
    with Held([*network.parameters(), *network.buffers()]) as held:
        network(*_inputs(shape, latents, batch)).square().mean().backward()
    network.zero_grad()
    return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive; ``peak`` is the most at once."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in there:
            self._see(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call, and count what it returns."""
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="*", default=sorted(RECIPES.glob("*.yaml")))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    for path in asked.recipe:
        found = figures(path)
        rows.append({**asdict(found), "peak_gib": round(found.peak_gib, 1)})
        print(
            f"{found.recipe}: {found.weights / 1e6:.0f} M weights, {found.trained / 1e6:.0f} M trained; "
            f"update {found.update_bytes / 2**30:.1f} GiB, merge {found.merge_bytes / 2**30:.1f}, "
            f"pool {found.pool_bytes / 2**30:.1f}; {found.update_tflop:.0f} TFLOP an update, "
            f"{found.pool_tflop / 1000:.0f} PFLOP for the pool",
            flush=True,
        )
    if asked.json is not None:
        write_json(asked.json, document("recipe_figures", rows))


if __name__ == "__main__":
    main()
