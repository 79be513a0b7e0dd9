"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from redif_sdk.artifact.paths import is_clutter
from redif_sdk.errors import InvalidRequest

__all__ = ["REPLACEABLE", "atomic_file", "atomic_folder", "atomic_write"]

#: A folder is replaced only if it holds one of these files, so that a mistyped path deletes no other folder.
REPLACEABLE = ("redif.json", "model_index.json")


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` at once: the old file or the whole new one is there, also after an OSError."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path` to write into; it replaces `path` at the end, or is removed on an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_free(path: Path, overwrite: bool, replaceable: Sequence[str]) -> None:
    """Raise InvalidRequest unless `path` is free, an empty folder, or a folder that may be replaced."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InvalidRequest(f"{path} is a file; give a folder")
    if all(is_clutter(entry.name) and entry.is_file() and not entry.is_symlink() for entry in path.iterdir()):
        return  # empty, but for what the system put there
    if not overwrite:
        raise InvalidRequest(f"{path} exists and is not empty; give another folder, or overwrite it")
    if not any((path / name).is_file() for name in replaceable):
        names = " or ".join(replaceable)
        raise InvalidRequest(f"{path} holds no {names}, so it is not overwritten; give another folder")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False, replaceable: Sequence[str] = REPLACEABLE) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to write into; it replaces `path` at the end, or is removed on an error.

    Args:
        path: The folder to make. An empty folder counts as absent, and so does one that holds clutter alone.
        overwrite: Whether to replace a folder that is there.
        replaceable: A folder is replaced only if it holds one of these files.

    Raises:
        InvalidRequest: Something else is at `path`, or a folder that may not be replaced.
    """
    path = Path(path).resolve()
    _check_free(path, overwrite, replaceable)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        _check_free(path, overwrite, replaceable)
        _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was at `path` is put back should that fail, and removed otherwise."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
