"""The parity gate: checks that the graphs compute what torch computed at export. Needs numpy and an engine, no torch.

The hash of every file is checked first, then each graph in each engine against the golden outputs. Nothing is written.
`parity.py` has the comparisons and their thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Component, Graph
from redif_sdk.errors import InvalidRequest, ManifestError, RuntimeUnavailable
from redif_sdk.export import parity
from redif_sdk.export.golden import GoldenRecord, read_golden
from redif_sdk.export.parity import FIELDS, THRESHOLDS, Threshold
from redif_sdk.runtimes import Runtime, RuntimeInfo, RuntimeOptions, load, loops_in_numpy, resolve, runnable
from redif_sdk.runtimes.guided import GuidedInputs

__all__ = ["THRESHOLDS", "Emulated", "Threshold", "absent", "summary", "verify"]

#: The graphs that are loaded and checked together: images of the denoiser need the decoder too.
TOGETHER: tuple[tuple[Component, ...], ...] = (
    ("text_encoder",),
    ("denoiser", "decoder"),
    ("encoder",),
    ("nag",),
    ("generator",),
)

Load = Callable[[Graph], Runtime]


def verify(
    folder: str | Path,
    runtimes: Sequence[str] | None = None,
    *,
    precisions: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Check every hash, then every graph in every engine (default: those that run here) against the golden outputs.

    A failed check is not an error: see ``passed`` in its row. A bf16 graph that no engine of this machine computes is
    checked by emulation (runtime "emulated", see `emulate.py`); so is the fused one where the engine is OpenVINO, which
    runs the denoiser only.

    Args:
        folder: The student's folder.
        runtimes: Engines to check; None: those that run on this machine.
        precisions: Precisions to check; None: all.
        batches: Recorded batch sizes to check; None: all.
        sizes: Recorded sizes to check, (height, width) in pixels; None: all.

    Returns:
        One row for each check: component, precision, runtime, device, num_inference_steps, batch, size, max_abs,
        mean_abs, relative_rmse, psnr (dB), nonfinite (number of values), measure and threshold (the criterion), passed,
        reason. The components are "noise" (drawn again), "tokenizer" (the prompts' ids), "text_encoder" (the encoded
        prompts), "denoiser" (the network's output at each recorded step), "long" (that for long prompts), "decoder"
        (the images of recorded latents), "encoder" (the latents of recorded images), "loop" (the images of the denoiser
        and the loop in numpy) and "generator" (those of the fused graph). An undefined figure, such as the psnr of
        equal images, is None. An engine that is not available for a precision has one row with the reason, and None in
        the other fields.

    Raises:
        IntegrityError: A file is altered, missing or not listed.
        ManifestError: The student has no graphs or golden files.
        InvalidRequest: No recorded output fits `precisions`, `batches` and `sizes`.
        RuntimeUnavailable: No engine is available.
    """
    student = StudentFolder(folder)
    student.check_all()
    manifest = student.manifest
    if not manifest.graphs or not manifest.golden:
        raise ManifestError(f"{folder} has no graphs to verify; run redif export {folder}")
    engines = [resolve(name) for name in runtimes] if runtimes is not None else runnable()
    records = _records(student, batches, sizes)
    graphs = _graphs(manifest, precisions)
    rows = [parity.check_noise(record) for record in records]
    if manifest.text is not None:
        from redif_sdk.tokenizer import PromptTokenizer  # a package that other students need not load

        tokenizer = PromptTokenizer(student)
        rows += [parity.check_tokenizer(tokenizer, record) for record in records]
    for precision in dict.fromkeys(graph.precision for graph in graphs):
        rows += _check_precision(student, engines, [g for g in graphs if g.precision == precision], records)
    return rows


def _records(
    student: StudentFolder, batches: Sequence[int] | None, sizes: Sequence[tuple[int, int]] | None
) -> list[GoldenRecord]:
    records = [read_golden(student, golden) for golden in student.manifest.golden]
    found = [
        record
        for record in records
        if (batches is None or len(record.seeds) in batches) and (sizes is None or record.images.shape[1:3] in sizes)
    ]
    if not found:
        have = sorted({f"{len(r.seeds)} of {r.images.shape[1]}x{r.images.shape[2]}" for r in records})
        raise InvalidRequest(
            f"{student.path} has golden outputs for batches of {', '.join(have)}; ask for some of these"
        )
    return found


def _graphs(manifest: Manifest, precisions: Sequence[str] | None) -> list[Graph]:
    graphs = [graph for graph in manifest.graphs if precisions is None or graph.precision in precisions]
    if not graphs:
        have = ", ".join(sorted({graph.precision for graph in manifest.graphs}))
        raise InvalidRequest(f"{manifest.name} has graphs in {have}; ask for some of these")
    return graphs


def _check_precision(
    student: StudentFolder, engines: Sequence[str], graphs: Sequence[Graph], records: Sequence[GoldenRecord]
) -> list[dict[str, Any]]:
    """The rows of one precision's graphs in every engine."""
    precision = graphs[0].precision
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    left = {graph.component for graph in graphs if precision == "bf16"}  # to be emulated
    for engine in engines:
        taken = [graph for graph in graphs if graph.component != "generator" or not loops_in_numpy(engine, precision)]
        try:
            for group in _groups(taken):
                rows += _check_group(partial(load, engine, student), group, records)
                left -= set(group)
        except RuntimeUnavailable as error:
            absent.append(_absent(engine, precision, str(error)))
    for group in _groups([graph for graph in graphs if graph.component in left]):
        try:
            rows += _check_group(partial(_emulated, student), group, records)
        except RuntimeUnavailable as error:
            if not rows:
                raise
            absent.append(_absent("emulated", precision, str(error)))
    return rows + absent


def _groups(graphs: Sequence[Graph]) -> Iterator[dict[str, Graph]]:
    """The groups of `graphs` that are checked together, each by component."""
    for components in TOGETHER:
        if group := {graph.component: graph for graph in graphs if graph.component in components}:
            yield {component: group[component] for component in components if component in group}


def _check_group(load_graph: Load, group: Mapping[str, Graph], records: Sequence[GoldenRecord]) -> list[dict[str, Any]]:
    """The rows of one group of graphs, which is loaded for it."""
    loaded = {component: load_graph(graph) for component, graph in group.items()}
    rows = []
    for record in records:
        if "text_encoder" in loaded:
            rows.append(parity.check_text_encoder(loaded["text_encoder"], record))
        if "denoiser" in loaded:
            rows.append(parity.check_denoiser(loaded["denoiser"], record))
        if "denoiser" in loaded and record.long_f is not None:
            rows.append(parity.check_long(loaded["denoiser"], record))
        if "encoder" in loaded and record.encoded is not None:
            rows.append(parity.check_encoder(loaded["encoder"], record))
        if "decoder" in loaded:
            rows.append(parity.check_decoder(loaded["decoder"], record))
        if "denoiser" in loaded and ("decoder" in loaded or record.latents is None):
            rows.append(parity.check_loop(loaded["denoiser"], loaded.get("decoder"), record))
        if "nag" in loaded:
            rows.append(parity.check_nag(loaded["nag"], record))
        if "generator" in loaded:
            rows.append(parity.check_generator(loaded["generator"], record))
    return rows


def _emulated(student: StudentFolder, graph: Graph) -> Runtime:
    return Emulated.load(student, graph, RuntimeOptions())


def _absent(engine: str, precision: str, reason: str) -> dict[str, Any]:
    return dict.fromkeys(FIELDS) | {"precision": precision, "runtime": engine, "reason": reason}


class Emulated:
    """An emulated bfloat16 graph (`emulate.py`) in ONNX Runtime on the CPU; a `Runtime`."""

    def __init__(self, session: Any, graph: Graph, info: RuntimeInfo) -> None:
        self._session = session
        self._inputs_of = GuidedInputs(graph.inputs)
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        """As `Runtime.load`."""
        try:
            import onnx
            import onnxruntime

            from redif_sdk.export.emulate import emulate
        except ImportError as error:
            raise RuntimeUnavailable(
                f"no engine here computes bf16; its emulation needs {error.name}: pip install onnx onnxruntime"
            ) from error
        if graph.data:
            raise RuntimeUnavailable(
                f"no engine of this machine computes bf16, and {graph.file} is too large to be emulated"
            )
        model = emulate(onnx.ModelProto.FromString(student.read_graph(graph)[0]))
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        version = onnxruntime.__version__
        info = RuntimeInfo("emulated", version, "onnxruntime", "cpu", "bf16", graph.component, graph.file, None)
        return cls(session, graph, info)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """As `Runtime.run`."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, self._inputs_of(inputs)), strict=True))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The failed rows in one line."""
    return "; ".join(
        f"{row['component']} {row['precision']} on {row['runtime']}, {row['num_inference_steps']} steps, batch "
        f"{row['batch']}: {row['measure']} {_text(row[row['measure']])}, threshold {row['threshold']:g}"
        + (f", {row['nonfinite']} values not finite" if row["nonfinite"] else "")
        for row in rows
        if row["passed"] is False
    )


def absent(rows: Sequence[Mapping[str, Any]]) -> str:
    """The checks that could not be made on this machine, in one line."""
    return "; ".join(f"{row['precision']} on {row['runtime']}: {row['reason']}" for row in rows if row["reason"])


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"
