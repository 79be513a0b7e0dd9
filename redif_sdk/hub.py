"""Getting a student from the Hugging Face Hub: the manifest first, then only the files that are needed.

What the files mean, and whether they are unaltered, is checked by `manifest.StudentFolder`, not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from redif_sdk.errors import HubError

__all__ = ["fetch", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like "org/name"."""
    return _HUB_ID.fullmatch(source) is not None


def fetch(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local folder of `repo_id` at `revision` with the files that match `patterns`, downloaded where not cached.

    The folder's name is the commit, so that a second call can ask for the same one. Raises HubError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, allow_patterns=list(patterns), revision=revision, token=token, cache_dir=cache_dir
            )
        )
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository on the Hub: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise HubError(
            f"{repo_id} is no folder here and could not be got from the Hub: {reason}; check name, revision and token"
        ) from error
