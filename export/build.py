"""`export`: makes a student's graphs, checks them against torch, and adds them to its folder.

It uses `onnx.py`, `fuse.py`, `golden.py` and `verify.py`, and writes samples and the card. The folder is replaced when
everything has passed; a failed export leaves it as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Graph, Latents, Network
from redif_sdk.card.render import read_card, write_card
from redif_sdk.card.sections import user_sections
from redif_sdk.errors import ExportError, InvalidRequest, ParityError, RuntimeUnavailable, UnsupportedModel
from redif_sdk.export import golden, samples, store
from redif_sdk.export.conditions import ExampleConditions
from redif_sdk.export.decoder import compared, replace_decoder
from redif_sdk.export.fuse import generator_model
from redif_sdk.export.nag import check_takes_nag, nag_model
from redif_sdk.export.needs import check_fits
from redif_sdk.export.networks import encoder_of, given_network, is_large, load_decoder, load_encoders, load_network
from redif_sdk.export.onnx import (
    GraphDenoiser,
    decoder_model,
    denoiser_model,
    encoder_model,
    largest_extent,
    part_precision,
    size_multiple,
    text_encoder_model,
)
from redif_sdk.export.verify import absent, summary, verify
from redif_sdk.export.weight_only import WEIGHT_ONLY, weight_only
from redif_sdk.export.weights import LazyModel
from redif_sdk.inputs.chunks import takes_chunks
from redif_sdk.models.families import LatentDecoder, TextEncoders, is_supported
from redif_sdk.runtimes import PRECISIONS, runnable
from redif_sdk.runtimes.protocol import nvidia_driver

__all__ = ["OnProgress", "build_graphs"]

BATCHES = (1, 8)
BATCHES_OF_LARGE = (2, 1)
SMALL = 16  # latents on a side

OnProgress = Callable[[float | None, str], object]  # the share that is done, if known, and what is done now


class TorchStudent(NamedTuple):
    """A student's parts in torch, from which its graphs are made."""

    denoiser: GraphDenoiser
    encoders: TextEncoders | None
    decoder: LatentDecoder | None
    conditions: ExampleConditions


def build_graphs(
    folder: str | Path,
    precisions: Sequence[str] = ("fp32",),
    *,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    runtimes: Sequence[str] | None = None,
    network: torch.nn.Module | None = None,
    decoder: str | Path | None = None,
    max_memory: int | None = None,
    nag: bool = False,
    long_prompts: bool = False,
    on_progress: OnProgress = lambda done, note: None,
) -> Manifest:
    """The ONNX part of `redif_sdk.export.export`, where the arguments are described. Returns the new manifest."""
    _check_precisions(precisions)
    if batches is not None and (not batches or min(batches) < 1):
        raise InvalidRequest(f"batches are {list(batches)}; give at least one, of at least 1")
    student = StudentFolder(folder)
    needs, engines = check_fits(student, precisions, max_memory, runtimes)
    if runtimes is None and (left := [engine for engine in runnable() if engine not in engines]):
        on_progress(None, f"{', '.join(left)} would not fit into memory, and is not checked")
    on_progress(None, f"about {needs.memory / 2**30:.1f} GiB of memory, {needs.disk / 1e9:.1f} GB of disk")
    on_progress(None, "checking hashes")
    student.check_all()
    user_sections(read_card(student.path) or "")  # malformed ones are refused before the work
    with atomic_folder(student.path, overwrite=True) as new:
        more = {"nag": nag, "long_prompts": long_prompts}
        manifest = _make(student, new, precisions, batches, sizes, network, decoder, on_progress, **more)
        on_progress(None, "checking the graphs against torch")
        checked = _pass_gate(folder, new, manifest.graphs, engines)
        on_progress(None, "drawing samples")
        samples.write_samples(new)
        manifest = write_manifest(new, manifest.model_copy(update={"verification": checked}))
        write_card(new)
        return manifest


def _make(
    student: StudentFolder,
    new: Path,
    precisions: Sequence[str],
    batches: Sequence[int] | None,
    sizes: Sequence[tuple[int, int]],
    network: torch.nn.Module | None,
    decoder: str | Path | None,
    on_progress: OnProgress,
    *,
    nag: bool,
    long_prompts: bool,
) -> Manifest:
    """The student in `new`, with graphs and golden files. All that torch loads for it is gone when it returns."""
    on_progress(None, "copying the student")
    student.copy_to(new, without=(store.FOLDER, golden.FOLDER, samples.FOLDER))
    student.keep_foreign(new)
    former = student
    if decoder is not None:
        replace_decoder(student, new, decoder)
        student = StudentFolder(new)
    on_progress(None, "loading the networks")
    loaded = load_network(student, new) if network is None else given_network(student, network)
    manifest, recorded = _with_sizes(student.manifest, loaded, sizes)
    shapes = _shapes(recorded, batches, large=is_large(loaded))
    manifest = manifest.model_copy(update={"network": _with_guidance(manifest)})
    manifest = _with_long_prompts(manifest, loaded, asked=long_prompts)
    if nag:
        check_takes_nag(manifest, loaded)
    source = _source(student, manifest, loaded, new)
    on_progress(None, "recording what torch computes")
    entries = golden.record_golden(source.denoiser, source.decoder, source.conditions, manifest, new, shapes, nag=nag)
    graphs = _Graphs(source, manifest, new, on_progress, nag=nag).write(precisions)
    manifest = manifest.model_copy(update={"graphs": graphs, "golden": entries, "verification": []})
    manifest = write_manifest(new, manifest)
    if decoder is None:
        return manifest
    on_progress(None, "comparing the decoders")
    kept = [row for row in manifest.metrics if "decoder" not in row]
    row = compared(former, StudentFolder(new))
    return write_manifest(new, manifest.model_copy(update={"metrics": [*kept, row]}))


def _pass_gate(folder: str | Path, new: Path, graphs: Sequence[Graph], engines: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the parity gate, all of them passed.

    Raises:
        ParityError: A graph does not compute what torch computes.
        ExportError: ONNX Runtime does not run a graph on a processor (it has kernels for all precisions but bf16).
        RuntimeUnavailable: No engine of this machine can check a graph.
    """
    rows = verify(new, engines)
    if failed := summary(rows):
        raise ParityError(f"the graphs of {folder} do not compute what torch computes: {failed}")
    missed = [row for row in rows if row["reason"] and row["runtime"] == "onnxruntime" and row["precision"] != "bf16"]
    if missed and nvidia_driver() is None:
        raise ExportError(f"the graphs of {folder} do not run as they should: {absent(missed)}")
    checked = [row for row in rows if row["passed"] is not None]
    seen = {(row["component"], row["precision"]) for row in checked}
    needed = [graph for graph in graphs if graph.component != "generator"]
    unseen = dict.fromkeys(graph.precision for graph in needed if (graph.component, graph.precision) not in seen)
    if unseen:
        raise RuntimeUnavailable(f"no engine of this machine can check {', '.join(unseen)}: {absent(rows)}")
    return checked


def _check_precisions(asked: Sequence[str]) -> None:
    for choice in asked:
        if choice not in PRECISIONS:
            raise InvalidRequest(f"precision {choice!r} is unknown; use {', '.join(PRECISIONS)}")
    if not asked or len(set(asked)) != len(asked):
        raise InvalidRequest(f"precisions are {list(asked)}; give each once, at least one of {', '.join(PRECISIONS)}")


def _shapes(
    sizes: Sequence[golden.Size], batches: Sequence[int] | None, *, large: bool
) -> list[tuple[golden.Size, int]]:
    """(size, batch) of each golden file: every pair; of a large network two batches, in turn over the sizes."""
    if batches is None and large:
        count = max(len(sizes), len(BATCHES_OF_LARGE))
        return [(sizes[place % len(sizes)], BATCHES_OF_LARGE[place % len(BATCHES_OF_LARGE)]) for place in range(count)]
    return [(size, batch) for size in sizes for batch in batches or BATCHES]


def _source(student: StudentFolder, manifest: Manifest, network: torch.nn.Module, checked: Path) -> TorchStudent:
    """The student's parts in torch, from its checked copy; `manifest` is its new one."""
    encoders = load_encoders(student, checked)
    conditions = ExampleConditions(student, encoders, manifest)
    denoiser = GraphDenoiser.of(network, manifest)
    return TorchStudent(denoiser, encoders, load_decoder(student, checked), conditions)


def _with_guidance(manifest: Manifest) -> Network:
    """The manifest's network, whose graphs take the guidance as inputs where it has any."""
    network = manifest.network
    guided = network.guidance is not None and manifest.condition is not None
    return network.model_copy(update={"guidance_inputs": guided or network.embedded_guidance is not None})


def _with_long_prompts(manifest: Manifest, network: torch.nn.Module, *, asked: bool) -> Manifest:
    """The manifest, whose graphs take long prompts if that is `asked`.

    Raises:
        UnsupportedModel: They cannot.
    """
    text = manifest.text
    if asked and (not takes_chunks(manifest) or type(network).__name__ != "UNet2DConditionModel"):
        raise UnsupportedModel(
            f"{manifest.name} takes no prompts in chunks, which UNets of Stable Diffusion, SDXL and LCM do; leave "
            "long_prompts out"
        )
    if text is None:
        return manifest
    return manifest.model_copy(update={"condition": text.model_copy(update={"long_prompts": asked})})


def _with_sizes(
    manifest: Manifest, network: torch.nn.Module, sizes: Sequence[tuple[int, int]]
) -> tuple[Manifest, list[golden.Size]]:
    """The manifest with the axes free that `sizes` (pixels) vary, and the sizes of latents to record.

    Of a large network that takes several sizes both axes are free, and small sizes stand for the student's own, at
    which every check would take minutes and gigabytes.
    """
    scale = manifest.postprocess.scale
    own = manifest.latents
    if manifest.arrays is not None and any(size != manifest.image_shape[:2] for size in sizes):
        raise InvalidRequest(f"{manifest.name} is conditioned on arrays of one size; leave sizes out")
    small = [] if sizes or manifest.arrays is not None or not is_large(network) else _small_sizes(own, network)
    sizes = sizes or [(height * scale, width * scale) for height, width in small]
    axes = [
        axis
        for index, axis in enumerate(("height", "width"))
        if axis in own.dynamic or any(size[index] != getattr(own, axis) * scale for size in sizes)
    ]
    if not axes:
        return manifest, [(own.height, own.width)]
    known = own.multiple > 1 and not is_supported(network)  # for a network of another library, the manifest says it
    multiple = own.multiple if known else math.lcm(own.multiple, size_multiple(network))
    free = {"dynamic": axes, "multiple": multiple, "largest": largest_extent(network) or own.largest}
    latents = Latents.model_validate(own.model_dump() | free)
    further = [latents.size(height, width, scale) for height, width in sizes]
    if not further:  # an axis is free, and no size to check was given
        height, width = (_another(latents.height, latents), _another(latents.width, latents))
        further = [(height if "height" in axes else own.height, width if "width" in axes else own.width)]
    recorded = further if is_large(network) else [(own.height, own.width), *further]
    return manifest.model_copy(update={"latents": latents}), recorded


def _small_sizes(latents: Latents, network: torch.nn.Module) -> list[golden.Size]:
    """Two sizes of latents that are quickly checked, one of them not square; none, if the network takes one only."""
    try:
        unit = math.lcm(latents.multiple, size_multiple(network))
    except UnsupportedModel:
        return []
    least = max(unit, -(-SMALL // unit) * unit)
    return [size for size in ((least, least), (least, least + unit)) if size != (latents.height, latents.width)]


def _another(extent: int, latents: Latents) -> int:
    """Another extent to record: 1.5 times as much, or two thirds where that is too large."""
    more = -(-extent * 3 // (2 * latents.multiple)) * latents.multiple
    if latents.largest is None or more <= latents.largest:
        return more
    return max(1, extent * 2 // (3 * latents.multiple)) * latents.multiple


class _Graphs:
    """Makes a student's graphs and writes them into `folder`. A graph that two precisions share is written once."""

    def __init__(
        self, source: TorchStudent, manifest: Manifest, folder: Path, on_progress: OnProgress, *, nag: bool
    ) -> None:
        self._nag = nag
        self._source = source
        self._say = on_progress
        self._manifest = manifest
        self._folder = folder
        self._written: dict[tuple[str, str], Graph] = {}

    def write(self, precisions: Sequence[str]) -> list[Graph]:
        """The graphs of each precision: those of the student's parts, and the generator if it fits into one file."""
        return [graph for precision in precisions for graph in self._chain(precision)]

    def _chain(self, precision: str) -> list[Graph]:
        source, manifest = self._source, self._manifest
        graphs = []
        if source.encoders is not None:
            self._say(None, f"text encoders in {precision}")
            graphs.append(self._part("text_encoder", precision, None))
        self._say(None, f"network in {precision}")
        model = denoiser_model(source.denoiser, manifest, precision, source.conditions)
        decoder = None
        if source.decoder is not None:
            self._say(None, f"decoder in {precision}")
            decoder = decoder_model(source.decoder, manifest, self._computed("decoder", precision))
        fits = model.size + (decoder.size if decoder is not None else 0) <= store.LARGEST_FILE
        generator = generator_model(model, manifest, decoder) if fits else None
        self._say(None, f"writing the graphs in {precision}")
        graphs.append(store.write_graph(self._folder, "denoiser", precision, model))
        if self._nag:
            self._say(None, f"network with negative prompts in {precision}")
            graphs.append(self._with_negatives(precision, graphs[-1]))
        if decoder is not None and source.decoder is not None:
            graphs.append(self._part("decoder", precision, decoder))
            encoder = encoder_model(encoder_of(source.decoder), manifest, self._computed("encoder", precision))
            graphs.append(self._part("encoder", precision, encoder))
        if generator is not None:
            graphs.append(store.write_graph(self._folder, "generator", precision, generator))
        return graphs

    def _with_negatives(self, precision: str, denoiser: Graph) -> Graph:
        """The denoiser with negative prompts. Weights beside the denoiser's graph are not written again."""
        computed = self._computed("nag", precision)
        plain = "fp32" if computed in WEIGHT_ONLY else computed
        model = nag_model(self._source.denoiser, self._manifest, plain)
        model = model if plain == computed else weight_only(model, computed)
        beside = denoiser if computed == precision else None
        return store.write_graph(self._folder, "nag", precision, model, beside)

    def _part(self, component: str, precision: str, model: LazyModel | None) -> Graph:
        """The graph of the text encoders, or of another part (`model`), for a student in `precision`."""
        computed = self._computed(component, precision)
        if (component, computed) not in self._written:
            if model is None:
                assert self._source.encoders is not None
                model = text_encoder_model(self._source.encoders, self._manifest, computed)
            self._written[component, computed] = store.write_graph(self._folder, component, computed, model)
        return self._written[component, computed].model_copy(update={"precision": precision})

    def _computed(self, component: str, precision: str) -> str:
        return part_precision(component, precision, self._manifest, self._source.decoder)
