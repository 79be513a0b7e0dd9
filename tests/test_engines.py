"""The cache of TensorRT engines: what is found, why something is not, and that one builds while others wait.

No engine here is one: the cache asks only who built which bytes for what.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.errors import InvalidRequest
from redif_sdk.runtimes.protocol import RuntimeOptions
from redif_sdk.runtimes.tensorrt import cache as engines_module
from redif_sdk.runtimes.tensorrt.cache import BuildSettings, Built, EngineCache, EngineKey, graph_digest
from redif_sdk.runtimes.tensorrt.cuda import Gpu

GRAPH, OTHER = "a" * 64, "b" * 64
ADA = Gpu(0, "NVIDIA L4", 89)
SPEC = TensorSpec(name="x", dtype="float32", shape=["batch", 4])


def key(**changes: Any) -> EngineKey:
    fields: dict[str, Any] = {
        "graph": GRAPH,
        "component": "denoiser",
        "precision": "fp32",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1",
        "targets": [89],
        "device": None,
        "profile": {"x": ((1, 4), (4, 4), (8, 4))},
    }
    return EngineKey(**{**fields, **changes})


def built(data: bytes = b"an engine") -> Built:
    return Built(data, 1.5, [SPEC], [SPEC])


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(RuntimeOptions(engine_dir=tmp_path / "engines"))


def test_what_was_built_is_found(cache: EngineCache) -> None:
    record, reason = cache.build_once(key(), built)
    assert reason == "miss: no engine for this student"
    assert (record.bytes, record.seconds, record.inputs) == (9, 1.5, [SPEC])
    found = cache.find(key())
    assert (found.reason, found.record, found.data) == ("hit", record, b"an engine")
    assert cache.build_once(key(), lambda: pytest.fail("it was built again")) == (record, "hit")
    assert sorted(path.name for path in cache.folder.iterdir()) == [".locks", record.file, f"{record.key.name}.json"]
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    assert EngineCache(RuntimeOptions()).folder == tmp_path / "engines"
    assert EngineCache(RuntimeOptions(cache_dir=tmp_path / "c")).folder == tmp_path / "c" / "engines"


def test_a_folder_inside_a_student_is_refused(bare_student: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bare_student / "unet")
    for folder in (bare_student, bare_student / "onnx" / "engines", tmp_path / "link"):
        with pytest.raises(InvalidRequest, match="lies inside the student"):
            EngineCache(RuntimeOptions(engine_dir=folder))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be used as a folder"):
        EngineCache(RuntimeOptions(engine_dir=tmp_path / "file")).build_once(key(), built)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"graph": OTHER}, "no engine for this student"),
        ({"flavour": "tensorrt"}, "built for tensorrt-rtx, asked for tensorrt"),
        ({"version": "1.8.0"}, "built with tensorrt-rtx 1.7.1, this is 1.8.0"),
        ({"targets": [86, 89]}, "built for sm 89, asked for sm 86, 89"),
        ({"device": "NVIDIA L4"}, "built for sm 89, asked for NVIDIA L4 (sm 89)"),
        (
            {"profile": {"x": ((1, 4), (8, 4), (16, 4))}},
            "built for x of 1x4 to 4x4 to 8x4, asked for 1x4 to 8x4 to 16x4",
        ),
        ({"settings": BuildSettings(level="best")}, "built with level default, asked for best"),
        ({"settings": BuildSettings(workspace_mb=64)}, "built with workspace mb None, asked for 64"),
    ],
)
def test_a_miss_says_what_is_different(cache: EngineCache, changes: dict[str, Any], reason: str) -> None:
    cache.build_once(key(), built)
    assert cache.find(key(**changes)).reason == f"miss: {reason}"


def test_a_miss_speaks_of_the_nearest_engine(cache: EngineCache) -> None:
    cache.build_once(key(version="1.6.0", targets=[86]), built)
    cache.build_once(key(targets=[86]), built)
    assert cache.find(key()).reason == "miss: built for sm 86, asked for sm 89"


def test_an_altered_engine_is_no_engine(cache: EngineCache) -> None:
    record, _ = cache.build_once(key(), built)
    for data in (b"an Engine", b"an engine, longer"):
        (cache.folder / record.file).write_bytes(data)
        assert cache.find(key()).reason == f"miss: the file was altered ({record.file})"
        assert cache.pick(GRAPH, "tensorrt-rtx", "1.7.1", ADA).record is None
    again, reason = cache.build_once(key(), built)
    assert (again.sha256, reason) == (record.sha256, f"miss: the file was altered ({record.file})")
    (cache.folder / record.file).unlink()
    assert cache.find(key()).reason == f"miss: {record.file} is gone"


def test_an_altered_description_is_none(cache: EngineCache) -> None:
    record, _ = cache.build_once(key(), built)
    path = cache.folder / f"{record.key.name}.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"key": document["key"] | {"targets": [86]}}))
    assert "was altered: it describes denoiser.fp32.tensorrt-rtx.sm86-" in cache.find(key()).reason
    path.write_text(json.dumps(document | {"more": 1}))
    assert "cannot be read (more: Extra inputs are not permitted)" in cache.find(key()).reason
    path.unlink()
    assert "the build was interrupted" in cache.find(key()).reason
    assert cache.pick(GRAPH, "tensorrt-rtx", "1.7.1", ADA).reason == "miss: no engine for this student"


def test_a_description_that_is_a_link_out_of_the_folder_is_not_read(cache: EngineCache, tmp_path: Path) -> None:
    record, _ = cache.build_once(key(), built)
    path = cache.folder / f"{record.key.name}.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert cache.find(key()).record is None


def test_a_write_that_stops_between_the_two_files_leaves_no_engine(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = engines_module.atomic_write

    def stops(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise OSError("no space left")
        write(path, data)

    monkeypatch.setattr(engines_module, "atomic_write", stops)
    with pytest.raises(OSError, match="no space"):
        cache.build_once(key(), built)
    assert "the build was interrupted" in cache.find(key()).reason
    monkeypatch.undo()
    (cache.folder / f".{key().name}.engine.0123abcd").write_bytes(b"of a process that was killed while it wrote")
    assert cache.build_once(key(), built)[0].bytes == 9
    assert not list(cache.folder.glob(".denoiser*"))


def test_a_build_that_fails_leaves_nothing(cache: EngineCache) -> None:
    def fails() -> Built:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(key(), fails)
    assert [path.name for path in cache.folder.iterdir()] == [".locks"]
    assert cache.build_once(key(), built)[1] == "miss: no engine for this student"


@pytest.mark.parametrize(
    ("changes", "gpu", "reason"),
    [
        ({}, ADA, "hit"),
        ({"targets": [86, 89]}, ADA, "hit"),
        ({}, Gpu(0, "RTX 3090", 86), "miss: built for sm 89, this GPU is RTX 3090, sm 86"),
        ({"version": "1.6.0"}, ADA, "miss: built with tensorrt-rtx 1.6.0, this is 1.7.1"),
        ({"flavour": "tensorrt"}, ADA, "miss: built for tensorrt, asked for tensorrt-rtx"),
        ({"graph": OTHER}, ADA, "miss: no engine for this student"),
    ],
)
def test_a_runtime_picks_by_the_gpu(cache: EngineCache, changes: dict[str, Any], gpu: Gpu, reason: str) -> None:
    cache.build_once(key(**changes), built)
    assert cache.pick(GRAPH, "tensorrt-rtx", "1.7.1", gpu).reason == reason


@pytest.mark.parametrize(
    ("compatibility", "fitting"),
    [
        ("none", ["NVIDIA L4"]),
        ("same-cc", ["NVIDIA L4", "RTX 4090"]),
        ("ampere-plus", ["NVIDIA L4", "RTX 4090", "A10"]),
    ],
)
def test_an_enterprise_engine_is_for_one_model_unless_it_was_built_for_more(
    compatibility: Any, fitting: list[str]
) -> None:
    gpus = [ADA, Gpu(0, "RTX 4090", 89), Gpu(0, "A10", 86), Gpu(0, "T4", 75)]
    made = key(flavour="tensorrt", device="NVIDIA L4", settings=BuildSettings(hardware_compatibility=compatibility))
    assert [gpu.name for gpu in gpus if made.runs_on(gpu)] == fitting


def test_a_runtime_takes_the_newest(cache: EngineCache) -> None:
    cache.build_once(key(), built)
    time.sleep(0.002)  # dates have milliseconds
    newer, _ = cache.build_once(key(settings=BuildSettings(level="best")), lambda: built(b"newer"))
    assert cache.pick(GRAPH, "tensorrt-rtx", "1.7.1", ADA).record == newer


def test_the_digest_is_of_the_graphs_files(bare_student: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(bare_student)
    (folder / "onnx").mkdir()

    def digest(content: bytes, weights: bytes) -> str:
        (folder / "onnx/d.onnx").write_bytes(content)
        (folder / "onnx/d.onnx.data").write_bytes(weights)
        graph = Graph(
            component="denoiser",
            precision="fp32",
            file="onnx/d.onnx",
            data=["onnx/d.onnx.data"],
            opset=20,
            inputs=[],
            outputs=[],
        )
        write_manifest(folder, StudentFolder(bare_student).manifest.model_copy(update={"graphs": [graph]}))
        return graph_digest(StudentFolder(folder), graph)

    assert len({digest(b"1", b"2"), digest(b"2", b"1"), digest(b"1", b"3"), digest(b"1", b"2")}) == 3


OTHER_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_engines import EngineCache, RuntimeOptions, built, key

folder = Path(sys.argv[1])

def build():
    with (folder / "builds").open("a") as file:
        file.write("one\\n")
    time.sleep(float(sys.argv[2]))
    return built()

print(EngineCache(RuntimeOptions(engine_dir=folder / "engines")).build_once(key(), build)[1])
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    script = OTHER_PROCESS.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(folder), str(seconds)]
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


def test_of_two_processes_one_builds(tmp_path: Path) -> None:
    processes = [start(tmp_path, 2.0), start(tmp_path, 2.0)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["hit", "miss: no engine for this student"]
    assert (tmp_path / "builds").read_text() == "one\n"


def test_a_process_that_is_killed_holds_nobody_up(tmp_path: Path, cache: EngineCache) -> None:
    process = start(tmp_path, 600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "builds").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert cache.build_once(key(), built)[1] == "miss: no engine for this student"
