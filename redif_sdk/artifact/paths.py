"""Paths and files that may not be trusted: safe names, and reads that are checked.

A file's bytes are hashed and returned from one read, so that nothing can change between the check and the use. Weights
of gigabytes are mapped instead (`MappedFile`): a process that writes to the folder could change them after the check.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from redif_sdk.errors import IntegrityError, ManifestError

__all__ = [
    "MOST_FILES",
    "ORIGIN",
    "PICKLE_SUFFIXES",
    "MappedFile",
    "check_kind",
    "check_name",
    "check_pickle",
    "check_relative",
    "folder_of",
    "hash_file",
    "is_clutter",
    "list_files",
    "locate",
    "read_checked",
    "read_start",
    "shown",
]

#: Formats that run code when they are loaded. A student never holds one.
PICKLE_SUFFIXES = frozenset(
    {".pkl", ".pickle", ".pt", ".pt2", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".h5", ".keras", ".mar"}
)
#: Compiled engines. They run unchecked code on one kind of machine, so they are built where they are used.
ENGINE_SUFFIXES = frozenset({".engine", ".plan", ".trt", ".rtx", ".timing", ".blob", ".so", ".dll", ".dylib"})
#: The kinds of files in a student: weights, graphs, recorded outputs, configurations, images and text.
SUFFIXES = frozenset(
    {".safetensors", ".onnx", ".data", ".npz", ".json", ".txt", ".model", ".md", ".png", ".jpg", ".jpeg", ".webp"}
)
LICENCES = frozenset({"LICENSE", "LICENCE", "NOTICE"})

#: Folders of version control and of the Hub's client. Never read, never hashed.
FOREIGN_FOLDERS = (".git", ".cache/huggingface")

#: What operating systems and editors leave in a folder unasked, by the file's name in lower case.
_CLUTTER = re.compile(
    r"\.ds_store|\._.+|\.localized|icon\r"  # macOS
    r"|thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini"  # Windows
    r"|\.directory|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+"  # Linux
    r"|[^~]+~|#[^#]+#|\.#.+|\..+\.sw[a-p]",  # Emacs and others, vim
    re.DOTALL,
)

#: The file in which a pulled student records its repository and commit.
ORIGIN = ".cache/huggingface/redif-origin.json"

#: Most files of a student's folder; listing stops with an error beyond that.
MOST_FILES = 10_000

_CHUNK = 1 << 20
_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns")  # of a file that nobody has touched
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,127}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DEEPEST = 8
_DRIVE = re.compile(r"^[A-Za-z]:")
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")


def check_relative(path: str) -> str:
    """Return `path` if it is a plain relative POSIX path and not a pickle.

    Raises:
        ManifestError: It is absolute, or has ``..``, ``.``, an empty part, a backslash, a drive letter, a control
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
    """`path` for use in a message: quoted, escaped and cut unless it is plain and short."""
    return path if path.isprintable() and len(path) <= 200 else f"{path!r:.200}"


def check_pickle(path: str) -> None:
    """Raise ManifestError if any suffix of the name is a pickle's: a loader may look at any of them."""
    if not PICKLE_SUFFIXES.isdisjoint(PurePosixPath(path.lower()).suffixes):
        raise ManifestError(
            f"{shown(path)}: files of this kind can hold a pickle, which runs code; convert it to safetensors"
        )


def check_name(path: str) -> str:
    """Return `path` if it means the same on every file system and to every reader.

    Only ASCII letters, digits and ``_.+=@-`` are allowed: a letter of another script may look like one of these, and
    ``*`` or ``:`` has a meaning to the Hub or to Windows.

    Raises:
        ManifestError: Any other path.
    """
    check_relative(path)
    parts = path.split("/")
    if len(parts) > _DEEPEST or any(
        _PART.fullmatch(part) is None or part.endswith(".") or _DEVICE.fullmatch(part) for part in parts
    ):
        raise ManifestError(
            f"{path!r:.200} is not a valid name in a student; use ASCII letters, digits and _.+=@- (no device name "
            f"of Windows), at most {_DEEPEST} folders deep"
        )
    return path


def is_clutter(path: str) -> bool:
    """Whether `path` has the name of a file that a system or an editor leaves behind, such as ``.DS_Store``.

    Such files are neither read nor sent, and do not make a student another one. A name that could be a pickle's or an
    engine's is never one of them, whatever stands around it.
    """
    name = path.rpartition("/")[2].lower()
    kinds = {f".{part}" for part in re.split(r"[.~#]+", name)}
    return _CLUTTER.fullmatch(name) is not None and kinds.isdisjoint(PICKLE_SUFFIXES | ENGINE_SUFFIXES)


def check_kind(path: str) -> str:
    """Return `path` if it is a valid name of a kind in `SUFFIXES`. Raises ManifestError otherwise."""
    check_name(path)
    name = PurePosixPath(path)
    if name.suffix.lower() in ENGINE_SUFFIXES:
        raise ManifestError(f"{path}: compiled engines never travel with a student; build them where they are used")
    if name.suffix.lower() not in SUFFIXES and name.name not in LICENCES:
        raise ManifestError(
            f"{path}: a student holds no files of this kind (allowed: {', '.join(sorted(SUFFIXES))}); remove it"
        )
    return path


def locate(root: Path, relative: str) -> Path:
    """The real path of `relative` inside `root`, links followed.

    A link may lead elsewhere inside the folder, or into ``blobs/`` of the same repository in a Hub cache, which is how
    the Hub's client lays files out.

    Raises:
        IntegrityError: The file is missing, or another link leaves the folder.
        ManifestError: The path is not safe (`check_relative`).
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
    """The bytes of a file, read once and checked before they are returned.

    Args:
        root: The folder.
        relative: The file's path in it.
        limit: Most bytes to accept.
        size: The expected number of bytes, if known.
        sha256: The expected hash, if known.

    Raises:
        IntegrityError: The file is missing, too large or altered; the message names it.
    """
    with os.fdopen(_open_regular(root, relative), "rb") as file:
        present = os.fstat(file.fileno()).st_size
        try:
            data = file.read(limit + 1) if present <= limit and size in (None, present) else b""
        except MemoryError as error:
            raise IntegrityError(f"{relative} in {root} has {present} bytes, which do not fit into memory") from error
    if (present > limit or len(data) > limit) and size is None:
        raise IntegrityError(
            f"{relative} in {root} has more than {limit} bytes, the limit of such a file; do not use it"
        )
    if size is not None and len(data) != size:
        raise _altered(root, relative, f"it should have {size} bytes")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise _altered(root, relative, "its SHA-256 is not the manifest's")
    return data


def _altered(root: Path, relative: str, why: str) -> IntegrityError:
    return IntegrityError(f"{relative} in {root} was altered: {why}; fetch or export it again")


class MappedFile:
    """A large file, mapped read-only and hashed where it lies: its pages are the system's, not copied into memory.

    `view` holds the file that was checked, even if another one is put in its place. It does not hold the bytes of a
    file that is written to in place: keep a student's folder from others' writing, as a Hub cache is kept.

    Args:
        root: The folder.
        relative: The file's path in it.
        size: The expected number of bytes, more than 0.
        sha256: The expected hash.

    Raises:
        IntegrityError: The file is missing or altered; the message names it.
    """

    def __init__(self, root: Path, relative: str, *, size: int, sha256: str) -> None:
        self._root, self._relative = root, relative
        with os.fdopen(_open_regular(root, relative), "rb") as file:
            self._found = os.fstat(file.fileno())
            if self._found.st_size != size:
                raise _altered(root, relative, f"it should have {size} bytes")
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self.view = memoryview(pages)
        digest = hashlib.sha256()
        for start in range(0, size, _CHUNK):
            piece = self.view[start : start + _CHUNK]
            digest.update(piece)
            if hasattr(pages, "madvise"):  # not on Windows; the pages stay in the system's cache
                pages.madvise(mmap.MADV_DONTNEED, start, len(piece))
        if digest.hexdigest() != sha256:
            raise _altered(root, relative, "its SHA-256 is not the manifest's")

    @property
    def path(self) -> Path:
        """The file itself, links followed."""
        return locate(self._root, self._relative)

    def check_same(self) -> None:
        """Raise IntegrityError unless `path` is still the file that was hashed, and was not written to since.

        For engines that open the file themselves: call this when they have.
        """
        found = self.path.stat()
        if any(getattr(found, field) != getattr(self._found, field) for field in _IDENTITY):
            raise _altered(self._root, self._relative, "it was replaced or written to while it was read")


def folder_of(files: Mapping[str, MappedFile]) -> Path | None:
    """The folder in which all these files lie under their names, links followed; None: in a Hub cache, say."""
    paths = [file.path for file in files.values()]
    folders = {path.parent for path in paths}
    return folders.pop() if [path.name for path in paths] == list(files) and len(folders) == 1 else None


def read_start(root: Path, relative: str, size: int) -> bytes:
    """The first `size` bytes of a file, or fewer if it is shorter. Raises IntegrityError."""
    with os.fdopen(_open_regular(root, relative), "rb") as file:
        return file.read(size)


def hash_file(root: Path, relative: str, copy_to: Path | None = None, *, size: int | None = None) -> tuple[int, str]:
    """The size and SHA-256 of a file of any size, read in chunks.

    Args:
        root: The folder.
        relative: The file's path in it.
        copy_to: Where to write a copy, if given.
        size: The expected number of bytes, if known. A file of another size is not read.

    Returns:
        (bytes, sha256); the hash is empty if the file has another size than expected.

    Raises:
        IntegrityError: The file is missing or cannot be read.
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
    """Every file below `root`, as sorted POSIX paths; a link to a folder counts as a file.

    What is in `FOREIGN_FOLDERS`, and regular files that are clutter (`is_clutter`), are left out.

    Raises:
        ManifestError: There are more than `MOST_FILES`, or folders nested too deep.
    """
    found: list[str] = []
    left_out = 0
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        if folder.count("/") > _DEEPEST:
            raise ManifestError(
                f"{root} has folders more than {_DEEPEST} deep, so it is not a student; give another one"
            )
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = folder + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    if is_clutter(path) and entry.is_file(follow_symlinks=False):
                        left_out += 1
                    else:
                        found.append(path)
                elif path not in FOREIGN_FOLDERS:
                    waiting.append(f"{path}/")
                if len(found) + left_out + len(waiting) > MOST_FILES:
                    raise ManifestError(
                        f"{root} holds more than {MOST_FILES} files, so it is not a student; give another one"
                    )
    return sorted(found)
