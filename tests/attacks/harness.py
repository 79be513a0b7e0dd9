"""Reads hostile students, each in a process of its own that is watched and limited, and reports what happened.

    python -m tests.attacks.harness GOOD WORK [--torch] [--half 0|1] [--wanted FILE]

GOOD is an exported student (`tests/conftest.py: build_student`), WORK an empty folder. One line of JSON a case and
reader: see `Outcome`. The process imports what the readers need, makes one hostile student after the other, and forks a
child that reads it under a limit of address space and an audit hook. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .cases import CASES, Case, Student

__all__ = ["READERS", "Outcome", "good_case", "jobs", "run"]

MEMORY = 1 << 30  # bytes of address space that a reader may add to what the imports took
SECONDS = 20.0
MOST_EVENTS = 20
REPOSITORY = Path(__file__).resolve().parents[2]
TORCH_READERS = frozenset({"student", "network"})

#: What a reader never does.
FORBIDDEN = (
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *("pickle.find_class", "sqlite3.connect", "webbrowser.open"),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"),
)
#: What changes files: how many of the arguments are paths.
MUTATIONS = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
    "os.setxattr": 1,
}
LISTINGS = frozenset({"os.listdir", "os.scandir"})
SYSTEM = ("/usr/", "/lib/", "/lib64/", "/etc/", "/sys/", "/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")


@dataclass
class Outcome:
    """What became of one case with one reader. `errors`: the class of what was raised and its bases, by name.

    `events`: what the reader did and never should; `changed`: what differs beside and in the student's folder;
    `opened`: files beside the folder that were opened, by Python or by native code; `result`: a hash of what came back.
    """

    case: str
    kind: str
    reader: str
    errors: list[str] = field(default_factory=list)
    message: str = ""
    result: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    timed_out: bool = False
    events: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    marker: bool = False
    leaked: bool = False

    @property
    def refused(self) -> bool:
        return "RedifError" in self.errors


# ---------------------------------------------------------------- readers


def _load(folder: Path, _: Path) -> str:
    from redif_sdk import FastPipeline

    pipe = FastPipeline.from_pretrained(folder, runtime="onnxruntime", num_threads=1)
    images = pipe(class_labels=0 if pipe.manifest.condition else None, seed=0, output_type="uint8").images
    return _hash(images.tobytes())


def _verify(folder: Path, _: Path) -> str:
    from redif_sdk.export import verify

    return str(all(row["passed"] for row in verify(folder, ["onnxruntime"])))


def _copy(folder: Path, target: Path) -> str:
    from redif_sdk.artifact.atomic import atomic_folder
    from redif_sdk.artifact.folder import StudentFolder

    student = StudentFolder(folder)
    student.check_all()
    with atomic_folder(target) as new:
        student.copy_to(new)
    StudentFolder(target).check_all()
    return "whole"


def _save(folder: Path, target: Path) -> str:
    from redif_sdk import FastPipeline
    from redif_sdk.artifact.folder import StudentFolder

    FastPipeline.from_pretrained(folder, runtime="onnxruntime", num_threads=1).save_pretrained(target)
    StudentFolder(target).check_all()
    return "whole"


def _student(folder: Path, _: Path) -> str:
    from redif_sdk.distill.student import load_student

    return _state(load_student(folder).inner)


def _network(folder: Path, _: Path) -> str:
    from redif_sdk.artifact.folder import StudentFolder
    from redif_sdk.export.onnx import load_network

    return _state(load_network(StudentFolder(folder)))


READERS: dict[str, Callable[[Path, Path], str]] = {
    "load": _load,
    "verify": _verify,
    "copy": _copy,
    "save": _save,
    "student": _student,
    "network": _network,
}


def _trick_writes(folder: Path, _: Path) -> str:
    (folder.parent / "written").touch()
    return ""


def _trick_reads(folder: Path, _: Path) -> str:
    return (folder.parent / "outside" / "secret.json").read_text()


def _trick_native(folder: Path, _: Path) -> str:
    descriptor = ctypes.CDLL(None).open(os.fsencode(folder.parent / "outside" / "secret.json"), os.O_RDONLY)
    return str(os.read(descriptor, 1))


#: Readers that misbehave, to try the harness itself.
TRICKS = {"writes": _trick_writes, "reads": _trick_reads, "native": _trick_native}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _state(network: Any) -> str:
    state = sorted(network.state_dict().items())
    return _hash(b"".join(name.encode() + value.float().numpy().tobytes() for name, value in state))


def _imports(torch: bool) -> None:
    """All that the readers import, so that a child's memory and time are those of reading."""
    import numpy.lib.npyio
    import onnx
    import onnxruntime

    import redif_sdk.export.verify
    import redif_sdk.images
    import redif_sdk.runtimes.onnxruntime
    from redif_sdk import FastPipeline

    assert all((numpy, onnx, onnxruntime, redif_sdk, FastPipeline))
    if torch:
        import diffusers

        import redif_sdk.distill.student
        import redif_sdk.export.onnx

        assert all((redif_sdk.distill.student, redif_sdk.export.onnx))
        assert all((diffusers.UNet2DModel, diffusers.DPMSolverMultistepScheduler))


# ---------------------------------------------------------------- the watched child


class _Watch:
    """An audit hook that records what reading a student's folder never does. `on` while the reader runs."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.events: list[str] = []
        self.on = False
        self._thread = threading.get_ident()
        code = (sys.prefix, sys.base_prefix, *(REPOSITORY / name for name in ("redif_sdk", "export", "distill")))
        self._code = tuple(os.path.realpath(path) + "/" for path in code)
        self._readable = (*self._code, *SYSTEM, os.path.realpath(folder))
        self._writable = (str(target.parent), "/dev/null")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """For what the attacker does in the reader's own thread."""
        on, self.on = self.on, False
        yield
        self.on = on

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or threading.get_ident() != self._thread:  # the thread of a race is the attacker's
            return
        self.on = False
        try:
            found = self._judge(event, arguments)
            if found is not None and len(self.events) < MOST_EVENTS:
                self.events.append(f"{event} {found}"[:300])
        finally:
            self.on = True

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            return self._outside(path, () if writes else self._readable)
        if event in MUTATIONS:
            outside = [self._outside(path, ()) for path in arguments[: MUTATIONS[event]]]
            return next((path for path in outside if path is not None), None)
        if event in LISTINGS:
            return self._outside(arguments[0] or ".", self._readable)
        if event == "ctypes.dlopen":
            return self._outside(arguments[0], self._readable) if "/" in str(arguments[0]) else None
        if event == "exec":
            name = str(getattr(arguments[0], "co_filename", "<"))
            return None if name.startswith("<") else self._outside(name, self._code)
        return repr(arguments)[:200] if event in FORBIDDEN else None

    def _outside(self, path: Any, allowed: tuple[str, ...]) -> str | None:
        """The path, links followed, if it begins with none of `allowed` and is not where the reader writes."""
        if isinstance(path, int) or path is None:
            return None
        name = os.path.realpath(os.fsdecode(path))
        return None if name.startswith(allowed + self._writable) else name


def _peak(*, reset: bool = False) -> float:
    """Most MiB that this process has held since the last `reset`."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _read(case: Case, reader: str, student: Student, target: Path) -> dict[str, Any]:
    """Read the student, and say what happened. Runs in a child."""
    target.parent.mkdir()
    tempfile.tempdir = str(target.parent)
    os.chdir(target.parent)  # names relative to an open folder, of which the hook is not told, count as in here
    watch = _Watch(student.folder, target)
    sys.addaudithook(watch.hook)
    student.quiet = watch.pause
    errors: list[str] = []
    message = result = ""
    stop = case.during(student) if case.during is not None else None
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = _peak(reset=True)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    start = time.perf_counter()
    try:
        watch.on = True
        result = (READERS | TRICKS)[reader](student.folder, target)
    except BaseException as error:
        watch.on = False
        errors = [kind.__name__ for kind in type(error).__mro__ if kind is not object]
        message = str(error)[:5000]
        if "RedifError" not in errors:
            message += " | " + " ".join(traceback.format_exc().split())[-800:]
    watch.on = False
    seconds = time.perf_counter() - start
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    peak = _peak() - before
    if stop is not None:
        stop()
    said = {"errors": errors, "message": message, "result": result, "seconds": seconds, "peak_mib": peak}
    return said | {"events": watch.events}


def _in_child(readings: Sequence[Callable[[], dict[str, Any]]], seconds: float) -> list[dict[str, Any]]:
    """What each of `readings` returns, in one forked child. It is killed when one takes longer than `seconds`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            void = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(void, standard)
            with os.fdopen(writing, "wb", buffering=0) as file:
                for job in readings:
                    file.write(json.dumps(job()).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    lines, data, end, ended = [], b"", time.monotonic() + seconds, False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = pipe.read(1 << 16)
            ended = not piece
            if ended:
                break
            data += piece
            *whole, data = data.split(b"\n")
            if whole:
                lines += whole
                end = time.monotonic() + seconds
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = [json.loads(line) for line in lines]
    rest: dict[str, Any] = {"timed_out": True, "seconds": seconds} if not ended else {"errors": ["Died"]}
    return found + [rest] * (len(readings) - len(found))


# ---------------------------------------------------------------- what changed, and what was opened


def _listing(place: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below `place`, links not followed."""
    found: dict[str, tuple[Any, ...]] = {}
    waiting = [str(place)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                found[entry.path] = about.st_mode, about.st_size, about.st_mtime_ns
                if stat.S_ISDIR(about.st_mode):
                    waiting.append(entry.path)
    return found


class _Opened:
    """Which files beside the student are opened, by whomever: inotify sees what native code does too."""

    _OPEN, _ISDIR = 0x20, 0x40000000

    def __init__(self, place: Path, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        for here, names, _ in os.walk(place):
            names[:] = [name for name in names if Path(here, name) != folder]
            self._libc.inotify_add_watch(self._descriptor, os.fsencode(here), self._OPEN)

    def names(self) -> list[str]:
        """The names of the files that were opened since."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            data = b""
        os.close(self._descriptor)
        found: dict[str, None] = {}
        while data:
            _, mask, _, length = struct.unpack("iIII", data[:16])
            if not mask & self._ISDIR:
                found[os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))] = None
            data = data[16 + length :]
        return list(found)


def _outcomes(case: Case, readers: Sequence[str], good: Path, work: Path) -> Iterator[Outcome]:
    """One student, made here, and read in one child by each of `readers`."""
    student, out = Student(good, work / case.name), work / f"{case.name}.out"
    student.begin()
    case.build(student)
    out.mkdir()
    before = _listing(student.place)
    watched = _Opened(student.place, student.folder)
    jobs = [partial(_read, case, reader, student, out / reader / "copy") for reader in readers]
    said = _in_child(jobs, SECONDS)
    opened = watched.names()
    after = _listing(student.place)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    for reader, one in zip(readers, said, strict=True):
        outcome = Outcome(case.name, case.kind, reader)
        for name, value in one.items():
            setattr(outcome, name, value)
        if case.during is None:  # else it is the case that changes and opens files
            outcome.opened = opened
            outcome.changed = sorted(os.path.relpath(path, student.place) for path in changed)[:MOST_EVENTS]
        if outcome.errors and (out / reader).exists():
            outcome.changed += [f"left: {path.name}" for path in (out / reader).iterdir()]
        outcome.marker = student.marker.exists()
        outcome.leaked = student.secret in outcome.message
        yield outcome
    for place in (student.place, out):
        subprocess.run(["rm", "-rf", str(place)], check=True)  # shutil.rmtree gives up on deep folders


def outcomes(good: Path, work: Path, wanted: Sequence[tuple[Case, str]]) -> Iterator[Outcome]:
    """Every case with its readers, one after another."""
    cases = {case.name: case for case, _ in wanted}
    for name, case in cases.items():
        readers = [reader for other, reader in wanted if other.name == name]
        for group in [readers] if case.during is None else [[reader] for reader in readers]:
            yield from _outcomes(case, group, good, work)


# ---------------------------------------------------------------- the process that forks


def good_case() -> Case:
    """The student as it is, which every reader takes."""
    return Case("good", "good", tuple(READERS), "", lambda _: None)


def jobs() -> list[tuple[Case, str]]:
    """Every case with each of its readers."""
    return [(case, reader) for case in CASES for reader in case.readers]


def run(
    good: Path, work: Path, *, wanted: Sequence[tuple[str, str]] | None = None, trick: str = ""
) -> dict[tuple[str, str], Outcome]:
    """Outcomes by (case, reader), of the good student too: three processes at once, of which one has torch.

    Args:
        good: The exported student that the cases alter.
        work: An empty folder.
        wanted: The names of the cases and their readers; None for all.
        trick: Instead of the cases, the good student read by a reader that misbehaves: one of ``TRICKS``.
    """
    command = [sys.executable, "-m", "tests.attacks.harness", str(good)]
    more = ["--trick", trick] if trick else []
    if wanted is not None:
        (work / "wanted.json").write_text(json.dumps(list(wanted)))
        more += ["--wanted", str(work / "wanted.json")]
    places = {"even": ["--half", "0"], "odd": ["--half", "1"], "torch": ["--torch"]}
    if trick:
        places = {"trick": []}
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    processes: dict[Path, subprocess.Popen[bytes]] = {}
    found: dict[tuple[str, str], Outcome] = {}
    try:
        for name, flags in places.items():
            output = work / f"{name}.jsonl"
            with output.open("wb") as file:
                processes[output] = subprocess.Popen(
                    [*command, str(work / name), *flags, *more],
                    cwd=REPOSITORY,
                    stdout=file,
                    env=os.environ | environment,
                )
        for output, process in processes.items():
            if process.wait() != 0:
                raise RuntimeError(f"the harness failed with status {process.returncode}; it says why")
            for line in output.read_text().splitlines():
                outcome = Outcome(**json.loads(line))
                found[outcome.case, outcome.reader] = outcome
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("good", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--torch", action="store_true", help="the readers that need torch; else the others")
    parser.add_argument("--half", type=int, choices=(0, 1), help="every other case alone, the even or the odd ones")
    parser.add_argument("--wanted", type=Path, metavar="FILE", help="JSON: the pairs of case and reader; else all")
    parser.add_argument("--trick", choices=TRICKS, help="have the good student read by a reader that misbehaves")
    asked = parser.parse_args(arguments)
    good = good_case()
    wanted = jobs()
    if asked.wanted:
        names = {(case, reader) for case, reader in json.loads(asked.wanted.read_text())}
        wanted = [(case, reader) for case, reader in wanted if (case.name, reader) in names]
    wanted = [*((good, reader) for reader in good.readers), *wanted]
    wanted = [(case, reader) for case, reader in wanted if (reader in TORCH_READERS) == asked.torch]
    if asked.half is not None:
        half = set(list(dict.fromkeys(case.name for case, _ in wanted))[asked.half :: 2])
        wanted = [(case, reader) for case, reader in wanted if case.name in half]
    if asked.trick:
        wanted = [(good, asked.trick)]
    _imports(asked.torch)
    asked.work.mkdir(parents=True)
    for outcome in outcomes(asked.good.resolve(), asked.work.resolve(), wanted):
        print(json.dumps(asdict(outcome)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
