"""The folder in which the package keeps what it can make or fetch again: pairs, engines, compiled graphs.

A cache that cannot be written is done without, with one warning for each folder.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

__all__ = ["cache_folder", "done_without", "writable_cache"]

_log = logging.getLogger(__name__)
_warned: set[Path] = set()


def cache_folder(chosen: Path | None = None) -> Path:
    """`chosen` where it is given, else ``$REDIF_CACHE``, ``$XDG_CACHE_HOME/redif`` or ``~/.cache/redif``.

    The folder may not exist yet, and it may not be possible to make it: see `writable_cache`.
    """
    if chosen is not None:
        return chosen
    if own := os.environ.get("REDIF_CACHE"):
        return Path(own)
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "redif"
    except RuntimeError:  # this user has no home; below this name no folder can be made
        return Path(os.devnull) / "redif"


def writable_cache(name: str, chosen: Path | None = None) -> Path | None:
    """The folder `name` of the cache, made if necessary; None, with one warning, if nothing can be written there."""
    folder = cache_folder(chosen) / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it may not be written")
    except OSError as error:
        done_without(folder, error)
        return None
    return folder


def done_without(folder: Path, error: OSError) -> None:
    """Warn, once for each folder, that what would be kept there is made anew each time."""
    if folder not in _warned:
        _warned.add(folder)
        reason = error.strerror or error
        _log.warning("the cache %s cannot be written (%s), so nothing is kept; set REDIF_CACHE", folder, reason)
