"""Golden outputs: what torch computes for a few inputs, recorded at export, so that the parity gate needs no torch.

One compressed ``.npz`` holds, for one step table and one batch of B images: ``seeds`` (B, 2) uint64, ``rows`` (R,)
int64, the steps looked at, ``x`` and ``f`` (R, B, C, H, W) float32, the network's input and output there, and
``images`` (B, H', W', C') uint8. A student with a decoder also has ``latents`` (B, C, H, W) float32, the final ones; a
class-conditional one ``class_labels`` (B,) int64; a text-to-image one ``prompts`` (B,) text, ``tokens.NAME`` (B, L)
int64, the text encoder's inputs, and ``conditions.NAME`` (B, ...) float32, its outputs, and an inpainting student's
mask and masked image as latents; one on arrays these as ``conditions.NAME``. With guidance at run time, there are
``guidance_scale`` (B,) float32, and for classifier-free guidance ``null.NAME`` (B, ...), the null conditions.
One with long prompts has ``long.f``, the network's outputs like ``f``, of prompts of two chunks (`lengthened`).
A student with the graph "nag" has that graph's further inputs under their names, and its outputs ``nag.f`` like ``f``.

Reading needs numpy only; torch is imported when something is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import GUIDANCE_SCALE, Manifest
from redif_sdk.artifact.records import Golden, TensorSpec
from redif_sdk.artifact.untrusted.npz import npz_arrays
from redif_sdk.errors import ManifestError
from redif_sdk.images import from_uint8
from redif_sdk.runtimes.guided import NULL
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

if TYPE_CHECKING:
    from torch import Tensor

    from redif_sdk.export.conditions import ExampleConditions
    from redif_sdk.export.onnx import GraphDenoiser
    from redif_sdk.models.families import LatentDecoder

__all__ = ["FOLDER", "Arrays", "GoldenRecord", "Size", "lengthened", "read_golden", "record_golden"]

FOLDER = "golden"
SEED = 0
MOST_ROWS = 4  # of a long table, so that the files stay small

Size = tuple[int, int]  # height and width of latents
Arrays = dict[str, NDArray[Any]]

# ---------------------------------------------------------------------- recording


def record_golden(
    denoiser: GraphDenoiser,
    decoder: LatentDecoder | None,
    conditions: ExampleConditions,
    manifest: Manifest,
    folder: Path,
    shapes: Sequence[tuple[Size, int]],
    *,
    nag: bool = False,
) -> list[Golden]:
    """Write a golden file for each table and shape into `folder`.

    Args:
        denoiser: The network in float32.
        decoder: The latents' decoder, for a student that has one.
        conditions: What the recorded images are conditioned on.
        manifest: The student's manifest.
        folder: The student's folder; the files go into its subfolder `FOLDER`.
        shapes: What to record: (height and width of latents, batch).
        nag: Whether to record negative prompts.

    Returns:
        The manifest's entries of the files.
    """
    (folder / FOLDER).mkdir()
    own = (manifest.latents.height, manifest.latents.width)
    entries = []
    for steps in manifest.supported_steps:
        first = 0
        for size, batch in dict.fromkeys(shapes):
            place = "" if size == own else f"-{size[0]}x{size[1]}"
            file = f"{FOLDER}/steps-{steps}-batch-{batch}{place}.npz"
            indices = range(first, first + batch)
            arrays = _asked(conditions, manifest, indices, size)
            arrays |= _run(denoiser, decoder, conditions, manifest, manifest.step_table(steps), indices, size)
            arrays |= _nag(denoiser, conditions.of(indices, size), manifest.step_table(steps), arrays) if nag else {}
            np.savez_compressed(folder / file, **arrays)  # type: ignore[arg-type] # numpy: one of these may be allow_pickle
            other = {} if size == own else {"height": size[0], "width": size[1]}
            entries.append(Golden(file=file, num_inference_steps=steps, batch=batch, **other))
            first += batch
    return entries


def _asked(conditions: ExampleConditions, manifest: Manifest, indices: range, size: Size) -> dict[str, NDArray[Any]]:
    """The conditions of the images as the file holds them: class labels, or prompts, tokens and encoded prompts."""
    given = {name: value.numpy() for name, value in conditions.of(indices, size).items()}
    if manifest.arrays is not None:
        return {f"conditions.{name}": value for name, value in given.items()}
    if manifest.text is None:
        return given
    guiding = {name: given.pop(name) for name in list(given) if name == GUIDANCE_SCALE or name.startswith(NULL)}
    prompts = conditions.prompts(indices)
    tokens = {f"tokens.{name}": value for name, value in conditions.tokens(prompts).items()}
    return {
        "prompts": np.array(prompts),
        **tokens,
        **{f"conditions.{name}": value for name, value in given.items()},
        **guiding,
    }


def _run(
    denoiser: GraphDenoiser,
    decoder: LatentDecoder | None,
    conditions: ExampleConditions,
    manifest: Manifest,
    table: StepTable,
    indices: range,
    size: Size,
) -> dict[str, NDArray[Any]]:
    """Images `indices` of `SEED`, in torch from the noise to the uint8 images."""
    import torch

    from redif_sdk.export.networks import encoder_of

    seeds = [(SEED, index) for index in indices]
    noise = torch.from_numpy(draw(seeds, (manifest.latents.channels, *size), slices=table.noise_slices))
    asked = conditions.of(indices, size)
    steps = table.num_inference_steps
    rows = sorted({round(row) for row in np.linspace(0, steps - 1, min(steps, MOST_ROWS))})
    states, outputs = [], []

    def predict(k: int, x: Tensor) -> Tensor:
        f = denoiser.guided(x, torch.full((len(x),), float(table.timesteps[k])), asked)
        if k in rows:
            states.append(x)
            outputs.append(f)
        clean: Tensor = table.clean(k, x, f)
        return clean

    with torch.no_grad():
        x = run_steps(table, table.start(noise[0]), noise, predict)
        images = _images(x, decoder, manifest).numpy()
    longer = _long(denoiser, asked, table, rows, states) if manifest.takes_long_prompts else {}
    arrays = {
        **longer,
        "seeds": np.array(seeds, dtype=np.uint64),
        "rows": np.array(rows, dtype=np.int64),
        "x": torch.stack(states).numpy(),
        "f": torch.stack(outputs).numpy(),
        "images": images,
    }
    if decoder is None:
        return arrays
    encoder, shown = encoder_of(decoder), torch.from_numpy(from_uint8(images, manifest.postprocess))
    with torch.no_grad():
        encoded = torch.cat([encoder(one) for one in shown.split(1)])
    return arrays | {"latents": x.numpy(), "encoded": encoded.numpy()}


def lengthened(conditions: Arrays, states: str) -> Arrays:
    """Conditions of prompts of two chunks: the image's own, and that of the image before; the null prompt's twice."""
    found = dict(conditions)
    for name, other in ((states, np.roll(conditions[states], 1, 0)), (NULL + states, conditions.get(NULL + states))):
        if name in conditions and other is not None:
            found[name] = np.concatenate([conditions[name], other], 1)
    return found


def _long(
    denoiser: GraphDenoiser, asked: Mapping[str, Tensor], table: StepTable, rows: Sequence[int], xs: Sequence[Tensor]
) -> Arrays:
    """The outputs of long prompts at the recorded states."""
    import torch

    longer = lengthened({name: value.numpy() for name, value in asked.items()}, next(iter(asked)))
    given = {name: torch.from_numpy(value) for name, value in longer.items()}
    with torch.no_grad():
        found = [
            denoiser.guided(x, torch.full((len(x),), float(table.timesteps[row])), given)
            for row, x in zip(rows, xs, strict=True)
        ]
    return {"long.f": torch.stack(found).numpy()}


def _nag(denoiser: GraphDenoiser, asked: Mapping[str, Tensor], table: StepTable, recorded: Arrays) -> Arrays:
    """The outputs with negative prompts at the recorded states."""
    import torch

    from redif_sdk.export.nag import nag_example, nag_reference

    example, outputs = nag_example(denoiser.network, asked), []
    for row, x in zip(recorded["rows"], recorded["x"], strict=True):
        t = torch.full((len(x),), float(table.timesteps[row]))
        outputs.append(nag_reference(denoiser, torch.from_numpy(x), t, asked, example))
    return {**example, "nag.f": np.stack(outputs)}


def _images(x: Tensor, decoder: LatentDecoder | None, manifest: Manifest) -> Tensor:
    """Latents (B, C, H, W) to images, uint8 (B, H', W', C')."""
    import torch

    if decoder is None:
        images = torch.nn.functional.pixel_shuffle(x, manifest.postprocess.pixel_shuffle)
    else:  # one after another: an autoencoder takes gigabytes for a batch
        images = torch.cat([decoder(one) for one in x.split(1)])
    low, high = manifest.postprocess.value_range
    levels = (images - low) * (255 / (high - low))
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class GoldenRecord:
    """One golden file of a student. `prompts` and `tokens` are empty, and `latents` None, where it has none."""

    manifest: Manifest
    table: StepTable
    seeds: list[tuple[int, int]]
    conditions: Arrays  # by the names of the denoiser's inputs
    prompts: list[str]
    tokens: Arrays  # by the names of the text encoder's inputs
    rows: list[int]
    x: NDArray[np.float32]
    f: NDArray[np.float32]
    latents: NDArray[np.float32] | None
    encoded: NDArray[np.float32] | None  # the latents of `images`; None: recorded before format 1.6
    images: NDArray[np.uint8]
    long_f: NDArray[np.float32] | None  # f of `lengthened` conditions; None: the graphs take no long prompts
    nag: Arrays  # further inputs of the graph "nag", and its output as "nag.f"; empty where there is no such graph

    def noise(self) -> NDArray[np.float32]:
        """The noise of the recorded images, drawn from their seeds: float32 (slices, B, C, H, W)."""
        return draw(self.seeds, self.x.shape[2:], slices=self.table.noise_slices)


def read_golden(student: StudentFolder, golden: Golden) -> GoldenRecord:
    """Read the golden file of a manifest's entry.

    Raises:
        IntegrityError: The file was altered.
        ManifestError: Its arrays are not those that the manifest describes.
    """
    manifest = student.manifest
    try:
        arrays = npz_arrays(student.read(golden.file), golden.file)
        text = manifest.text is not None
        apart = text or manifest.arrays is not None
        record = GoldenRecord(
            manifest,
            manifest.step_table(golden.num_inference_steps),
            [(int(seed), int(index)) for seed, index in arrays["seeds"]],
            {
                spec.name: arrays[f"conditions.{spec.name}" if apart else spec.name].astype(spec.dtype)
                for spec in (*manifest.condition_tensors, *manifest.image_tensors)
            }
            | {spec.name: arrays[spec.name].astype(spec.dtype) for spec in _guiding(manifest)},
            [str(prompt) for prompt in arrays["prompts"]] if text else [],
            {name: arrays[f"tokens.{name}"].astype(np.int64) for name in _token_shapes(manifest, 0)},
            [int(row) for row in arrays["rows"]],
            arrays["x"].astype(np.float32),
            arrays["f"].astype(np.float32),
            arrays["latents"].astype(np.float32) if manifest.postprocess.decoder is not None else None,
            arrays["encoded"].astype(np.float32) if "encoded" in arrays else None,
            arrays["images"].astype(np.uint8),
            arrays["long.f"].astype(np.float32) if manifest.takes_long_prompts else None,
            {spec.name: arrays[spec.name].astype(spec.dtype) for spec in _nag_specs(manifest)},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{golden.file} in {student.path} cannot be read: {error}; export the student again"
        ) from error
    expected = _expected_shapes(manifest, golden, len(record.rows), encoded=record.encoded is not None)
    if _shapes(record) != expected or record.rows[:1] != [0]:
        raise ManifestError(f"{golden.file} in {student.path} has arrays of other shapes; export the student again")
    return record


def _guiding(manifest: Manifest) -> list[TensorSpec]:
    """What guides the recorded images: the scale, and the null conditions."""
    if manifest.guidance_at_run_time is None:
        return []
    scale = manifest.graph_conditions[-1]
    if manifest.guidance_at_run_time == "embedded":
        return [scale]
    return [scale, *(spec.model_copy(update={"name": NULL + spec.name}) for spec in manifest.condition_tensors)]


def _nag_specs(manifest: Manifest) -> list[TensorSpec]:
    """The arrays of negative prompts."""
    graph = next((graph for graph in manifest.graphs if graph.component == "nag"), None)
    if graph is None:
        return []
    known = {"sample", "timestep", *(spec.name for spec in manifest.graph_conditions)}
    inputs = [spec for spec in graph.inputs if spec.name not in known]
    return [*inputs, TensorSpec(name="nag.f", dtype="float32", shape=[])]


def _token_shapes(manifest: Manifest, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the text encoder's inputs by name."""
    return {
        name: (batch, part.max_length)
        for part in (manifest.text.tokenizers if manifest.text is not None else [])
        for name in (part.input, part.mask)
        if name is not None
    }


def _shapes(record: GoldenRecord) -> Mapping[str, Any]:
    arrays = {**record.conditions, **record.tokens, "x": record.x, "f": record.f, "images": record.images}
    arrays |= record.nag
    if record.long_f is not None:
        arrays["long.f"] = record.long_f
    if record.latents is not None:
        arrays["latents"] = record.latents
    if record.encoded is not None:
        arrays["encoded"] = record.encoded
    shapes = {name: value.shape for name, value in arrays.items()}
    return {**shapes, "seeds": len(record.seeds), "prompts": len(record.prompts)}


def _expected_shapes(manifest: Manifest, golden: Golden, rows: int, *, encoded: bool) -> Mapping[str, Any]:
    """What `_shapes` must return for a file that the manifest describes so."""
    batch, latents, postprocess = golden.batch, manifest.latents, manifest.postprocess
    height, width = golden.height or latents.height, golden.width or latents.width
    scale, channels = postprocess.scale, postprocess.channels(latents.channels)
    state = (batch, latents.channels, height, width)
    given = [*manifest.condition_tensors, *_guiding(manifest)]
    shapes: dict[str, Any] = {spec.name: (batch, *spec.shape[1:]) for spec in given}
    shapes |= {spec.name: (batch, spec.shape[1], height, width) for spec in manifest.image_tensors}
    shapes |= _token_shapes(manifest, batch)
    shapes |= {"x": (rows, *state), "f": (rows, *state), "images": (batch, height * scale, width * scale, channels)}
    own = {"tokens": manifest.condition_tensors[0].shape[1]} if manifest.takes_long_prompts else {}
    for spec in _nag_specs(manifest):
        shapes[spec.name] = (batch, *(own.get(str(side), side) for side in spec.shape[1:]))
    shapes |= {"nag.f": (rows, *state)} if manifest.takes_nag else {}
    shapes |= {"long.f": (rows, *state)} if manifest.takes_long_prompts else {}
    if postprocess.decoder is not None:
        shapes |= {"latents": state, **({"encoded": state} if encoded else {})}
    return {**shapes, "seeds": batch, "prompts": batch if manifest.text is not None else 0}
