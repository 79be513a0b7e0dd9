"""The commands `redif export` and `redif verify`: what they take, what they call, what they print.

Torch, ONNX and TensorRT are imported when a command runs that needs them.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    GATE_FAILED,
    Json,
    Quiet,
    StudentFolderArgument,
    console_for,
    fail,
    numbers,
    print_rows,
    sizes_of,
    write_rows,
)
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError, ParityError

__all__ = ["export_command", "verify_command"]

Batches = Annotated[str | None, typer.Option(metavar="N,...", help="Batch sizes to check, as in 1,8.")]

PARITY = {
    "component": "component",
    "runtime": "runtime",
    "precision": "prec",
    "num_inference_steps": "steps",
    "batch": "batch",
    "size": "size",
    "max_abs": "max_abs",
    "relative_rmse": "rel_rmse",
    "psnr": "psnr",
    "threshold": "threshold",
    "passed": "passed",
}
ENGINES = {
    "component": "component",
    "precision": "prec",
    "flavour": "flavour",
    "targets": "targets",
    "seconds": "seconds",
    "megabytes": "MB",
    "cache": "cache",
}


def export_command(
    folder: StudentFolderArgument,
    target: Annotated[
        list[str] | None, typer.Option(help="onnx, tensorrt-rtx, tensorrt, web; may be repeated. Default: onnx.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16, bf16, int8; may be repeated. Default: fp32; of engines, all graphs there are."),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Batch sizes to check, as in 1,8; of engines: SMALLEST,BEST,LARGEST."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="HxW,...",
            help="Picture sizes to check; axes on which they differ become free. Of engines: SMALLEST,BEST,LARGEST.",
        ),
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(help="Engines: text_encoder, denoiser, decoder, generator; may be repeated. Default: all."),
    ] = None,
    sm: Annotated[
        str | None, typer.Option(metavar="N,...", help="Engines: compute capabilities to build for, as in 86,89,120.")
    ] = None,
    engine_dir: Annotated[
        Path | None, typer.Option(help="Engines: where they go; default: this machine's cache.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Engines: most steps; default: the student's most.")] = None,
    level: Annotated[str, typer.Option(help="Engines: how long to search: fast, default, best.")] = "default",
    workspace_mb: Annotated[int | None, typer.Option(help="Engines: most memory for one layer.")] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="Engines of tensorrt: none, ampere-plus, same-cc.")
    ] = "none",
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Engines: without the weights, which the student has.")
    ] = False,
    web_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Web: the page's folder; default: the student's name with -web.")
    ] = None,
    web_engine: Annotated[
        list[str] | None, typer.Option(help="Web: wasm, webgpu; may be repeated. Default: both.")
    ] = None,
    timing_cache: Annotated[bool, typer.Option(help="Engines of tensorrt: keep what was timed.")] = True,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compile a student: to ONNX, checked against torch, and from there to TensorRT engines or a page for browsers.

    The ONNX graphs that were there are replaced: name every precision that the student shall have. Engines are built of
    the graphs that are there, without torch, and never lie in the student's folder; so is the page of the target web,
    which needs npm for the browser's engine.
    """
    from redif_sdk.export import ENGINE_TARGETS, PAGE_TARGET, build_engines, build_page, export

    console = console_for(json, quiet)
    targets = target or ["onnx"]
    graphs = [name for name in targets if name not in (*ENGINE_TARGETS, PAGE_TARGET)]
    if PAGE_TARGET in targets and len(precision or []) > 1 and set(targets) <= {PAGE_TARGET}:
        raise InvalidRequest(f"a page runs one precision; {', '.join(precision or [])} were given")
    for option, given in (("--web-dir", web_dir), ("--web-engine", web_engine)):
        if given and PAGE_TARGET not in targets:
            raise InvalidRequest(f"{option} is for --target web, which was not asked for")
    rows: list[dict[str, Any]] = []
    if graphs:
        if batches is not None and len(targets) > len(graphs):
            raise InvalidRequest("--batches mean one thing for onnx and another for engines; export onnx first")
        with console.status("compiling") if console.is_terminal else nullcontext():
            checked = numbers("--batches", batches) or (1, 8)
            manifest = export(folder, graphs, precision or ["fp32"], batches=checked, sizes=sizes_of(sizes) or ())
        rows += manifest.verification
        print_rows(console, PARITY, manifest.verification)
        console.print(f"{folder}: {', '.join(graph.file for graph in manifest.graphs)}", soft_wrap=True)
    for name in targets:
        if name in ENGINE_TARGETS:
            with console.status(f"building for {name}") if console.is_terminal else nullcontext():
                built = build_engines(
                    folder,
                    flavour=name,
                    precisions=precision or None,
                    components=component or None,
                    sm=numbers("--sm", sm) or (),
                    engine_dir=engine_dir,
                    batches=_three("--batches", numbers("--batches", batches)) or (1, 4, 8),
                    sizes=_three("--sizes", sizes_of(sizes)),
                    max_steps=max_steps,
                    level=level,
                    workspace_mb=workspace_mb,
                    hardware_compatibility=hardware_compatibility,
                    strip_weights=strip_weights,
                    timing_cache=timing_cache,
                )
            rows += built
            print_rows(console, ENGINES, [_shown(row) for row in built])
            for row in built:
                console.print(row["file"], soft_wrap=True)
    if PAGE_TARGET in targets:
        with console.status("making the page") if console.is_terminal else nullcontext():
            page = build_page(
                folder,
                web_dir,
                precision=(precision or ["fp32"])[0],
                engines=tuple(dict.fromkeys(web_engine)) if web_engine else ("wasm", "webgpu"),
            )
        size = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
        rows.append({"target": PAGE_TARGET, "folder": str(page), "bytes": size})
        console.print(
            f"{page}: {size / 1e6:.1f} MB; try it with python -m http.server -d {page}, publish it on any host of "
            f"static files",
            soft_wrap=True,
        )
    write_rows(json, "export", rows)


def _three(option: str, values: list[Any] | None) -> tuple[Any, Any, Any] | None:
    if values is None:
        return None
    if len(values) != 3:
        raise InvalidRequest(f"{option} of engines are three: SMALLEST,BEST,LARGEST; {len(values)} were given")
    return values[0], values[1], values[2]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """An engine's row as it is printed."""
    targets = ", ".join(f"sm {number}" for number in row["targets"]) or row["device"]
    return row | {"targets": targets, "megabytes": row["bytes"] / 1e6}


def verify_command(
    folder: StudentFolderArgument,
    runtime: Annotated[list[str] | None, typer.Option(help="Engines to check; default: those that run here.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Graphs to check; default: all.")] = None,
    batches: Batches = None,
    sizes: Annotated[str | None, typer.Option(metavar="HxW,...", help="Recorded sizes to check; default: all.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Check every file's hash, and every graph against the recorded torch outputs. Writes nothing; exits 1 if it fails.

    The hashes come first: an altered, missing or additional file is named, and nothing of the student is run.
    """
    from redif_sdk.artifact.manifest import MANIFEST_NAME
    from redif_sdk.export.verify import absent, summary, verify

    try:
        rows = verify(
            folder, runtime, precisions=precision, batches=numbers("--batches", batches), sizes=sizes_of(sizes)
        )
    except ManifestError as error:
        if not isinstance(error, IntegrityError) and not (folder / MANIFEST_NAME).is_file():
            raise  # this is no student; an altered manifest may be one that cannot even be read
        fail(str(error), GATE_FAILED)
    write_rows(json, "verify", rows)
    console = console_for(json, quiet)
    print_rows(console, PARITY, [row for row in rows if row["passed"] is not None])
    if failed := summary(rows):
        raise ParityError(f"{folder} failed: {failed}")
    passed = sum(bool(row["passed"]) for row in rows)
    console.print(f"{folder}: every file is unaltered, and all {passed} checks passed", soft_wrap=True)
    if unchecked := absent(rows):
        console.print(f"not checked here: {unchecked}", soft_wrap=True)
