"""The core of `redif bench`: times whole generations of the same images by several contenders.

A `Contender` has a name and a way to set it up. `compare` sets all of them up, checks that their images agree, times
them in interleaved rounds, and returns one row each. Who the contenders are stands in `bench/engines.py` (engines and
FastPipeline) and in `distill/evaluation/peers.py` (torch); operations are counted in `bench/flops.py`, and what a fresh
process needs is measured in `bench/fresh.py`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redif_sdk import runtimes
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.bench.interleave import Clock, interleave
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.graphs import LoadedGraphs
from redif_sdk.inputs import guiding_inputs, own_nulls, refuse_arrays
from redif_sdk.runtimes import RuntimeOptions
from redif_sdk.runtimes.guided import GuidedInputs
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

__all__ = [
    "FIELDS",
    "REFERENCES",
    "Agreement",
    "Contender",
    "Fresh",
    "Generate",
    "Prepared",
    "Spread",
    "Workload",
    "agreement",
    "compare",
    "disagreeing",
    "ratio",
    "row",
]

#: Noise (N, B, C, H, W) and the condition to images, uint8 (B, H, W, C): one whole generation. The condition is
#: labels (B,) int64, or what prompts became: the arrays by name (the text encoder is not timed), or None.
Generate = Callable[[NDArray[np.float32], Any], NDArray[np.uint8]]

#: What a row says; what was not measured is None. `ratio` is how many times faster than `ratio_to` it is: the median of
#: the rounds' own ratios, with their 10th and 90th percentile. `round_seconds` is each round's median.
FIELDS = (
    "contender",
    "runtime",
    "precision",
    "num_inference_steps",
    "network_calls",
    "batch",
    "seconds_median",
    "seconds_p95",
    "images_per_second",
    "ratio",
    "ratio_low",
    "ratio_high",
    "ratio_to",
    "peak_memory_mb",
    "cold_start_seconds",
    "cold_start_runs",
    "setup_seconds",
    "gflop",
    "gflop_per_second",
    "share_of_peak",
    "max_level_difference",
    "psnr",
    "agrees",
    "overhead_seconds",
    "overhead_alone_seconds",
    "overhead_share",
    "noise_seconds",
    "output_seconds",
    "rounds",
    "timed_calls",
    "round_seconds",
    "skipped",
)

#: Who the others are measured against, and compared with: the first of these that is there.
REFERENCES = ("torch-eager", "diffusers-eager", "onnxruntime", "openvino", "fastpipeline")

#: Images of the same noise agree within this many levels of 255 in fp32, and by at least this PSNR in dB otherwise.
LEVELS = 2
PSNR = {"fp16": 45.0, "bf16": 30.0, "int8": 30.0, "int8wo": 30.0, "int4wo": 20.0}


@dataclass(frozen=True)
class Workload:
    """What every contender computes: the images of `noise` and `condition`, with the steps of `table`.

    `num_threads`: of the processor, the same for all; None leaves every contender its own default.
    """

    student: StudentFolder
    table: StepTable
    noise: NDArray[np.float32]
    condition: NDArray[np.int64] | dict[str, NDArray[Any]] | None
    num_threads: int | None = None
    device: str = "cpu"
    guidance: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: str | Path,
        *,
        batch: int,
        steps: int | None = None,
        num_threads: int | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> Workload:
        """A batch of images of the student in `folder`, cycling through its classes or example prompts.

        Raises InvalidRequest for steps that it has not and for an inpainting student, RuntimeUnavailable where nothing
        here encodes its prompts.
        """
        student = StudentFolder(folder)
        manifest = student.manifest
        refuse_arrays(manifest, "redif bench")
        if manifest.network.inpainting:
            raise InvalidRequest(
                f"{manifest.name} is an inpainting student, and redif bench gives no images to paint; time calls of "
                "FastPipeline, whose timings are in its output"
            )
        table, latents = manifest.step_table(steps), manifest.latents
        shape = (latents.channels, latents.height, latents.width)
        noise = draw([(seed, index) for index in range(batch)], shape, slices=table.noise_slices)
        condition, guidance = _condition(student, batch)
        return cls(student, table, noise, condition, num_threads, device, guidance)

    @property
    def batch(self) -> int:
        """Number of images."""
        return int(self.noise.shape[1])

    @property
    def manifest(self) -> Manifest:
        """The student's ``redif.json``."""
        return self.student.manifest

    @property
    def steps(self) -> int:
        """Rows of the table."""
        return self.table.num_inference_steps

    @property
    def network_calls(self) -> int:
        """Network calls for one image."""
        return self.steps * self.manifest.network.calls_per_step

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The classes of a class-conditional student."""
        return self.condition if isinstance(self.condition, np.ndarray) else None

    @property
    def conditions(self) -> dict[str, NDArray[Any]]:
        """What a `Runtime` takes besides the state, by name: the condition, and the student's own guidance."""
        if isinstance(self.condition, dict):
            return self.condition | self.guidance
        return {} if self.condition is None else {"class_labels": self.condition, **self.guidance}

    @property
    def graph_conditions(self) -> dict[str, NDArray[Any]]:
        """What the graphs themselves take besides the state, by name."""
        return GuidedInputs(self.manifest.graph_conditions)(self.conditions)

    @property
    def asked(self) -> dict[str, Any]:
        """The condition as arguments of a `FastPipeline`, one per image, JSON-safe."""
        if (text := self.manifest.text) is not None:
            return {"prompt": _in_turn(text.examples, self.batch)}
        return {"num_images_per_prompt": self.batch} if self.labels is None else {"class_labels": self.labels.tolist()}

    def inputs(self, noise: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """What a `Runtime` of the fused generator takes."""
        return {"noise": noise, "table": self.table.rows, "init_scale": self.table.scale, **self.conditions}

    def graph_inputs(self, noise: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Inputs of the fused generator's graph itself."""
        return GuidedInputs(self.manifest.graph_conditions)(self.inputs(noise))


def _in_turn(items: Sequence[Any], count: int) -> list[Any]:
    return [items[place % len(items)] for place in range(count)]


def _condition(
    student: StudentFolder, batch: int
) -> tuple[NDArray[np.int64] | dict[str, NDArray[Any]] | None, dict[str, NDArray[Any]]]:
    """The condition and what guides the images.

    Classes in turn; of example prompts in turn what they become, by the student's own fp32 text encoder.
    """
    manifest = student.manifest
    if manifest.text is not None:
        options = RuntimeOptions(device="cpu")
        encoder, _ = runtimes.choose(student, "text_encoder", "auto", "fp32", options)
        graphs = LoadedGraphs(student, encoder, options)
        return graphs.encode(_in_turn(manifest.text.examples, batch)), graphs.guidance(batch)
    if manifest.classes is None:
        return None, {}
    nulls = partial(own_nulls, manifest, lambda prompts: {})
    labels = np.arange(batch, dtype=np.int64) % manifest.classes.num_classes
    return labels, guiding_inputs(manifest, batch, nulls=nulls)


@dataclass(frozen=True)
class Prepared:
    """A contender that is set up, and what it really runs on."""

    generate: Generate
    runtime: str
    precision: str


@dataclass(frozen=True)
class Fresh:
    """A whole Python program, from its imports to the images, and the JSON that it gets in ``sys.argv[1]``."""

    source: str
    asked: Mapping[str, Any]
    runs: int | None = None  # at most, for programs that take minutes


@dataclass(frozen=True)
class Contender:
    """One way to compute the images.

    `prepare` sets it up for a workload, and raises RuntimeUnavailable where it cannot be had. `compared`: it computes
    the student's images; the teacher, whose images differ, is not compared. `steps` and `network_calls` are its own,
    where they are not the workload's. `required`: it was asked for by name, so that without it there is no result.
    """

    name: str
    runtime: str
    precision: str
    prepare: Callable[[Workload], Prepared]
    fresh: Callable[[Workload], Fresh] | None = None
    compared: bool = True
    steps: int | None = None
    network_calls: int | None = None
    required: bool = False

    @property
    def label(self) -> str:
        """Its name with what tells it from the others, each contender's its own."""
        kind = [part for part in (self.runtime, self.precision) if part not in ("auto", self.name)]
        return " ".join([self.name, *kind])


class Spread(NamedTuple):
    """A median with the 10th and the 90th percentile."""

    median: float
    low: float
    high: float


class Agreement(NamedTuple):
    """The difference of images from the reference's: in levels of 255, and PSNR in dB (None: equal)."""

    max_level_difference: int
    psnr: float | None
    agrees: bool


def row(**known: Any) -> dict[str, Any]:
    """A row with every field of `FIELDS`, in their order; those not given are None."""
    unknown = sorted(set(known) - set(FIELDS))
    assert not unknown, f"no fields of a row: {unknown}"
    return {name: known.get(name) for name in FIELDS}


def agreement(images: NDArray[np.uint8], reference: NDArray[np.uint8], precision: str) -> Agreement:
    """Whether `images`, computed in `precision`, agree with `reference`."""
    if images.shape != reference.shape or images.dtype != np.uint8:
        return Agreement(255, 0.0, False)
    difference = images.astype(np.int16) - reference.astype(np.int16)
    worst = int(np.abs(difference).max(initial=0))
    error = float(np.mean(difference.astype(np.float64) ** 2))
    psnr = 10 * math.log10(255**2 / error) if error else None
    agrees = worst <= LEVELS if precision == "fp32" else psnr is None or psnr >= PSNR[precision]
    return Agreement(worst, psnr, agrees)


def ratio(own: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Spread:
    """How many times faster `own` is than `reference`, from the rounds of both: each round gives one ratio."""
    found = [statistics.median(them) / statistics.median(us) for us, them in zip(own, reference, strict=True)]
    return Spread(statistics.median(found), *(float(np.percentile(found, share)) for share in (10, 90)))


@dataclass
class _Entry:
    """A contender with what is known of it so far."""

    contender: Contender
    known: dict[str, Any]
    prepared: Prepared | None = None
    images: NDArray[np.uint8] | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        return f"{self.known['contender']} {self.known['runtime']} {self.known['precision']}"

    @property
    def runs(self) -> bool:
        return self.prepared is not None and self.known.get("agrees") is not False


def compare(
    contenders: Iterable[Contender],
    work: Workload,
    *,
    rounds: int,
    clock: Clock = time.perf_counter,
    pause: Callable[[float], object] = time.sleep,
    say: Callable[[str], object] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure contenders on `work`: one row each, with speed, ratio to the reference, and agreement of the images.

    The reference is the first of `REFERENCES` in fp32 that is there, else the first contender. One whose images do
    not agree with the reference's is not timed: it computes something else. One that cannot be had here has a row that
    says why; RuntimeUnavailable if it was `required`.
    """
    entries = [_set_up(contender, work, clock, say) for contender in contenders]
    present = [entry for entry in entries if entry.prepared is not None]
    if not present:
        return [row(**entry.known) for entry in entries]
    reference = _reference(present)
    for entry in present:
        if entry.contender.compared:
            assert entry.images is not None
            assert reference.images is not None
            found = agreement(entry.images, reference.images, entry.known["precision"])
            entry.known |= found._asdict()
        entry.images = None if entry is not reference else entry.images
    calls = {entry.key: _call(entry, work) for entry in present if entry.runs}
    times = interleave(
        calls, rounds, clock=clock, pause=pause, progress=lambda done, of: say(f"batch {work.batch}: round {done}/{of}")
    )
    for entry in present:
        if entry.runs:
            entry.known |= _figures(times[entry.key], work.batch)
            spread = ratio(times[entry.key], times[reference.key])
            entry.known |= {"ratio": spread.median, "ratio_low": spread.low, "ratio_high": spread.high}
            entry.known |= {"ratio_to": reference.contender.name, "rounds": rounds}
    return [row(**entry.known) for entry in entries]


def _set_up(contender: Contender, work: Workload, clock: Clock, say: Callable[[str], object]) -> _Entry:
    """Prepare a contender and let it compute its first images; setup_seconds is the time for both."""
    say(f"batch {work.batch}: setting up {contender.label}")
    known: dict[str, Any] = {
        "contender": contender.name,
        "runtime": contender.runtime,
        "precision": contender.precision,
        "num_inference_steps": contender.steps or work.steps,
        "network_calls": contender.network_calls or work.network_calls,
        "batch": work.batch,
    }
    start = clock()
    try:
        prepared = contender.prepare(work)
        images = prepared.generate(work.noise, work.condition)
    except RuntimeUnavailable as error:
        if contender.required:
            raise
        return _Entry(contender, known | {"skipped": str(error)})
    known |= {"runtime": prepared.runtime, "precision": prepared.precision, "setup_seconds": clock() - start}
    return _Entry(contender, known, prepared, images)


def _reference(entries: Sequence[_Entry]) -> _Entry:
    compared = [entry for entry in entries if entry.contender.compared] or list(entries)
    for name in REFERENCES:
        for entry in compared:
            if entry.contender.name == name and entry.known["precision"] == "fp32":
                return entry
    return compared[0]


def _call(entry: _Entry, work: Workload) -> Callable[[], object]:
    assert entry.prepared is not None
    generate = entry.prepared.generate
    return lambda: generate(work.noise, work.condition)


def _figures(rounds: Sequence[Sequence[float]], batch: int) -> dict[str, Any]:
    """Statistics of one contender's timings."""
    every = [seconds for turn in rounds for seconds in turn]
    median = statistics.median(every)
    return {
        "seconds_median": median,
        "seconds_p95": float(np.percentile(every, 95)),
        "images_per_second": batch / median,
        "timed_calls": len(every),
        "round_seconds": [statistics.median(turn) for turn in rounds],
    }


def disagreeing(rows: Iterable[Mapping[str, Any]]) -> str:
    """The contenders whose images disagree with the reference, in one line; empty if there are none."""
    return "; ".join(
        f"{entry['contender']} on {entry['runtime']} in {entry['precision']}, batch {entry['batch']}: up to "
        f"{entry['max_level_difference']} levels off"
        + ("" if entry["psnr"] is None else f", PSNR {entry['psnr']:.1f} dB")
        for entry in rows
        if entry["agrees"] is False
    )
