"""The command ``redif bench``: a student on every engine that is here, against torch and diffusers.

It collects the contenders, has them measured by `redif_sdk.bench`, and prints the result. Torch is imported only where
it is installed and was not excluded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from redif_sdk.cli.terminal import Json, Quiet, StudentFolderArgument, console_for, listed, numbers, print_rows
from redif_sdk.errors import InvalidRequest, ParityError, RuntimeUnavailable
from redif_sdk.progress import Progress

__all__ = ["BenchSettings", "bench_command", "measure"]

Strings = list[str] | None

TORCH_NAMES = ("torch-eager", "torch-compile", "diffusers-eager", "diffusers-pipeline")

COLUMNS = {
    "contender": "contender",
    "runtime": "runtime",
    "precision": "prec",
    "num_inference_steps": "steps",
    "batch": "batch",
    "milliseconds": "ms",
    "milliseconds_p95": "p95",
    "images_per_second": "img/s",
    "ratio": "ratio",
    "spread": "10-90 %",
    "share_of_peak": "of peak",
    "peak_memory_mb": "MB",
    "cold_start_seconds": "cold s",
}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. Empty `contenders`, `runtimes`, `precisions`: all that are there and can run here."""

    folder: Path
    against: str | None = None
    contenders: Sequence[str] = ()
    runtimes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    batches: Sequence[int] = (1, 8)
    steps: int | None = None
    rounds: int = 11
    num_threads: int | None = None
    device: str = "cpu"
    timings: bool = True
    cold_start: bool = True


def bench_command(
    folder: StudentFolderArgument,
    against: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="Also measure this teacher at its own steps: a name or a folder."),
    ] = None,
    contender: Annotated[Strings, typer.Option(metavar="NAME,...", help="Contenders to measure; default: all.")] = None,
    runtime: Annotated[
        Strings, typer.Option(metavar="NAME,...", help="Engines; default: those installed here.")
    ] = None,
    precision: Annotated[Strings, typer.Option(metavar="NAME,...", help="Precisions; default: fp32,bf16.")] = None,
    batch: Annotated[
        Strings, typer.Option("--batch", "--batches", metavar="N,...", help="Images for each call; default: 1,8.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the student; default: the first that it supports.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each, every contender is timed once.")] = 11,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each contender; default: its own.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, ...")] = "cpu",
    cold_start: Annotated[
        bool, typer.Option(help="Also measure memory and the first image, in fresh processes.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a bar chart as SVG.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Record the figures in the student's manifest and card.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time a student on every engine, side by side.

    Contenders are FastPipeline, bare engines, torch.compile and diffusers; compare them by the ratios. All
    contenders must compute the same images; one that does not is not timed, and the command exits with 1.
    """
    from redif_sdk.bench.rounds import disagreeing
    from redif_sdk.card.record import check_recordable, record, speed_rows
    from redif_sdk.results import write_json

    request = BenchSettings(
        folder,
        against,
        listed(contender),
        listed(runtime),
        listed(precision),
        _batches(batch),
        steps,
        rounds,
        threads,
        device,
        cold_start=cold_start,
    )
    if save:
        check_recordable(folder)
    console = console_for(json, quiet)
    progress = Progress(quiet)
    progress.say(f"{folder}: {rounds} rounds of every contender, batches of {', '.join(map(str, request.batches))}")
    with progress.stage("bench") as show:
        result = measure(request, lambda message: show(None, message))
    if json is not None:
        write_json(json, result)
    if plot is not None:
        _plot(plot, result)
    _print(console, result)
    if wrong := disagreeing(result["rows"]):
        raise ParityError(f"these contenders compute other images: {wrong}")
    if save:
        record(folder, speed_rows(result["rows"]))


def _batches(values: Sequence[str] | None) -> list[int]:
    found = numbers("--batch", values) or [1, 8]
    if min(found) < 1:
        raise InvalidRequest(f"--batch is {min(found)}; give at least 1")
    return found


def measure(request: BenchSettings, say: Callable[[str], object] = lambda message: None) -> dict[str, Any]:
    """The whole result of the command as `redif_sdk.results.document` makes it, its rows in the contenders' order.

    Raises InvalidRequest for names that are unknown, RuntimeUnavailable for what was asked for and cannot be had.
    """
    from redif_sdk.bench.rounds import Workload
    from redif_sdk.results import document

    contenders = _contenders(request)
    fixed: dict[str, Any] = {"steps": request.steps, "num_threads": request.num_threads, "device": request.device}
    works = [Workload.of(request.folder, batch=batch, **fixed) for batch in request.batches]
    before, rows, gflop_per_call = _peaks(request, say), [], None
    for work in works:
        measured = _timed(request, contenders, work, say) if request.timings else _untimed(contenders, work)
        if request.cold_start:
            _fresh(request, contenders, work, measured, say)
        rows += measured
    # Once more, and the better one: the machine may have been busy with something else.
    peaks = {name: max(best, before[name]) for name, best in _peaks(request, say).items()}
    for work in works:
        gflop = _count(work)
        gflop_per_call = None if gflop is None else gflop / work.batch
        for entry in rows:
            if entry["batch"] == work.batch:
                _operations(entry, gflop, peaks)
    return document(
        "bench",
        rows,
        device=request.device,
        student=works[0].manifest.name,
        num_threads=request.num_threads,
        gemm_peak_gflop_per_second=peaks,
        gflop_per_image_call=gflop_per_call,
    )


# ---------------------------------------------------------------- who takes part


def _contenders(request: BenchSettings) -> list[Any]:
    """The contenders that were asked for; what was named is required."""
    from redif_sdk.bench import engines as bench_engines
    from redif_sdk.runtimes import PRECISIONS, resolve

    known = (*bench_engines.NAMES, *TORCH_NAMES)
    for name in request.contenders:
        if name not in known:
            raise InvalidRequest(f"contender {name!r} is unknown; use {', '.join(known)} (--against adds the teacher)")
    for name in request.precisions:
        if name not in PRECISIONS:
            raise InvalidRequest(f"precision {name!r} is unknown; use {', '.join(PRECISIONS)}")
    engines = [resolve(name) for name in request.runtimes] or _engines(request.device)
    precisions = request.precisions or ("fp32", "bf16")
    found = bench_engines.contenders(engines, precisions)
    if not request.contenders or set(request.contenders) & set(TORCH_NAMES):
        found += _torch(request, precisions)
    if request.contenders:
        found = [entry for entry in found if entry.name in request.contenders]
    found = [replace(entry, required=_required(request, entry)) for entry in found]
    if request.against is not None:
        from redif_sdk.distill.evaluation.peers import teacher_contender

        found.append(teacher_contender(request.against))
    if not found:
        raise InvalidRequest(f"no contender of {', '.join(request.contenders)} is on {', '.join(engines)}")
    return found


def _engines(device: str) -> list[str]:
    """The engines that are installed and know such a device."""
    from redif_sdk.bench.engines import ENGINES
    from redif_sdk.runtimes import RUNTIMES, installed, parse_device

    kind, _ = parse_device(device)
    here = installed()
    return [name for name in ENGINES if name in here and kind in RUNTIMES[name].devices]


def _required(request: BenchSettings, contender: Any) -> bool:
    """Whether it was asked for by name; bf16, which is tried by default, only if bf16 was asked for too."""
    named = contender.name in request.contenders or contender.runtime in request.runtimes
    return named and contender.precision in ("auto", "fp32", *request.precisions)


def _torch(request: BenchSettings, precisions: Sequence[str]) -> list[Any]:
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if not missing:
        from redif_sdk.distill.evaluation import peers

        return peers.contenders(precisions)
    if request.contenders:
        raise RuntimeUnavailable(f'{missing[0]} is not installed; pip install "redif-sdk[distill]"')
    return []


# ---------------------------------------------------------------- what is measured


def _timed(
    request: BenchSettings, contenders: Sequence[Any], work: Any, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Rows with the timings, and what FastPipeline adds to its engines."""
    from redif_sdk.bench.engines import overhead
    from redif_sdk.bench.rounds import compare

    rows = compare(contenders, work, rounds=request.rounds, say=say)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for entry in rows:
        if entry["contender"].startswith("fastpipeline") and entry["seconds_median"] is not None:
            engine = (entry["runtime"], entry["precision"])  # "auto" is one of those that are also named
            if engine not in found:
                say(f"batch {work.batch}: what FastPipeline adds to {entry['runtime']} in {entry['precision']}")
                found[engine] = overhead(work, *engine)
            entry |= found[engine]
    return rows


def _untimed(contenders: Sequence[Any], work: Any) -> list[dict[str, Any]]:
    from redif_sdk.bench.rounds import row

    return [
        row(
            contender=entry.name,
            runtime=entry.runtime,
            precision=entry.precision,
            num_inference_steps=entry.steps or work.steps,
            network_calls=entry.network_calls or work.network_calls,
            batch=work.batch,
        )
        for entry in contenders
    ]


def _fresh(
    request: BenchSettings,
    contenders: Sequence[Any],
    work: Any,
    rows: Sequence[dict[str, Any]],
    say: Callable[[str], object],
) -> None:
    """Put memory and cold start into the rows; the first image is measured at the smallest batch alone."""
    from redif_sdk.bench.fresh import COLD_RUNS, cold_starts

    wanted = [
        contender
        for contender, entry in zip(contenders, rows, strict=True)
        if entry["skipped"] is None and entry["agrees"] is not False and contender.fresh is not None
    ]
    runs = COLD_RUNS if work.batch == min(request.batches) else 0
    found = cold_starts(wanted, work, runs=runs, say=say)
    for contender, entry in zip(contenders, rows, strict=True):
        if contender in wanted:
            figures = found[contender.label]
            if "skipped" in figures and (contender.required or entry["seconds_median"] is not None):
                raise RuntimeUnavailable(figures["skipped"])
            entry |= figures


def _peaks(request: BenchSettings, say: Callable[[str], object]) -> dict[str, float]:
    """GFLOP a second that this processor multiplies at best, by precision."""
    if request.device != "cpu" or not request.timings:
        return {}
    from redif_sdk.bench.flops import gemm_peak

    say("the machine's peak")
    peaks = {"fp32": gemm_peak(request.num_threads) / 1e9}
    if importlib.util.find_spec("torch") is not None:
        from redif_sdk.distill.evaluation.peers import gemm_peak as torch_peak

        best = torch_peak("bf16", request.num_threads)
        if best is not None:
            peaks["bf16"] = best / 1e9
    return peaks


def _count(work: Any) -> float | None:
    """GFLOP of one call of the student's network on the whole batch; None where `onnx` is missing or no rule fits."""
    from redif_sdk.bench.flops import count_flops
    from redif_sdk.errors import UnsupportedModel

    graph = work.manifest.graph("denoiser", "fp32")
    if graph is None or graph.data or importlib.util.find_spec("onnx") is None:
        return None
    try:
        return count_flops(work.student.read_graph(graph)[0], {"batch": work.batch}) / 1e9
    except UnsupportedModel:
        return None


def _operations(entry: dict[str, Any], gflop: float | None, peaks: Mapping[str, float]) -> None:
    """Put the operations into a row of the student's network: of one whole generation, a second, and of the peak."""
    if gflop is None or entry["contender"] == "teacher":
        return
    entry["gflop"] = gflop * entry["num_inference_steps"]
    if entry["seconds_median"] is not None:
        entry["gflop_per_second"] = entry["gflop"] / entry["seconds_median"]
        if entry["precision"] in peaks:
            entry["share_of_peak"] = entry["gflop_per_second"] / peaks[entry["precision"]]


# ---------------------------------------------------------------- what is shown


def _print(console: Any, result: Mapping[str, Any]) -> None:
    print_rows(console, COLUMNS, [_shown(entry) for entry in result["rows"] if entry["skipped"] is None])
    reference = next((entry["ratio_to"] for entry in result["rows"] if entry["ratio_to"]), None)
    if reference is not None:
        console.print(f"ratio: times faster than {reference}, median of the rounds and their 10-90 % spread")
    for precision, peak in result["gemm_peak_gflop_per_second"].items():
        console.print(f"peak: {peak:.0f} GFLOP/s in {precision}, of square matrix products")
    for entry in result["rows"]:
        name = f"{entry['contender']} on {entry['runtime']} in {entry['precision']}, batch {entry['batch']}"
        if entry["overhead_seconds"] is not None:
            console.print(
                f"{name}: {1e6 * entry['overhead_seconds']:.0f} us ({100 * entry['overhead_share']:.2f} %) over its "
                f"engine; beside that noise {1e6 * entry['noise_seconds']:.0f} us, PIL "
                f"{1e6 * entry['output_seconds']:.0f} us",
                soft_wrap=True,
            )
        if entry["skipped"] is not None:
            console.print(f"{name}: not measured: {entry['skipped']}", soft_wrap=True)


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its figures as a reader wants them."""
    if entry["seconds_median"] is None:
        return dict(entry)
    times = {"milliseconds": 1e3 * entry["seconds_median"], "milliseconds_p95": 1e3 * entry["seconds_p95"]}
    share = entry["share_of_peak"]
    return {
        **entry,
        **times,
        "spread": f"{entry['ratio_low']:.2f}-{entry['ratio_high']:.2f}",
        "share_of_peak": None if share is None else f"{100 * share:.0f} %",
    }


def _plot(file: Path, result: Mapping[str, Any]) -> None:
    from redif_sdk.artifact.atomic import atomic_write
    from redif_sdk.bench.plot import bars

    machine = result["machine"]
    threads = "" if result["num_threads"] is None else f", {result['num_threads']} threads"
    subtitle = f"{machine['processor']}, {machine['cores']} cores{threads}, {result['date'][:10]}; interleaved rounds"
    file.parent.mkdir(parents=True, exist_ok=True)
    steps = min(entry["num_inference_steps"] for entry in result["rows"])
    atomic_write(file, bars(result["rows"], f"{result['student']}, {steps} steps", subtitle).encode())
