"""The cache of TensorRT engines: `redif_sdk.export.tensorrt` fills it, `runtime.py` reads it.

An engine is two files: ``NAME.engine``, and ``NAME.json`` with its key (`EngineKey`) and SHA-256. NAME ends in a hash
of the key, so another student, library, GPU, shape or setting is another engine. An engine is code: it is loaded from
the user's own cache or from a folder that the user names, and never from a student's folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import MANIFEST_NAME
from redif_sdk.artifact.paths import read_checked
from redif_sdk.artifact.records import Component, Graph, Precision, TensorSpec
from redif_sdk.cache import cache_folder
from redif_sdk.errors import InvalidRequest, ManifestError
from redif_sdk.runtimes.protocol import RuntimeOptions
from redif_sdk.runtimes.tensorrt.cuda import Gpu

__all__ = [
    "FLAVOURS",
    "BuildSettings",
    "Built",
    "EngineCache",
    "EngineKey",
    "EngineRecord",
    "Flavour",
    "Lookup",
    "graph_digest",
]

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")

Shape = tuple[int, ...]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

SIDECAR_LIMIT = 1 << 20  # bytes; ours have some two thousand

_log = logging.getLogger(__name__)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BuildSettings(_Part):
    """The builder's settings beyond shapes and targets."""

    level: Literal["fast", "default", "best"] = "default"  # how long it searches
    workspace_mb: Annotated[int, Field(ge=1)] | None = None  # most memory for one layer; None: all there is
    hardware_compatibility: Literal["none", "ampere-plus", "same-cc"] = "none"
    strip_weights: bool = False  # the runtime puts them back from the student's graph
    tf32: bool = False  # fp32 products with 10-bit mantissas, which would fail the parity gate of fp32


class EngineKey(_Part):
    """Everything that an engine depends on. Equal keys mean the same engine."""

    graph: Sha256  # of the graph's file and data files: see `graph_digest`
    component: Component
    precision: Precision
    flavour: Flavour
    version: str  # of the TensorRT library
    targets: list[int]  # compute capabilities, 89 for 8.9, rising
    device: str | None  # the GPU on which it was built; None: on none, for all of `targets`
    profile: dict[str, tuple[Shape, Shape, Shape]]  # input -> smallest, best and largest shape
    settings: BuildSettings = BuildSettings()

    @property
    def digest(self) -> str:
        """SHA-256 of the key's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of the engine's files: readable, and unique by a hash of the key."""
        place = "-".join(f"sm{target}" for target in self.targets)
        return f"{self.component}.{self.precision}.{self.flavour}.{place}-{self.digest[:16]}"

    def runs_on(self, gpu: Gpu) -> bool:
        """Whether an engine of this key is made for that GPU; an Enterprise one is for the model it was built on."""
        if self.flavour == "tensorrt-rtx":
            return gpu.sm in self.targets
        if self.settings.hardware_compatibility == "ampere-plus":
            return gpu.sm >= 80
        same = gpu.sm in self.targets
        return same and (self.settings.hardware_compatibility == "same-cc" or gpu.name == self.device)


class EngineRecord(_Part):
    """``NAME.json``, beside ``NAME.engine``."""

    format_version: Literal["1"] = "1"
    key: EngineKey
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    date: str  # UTC, when it was built
    seconds: float  # that the build took
    inputs: list[TensorSpec]  # the network's own, as the parser saw them
    outputs: list[TensorSpec]

    @property
    def file(self) -> str:
        """The engine's file name."""
        return f"{self.key.name}.engine"


class Built(NamedTuple):
    """The result of a build."""

    data: bytes
    seconds: float
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Lookup(NamedTuple):
    """The result of a search: "hit" with the engine and its checked bytes, or "miss: " and the reason."""

    reason: str
    record: EngineRecord | None = None
    data: bytes = b""


def graph_digest(student: StudentFolder, graph: Graph) -> str:
    """SHA-256 over the hashes of a graph's file and data files, in their order."""
    hashes = [student.sha256(path) for path in (graph.file, *graph.data)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


class EngineCache:
    """A folder of engines: the user's own (``engines`` in `cache_folder`), or `RuntimeOptions.engine_dir`."""

    def __init__(self, options: RuntimeOptions) -> None:
        """Open the folder of `options`. Raises InvalidRequest for a folder inside a student."""
        self.folder = (
            options.engine_dir if options.engine_dir is not None else cache_folder(options.cache_dir) / "engines"
        )
        place = self.folder.resolve()
        for folder in (place, *place.parents):
            if os.access(folder / MANIFEST_NAME, os.F_OK):  # False also where nothing may be read
                raise InvalidRequest(
                    f"{self.folder} lies inside the student {folder}: engines are made for one GPU and never travel "
                    f"with a student; give a folder outside of it"
                )

    def find(self, key: EngineKey) -> Lookup:
        """The engine of exactly this key."""
        found = self._read(f"{key.name}.json")
        if isinstance(found, EngineRecord):
            return self._hit(found)
        if (self.folder / f"{key.name}.json").exists() or (self.folder / f"{key.name}.engine").exists():
            return Lookup(f"miss: {found}")
        return self._miss(key.graph, lambda have: _differences(have, key))

    def pick(self, graph: str, flavour: Flavour, version: str, gpu: Gpu) -> Lookup:
        """The newest engine of a graph, by its digest, that this version of the library can run on that GPU."""

        def unfit(have: EngineKey) -> Iterator[str]:
            yield from _library_differs(have, flavour, version)
            if not have.runs_on(gpu):
                yield f"built for {_where(have)}, this GPU is {gpu.name}, sm {gpu.sm}"

        fitting = [record for record in self._records(graph) if not any(unfit(record.key))]
        if not fitting:
            return self._miss(graph, unfit)
        return self._hit(max(fitting, key=lambda record: (record.date, record.file)))

    def build_once(self, key: EngineKey, build: Callable[[], Built]) -> tuple[EngineRecord, str]:
        """The engine of `key`, built by `build` if it is not there; and "hit", or "miss: " and the reason.

        Of several processes that ask at the same time, one builds. A failed or interrupted build leaves no engine.
        """
        found = self.find(key)
        if found.record is not None:
            return found.record, found.reason
        self._make_folder()
        with FileLock(self.folder / ".locks" / f"{key.name}.lock"):
            again = self.find(key)  # another process may have built it while this one waited
            if again.record is not None:
                return again.record, again.reason
            return self._write(key, build()), again.reason

    def _make_folder(self) -> None:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True, mode=0o700)  # an engine is code: nobody else may put one here
            (self.folder / ".locks").mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidRequest(
                f"{self.folder} cannot be used as a folder of engines ({error.strerror}); give another one"
            ) from None

    def _write(self, key: EngineKey, built: Built) -> EngineRecord:
        """The engine first: a description without its engine, or with another one's, is never taken for a hit."""
        for name in (f"{key.name}.engine", f"{key.name}.json"):
            for left in self.folder.glob(f".{name}.*"):  # by a process that was killed; this one holds the lock
                left.unlink(missing_ok=True)
        record = EngineRecord(
            key=key,
            bytes=len(built.data),
            sha256=hashlib.sha256(built.data).hexdigest(),
            date=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=round(built.seconds, 3),
            inputs=built.inputs,
            outputs=built.outputs,
        )
        atomic_write(self.folder / record.file, built.data)
        atomic_write(self.folder / f"{key.name}.json", (record.model_dump_json(indent=1) + "\n").encode())
        return record

    def _records(self, graph: str) -> list[EngineRecord]:
        names = sorted(path.name for path in self.folder.glob("*.json"))
        found = [self._read(name) for name in names]
        return [record for record in found if isinstance(record, EngineRecord) and record.key.graph == graph]

    def _read(self, name: str) -> EngineRecord | str:
        """An engine's description, or what is wrong with it."""
        try:
            record = EngineRecord.model_validate_json(read_checked(self.folder, name, limit=SIDECAR_LIMIT))
        except ManifestError:
            return f"{name} is missing or no plain file: the build was interrupted"
        except ValidationError as error:
            first = error.errors()[0]
            return f"{name} cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        if f"{record.key.name}.json" != name:
            return f"{name} was altered: it describes {record.key.name}"
        return record

    def _hit(self, record: EngineRecord) -> Lookup:
        try:
            data = read_checked(self.folder, record.file, limit=record.bytes, size=record.bytes, sha256=record.sha256)
        except ManifestError:
            there = (self.folder / record.file).exists()
            return Lookup(f"miss: the file was altered ({record.file})" if there else f"miss: {record.file} is gone")
        return Lookup("hit", record, data)

    def _miss(self, graph: str, differences: Callable[[EngineKey], Iterator[str]]) -> Lookup:
        """A miss, with the difference between the key and the nearest engine's of that graph."""
        reasons = [list(differences(record.key)) for record in self._records(graph)]
        if not reasons:
            return Lookup("miss: no engine for this student")
        return Lookup(f"miss: {min(reasons, key=len)[0]}")


def _library_differs(have: EngineKey, flavour: Flavour, version: str) -> Iterator[str]:
    if have.flavour != flavour:
        yield f"built for {have.flavour}, asked for {flavour}"
    elif have.version != version:
        yield f"built with {have.flavour} {have.version}, this is {version}"


def _differences(have: EngineKey, asked: EngineKey) -> Iterator[str]:
    yield from _library_differs(have, asked.flavour, asked.version)
    if (have.targets, have.device) != (asked.targets, asked.device):
        yield f"built for {_where(have)}, asked for {_where(asked)}"
    for name, shapes in asked.profile.items():
        if have.profile.get(name) != shapes:
            yield f"built for {name} of {_range(have.profile.get(name))}, asked for {_range(shapes)}"
    for field in BuildSettings.model_fields:
        ours, theirs = getattr(have.settings, field), getattr(asked.settings, field)
        if ours != theirs:
            yield f"built with {field.replace('_', ' ')} {ours}, asked for {theirs}"


def _where(key: EngineKey) -> str:
    targets = "sm " + ", ".join(map(str, key.targets))
    return targets if key.device is None else f"{key.device} ({targets})"


def _range(shapes: tuple[Shape, Shape, Shape] | None) -> str:
    return "no range" if shapes is None else " to ".join(re.sub(r"[(), ]+", "x", str(s)).strip("x") for s in shapes)
