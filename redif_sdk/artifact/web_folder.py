"""The folder of a page for browsers, as `redif export --target web` writes it: is it one, and is it whole?

What lies in it is made by `redif_sdk.export.web`; whoever replaces or publishes such a folder asks here first.
"""

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
    """``student.json``, or None where there is none of this format."""
    try:
        found = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def is_page(folder: str | Path) -> bool:
    """Whether `folder` is such a page, by its own word."""
    return _config(Path(folder)) is not None


def check_page(folder: str | Path) -> dict[str, Any]:
    """The ``student.json`` of a page, if it is one and nothing of it was altered; else InvalidRequest."""
    path = Path(folder)
    config = _config(path)
    files = config.get("files") if config is not None else None
    if config is None or not isinstance(files, dict):
        raise InvalidRequest(f"{path} is no page of redif export --target web; give the folder of one")
    present = set(list_files(path)) - {CONFIG_NAME}
    for name in sorted(present - set(files)):
        raise InvalidRequest(f"{name} in {path} is not of the page; take it out of that folder")
    for name, sha256 in files.items():
        if name not in present:
            raise InvalidRequest(f"{name} of the page in {path} is missing; export it again, into another folder")
        if hash_file(path, name)[1] != sha256:
            raise InvalidRequest(
                f"{name} of the page in {path} was changed: it is not what was exported; export it again, into another "
                f"folder"
            )
    return config
