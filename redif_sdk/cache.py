"""The folder in which the package keeps what it can make or fetch again: pairs, engines, compiled graphs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(chosen: Path | None = None) -> Path:
    """`chosen` where it is given, else ``$REDIF_CACHE``, else ``~/.cache/redif``. The folder may not exist yet."""
    if chosen is not None:
        return chosen
    return Path(os.environ.get("REDIF_CACHE") or Path.home() / ".cache" / "redif")
