"""A batch over the cores: every picture is computed once, in its place, whoever computes it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.runtimes.cores import LARGEST_PIECE, Arrays, Batches, Workers, pieces

GRAPH = Graph(
    component="generator",
    precision="fp32",
    file="onnx/generator.fp32.onnx",
    opset=20,
    inputs=[
        TensorSpec(name="noise", dtype="float32", shape=["slices", "batch", 1]),
        TensorSpec(name="table", dtype="float32", shape=["steps", 6]),
        TensorSpec(name="class_labels", dtype="int64", shape=["batch"]),
    ],
    outputs=[TensorSpec(name="images", dtype="float32", shape=["batch", 1])],
)


def request(batch: int, slices: int = 2) -> Arrays:
    return {
        "noise": np.arange(slices * batch, dtype=np.float32).reshape(slices, batch, 1),
        "table": np.ones((3, 6), np.float32),
        "class_labels": np.arange(batch) * 100,
    }


def answer(feed: Arrays) -> Arrays:
    return {"images": feed["noise"].sum(0) + feed["class_labels"][:, None] + feed["table"].sum()}


@given(st.integers(1, 200), st.integers(1, 64))
def test_pieces_are_few_sizes_that_add_up_and_leave_no_worker_idle(batch: int, workers: int) -> None:
    sizes = pieces(batch, workers)
    assert sum(sizes) == batch
    assert set(sizes) <= {1, 2, LARGEST_PIECE}
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= min(batch, workers)
    for size in {1, 2, LARGEST_PIECE} - {1}:
        assert sizes.count(size) % workers == 0  # whole rounds: all workers have as much to do


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
def test_cutting_and_joining_changes_nothing(batch: int, slices: int, workers: int) -> None:
    batches, feed = Batches(GRAPH), request(batch, slices)
    assert batches.size(feed) == batch
    cut = batches.cut(feed, pieces(batch, workers))
    assert all(piece["table"] is feed["table"] for piece in cut)
    assert all(array.flags.c_contiguous for piece in cut for array in piece.values())
    assert np.array_equal(batches.join([answer(piece) for piece in cut])["images"], answer(feed)["images"])


def test_few_pictures_are_computed_on_all_cores_and_many_in_pieces() -> None:
    seen: list[tuple[str, int]] = []

    def record(kind: str) -> Any:
        return lambda feed: seen.append((kind, len(feed["class_labels"]))) or answer(feed)

    workers = Workers(2)
    for batch in (1, 5):
        workers.run(Batches(GRAPH), request(batch), record("wide"), record("narrow"))
    assert seen[0] == ("wide", 1)
    assert sorted(seen[1:]) == [("narrow", 1), ("narrow", 2), ("narrow", 2)]


def test_calls_at_the_same_time_share_the_workers() -> None:
    """Whoever asks while another call is under way is given one core, so that eight callers do not start sixteen."""
    running, most, lock = 0, 0, threading.Lock()
    inside, go = threading.Event(), threading.Event()

    def wide(feed: Arrays) -> Arrays:
        inside.set()
        assert go.wait(30)
        return answer(feed)

    def narrow(feed: Arrays) -> Arrays:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        result = answer(feed)
        with lock:
            running -= 1
        return result

    workers, batches = Workers(3), Batches(GRAPH)
    with ThreadPoolExecutor(9) as callers:
        first = callers.submit(workers.run, batches, request(1), wide, narrow)
        assert inside.wait(30)
        others = [callers.submit(workers.run, batches, request(n), wide, narrow) for n in range(1, 9)]
        for number, other in enumerate(others, 1):
            assert np.array_equal(other.result(30)["images"], answer(request(number))["images"])
        go.set()
        assert np.array_equal(first.result(30)["images"], answer(request(1))["images"])
    assert 1 <= most <= 3


@pytest.mark.parametrize("batch", [1, 4])
def test_a_failure_frees_the_worker_for_the_next_call(batch: int) -> None:
    workers, batches = Workers(2), Batches(GRAPH)
    seen: list[str] = []

    def fail(feed: Arrays) -> Arrays:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        workers.run(batches, request(batch), fail, fail)
    workers.run(batches, request(1), lambda feed: seen.append("wide") or answer(feed), fail)
    assert seen == ["wide"]  # it counts itself alone again
