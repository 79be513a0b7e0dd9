"""`redif bench`: statistics and order by a clock that only counts, agreement, operations, the plot, and the command."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from redif_sdk.bench import flops
from redif_sdk.bench import rounds as bench
from redif_sdk.bench.flops import count_flops, gemm_peak
from redif_sdk.bench.fresh import cold_starts
from redif_sdk.bench.interleave import interleave
from redif_sdk.bench.plot import bars
from redif_sdk.bench.rounds import (
    Contender,
    Fresh,
    Prepared,
    Workload,
    agreement,
    compare,
    disagreeing,
    ratio,
    row,
)
from redif_sdk.cli.bench import COLUMNS, BenchSettings, bench_command, measure
from redif_sdk.errors import InvalidRequest, ParityError, RuntimeUnavailable, UnsupportedModel


class Clock:
    """Time that passes only when a contender works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes `seconds`, one after another, and the last one from then on."""
        durations = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return call


# ---------------------------------------------------------------- rounds and statistics


def test_every_contender_has_one_turn_a_round_in_changing_order() -> None:
    clock = Clock()
    calls = {name: clock.work(name, 1.0) for name in "abc"}
    times = interleave(calls, 4, clock=clock, pause=clock.pause)
    assert times == {name: [[1.0]] * 4 for name in "abc"}
    assert "".join(clock.log) == "aabbcc" + "abc" + "acb" + "cab" + "cba"
    rounds = ["".join(clock.log[start : start + 3]) for start in range(6, 18, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len({turn[0] for turn in rounds}) > 1


def test_short_calls_are_repeated_and_preceded_by_one_that_does_not_count() -> None:
    clock = Clock()
    times = interleave(
        {"short": clock.work("short", 9.0, 1 / 64), "long": clock.work("long", 9.0, 1.0)},
        2,
        min_seconds=5 / 64,
        clock=clock,
        pause=clock.pause,
    )
    assert [len(turn) for turn in times["short"]] == [5, 5]  # the slow first call is the warm-up's
    assert [len(turn) for turn in times["long"]] == [1, 1]
    assert clock.log.count("short") == 2 + 2 * (1 + 5)
    assert clock.log.count("long") == 2 + 2
    assert max(times["short"][0]) == 1 / 64
    clock.log.clear()
    interleave({"short": clock.work("short", 1 / 64)}, 3, min_seconds=0.0, settle=False, clock=clock)
    assert len(clock.log) == 2 + 3


def test_ratio_is_of_each_round_so_that_a_slow_machine_does_not_show() -> None:
    reference = [[2.0], [20.0], [2.0]]  # the second round was ten times slower for all
    own = [[1.0], [10.0], [0.5]]
    assert ratio(own, reference).median == 2.0
    assert ratio(own, reference).low == 2.0
    assert ratio(own, reference).high == pytest.approx(3.6)
    assert ratio(reference, reference) == (1.0, 1.0, 1.0)


def test_a_row_has_every_field_and_no_other() -> None:
    design = "contender runtime precision num_inference_steps batch seconds_median seconds_p95 images_per_second"
    design += " ratio ratio_to peak_memory_mb cold_start_seconds"
    assert set(design.split()) <= set(bench.FIELDS)
    assert tuple(row(contender="a")) == bench.FIELDS
    with pytest.raises(AssertionError, match="speed"):
        row(speed=1)


# ---------------------------------------------------------------- contenders that agree, and others


def test_agreement() -> None:
    reference = np.full((2, 4, 4, 1), 100, np.uint8)
    assert agreement(reference, reference, "fp32") == (0, None, True)
    near = reference.copy()
    near[0, 0, 0] += 2
    assert agreement(near, reference, "fp32").agrees
    near[0, 0, 0] += 1
    assert agreement(near, reference, "fp32")[::2] == (3, False)
    assert agreement(near, reference, "bf16").agrees  # 45 dB
    assert not agreement(255 - reference, reference, "bf16").agrees
    assert not agreement(reference[:1], reference, "fp32").agrees  # another number of pictures


def fake(clock: Clock, name: str, seconds: float, level: int = 100, precision: str = "fp32", **more: Any) -> Contender:
    """Pictures of one grey in `seconds`."""
    work = clock.work(name, seconds)

    def prepare(workload: Workload) -> Prepared:
        clock.now += 5.0

        def generate(noise: Any, labels: Any) -> Any:
            work()
            return np.full((noise.shape[1], 4, 4, 1), level, np.uint8)

        return Prepared(generate, "fake", precision)

    return Contender(name, "fake", precision, prepare, **more)


def absent(workload: Workload) -> Prepared:
    raise RuntimeUnavailable("it is not here")


@pytest.fixture
def work(tiny_student: Path) -> Workload:
    return Workload.of(tiny_student, batch=2)


def test_compare(work: Workload) -> None:
    clock = Clock()
    contenders = [
        fake(clock, "fastpipeline", 0.5, level=101),
        fake(clock, "wrong", 0.001, level=90),
        fake(clock, "torch-eager", 2.0),
        fake(clock, "low", 1.0, level=98, precision="bf16"),
        fake(clock, "teacher", 40.0, level=7, compared=False, steps=50, network_calls=100),
        Contender("gone", "fake", "fp32", absent),
    ]
    rows = compare(contenders, work, rounds=3, clock=clock, pause=clock.pause)
    found = {entry["contender"]: entry for entry in rows}
    assert list(found) == [contender.name for contender in contenders]
    fast = found["fastpipeline"]
    assert (fast["seconds_median"], fast["images_per_second"], fast["batch"]) == (0.5, 4.0, 2)
    assert fast["seconds_p95"] == pytest.approx(0.5)
    assert (fast["ratio"], fast["ratio_low"], fast["ratio_high"], fast["ratio_to"]) == (4.0, 4.0, 4.0, "torch-eager")
    assert (fast["num_inference_steps"], fast["network_calls"]) == (2, 2)
    assert fast["setup_seconds"] == pytest.approx(5.5)  # with the first pictures
    assert fast["round_seconds"] == [0.5] * 3
    assert (fast["max_level_difference"], fast["agrees"]) == (1, True)
    assert found["low"]["ratio"] == 2.0
    assert (found["teacher"]["ratio"], found["teacher"]["agrees"]) == (pytest.approx(0.05), None)
    assert (found["teacher"]["num_inference_steps"], found["teacher"]["network_calls"]) == (50, 100)
    # The wrong one is not timed: it was called once, for its pictures.
    assert (found["wrong"]["agrees"], found["wrong"]["seconds_median"]) == (False, None)
    assert clock.log.count("wrong") == 1
    assert "wrong on fake in fp32, batch 2: up to 10 levels off" in disagreeing(rows)
    assert disagreeing([fast]) == ""
    assert found["gone"]["skipped"] == "it is not here"


def test_what_was_asked_for_and_cannot_be_had_is_an_error(work: Workload) -> None:
    with pytest.raises(RuntimeUnavailable, match="not here"):
        compare([Contender("gone", "fake", "fp32", absent, required=True)], work, rounds=1)
    rows = compare([Contender("gone", "fake", "fp32", absent)], work, rounds=1)
    assert rows[0]["skipped"] == "it is not here"


# ---------------------------------------------------------------- operations


def small_graph(trips: bool) -> Any:
    """Conv, MatMul and Gemm on a free batch; in the body of a loop if `trips`, after a MatMul outside it."""
    from onnx import TensorProto, helper, numpy_helper

    def tensor(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def weights(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(np.zeros(shape, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1], group=2),  # 4 -> 6 channels, 3 x 3
        helper.make_node("MatMul", ["c", "square"], ["m"]),  # (B, 6, 5, 5) with (5, 7)
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("Gemm", ["f", "dense"], ["g"], transB=1),  # (B, 210) with (10, 210)
    ]
    values = [weights("kernel", 6, 2, 3, 3), weights("square", 5, 7), weights("dense", 10, 210)]
    given = tensor("x", ["batch", 4, 5, 5])
    if not trips:
        graph = helper.make_graph(nodes, "plain", [given], [tensor("g", ["batch", 10])], values)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    again = [helper.make_node("Identity", [old], [new]) for old, new in (("go", "go_on"), ("x", "x_next"))]
    body = helper.make_graph(
        [*nodes, *again],
        "body",
        [tensor("k", [], TensorProto.INT64), tensor("go", [], TensorProto.BOOL), given],
        [tensor("go_on", [], TensorProto.BOOL), tensor("x_next", ["batch", 4, 5, 5])],
        values,
    )
    outer = [
        helper.make_node("MatMul", ["start", "side"], ["first"]),
        helper.make_node("Loop", ["count", "", "first"], ["last"], body=body),
    ]
    inputs = [tensor("start", ["batch", 4, 5, 5]), tensor("count", [], TensorProto.INT64)]
    graph = helper.make_graph(outer, "looped", inputs, [tensor("last", ["batch", 4, 5, 5])], [weights("side", 5, 5)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


CONV, MATMUL, GEMM = 2 * 6 * 25 * (2 * 9), 2 * 6 * 5 * 7 * 5, 2 * 10 * 210


def test_operations_of_a_small_graph_counted_by_hand() -> None:
    plain = small_graph(trips=False).SerializeToString()
    assert count_flops(plain, {"batch": 1}) == CONV + MATMUL + GEMM
    assert count_flops(plain, {"batch": 8}) == 8 * (CONV + MATMUL + GEMM)
    looped = small_graph(trips=True).SerializeToString()
    side = 2 * 4 * 25 * 5
    assert count_flops(looped, {"batch": 3}, trips=4) == 3 * (side + 4 * (CONV + MATMUL + GEMM))


def test_operations_are_not_guessed() -> None:
    plain = small_graph(trips=False)
    with pytest.raises(UnsupportedModel, match=r"shape of c .*unknown"):
        count_flops(plain.SerializeToString(), {})
    plain.graph.node[1].op_type = "Einsum"
    with pytest.raises(UnsupportedModel, match=r"Einsum .*not counted"):
        count_flops(plain.SerializeToString(), {"batch": 1})


def test_operations_of_a_student(tiny_student: Path) -> None:
    """The fused graph runs the network once a step, and nothing else that multiplies."""
    graphs = {name: (tiny_student / f"onnx/{name}.fp32.onnx").read_bytes() for name in ("denoiser", "generator")}
    once = count_flops(graphs["denoiser"], {"batch": 1})
    assert once > 1e6
    assert count_flops(graphs["generator"], {"batch": 2}, trips=3) == 2 * 3 * once


def test_the_peak_is_a_number_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        compile(command[-1], "gemm", "exec")
        assert env["OMP_NUM_THREADS"] == "3"
        return subprocess.CompletedProcess(command, 0, "1.5e9\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert gemm_peak(3) == 1.5e9


# ---------------------------------------------------------------- fresh processes


def test_cold_starts(work: Workload) -> None:
    """A program's own peak, not that of the process that starts it; and what fails says why."""
    held = np.ones(400 * 2**20, np.uint8)  # of this process: a child must not count it
    source = "import json, sys\nimport numpy as np\nnp.load(json.loads(sys.argv[1])['inputs'])['noise']\n"
    programs = {
        "small": Fresh(source, {}),
        "large": Fresh(source + "kept = np.ones(80 * 2**20, np.uint8)\n", {}, runs=1),
        "broken": Fresh("raise SystemExit('no such engine')", {}),
    }
    contenders = [
        Contender(name, "fake", "fp32", absent, fresh=lambda _, program=program: program)  # type: ignore[misc]
        for name, program in programs.items()
    ]

    def refuse(workload: Workload) -> Fresh:
        raise RuntimeUnavailable("not in bf16")

    contenders.append(Contender("refused", "fake", "bf16", absent, fresh=refuse))
    found = cold_starts(contenders, work, runs=2)
    small, large = found["small fake fp32"], found["large fake fp32"]
    assert small["peak_memory_mb"] < 200 <= 400 == held.size // 2**20
    assert large["peak_memory_mb"] - small["peak_memory_mb"] == pytest.approx(80, abs=15)
    assert (small["cold_start_runs"], large["cold_start_runs"]) == (2, 1)
    assert small["cold_start_seconds"] > 0
    assert found["broken fake fp32"] == {"skipped": "broken fake fp32 failed in a fresh process: no such engine"}
    assert found["refused fake bf16"] == {"skipped": "not in bf16"}
    assert set(cold_starts(contenders[:1], work, runs=0)["small fake fp32"]) == {"peak_memory_mb"}


# ---------------------------------------------------------------- the plot


def test_the_plot_is_well_formed_and_states_the_batch() -> None:
    def timed(name: str, seconds: float, batch: int, **more: Any) -> dict[str, Any]:
        figures = {"seconds_median": seconds, "seconds_p95": 1.2 * seconds, "batch": batch}
        spread = {"ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5, "ratio_to": "torch-eager"}
        fixed = {"runtime": "onnxruntime", "precision": "fp32", "num_inference_steps": 2}
        return row(contender=name, **fixed, **figures, **(spread | more))

    rows = [
        timed(name, seconds, batch) for batch in (1, 8) for name, seconds in (("fastpipeline", 0.01), ("<&>", 0.02))
    ]
    rows += [timed("teacher", 9.0, 1, ratio=None, ratio_low=None), row(contender="gone", batch=1, skipped="absent")]
    text = bars(rows, "a & b $x_1$", "<subtitle>")
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b $x_1$", "<subtitle>", "<&>, fp32", "teacher in diffusers, 2 steps"} <= set(words)
    assert any(word is not None and word.startswith("Batch 8: milliseconds per image") for word in words)
    assert "10 ms · 2x (1.5-2.5)" in words
    assert "//" in words  # the teacher's bar is cut
    assert "gone" not in text
    assert text == bars(rows, "a & b $x_1$", "<subtitle>")
    assert "http" not in text.replace("http://www.w3.org/", "")  # nothing from elsewhere
    ElementTree.fromstring(bars([], "nothing"))


def test_without_matplotlib_a_plot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match=r'pip install "redif-sdk\[plot\]"'):
        bars([], "nothing")


# ---------------------------------------------------------------- the command


@pytest.fixture
def redif_bench() -> Callable[..., Any]:
    """Runs the command in this process; what it raises is in `exception`."""
    app = typer.Typer()
    app.command()(bench_command)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


ENGINE = ("--contender", "fastpipeline-auto", "--contender", "fastpipeline", "--contender", "onnxruntime")


def test_the_command(
    redif_bench: Callable[..., Any], tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = flops._GEMM_PROGRAM.replace("1536, 1792, 2048", "256,")  # the peak of large products takes ten seconds
    assert small != flops._GEMM_PROGRAM
    monkeypatch.setattr(flops, "_GEMM_PROGRAM", small)
    files = {"--json": tmp_path / "bench.json", "--plot": tmp_path / "bench.svg"}
    options = ("--runtime", "onnxruntime", "--precision", "fp32", "--batch", 1, "--rounds", 2, "--no-cold-start")
    named = [part for pair in files.items() for part in pair]
    result = redif_bench(tiny_student, *ENGINE, *options, *named)
    assert result.exception is None, result.output
    document = json.loads(files["--json"].read_text())
    assert document["command"] == "bench"
    assert document["gemm_peak_gflop_per_second"]["fp32"] > 0
    rows = document["rows"]
    assert [entry["contender"] for entry in rows] == ["fastpipeline-auto", "fastpipeline", "onnxruntime"]
    for entry in rows:
        assert tuple(entry) == bench.FIELDS
        assert (entry["batch"], entry["rounds"], entry["num_inference_steps"]) == (1, 2, 2)
        assert entry["agrees"] is True
        assert entry["seconds_p95"] >= entry["seconds_median"] > 0
        assert entry["ratio_to"] == "onnxruntime"
        assert entry["gflop"] > 0
        assert entry["share_of_peak"] > 0
        assert entry["cold_start_seconds"] is None
    assert rows[0]["runtime"] in ("onnxruntime", "openvino")  # what "auto" took
    assert all(
        rows[1][name] is not None
        for name in ("overhead_seconds", "overhead_alone_seconds", "noise_seconds", "output_seconds")
    )
    ElementTree.parse(files["--plot"])
    assert all(head in result.output for head in COLUMNS.values())
    assert "over its engine" in result.output


@pytest.mark.slow
def test_torch_and_diffusers_compute_the_same_pictures(tiny_student: Path) -> None:
    names = ("fastpipeline", "torch-eager", "diffusers-eager")
    request = BenchSettings(
        tiny_student, None, names, ("onnxruntime",), ("fp32",), (2,), rounds=1, num_threads=1, cold_start=False
    )
    rows = {entry["contender"]: entry for entry in measure(request)["rows"]}
    assert set(rows) == set(names)
    assert all(entry["agrees"] and entry["ratio_to"] == "torch-eager" for entry in rows.values())


def test_the_pipeline_of_diffusers_and_a_teacher(teacher_folder: Path, tiny_student: Path) -> None:
    """A class-conditional student has no pipeline in diffusers; the teacher makes pictures of its own."""
    from redif_sdk.distill.evaluation import peers

    work = Workload.of(tiny_student, batch=2)
    pipeline = next(entry for entry in peers.contenders(["fp32"]) if entry.name == "diffusers-pipeline")
    with pytest.raises(RuntimeUnavailable, match="class-conditional"):
        pipeline.prepare(work)
    teacher = peers.teacher_contender(str(teacher_folder))
    assert (teacher.steps, teacher.network_calls, teacher.compared) == (6, 6, False)
    images = teacher.prepare(work).generate(work.noise, work.labels)
    assert images.shape == (2, 16, 16, 1)
    assert len(np.unique(images)) > 10


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--runtime", "abacus"), InvalidRequest, "runtime 'abacus' is unknown; use one of"),
        (("--contender", "abacus"), InvalidRequest, "contender 'abacus' is unknown; use fastpipeline-auto"),
        (("--precision", "fp7"), InvalidRequest, "precision 'fp7' is unknown; use fp32"),
        (("--device", "abacus"), InvalidRequest, "device is 'abacus'"),
        (("--steps", "7"), InvalidRequest, "7"),
        (("--device", "cuda", *ENGINE), RuntimeUnavailable, "cuda"),
        (("--contender", "torch-eager", "--device", "cuda"), RuntimeUnavailable, "CUDA"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    redif_bench: Callable[..., Any], tiny_student: Path, arguments: tuple[str, ...], error: type[Exception], words: str
) -> None:
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    result = redif_bench(tiny_student, "--rounds", "1", "--no-cold-start", *arguments)
    assert isinstance(result.exception, error)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.slow
def test_a_contender_that_computes_something_else_fails_the_command(
    redif_bench: Callable[..., Any], tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redif_sdk.bench import engines as bench_engines

    clock = Clock()
    monkeypatch.setattr(
        bench_engines, "contenders", lambda *_: [fake(clock, "onnxruntime", 0.0), fake(clock, "openvino", 0.0, level=9)]
    )
    result = redif_bench(tiny_student, *("--contender", "onnxruntime", "--contender", "openvino"), "--rounds", 1)
    assert isinstance(result.exception, ParityError)
    assert "openvino on fake in fp32" in str(result.exception)


def test_bench_is_measured_without_torch() -> None:
    modules = "redif_sdk.cli.bench, redif_sdk.bench.engines, redif_sdk.bench.fresh"
    script = f"import {modules}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- the promises


@pytest.fixture
def performance_bounds() -> Any:
    """The script that checks them, as a module."""
    path = Path(__file__).resolve().parent.parent / "benchmarks/performance_bounds.py"
    spec = importlib.util.spec_from_file_location("performance_bounds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_promises_are_checked(performance_bounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def timed(name: str, seconds: float, precision: str = "fp32", **more: Any) -> dict[str, Any]:
        figures = {"seconds_median": seconds, "round_seconds": [seconds] * 3, "num_inference_steps": 2, **more}
        return {"part": "student", "student": "s", **row(contender=name, precision=precision, batch=1, **figures)}

    def cold(name: str, seconds: float) -> dict[str, Any]:
        return {"part": "cold", "student": "s", **row(contender=name, batch=1, cold_start_seconds=seconds)}

    rows = [
        timed("fastpipeline-auto", 0.010, overhead_seconds=250e-6),
        timed("torch-eager", 0.050),
        timed("openvino", 0.011),
        timed("openvino-stepped", 0.009),
        timed("torch-compile", 0.001),  # in fp32: no rival
        timed("teacher", 1.0),
        cold("fastpipeline-auto", 0.5),
        cold("diffusers-eager", 5.0),
    ]
    file = tmp_path / "performance.json"
    file.write_text(json.dumps({"rows": rows}))
    assert performance_bounds.check(file) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["kept", "MISSED", "kept", "kept", "kept", "not"]
    assert "s, batch 1: auto against torch eager in fp32, times: 5 >= 4" in lines[0]
    assert "openvino-stepped" in lines[1]  # the best of the rivals
    file.write_text(json.dumps({"rows": [entry for entry in rows if entry["contender"] != "openvino-stepped"]}))
    assert performance_bounds.check(file) == 0
