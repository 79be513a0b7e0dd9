"""The command ``redif export``. Torch, ONNX and TensorRT are imported when it runs, as a target needs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    Json,
    Quiet,
    StudentFolderArgument,
    bytes_of,
    console_for,
    listed,
    numbers,
    print_rows,
    sizes_of,
    write_rows,
)
from redif_sdk.errors import InvalidRequest
from redif_sdk.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PARITY", "export_command"]

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

Strings = list[str] | None
Target = Annotated[Strings, typer.Option(metavar="NAME,...", help="onnx, tensorrt-rtx, tensorrt, web; default: onnx.")]
PrecisionList = Annotated[
    Strings,
    typer.Option(
        metavar="NAME,...",
        help="fp32, fp16, bf16, int8, int8wo, int4wo; default: fp32; for engines: every exported one.",
    ),
]
Batches = Annotated[
    Strings,
    typer.Option(
        metavar="N,...",
        help="Batch sizes to check; default: 1,8, of large networks 1,2; for engines: SMALLEST,BEST,LARGEST.",
    ),
]
Sizes = Annotated[
    Strings,
    typer.Option(
        metavar="HxW,...",
        help="Image sizes to check; axes on which they differ become free. For engines: SMALLEST,BEST,LARGEST.",
    ),
]
Component = Annotated[
    Strings,
    typer.Option(
        metavar="NAME,...", help="Engines: text_encoder, denoiser, decoder, generator; default: all of the student's."
    ),
]
Sm = Annotated[
    Strings, typer.Option(metavar="N,...", help="Engines: compute capabilities to build for, as in 86,89,120.")
]
EngineDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Engines: output folder; default: the cache.")]
MaxSteps = Annotated[int | None, typer.Option(help="Engines: largest number of steps; default: the student's.")]
Level = Annotated[str, typer.Option(help="Engines: how long the builder searches: fast, default or best.")]
Workspace = Annotated[int | None, typer.Option(help="Engines: memory limit of one layer, in MiB.")]
Compatibility = Annotated[str, typer.Option(help="TensorRT engines: none, ampere-plus or same-cc.")]
Strip = Annotated[
    bool, typer.Option("--strip-weights", help="Engines without weights; they are read from the student.")
]
WebDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Web: output folder; default: the student's, + -web.")]
WebEngine = Annotated[Strings, typer.Option(metavar="NAME,...", help="Web: wasm, webgpu; default: both.")]
Marks = Annotated[
    bool, typer.Option("--marks/--no-marks", help="Web: downloads say that they were generated, and by what.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="ONNX: memory that may be used, as in 8GiB; default: what is free."),
]
DecoderFolder = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="ONNX: autoencoder to decode with in place of the student's own, e.g. TAESD."),
]
Nag = Annotated[
    bool,
    typer.Option(
        "--nag", help="ONNX: one more graph, with which students of one network call a step take negative prompts."
    ),
]
LongPrompts = Annotated[
    bool, typer.Option("--long-prompts", help="ONNX: graphs that take prompts of any length, in chunks.")
]
TimingCache = Annotated[bool, typer.Option(help="TensorRT engines: keep the measured timings for later builds.")]


@dataclass
class _Export:
    """One run of the command: what was asked for, and the rows it made so far."""

    folder: Path
    console: Console
    progress: Progress
    targets: list[str]
    precisions: list[str]
    batches: list[int]
    sizes: list[tuple[int, int]]
    max_memory: int | None = None
    decoder: str | None = None
    nag: bool = False
    long_prompts: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def graphs(self, names: list[str]) -> None:
        """Compile to ONNX and pass the parity gate."""
        from redif_sdk.export import export

        if self.batches and len(self.targets) > len(names):
            raise InvalidRequest("--batches means different things for onnx and for engines; export onnx first")
        precisions = self.precisions or ["fp32"]
        with self.progress.stage(f"export to ONNX in {', '.join(precisions)}, and check against torch") as show:
            manifest = export(
                self.folder,
                names,
                precisions,
                batches=self.batches or None,
                sizes=self.sizes,
                decoder=self.decoder,
                max_memory=self.max_memory,
                nag=self.nag,
                long_prompts=self.long_prompts,
                on_progress=show,
            )
        self.rows += manifest.verification
        print_rows(self.console, PARITY, manifest.verification)
        for row in manifest.metrics if self.decoder is not None else ():
            if "decoder" in row:
                psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
                self.console.print(f"{row['decoder']}: {psnr} to {row['in_place_of']}, {row['num_samples']} images")
        files = ", ".join(graph.file for graph in manifest.graphs)
        self.console.print(f"{self.folder}: {files}", soft_wrap=True)

    def engines(self, flavour: str, options: dict[str, Any]) -> None:
        """Build the engines of one TensorRT."""
        from redif_sdk.export import build_engines

        with self.progress.stage(f"build engines for {flavour}"):
            built = build_engines(
                self.folder,
                flavour=flavour,
                precisions=self.precisions or None,
                batches=_three("--batches", self.batches) or (1, 4, 8),
                sizes=_three("--sizes", self.sizes),
                **options,
            )
        self.rows += built
        print_rows(self.console, ENGINES, [_shown(row) for row in built])
        for row in built:
            self.console.print(row["file"], soft_wrap=True)

    def page(self, target: str, folder: Path | None, engines: list[str], marks: bool) -> None:
        """Make the page for browsers."""
        from redif_sdk.export import build_page

        with self.progress.stage("make the page"):
            made = build_page(
                self.folder,
                folder,
                precision=(self.precisions or ["fp32"])[0],
                engines=tuple(engines) or ("wasm", "webgpu"),
                marks=marks,
            )
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        self.rows.append({"target": target, "folder": str(made), "bytes": size})
        self.console.print(
            f"{made}: {size / 1e6:.1f} MB; try it with python -m http.server -d {made}, publish it on any host of "
            f"static files",
            soft_wrap=True,
        )


def export_command(
    folder: StudentFolderArgument,
    target: Target = None,
    precision: PrecisionList = None,
    batches: Batches = None,
    sizes: Sizes = None,
    component: Component = None,
    sm: Sm = None,
    engine_dir: EngineDir = None,
    max_steps: MaxSteps = None,
    level: Level = "default",
    workspace_mb: Workspace = None,
    hardware_compatibility: Compatibility = "none",
    strip_weights: Strip = False,
    web_dir: WebDir = None,
    web_engine: WebEngine = None,
    marks: Marks = True,
    timing_cache: TimingCache = True,
    max_memory: MaxMemory = None,
    decoder: DecoderFolder = None,
    nag: Nag = False,
    long_prompts: LongPrompts = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compile a student to ONNX, TensorRT or a web page.

    Every ONNX graph is checked against torch. Exporting to ONNX replaces all graphs of the student: name every
    precision that it shall have. Engines and the page are built from these graphs, without torch, outside the
    student's folder; the page needs npm.
    """
    from redif_sdk.export import ENGINE_TARGETS, PAGE_TARGET

    targets, precisions = listed(target) or ["onnx"], listed(precision)
    if PAGE_TARGET in targets and len(precisions) > 1 and set(targets) <= {PAGE_TARGET}:
        raise InvalidRequest(f"a page has one precision; {', '.join(precisions)} were given")
    for option, asked in (("--decoder", decoder is not None), ("--nag", nag), ("--long-prompts", long_prompts)):
        if asked and "onnx" not in targets:
            raise InvalidRequest(f"{option} needs new graphs; add --target onnx")
    for option, given in (("--web-dir", web_dir), ("--web-engine", web_engine), ("--no-marks", not marks)):
        if given and PAGE_TARGET not in targets:
            raise InvalidRequest(f"{option} needs --target web")
    console, sides = console_for(json, quiet), sizes_of(sizes)
    run = _Export(folder, console, Progress(quiet), targets, precisions, numbers("--batches", batches), sides)
    run.max_memory, run.decoder, run.nag = bytes_of("--max-memory", max_memory), decoder, nag
    run.long_prompts = long_prompts
    if graphs := [name for name in targets if name not in (*ENGINE_TARGETS, PAGE_TARGET)]:
        run.graphs(graphs)
    options = {
        "components": listed(component) or None,
        "sm": numbers("--sm", sm),
        "engine_dir": engine_dir,
        "max_steps": max_steps,
        "level": level,
        "workspace_mb": workspace_mb,
        "hardware_compatibility": hardware_compatibility,
        "strip_weights": strip_weights,
        "timing_cache": timing_cache,
    }
    for name in targets:
        if name in ENGINE_TARGETS:
            run.engines(name, options)
    if PAGE_TARGET in targets:
        run.page(PAGE_TARGET, web_dir, listed(web_engine), marks)
    write_rows(json, "export", run.rows)


def _three(option: str, values: list[Any]) -> tuple[Any, Any, Any] | None:
    if not values:
        return None
    if len(values) != 3:
        raise InvalidRequest(f"{option} of engines are three: SMALLEST,BEST,LARGEST; {len(values)} were given")
    return values[0], values[1], values[2]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """An engine's row as it is printed."""
    targets = ", ".join(f"sm {number}" for number in row["targets"]) or row["device"]
    return row | {"targets": targets, "megabytes": row["bytes"] / 1e6}
