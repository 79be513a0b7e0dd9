"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from redif_sdk.errors import InvalidRequest

__all__ = ["REPLACEABLE", "atomic_folder", "atomic_write"]

#: A folder that `atomic_folder` may replace holds one of these: a slip of the keyboard must not delete a home folder.
REPLACEABLE = ("redif.json", "model_index.json")


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`: the old file or the new one is there, never a part. After an OSError nothing is left."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_free(path: Path, overwrite: bool, replaceable: Sequence[str]) -> None:
    """Raise InvalidRequest unless `path` is free, an empty folder, or a folder of ours that may be overwritten."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InvalidRequest(f"{path} is a file; give a folder")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise InvalidRequest(f"{path} is there already and not empty; give another folder, or ask to overwrite it")
    if not any((path / name).is_file() for name in replaceable):
        names = " or ".join(replaceable)
        raise InvalidRequest(f"{path} is no folder of ours ({names}), so it is not overwritten; give another folder")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False, replaceable: Sequence[str] = REPLACEABLE) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write into; swap it in at the end, or remove it on any error.

    An empty folder at `path` counts as none. Raises InvalidRequest when something else is there and `overwrite` is
    false, or when it is not a folder of ours. The sibling is on the same file system, so the swap is a rename.
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
