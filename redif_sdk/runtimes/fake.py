"""A runtime without an engine, for tests of pipelines, servers and applications.

Its network is a formula: images are noise, but shapes, dtypes and the dependence on every input are a real student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import GUIDANCE_SCALE, Manifest
from redif_sdk.artifact.records import Decoder, Graph, TextCondition
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.images import to_uint8
from redif_sdk.runtimes.finite import LEVELS
from redif_sdk.runtimes.guided import NULL, is_guiding
from redif_sdk.runtimes.protocol import RuntimeInfo, RuntimeOptions, parse_device
from redif_sdk.sampling.loop import sample
from redif_sdk.sampling.table import StepTable

__all__ = ["FakeRuntime", "decode", "encode", "network"]

Arrays = Mapping[str, NDArray[Any]]

#: The inputs of graphs that are no conditions.
_NOT_CONDITIONS = ("sample", "timestep", "noise", "table", "init_scale")


def network(x: NDArray[np.float32], t: NDArray[np.float32], conditions: Arrays) -> NDArray[np.float32]:
    """f = tanh(x + label / 8 + t / 1000), float32 (B, C, H, W). Other conditions than labels add their mean."""
    shift = t / np.float32(1000)
    for name, value in conditions.items():
        worth = value.astype(np.float32).reshape(len(value), -1).mean(1)
        shift = shift + (worth / np.float32(8) if name == "class_labels" else worth)
    result: NDArray[np.float32] = np.tanh(x + shift.astype(np.float32)[:, None, None, None])
    return result


def guided(x: NDArray[np.float32], t: NDArray[np.float32], conditions: Arrays) -> NDArray[np.float32]:
    """f of `network`, guided by the per-image conditions of `redif_sdk.runtimes.guided`."""
    nulls = {name.removeprefix(NULL): value for name, value in conditions.items() if name.startswith(NULL)}
    own = {name: value for name, value in conditions.items() if not name.startswith(NULL)}
    if not nulls:
        return network(x, t, own)
    scale = own.pop(GUIDANCE_SCALE)
    asked = network(x, t, own)
    unasked = np.where(is_guiding(scale)[:, None, None, None], network(x, t, nulls), asked)
    mixed: NDArray[np.float32] = unasked + scale[:, None, None, None] * (asked - unasked)
    return mixed


def encode(ids: Arrays, text: TextCondition) -> dict[str, NDArray[Any]]:
    """Encoded prompts: each filled with one number in [0, 1), which depends on all ids and their order."""
    rows = np.concatenate([ids[part.input] for part in text.tokenizers], axis=1)
    worth = (rows * np.arange(1, rows.shape[1] + 1)).sum(1) % 97 / 97
    found = {}
    for spec in text.tensors:
        shape = [size if isinstance(size, int) else rows.shape[1] for size in spec.shape[1:]]
        value = worth.reshape(-1, *[1] * len(shape))
        found[spec.name] = np.broadcast_to(value, (len(rows), *shape)).astype(spec.dtype)
    return found


def decode(latents: NDArray[np.float32], decoder: Decoder) -> NDArray[np.float32]:
    """A decoder that repeats the latents' channels in turn, each value `scale` pixels wide and high."""
    chosen = latents[:, np.arange(decoder.channels) % latents.shape[1]] / np.float32(decoder.scaling_factor)
    return (chosen + np.float32(decoder.shift_factor)).repeat(decoder.scale, 2).repeat(decoder.scale, 3)


def encode_image(image: NDArray[np.float32], decoder: Decoder, channels: int) -> NDArray[np.float32]:
    """What `decode` makes an image of, where its pixels are blocks: (B, `channels`, H / scale, W / scale)."""
    seen = image[:, np.arange(channels) % image.shape[1], :: decoder.scale, :: decoder.scale]
    return (seen - np.float32(decoder.shift_factor)) * np.float32(decoder.scaling_factor)


class FakeRuntime:
    """Computes a student's graphs with `network` in place of its weights."""

    def __init__(self, manifest: Manifest, info: RuntimeInfo) -> None:
        self._manifest = manifest
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """As `Runtime.load`."""
        if parse_device(options.device)[0] not in ("auto", "cpu"):
            raise RuntimeUnavailable(f'runtime fake has no device {options.device}, and no GPU; use device="cpu"')
        student.read_bytes(graph.file)
        info = RuntimeInfo(
            "fake", "1", "numpy", "cpu", graph.precision, graph.component, graph.file, options.num_threads
        )
        return cls(student.manifest, info)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """As `Runtime.run`."""
        manifest = self._manifest
        if self.info.component == "text_encoder":
            assert manifest.text is not None
            return encode(inputs, manifest.text)
        if self.info.component == "decoder":
            assert manifest.postprocess.decoder is not None
            return {"sample": decode(inputs["latents"], manifest.postprocess.decoder)}
        if self.info.component == "encoder":
            assert manifest.postprocess.decoder is not None
            return {"latents": encode_image(inputs["image"], manifest.postprocess.decoder, manifest.latents.channels)}
        conditions = {name: value for name, value in inputs.items() if name not in _NOT_CONDITIONS}
        if self.info.component == "denoiser":
            return {"f": guided(inputs["sample"], inputs["timestep"], conditions)}
        table = StepTable(inputs["table"], "sample", init_scale=float(inputs["init_scale"]))
        x = sample(guided, table, inputs["noise"], conditions)
        if manifest.postprocess.decoder is not None:
            x = decode(x, manifest.postprocess.decoder)
        return {"images": to_uint8(x, manifest.postprocess), LEVELS: x}
