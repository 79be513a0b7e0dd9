"""A student whose network gives NaN or infinity for one class, and sound images for all others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from redif_sdk.artifact.folder import StudentFolder, write_manifest

__all__ = ["BAD_CLASS", "poisoned"]

BAD_CLASS = 3


def poisoned(student: Path, folder: Path, value: float = np.nan) -> Path:
    """A copy of an exported class-conditional student, in which the embedding of `BAD_CLASS` is `value`."""
    shutil.copytree(student, folder)
    for component in ("denoiser", "generator"):
        path = folder / f"onnx/{component}.fp32.onnx"
        model = onnx.load(path)
        (table,) = (tensor for tensor in tensors(model.graph) if tensor.name.endswith("class_embedding.weight"))
        values = onnx.numpy_helper.to_array(table).copy()
        values[BAD_CLASS] = value
        table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
        onnx.save(model, path)
    write_manifest(folder, StudentFolder(folder).manifest)
    return folder


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from tensors(attribute.g)
