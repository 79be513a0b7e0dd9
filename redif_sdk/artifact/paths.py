"""Paths and files that may not be trusted: safe names, and reads that are checked.

A file's bytes are hashed and returned from one read, so that nothing can change between the check and the use.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path, PurePosixPath

from redif_sdk.errors import IntegrityError, ManifestError

__all__ = [
    "MOST_FILES",
    "ORIGIN",
    "PICKLE_SUFFIXES",
    "check_kind",
    "check_name",
    "check_pickle",
    "check_relative",
    "hash_file",
    "list_files",
    "locate",
    "read_checked",
    "read_start",
    "shown",
]

#: Formats that run code when they are loaded. No student holds one, and no reader opens one.
PICKLE_SUFFIXES = frozenset(
    {".pkl", ".pickle", ".pt", ".pt2", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".h5", ".keras", ".mar"}
)
#: What an engine compiles for one machine. It runs unchecked code there, so it is built where it is used.
ENGINE_SUFFIXES = frozenset({".engine", ".plan", ".trt", ".rtx", ".timing", ".blob", ".so", ".dll", ".dylib"})
#: All that a student is made of: weights, graphs, recorded outputs, configurations, pictures and text.
SUFFIXES = frozenset(
    {".safetensors", ".onnx", ".data", ".npz", ".json", ".txt", ".model", ".md", ".png", ".jpg", ".jpeg", ".webp"}
)
LICENCES = frozenset({"LICENSE", "LICENCE", "NOTICE"})

#: What version control and the Hub's client leave beside the files. Never read, never hashed.
FOREIGN_FOLDERS = (".git", ".cache/huggingface")

#: Where a pulled student notes what it is a copy of.
ORIGIN = ".cache/huggingface/redif-origin.json"

#: Most files of a student's folder; a folder that holds more is not walked to its end.
MOST_FILES = 10_000

_CHUNK = 1 << 20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,127}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DEEPEST = 8
_DRIVE = re.compile(r"^[A-Za-z]:")
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")


def check_relative(path: str) -> str:
    """Return `path` if it is a plain relative POSIX path of an allowed format.

    Raises ManifestError for an absolute path, ``..``, ``.``, an empty part, a backslash, a drive letter, a control
    character, or the suffix of a pickle.
    """
    if (
        not path
        or path.startswith("/")
        or "\\" in path
        or _DRIVE.match(path)
        or any(part in ("", ".", "..") for part in path.split("/"))
        or any(ord(character) < 32 for character in path)
    ):
        raise ManifestError(
            f"unsafe path {path!r:.200} in the manifest: only plain relative paths inside the folder are read"
        )
    check_pickle(path)
    return path


def shown(path: str) -> str:
    """`path` as a message may hold it: quoted, escaped and cut where it is no plain name."""
    return path if path.isprintable() and len(path) <= 200 else f"{path!r:.200}"


def check_pickle(path: str) -> None:
    """Raise ManifestError for the suffix of a pickle, wherever in the name: a loader may look at any of them."""
    if not PICKLE_SUFFIXES.isdisjoint(PurePosixPath(path.lower()).suffixes):
        raise ManifestError(
            f"{shown(path)}: files of this kind can hold a pickle, which runs code; convert it to safetensors"
        )


def check_name(path: str) -> str:
    """Return `path` if every file system, and every reader, takes it for the same thing.

    Raises ManifestError for what `check_relative` refuses, and for all but ASCII letters, digits and ``_.+=@-``: a
    letter of another script may look like one of these, and ``*`` or ``:`` means something to the Hub or to Windows.
    """
    check_relative(path)
    parts = path.split("/")
    if len(parts) > _DEEPEST or any(
        _PART.fullmatch(part) is None or part.endswith(".") or _DEVICE.fullmatch(part) for part in parts
    ):
        raise ManifestError(
            f"{path!r:.200} is no name for a student's file; use ASCII letters, digits and _.+=@- (no device name of "
            f"Windows), at most {_DEEPEST} folders deep"
        )
    return path


def check_kind(path: str) -> str:
    """Return `path` if it names a file of a kind that a student is made of (`SUFFIXES`). Raises ManifestError."""
    check_name(path)
    name = PurePosixPath(path)
    if name.suffix.lower() in ENGINE_SUFFIXES:
        raise ManifestError(f"{path}: compiled engines never travel with a student; build them where they are used")
    if name.suffix.lower() not in SUFFIXES and name.name not in LICENCES:
        raise ManifestError(
            f"{path}: files of this kind are no part of a student (its kinds: {', '.join(sorted(SUFFIXES))}); remove it"
        )
    return path


def locate(root: Path, relative: str) -> Path:
    """The real path of `relative` inside `root`, links followed.

    A link may lead elsewhere inside the folder, or into ``blobs/`` of the same repository in a Hub cache, which is how
    the Hub's client lays files out. Raises IntegrityError for a missing file and for any other link.
    """
    check_relative(relative)
    base = root.resolve()
    try:
        target = (base / relative).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{relative} is missing from {root}; fetch or export the student again") from None
    except (RuntimeError, OSError) as error:  # RuntimeError: a loop of links (Python 3.11, 3.12)
        raise IntegrityError(f"{relative} in {root} cannot be reached: {error}") from error
    if target.is_relative_to(base):
        return target
    if _in_hub_cache(base, target):
        return target
    raise IntegrityError(f"{relative} in {root} is a link that leaves the folder; replace it by the file itself")


def _in_hub_cache(base: Path, target: Path) -> bool:
    """Whether `base` is a snapshot, ``CACHE/models--ORG--NAME/snapshots/COMMIT``, and `target` a blob of that cache.

    huggingface_hub 2 shares blobs between repositories too: there ``blobs/ETAG`` is itself a link, to
    ``CACHE/blobs/XX/HASH``.
    """
    repository = base.parent.parent
    if base.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs"
    return target.parent == repository / "blobs" or (
        target.parent.parent == shared and _SHARED_BLOB.fullmatch(target.name) is not None
    )


def _open_regular(root: Path, relative: str) -> int:
    """Open `relative` for reading and return the descriptor. IntegrityError unless it is a regular file."""
    target = locate(root, relative)
    # NOFOLLOW: links were resolved above; one that appeared since is refused. NONBLOCK: a pipe must not hang us.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(target, flags)
    except OSError as error:  # a socket, a file that may not be read, a link that appeared
        raise IntegrityError(f"{relative} in {root} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{relative} in {root} is not a regular file")
    return descriptor


def read_checked(root: Path, relative: str, *, limit: int, size: int | None = None, sha256: str | None = None) -> bytes:
    """The bytes of `relative`, from one open, checked before they are returned.

    `limit`: most bytes to accept. `size` and `sha256`: what the bytes must measure and hash to, where known.
    Raises IntegrityError, naming the file, when it is missing, too large or altered.
    """
    with os.fdopen(_open_regular(root, relative), "rb") as file:
        present = os.fstat(file.fileno()).st_size
        try:
            data = file.read(limit + 1) if present <= limit and size in (None, present) else b""
        except MemoryError as error:
            raise IntegrityError(f"{relative} in {root} has {present} bytes: there is no memory for them") from error
    if (present > limit or len(data) > limit) and size is None:
        raise IntegrityError(f"{relative} in {root} has more than {limit} bytes, which none of ours has")
    if size is not None and len(data) != size:
        raise IntegrityError(f"{relative} in {root} was altered: it should have {size} bytes; fetch or export it again")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(
            f"{relative} in {root} was altered: its SHA-256 is not the manifest's; fetch or export it again"
        )
    return data


def read_start(root: Path, relative: str, size: int) -> bytes:
    """The first `size` bytes of a file, or all where it has fewer. Raises IntegrityError."""
    with os.fdopen(_open_regular(root, relative), "rb") as file:
        return file.read(size)


def hash_file(root: Path, relative: str, copy_to: Path | None = None, *, size: int | None = None) -> tuple[int, str]:
    """(bytes, sha256) of a file of any size, read in chunks; written to `copy_to` on the way where given.

    A file that has not the `size` that it should have is not read: its hash is then empty.
    """
    digest, done = hashlib.sha256(), 0
    with os.fdopen(_open_regular(root, relative), "rb") as source:
        present = os.fstat(source.fileno()).st_size
        if size not in (None, present):
            return present, ""
        target = None
        if copy_to is not None:
            copy_to.parent.mkdir(parents=True, exist_ok=True)
            target = copy_to.open("wb")
        try:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if target is not None:
                    target.write(chunk)
        finally:
            if target is not None:
                target.close()
    return done, digest.hexdigest()


def list_files(root: Path) -> list[str]:
    """Every file below `root`, as sorted POSIX paths; a link to a folder counts as a file, `FOREIGN_FOLDERS` do not.

    Raises ManifestError for more than `MOST_FILES`, or folders nested deeper than any of ours.
    """
    found: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        if folder.count("/") > _DEEPEST:
            raise ManifestError(f"{root} has folders more than {_DEEPEST} deep, so it is no student; give another one")
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = folder + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    found.append(path)
                elif path not in FOREIGN_FOLDERS:
                    waiting.append(f"{path}/")
                if len(found) + len(waiting) > MOST_FILES:
                    raise ManifestError(f"{root} holds more than {MOST_FILES} files, so it is no student")
    return sorted(found)
