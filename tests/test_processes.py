"""A pipeline in other processes, real ones: forked, spawned, pickled; homes, caches and folders as they come."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.cache import cache_folder
from redif_sdk.errors import IntegrityError, RuntimeUnavailable
from redif_sdk.runtimes import installed
from tests.test_pipeline import hub_cache

RUNTIMES = ["fake", *[name for name in ("onnxruntime", "openvino") if name in installed()]]
ASKED: dict[str, Any] = {"class_labels": [0, 1, 2], "seed": 1, "output_type": "uint8"}
SECONDS = 300  # on a busy machine

if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)


@pytest.fixture(params=RUNTIMES)
def pipe(request: pytest.FixtureRequest, tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime=request.param, num_threads=2)


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that runs `script`, at most two threads wide."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False)


# ---------------------------------------------------------------- copies and pickles


def test_a_copy_generates_the_same_and_shares_the_graphs(pipe: FastPipeline) -> None:
    expected = pipe(**ASKED).images
    for other in (copy.copy(pipe), copy.deepcopy(pipe), copy.deepcopy({"pipe": [pipe]})["pipe"][0]):
        assert other is not pipe
        assert np.array_equal(other(**ASKED).images, expected)
        assert other._components is pipe._components


def test_a_pickle_is_the_source_and_the_options(pipe: FastPipeline) -> None:
    data = pickle.dumps(pipe)
    assert len(data) < 2000  # no weights
    other = pickle.loads(data)
    assert np.array_equal(other(**ASKED).images, pipe(**ASKED).images)
    assert other.runtime_info == pipe.runtime_info


def test_a_pickle_knows_whether_its_student_was_changed(tiny_student: Path, plain_student: Path, copy_of: Any) -> None:
    folder = copy_of(tiny_student)
    data = pickle.dumps(FastPipeline.from_pretrained(folder, runtime="fake"))
    shutil.rmtree(folder)
    shutil.copytree(plain_student, folder)
    with pytest.raises(IntegrityError, match="was changed since its pipeline was pickled"):
        pickle.loads(data)


def test_a_pickle_from_the_hub_is_its_commit_without_the_token(tiny_student: Path, tmp_path: Path) -> None:
    hub_cache(tiny_student, tmp_path)
    pipe = FastPipeline.from_pretrained("me/tiny", runtime="fake", cache_dir=tmp_path, token="hf_secret")
    data = pickle.dumps(pipe)
    assert b"hf_secret" not in data
    assert pipe.origin is not None
    assert pickle.loads(data).origin.commit == pipe.origin.commit


SPAWN = """
import multiprocessing, sys
import numpy as np
from redif_sdk import FastPipeline

def work(pipe, asked, queue):
    queue.put(pipe(**asked).images)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[3])
    pipe = FastPipeline.from_pretrained(sys.argv[1], runtime=sys.argv[2], num_threads=2)
    asked = {"class_labels": [0, 1, 2], "seed": 1, "output_type": "uint8"}
    expected = pipe(**asked).images
    queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=work, args=(pipe, asked, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert all(np.array_equal(queue.get(), expected) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    print("equal")
"""


@pytest.mark.parametrize(
    ("runtime", "method"),
    [
        ("onnxruntime", "fork"),
        ("openvino", "spawn"),
        pytest.param("onnxruntime", "spawn", marks=pytest.mark.slow),
        *(pytest.param(runtime, "forkserver", marks=pytest.mark.slow) for runtime in RUNTIMES[1:]),
    ],
)
def test_workers_of_multiprocessing_generate_the_same(
    tiny_student: Path, tmp_path: Path, runtime: str, method: str
) -> None:
    (tmp_path / "work.py").write_text(SPAWN)  # a file: spawned workers import it
    command = [sys.executable, tmp_path / "work.py", tiny_student, runtime, method]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.stdout, done.returncode) == ("equal\n", 0), done.stderr


# ---------------------------------------------------------------- fork

FORK = """
import os, sys, threading
import numpy as np
from redif_sdk import FastPipeline
from redif_sdk.errors import RuntimeUnavailable

asked = {"class_labels": [0, 1, 2], "seed": 1, "output_type": "uint8"}
pipe = FastPipeline.from_pretrained(sys.argv[1], runtime=sys.argv[2], num_threads=2)
expected = pipe(**asked).images
step = next(pipe.stream(class_labels=1, seed=2))
stop = threading.Event()

def busy():
    while not stop.is_set():
        pipe(**asked)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for number in range(2):
    child = os.fork()
    if not child:
        try:
            same = np.array_equal(pipe(**asked).images, expected)
        except RuntimeUnavailable as error:
            sys.exit(7 if "spawn" in str(error) else 3)
        same = same and np.array_equal(next(pipe.stream(class_labels=1, seed=2)), step)
        grandchild = os.fork()
        if not grandchild:
            sys.exit(0 if np.array_equal(pipe(**asked).images, expected) else 3)  # with everything that an exit frees
        same = same and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
        os._exit(0 if same else 3)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
for thread in threads:
    thread.join()
assert np.array_equal(pipe(**asked).images, expected)
print(codes)
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_process_that_is_forked_while_threads_generate_is_safe(tiny_student: Path, runtime: str) -> None:
    """OpenVINO's threads are not made again there: it says what to do, and does not wait for ever."""
    done = run(FORK, tiny_student, runtime)
    assert done.stdout == ("[7, 7]\n" if runtime == "openvino" else "[0, 0]\n"), done.stderr


def test_on_a_gpu_a_forked_process_is_told_what_to_do(tiny_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="fake")
    graphs = copy.copy(pipe._components)
    graphs._options = replace(graphs._options, device="cuda:0")
    graphs._after_fork()
    with pytest.raises(RuntimeUnavailable, match='start it with multiprocessing\'s "spawn"'):
        graphs["generator"]


def test_threads_generate_the_same(pipe: FastPipeline) -> None:
    expected = pipe(**ASKED).images
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(copy.deepcopy(pipe)(**ASKED).images)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(images, expected) for images in found)


# ---------------------------------------------------------------- homes, caches, folders, limits

GENERATE = """
import resource, sys
if sys.argv[3:]:
    limit = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
import numpy as np
from redif_sdk import FastPipeline
for _ in range(2):
    pipe = FastPipeline.from_pretrained(sys.argv[1], runtime=sys.argv[2], num_threads=2)
    for labels in ([0], [0, 1, 2]):
        pipe(class_labels=labels, seed=1)
    list(pipe.stream(class_labels=1, seed=2))
print("done")
"""

HOMES = {
    "no folder": dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME"), "/dev/null"),
    "home alone": {"HOME": "/dev/null"},
    "system": {"HOME": "/proc", "XDG_CACHE_HOME": "/proc", "HF_HOME": "/proc/x", "TMPDIR": "/proc"},
    "own cache": {"REDIF_CACHE": "/dev/null/cache"},
}


@pytest.mark.parametrize(
    ("runtime", "home"),
    [
        *(("openvino", home) for home in HOMES),  # which compiles into the cache
        ("onnxruntime", "no folder"),
        *(pytest.param("onnxruntime", home, marks=pytest.mark.slow) for home in list(HOMES)[1:]),
    ],
)
def test_a_home_that_cannot_be_written_costs_one_warning(tiny_student: Path, runtime: str, home: str) -> None:
    done = run(GENERATE, tiny_student, runtime, **{"REDIF_CACHE": "", **HOMES[home]})
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    warnings = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert len(warnings) == (1 if runtime == "openvino" else 0), done.stderr


def test_a_file_limit_of_64_is_enough(tiny_student: Path) -> None:
    for runtime in RUNTIMES[1:]:
        done = run(GENERATE, tiny_student, runtime, "64")
        assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@pytest.fixture
def read_only(tiny_student: Path, copy_of: Callable[[Path], Path]) -> Iterator[Path]:
    folder = copy_of(tiny_student)
    places = [folder, *folder.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    yield folder
    for place in places:
        place.chmod(0o755)


def test_a_read_only_student_is_used_and_stays_as_it_is(read_only: Path, tiny_student: Path, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in read_only.rglob("*"))
    pipe = FastPipeline.from_pretrained(read_only, runtime="onnxruntime", num_threads=1)
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("mine")  # the copy may be written
    assert np.array_equal(pickle.loads(pickle.dumps(pipe))(**ASKED).images, pipe(**ASKED).images)
    assert sorted((path, path.stat().st_mtime_ns) for path in read_only.rglob("*")) == before


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIF_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("REDIF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "redif"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "redif"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not cache_folder().exists()


def test_a_pool_that_cannot_be_kept_is_sampled(teacher_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from redif_sdk.distill import Teacher
    from redif_sdk.distill.pool import cache

    teacher = Teacher.load(teacher_folder, num_inference_steps=2)
    nowhere = Path("/dev/null/pool")
    first, _ = cache.get(teacher, 8, "train", cache=nowhere)
    again, _ = cache.get(teacher, 8, "train", cache=nowhere)
    assert first.target.equal(again.target)
    assert not cache.is_there(teacher, 8, "train", cache=nowhere)
    assert [record.getMessage() for record in caplog.records].count(
        f"the cache {nowhere} cannot be written (Not a directory), so nothing is kept; set REDIF_CACHE"
    ) == 1
