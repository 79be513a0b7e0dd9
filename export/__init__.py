"""Compile a student's network to graphs and engines, and check graphs against their source.

`verify` needs numpy and an inference engine only. torch is imported when `export` makes ONNX graphs, TensorRT when it
builds engines of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    runtimes: Sequence[str] | None = None,
    sm: Sequence[int] = (),
    engine_dir: str | Path | None = None,
    web_dir: str | Path | None = None,
    network: torch.nn.Module | None = None,
    decoder: str | Path | None = None,
    max_memory: int | None = None,
    nag: bool = False,
    long_prompts: bool = False,
    on_progress: Callable[[float | None, str], object] = lambda done, note: None,
) -> Manifest:
    """Compile the student in `folder`.

    The target "onnx" makes ONNX graphs of the network ("denoiser"), of the parts beside it ("text_encoder", "decoder")
    and of the whole sampler ("generator"), in place of those that were there, records golden outputs, and passes the
    parity gate. "tensorrt-rtx" and "tensorrt" build engines of the graphs (`build_engines` has more settings). "web"
    writes a page that runs the first of `precisions` in a browser (`build_page`). An error leaves the folder as it was.

    Args:
        folder: The student's folder.
        targets: Of `TARGETS`.
        precisions: Of "fp32", "fp16", "bf16", "int8", "int8wo", "int4wo". Only the network is int8, the other parts
            stay fp32 beside it; only the network's weights are int4, those of the other parts int8.
        batches: Batch sizes that the gate checks; None: 1 and 8, or 1 and 2 for 200 million parameters and more.
        sizes: Sizes of images that the gate checks, (height, width) in pixels; axes on which they differ become free.
        runtimes: Engines that the gate checks; None: those that run on this machine.
        sm: Compute capabilities that RTX engines are built for, 89 for 8.9.
        engine_dir: The folder of the engines; None: the cache of this machine.
        web_dir: The folder of the page; None: beside the student's.
        network: A module of the trained class, if that is not diffusers'. A copy gets the folder's weights, if any.
        decoder: Folder or Hub id of another autoencoder to decode with (TAESD); its images are compared with the former
            ones.
        max_memory: Bytes of memory that may be used; None: what is free.
        nag: Make the graph "nag" too, for negative prompts at one call a step (Stable Diffusion 1 to 3.5, LCM, Flux).
        long_prompts: Let the graphs take prompts of several chunks (UNets of Stable Diffusion, SDXL, LCM).
        on_progress: Called with the share that is done (None: unknown) and with what is done now.

    Returns:
        The new manifest.

    Raises:
        IntegrityError: The folder was altered, or holds files that its manifest does not list.
        UnsupportedModel: A network is not supported.
        ExportError: A network cannot be compiled, or does not fit into memory or disk.
        ParityError: A graph does not compute what torch computes.
        RuntimeUnavailable: A package or an engine is missing.
        OSError: The disk is full.
    """
    _check_targets(targets, decoder)
    if PAGE_TARGET in targets:
        from redif_sdk.export.web import check_supported

        check_supported(StudentFolder(folder))  # before minutes are spent on graphs
    if "onnx" in targets:
        _build_graphs()(
            folder,
            precisions,
            batches=batches,
            sizes=sizes,
            runtimes=runtimes,
            network=network,
            decoder=decoder,
            max_memory=max_memory,
            nag=nag,
            long_prompts=long_prompts,
            on_progress=on_progress,
        )
    for flavour in targets:
        if flavour in ENGINE_TARGETS:
            build_engines(folder, flavour=flavour, precisions=precisions, sm=sm, engine_dir=engine_dir)
    if PAGE_TARGET in targets:
        build_page(folder, web_dir, precision=precisions[0] if precisions else "fp32")
    return StudentFolder(folder).manifest


def _build_graphs() -> Callable[..., Manifest]:
    """`build_graphs`, which needs torch."""
    try:
        from redif_sdk.export.build import build_graphs
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable(f'export needs {error.name}; pip install "redif-sdk[export]"') from error
    return build_graphs


def _check_targets(targets: Sequence[str], decoder: str | Path | None) -> None:
    for target in targets:
        if target not in TARGETS:
            raise InvalidRequest(f"target {target!r} is unknown; use {', '.join(TARGETS)}")
    if not targets:
        raise InvalidRequest(f"no target was given; use {', '.join(TARGETS)}")
    if decoder is not None and "onnx" not in targets:
        raise InvalidRequest("another decoder needs new graphs; add the target onnx")


def build_engines(folder: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """TensorRT engines of a student's graphs; see `redif_sdk.export.tensorrt.build_engines`. Needs no torch."""
    try:
        from redif_sdk.export import tensorrt
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable(
            f'building engines needs {error.name}; pip install "redif-sdk[tensorrt-rtx]" or "redif-sdk[tensorrt]"'
        ) from error
    return tensorrt.build_engines(folder, **settings)


def build_page(folder: str | Path, output: str | Path | None = None, **settings: Any) -> Path:
    """A static page that runs the student in browsers; see `redif_sdk.export.web.build_page`. Needs no torch."""
    from redif_sdk.export import web

    return web.build_page(folder, output, **settings)
