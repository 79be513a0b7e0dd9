"""`export`: the graphs of a student, checked against torch, added to its folder in one piece.

It puts together what `onnx.py`, `precision.py`, `fuse.py`, `golden.py` and `verify.py` do, and writes the files, with
samples and the card. The folder is replaced only when everything has passed; a failed export leaves it as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto

from redif_sdk import samples
from redif_sdk.card import read_card, user_sections, write_card
from redif_sdk.errors import InvalidRequest, ParityError, RuntimeUnavailable
from redif_sdk.export import golden
from redif_sdk.export.fuse import generator_model
from redif_sdk.export.onnx import Denoiser, denoiser_model, load_network, size_multiple
from redif_sdk.export.verify import absent, summary, verify
from redif_sdk.files import atomic_folder
from redif_sdk.folder import StudentFolder, write_manifest
from redif_sdk.manifest import Graph, Latents, Manifest, TensorSpec
from redif_sdk.runtimes import PRECISIONS

__all__ = ["build_graphs"]

FOLDER = "onnx"

#: A protobuf ends at 2 GiB. A larger denoiser keeps its weights in a file beside it. A larger generator is not made:
#: ONNX Runtime takes such a file from memory for a graph, but not for a loop's body. Pipelines then step the denoiser.
LARGEST_FILE = (1 << 31) - (1 << 24)

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}


def build_graphs(
    folder: str | Path,
    precisions: Sequence[str] = ("fp32",),
    *,
    batches: Sequence[int] = golden.BATCHES,
    sizes: Sequence[tuple[int, int]] = (),
    runtimes: Sequence[str] | None = None,
    network: torch.nn.Module | None = None,
) -> Manifest:
    """The ONNX part of `redif_sdk.export.export`, where the arguments are described. Returns the new manifest."""
    _check_precisions(precisions)
    if not batches or min(batches) < 1:
        raise InvalidRequest(f"batches are {list(batches)}; give at least one, of at least 1")
    student = StudentFolder(folder)
    student.check_all()
    user_sections(read_card(student.path) or "")  # malformed ones are refused before the work
    loaded = load_network(student) if network is None else network.eval()
    manifest, further = _with_sizes(student.manifest, loaded, sizes)
    denoiser = Denoiser(loaded, manifest.latents.channels, manifest.network.guidance)
    with atomic_folder(student.path, overwrite=True) as new:
        student.copy_to(new, without=(FOLDER, golden.FOLDER, samples.FOLDER))
        student.keep_foreign(new)
        entries = golden.record(denoiser, manifest, new, batches, further)
        graphs = [graph for precision in precisions for graph in _graphs(denoiser, manifest, new, precision)]
        manifest = manifest.model_copy(update={"graphs": graphs, "golden": entries, "verification": []})
        write_manifest(new, manifest)
        rows = verify(new, runtimes)
        if failed := summary(rows):
            raise ParityError(f"the graphs of {folder} do not compute what torch computes: {failed}")
        checked = [row for row in rows if row["passed"] is not None]
        seen = {row["precision"] for row in checked if row["runtime"] != "numpy"}
        if missing := [precision for precision in precisions if precision not in seen]:
            raise RuntimeUnavailable(f"nothing here can check {', '.join(missing)}: {absent(rows)}")
        samples.write_samples(new)
        manifest = write_manifest(new, manifest.model_copy(update={"verification": checked}))
        write_card(new)
        return manifest


def _check_precisions(asked: Sequence[str]) -> None:
    for choice in asked:
        if choice not in PRECISIONS:
            raise InvalidRequest(f"precision {choice!r} is unknown to this release; use {', '.join(PRECISIONS)}")
    if not asked or len(set(asked)) != len(asked):
        raise InvalidRequest(f"precisions are {list(asked)}; give each once, at least one of {', '.join(PRECISIONS)}")


def _with_sizes(
    manifest: Manifest, network: torch.nn.Module, sizes: Sequence[tuple[int, int]]
) -> tuple[Manifest, list[golden.Size]]:
    """The manifest with the axes free that `sizes` (pixels) vary, and the latents' sizes to record besides its own."""
    scale = manifest.postprocess.pixel_shuffle
    own = manifest.latents
    axes = [
        axis
        for index, axis in enumerate(("height", "width"))
        if axis in own.dynamic or any(size[index] != getattr(own, axis) * scale for size in sizes)
    ]
    if not axes:
        return manifest, []
    multiple = own.multiple if own.multiple > 1 else size_multiple(network)
    latents = Latents.model_validate(own.model_dump() | {"dynamic": axes, "multiple": multiple})
    further = [latents.size(height, width, scale) for height, width in sizes]
    if not further:  # an axis is free, and nobody says which size to check: half as much again
        height, width = (_larger(getattr(own, axis), multiple, axis in axes) for axis in ("height", "width"))
        further = [(height, width)]
    return manifest.model_copy(update={"latents": latents}), further


def _larger(extent: int, multiple: int, free: bool) -> int:
    return -(-extent * 3 // (2 * multiple)) * multiple if free else extent


def _graphs(denoiser: Denoiser, manifest: Manifest, folder: Path, precision: str) -> list[Graph]:
    """Write the denoiser's graph in `precision`, and the generator's if it fits into a file."""
    model = denoiser_model(denoiser, manifest, precision)
    graphs = [_write(folder, "denoiser", precision, model)]
    if model.ByteSize() <= LARGEST_FILE:
        graphs.append(_write(folder, "generator", precision, generator_model(model, manifest)))
    return graphs


def _write(folder: Path, component: str, precision: str, model: onnx.ModelProto) -> Graph:
    """Write a model to ``onnx/COMPONENT.PRECISION.onnx``, its weights beside it if it is too large, and describe it."""
    file = f"{FOLDER}/{component}.{precision}.onnx"
    (folder / FOLDER).mkdir(exist_ok=True)
    data = []
    if model.ByteSize() > LARGEST_FILE:
        data = [f"{file}.data"]
        model = copy.deepcopy(model)  # the conversion empties the tensors in place
        onnx.external_data_helper.convert_model_to_external_data(model, location=Path(data[0]).name)
        onnx.save_model(model, folder / file)
    else:
        (folder / file).write_bytes(model.SerializeToString(deterministic=True))
    return Graph.model_validate(
        {
            "component": component,
            "precision": precision,
            "file": file,
            "data": data,
            "opset": next(opset.version for opset in model.opset_import if not opset.domain),
            "inputs": [_spec(value) for value in model.graph.input],
            "outputs": [_spec(value) for value in model.graph.output],
        }
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
