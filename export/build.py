"""`export`: the graphs of a student, checked against torch, added to its folder in one piece.

It puts together what `onnx.py`, `fuse.py`, `golden.py` and `verify.py` do, and writes the files. The folder is replaced
only when everything has passed; a failed export leaves it as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto

from redif_sdk.errors import InvalidRequest, ParityError, UnsupportedModel
from redif_sdk.export import golden
from redif_sdk.export.fuse import generator_model
from redif_sdk.export.onnx import OPSET, Denoiser, denoiser_model, load_network
from redif_sdk.export.verify import summary, verify
from redif_sdk.files import atomic_folder
from redif_sdk.manifest import Graph, Manifest, StudentFolder, TensorSpec, write_manifest

__all__ = ["PRECISIONS", "TARGETS", "export"]

TARGETS = ("onnx",)
PRECISIONS = ("fp32",)
FOLDER = "onnx"

#: A protobuf ends at 2 GiB. A larger denoiser keeps its weights in a file beside it. A larger generator is not made:
#: ONNX Runtime takes such a file from memory for a graph, but not for a loop's body. Pipelines then step the denoiser.
LARGEST_FILE = (1 << 31) - (1 << 24)

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}


def export(
    folder: str | Path,
    targets: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    *,
    network: torch.nn.Module | None = None,
) -> Manifest:
    """Compile the student in `folder`, record golden outputs, pass the parity gate, and add all to the folder.

    Graphs and golden files that were there are replaced. `network` takes the place of the one in the folder, for
    classes that are not diffusers'; it must compute what the folder's weights compute. Returns the new manifest.

    Raises IntegrityError if the folder was altered (or holds files of which its manifest does not know, which would be
    lost), UnsupportedModel or ExportError if the network cannot be compiled, ParityError if a graph does not compute
    what torch computes. In each case, and on a full disk (OSError), the folder stays as it was.
    """
    _check_choice("target", targets, TARGETS)
    _check_choice("precision", precisions, PRECISIONS)
    student = StudentFolder(folder)
    student.check_all()
    manifest = student.manifest
    if manifest.latents.dynamic:
        raise UnsupportedModel(f"{folder} has a free {manifest.latents.dynamic[0]}; this release exports fixed sizes")
    denoiser = Denoiser(
        load_network(student) if network is None else network.eval(),
        manifest.latents.channels,
        manifest.network.guidance,
    )
    with atomic_folder(student.path, overwrite=True) as new:
        student.copy_to(new, without=(FOLDER, golden.FOLDER))
        student.keep_foreign(new)
        entries = golden.record(denoiser, manifest, new)
        model = denoiser_model(denoiser, manifest)
        graphs = [_write(new, "denoiser", "fp32", model)]
        if model.ByteSize() <= LARGEST_FILE:
            graphs.append(_write(new, "generator", "fp32", generator_model(model, manifest)))
        manifest = manifest.model_copy(update={"graphs": graphs, "golden": entries, "verification": []})
        write_manifest(new, manifest)
        rows = verify(new)
        if not all(row["passed"] for row in rows):
            raise ParityError(f"the graphs of {folder} do not compute what torch computes: {summary(rows)}")
        return write_manifest(new, manifest.model_copy(update={"verification": rows}))


def _check_choice(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    for choice in asked:
        if choice not in known:
            raise InvalidRequest(f"{what} {choice!r} is unknown to this release; use {', '.join(known)}")
    if not asked:
        raise InvalidRequest(f"no {what} was given; use {', '.join(known)}")


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
    return Graph(
        component=component,
        precision=precision,
        file=file,
        data=data,
        opset=OPSET,
        inputs=[_spec(value) for value in model.graph.input],
        outputs=[_spec(value) for value in model.graph.output],
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
