"""What an export needs, said before it starts: memory and disk, reckoned from the sizes of the weights alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import ExportError
from redif_sdk.memory import free_memory, gib
from redif_sdk.runtimes import runnable

__all__ = ["Needs", "check_fits", "needs_of"]

#: Bytes that torch, diffusers, onnx and the engines take without any weights.
LIBRARIES = 1_200_000_000
#: An engine's peak over the weights of its graphs (measured: 1.0 and 2.0). ONNX Runtime computes from mapped files, the
#: others lay weights out anew.
PEAKS = {"onnxruntime": 1.1, "openvino": 2.2}
PEAK = 2.4  # of other engines
#: Bytes of weights below which nothing is reckoned: such a network fits wherever torch does.
SMALL = 200_000_000

#: Bytes of a weight; int8 is made of the fp32 graph.
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "int8wo": 1.1, "int4wo": 0.7}


class Needs(NamedTuple):
    """Bytes of memory at the peak, of disk beside the student that is there, and of the weights in float32."""

    memory: int
    disk: int
    weights: int


def needs_of(student: StudentFolder, precisions: Sequence[str], engine: str) -> Needs:
    """What exporting the student and checking it in `engine` takes, without the images that the gate computes.

    Args:
        student: The student's folder.
        precisions: The precisions that are asked for.
        engine: The engine's name.

    Raises:
        IntegrityError: A file of weights has a header that is not valid.
    """
    manifest = student.manifest
    decoder, text = manifest.postprocess.decoder, manifest.text
    together = [[manifest.network.folder, *([decoder.folder] if decoder is not None else [])]]
    together += [[part.folder for part in text.encoders]] if text is not None else []
    counts = [sum(_elements(student, folder) for folder in folders) for folders in together]
    widest = max(_WIDTHS[precision] for precision in precisions)
    graphs = sum(counts) * sum(_WIDTHS[precision] for precision in precisions)
    disk = graphs + sum(entry.bytes for entry in manifest.files)
    peak = PEAKS.get(engine, PEAK)
    return Needs(int(LIBRARIES + peak * widest * max(counts)), int(disk), 4 * sum(counts))


def check_fits(
    student: StudentFolder,
    precisions: Sequence[str],
    max_memory: int | None = None,
    engines: Sequence[str] | None = None,
) -> tuple[Needs, list[str]]:
    """`needs_of` the engines of the gate, if they fit into memory and the graphs onto the disk.

    Args:
        student: The student's folder.
        precisions: The precisions that are asked for.
        max_memory: Bytes of memory that may be used; None: what is free.
        engines: Those of the gate; None: of those that run here, those that fit.

    Returns:
        The most of any engine, and the engines.

    Raises:
        ExportError: It does not fit; the message has the numbers.
    """
    asked = list(engines) if engines is not None else runnable()
    needs = {engine: needs_of(student, precisions, engine) for engine in asked}
    least, most = (choose(needs.values(), key=lambda one: one.memory) for choose in (min, max))
    if most.weights < SMALL:
        return most, asked
    limit = free_memory() if max_memory is None else max_memory
    fitting = [engine for engine in asked if limit is None or needs[engine].memory <= limit]
    if limit is not None and (not fitting or (engines is not None and len(fitting) < len(asked))):
        lacking = least if engines is None else most
        narrower = "; --precision int8wo needs a quarter" if min(_WIDTHS[one] for one in precisions) > 2 else ""
        raise ExportError(
            f"exporting {student.path} in {', '.join(precisions)} takes about {gib(lacking.memory)} of memory, and "
            f"{gib(limit)} {'may be used' if max_memory is not None else 'are free'}; use a machine with more"
            f"{narrower}"
        )
    free = shutil.disk_usage(student.path).free
    if most.disk > free:
        raise ExportError(
            f"exporting {student.path} in {', '.join(precisions)} writes about {most.disk / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of its disk are free; make room, or ask for fewer precisions"
        )
    return max((needs[engine] for engine in fitting), key=lambda one: one.memory), fitting


def _elements(student: StudentFolder, folder: str) -> int:
    """Numbers in the safetensors files of a folder, by their headers."""
    files = (file for file in student.files(folder) if file.endswith(".safetensors"))
    return sum(math.prod(shape) for file in files for _, shape in student.tensors(file).values())
