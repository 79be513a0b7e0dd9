"""Checks of the folder of a browser page, which `redif_sdk.export.web` writes, before it is replaced or published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redif_sdk.artifact.paths import hash_file, list_files
from redif_sdk.errors import InvalidRequest

__all__ = ["CONFIG_NAME", "FORMAT", "check_page", "is_page"]

CONFIG_NAME = "student.json"
FORMAT = "redif-web-1"


def _config(folder: Path) -> dict[str, Any] | None:
    """The content of ``student.json``, or None if there is none of this format."""
    try:
        found = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def is_page(folder: str | Path) -> bool:
    """Whether `folder` says that it is such a page; its files are not checked."""
    return _config(Path(folder)) is not None


def check_page(folder: str | Path) -> dict[str, Any]:
    """The ``student.json`` of a page whose files are all there and unaltered.

    Raises:
        InvalidRequest: The folder is not a page, or a file was added, changed or removed.
    """
    path = Path(folder)
    config = _config(path)
    files = config.get("files") if config is not None else None
    if config is None or not isinstance(files, dict):
        raise InvalidRequest(f"{path} is not a page made by redif export --target web; give the folder of one")
    present = set(list_files(path)) - {CONFIG_NAME}
    for name in sorted(present - set(files)):
        raise InvalidRequest(f"{name} in {path} is not part of the page; remove it from that folder")
    for name, sha256 in files.items():
        if name not in present:
            raise InvalidRequest(f"{name} of the page in {path} is missing; export it again, into another folder")
        if hash_file(path, name)[1] != sha256:
            raise InvalidRequest(
                f"{name} of the page in {path} was changed: it is not what was exported; export it again, into another "
                f"folder"
            )
    return config
