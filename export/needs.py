"""What an export needs, said before it starts: memory and disk, reckoned from the sizes of the weights alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import ExportError

__all__ = ["Needs", "check_fits", "free_memory", "needs_of"]

#: Bytes that torch, diffusers, onnx and the engines take without any weights.
LIBRARIES = 1_200_000_000
#: An engine's peak over the weights of its graphs: it reads them, and lays them out anew (measured: 2.2 to 2.4).
ENGINE = 2.4
#: Bytes of weights below which nothing is reckoned: such a network fits wherever torch does.
SMALL = 200_000_000

#: Bytes of a weight; int8 is made of the fp32 graph.
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "int8wo": 1.1, "int4wo": 0.7}


class Needs(NamedTuple):
    """Bytes of memory at the peak, of disk beside the student that is there, and of the weights in float32."""

    memory: int
    disk: int
    weights: int


def needs_of(student: StudentFolder, precisions: Sequence[str]) -> Needs:
    """What exporting the student takes, without the images that the gate computes.

    Args:
        student: The student's folder.
        precisions: The precisions that are asked for.

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
    return Needs(int(LIBRARIES + ENGINE * widest * max(counts)), int(disk), 4 * sum(counts))


def check_fits(student: StudentFolder, precisions: Sequence[str], max_memory: int | None = None) -> Needs:
    """`needs_of`, if it fits into memory and onto the disk.

    Args:
        student: The student's folder.
        precisions: The precisions that are asked for.
        max_memory: Bytes of memory that may be used; None: what is free.

    Raises:
        ExportError: It does not fit; the message has the numbers.
    """
    found = needs_of(student, precisions)
    if found.weights < SMALL:
        return found
    limit = free_memory() if max_memory is None else max_memory
    if limit is not None and found.memory > limit:
        narrower = "; --precision fp16 needs half" if min(_WIDTHS[one] for one in precisions) > 2 else ""
        raise ExportError(
            f"exporting {student.path} in {', '.join(precisions)} takes about {_gib(found.memory)} of memory, and "
            f"{_gib(limit)} {'may be used' if max_memory is not None else 'are free'}; use a machine with more"
            f"{narrower}"
        )
    free = shutil.disk_usage(student.path).free
    if found.disk > free:
        raise ExportError(
            f"exporting {student.path} in {', '.join(precisions)} writes about {found.disk / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of its disk are free; make room, or ask for fewer precisions"
        )
    return found


def free_memory() -> int | None:
    """Bytes that can be had without swapping, within the limits of a container; None: not known on this system."""
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    return min(found, default=None)


def _elements(student: StudentFolder, folder: str) -> int:
    """Numbers in the safetensors files of a folder, by their headers."""
    files = (file for file in student.files(folder) if file.endswith(".safetensors"))
    return sum(math.prod(shape) for file in files for _, shape in student.tensors(file).values())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
