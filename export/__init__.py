"""Compile a student's network to graphs and engines, and check graphs against their source.

`verify` needs numpy and an inference engine only, so that a deployer can run it; torch is imported when `export` makes
ONNX graphs, and TensorRT when it builds engines of them. A page for browsers is made of the graphs that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.export.verify import verify

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINE_TARGETS", "PAGE_TARGET", "TARGETS", "build_engines", "build_page", "export", "verify"]

ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
PAGE_TARGET = "web"
TARGETS = ("onnx", *ENGINE_TARGETS, PAGE_TARGET)


def export(
    folder: str | Path,
    targets: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    *,
    batches: Sequence[int] = (1, 8),
    sizes: Sequence[tuple[int, int]] = (),
    runtimes: Sequence[str] | None = None,
    sm: Sequence[int] = (),
    engine_dir: str | Path | None = None,
    web_dir: str | Path | None = None,
    network: torch.nn.Module | None = None,
) -> Manifest:
    """Compile the student in `folder`: its ONNX graphs, checked and added to the folder, and engines built of these.

    "onnx" records golden outputs and passes the parity gate; graphs and golden files that were there are replaced. The
    graphs are of the network ("denoiser"), of what a student has beside it ("text_encoder", "decoder"), and of network
    and decoder in one ("generator"). "tensorrt-rtx" and "tensorrt" build engines of the graphs that are then there, for
    the compute capabilities `sm`, into `engine_dir` or this machine's cache; `build_engines` has more settings for
    them. "web" writes a static page that runs the first of `precisions` in the visitor's browser, into `web_dir` or
    beside the folder: see `build_page`.

    `precisions`: of "fp32", "fp16", "bf16", "int8"; int8 is the network's alone, and what is beside it stays fp32.
    `batches` and `sizes` (height, width in pixels) are what the gate looks at, in `runtimes` (default: those that run
    here); an axis on which `sizes` differ from the student's own becomes free, in the graphs and in requests. `network`
    takes the place of the one in the folder, for classes that are not diffusers'; it must compute what the folder's
    weights compute. Returns the new manifest.

    Raises IntegrityError if the folder was altered (or holds files of which its manifest does not know, which would be
    lost), UnsupportedModel or ExportError if a network cannot be compiled, ParityError if a graph does not compute
    what torch computes. In each case, and on a full disk (OSError), the folder stays as it was.
    """
    for target in targets:
        if target not in TARGETS:
            raise InvalidRequest(f"target {target!r} is unknown to this release; use {', '.join(TARGETS)}")
    if not targets:
        raise InvalidRequest(f"no target was given; use {', '.join(TARGETS)}")
    if PAGE_TARGET in targets:
        from redif_sdk.export.web import check_supported

        check_supported(StudentFolder(folder))  # before minutes are spent on graphs
    if "onnx" in targets:
        try:
            from redif_sdk.export.build import build_graphs
        except ModuleNotFoundError as error:
            raise RuntimeUnavailable(f'export needs {error.name}; pip install "redif-sdk[export]"') from error
        build_graphs(folder, precisions, batches=batches, sizes=sizes, runtimes=runtimes, network=network)
    for flavour in targets:
        if flavour in ENGINE_TARGETS:
            build_engines(folder, flavour=flavour, precisions=precisions, sm=sm, engine_dir=engine_dir)
    if PAGE_TARGET in targets:
        build_page(folder, web_dir, precision=precisions[0] if precisions else "fp32")
    return StudentFolder(folder).manifest


def build_engines(folder: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """TensorRT engines of a student's graphs; see `redif_sdk.export.tensorrt.build_engines`. Needs no torch."""
    try:
        from redif_sdk.export import tensorrt
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable(
            f'to build engines needs {error.name}; pip install "redif-sdk[tensorrt-rtx]" or "redif-sdk[tensorrt]"'
        ) from error
    return tensorrt.build_engines(folder, **settings)


def build_page(folder: str | Path, output: str | Path | None = None, **settings: Any) -> Path:
    """A static page that runs the student in browsers; see `redif_sdk.export.web.build_page`. Needs no torch."""
    from redif_sdk.export import web

    return web.build_page(folder, output, **settings)
