"""What pull and push share: repository names, the Hub's client, file listings, and its errors as HubError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redif_sdk
from redif_sdk.errors import HubError, InvalidRequest, RedifError

__all__ = [
    "RemoteFile",
    "check_id",
    "check_local",
    "client",
    "is_hub_id",
    "not_cached",
    "offline",
    "place",
    "remote_files",
    "translated",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_RETRY = re.compile(r"[Rr]etry after (\d+)")
_LOCAL = "local_files_only"
_LONGEST_ID = 96
TOKEN = "token=, HF_TOKEN, or hf auth login"
_TIMEOUT = 30.0  # seconds for one answer about a repository


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like "org/name"."""
    return _HUB_ID.fullmatch(source) is not None


def check_id(repo_id: str) -> str:
    """Return `repo_id` if the Hub accepts it as a name, else raise InvalidRequest."""
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InvalidRequest(f"{repo_id!r:.200} is not a repository name on the Hub: {_line(error)}") from error
    if not is_hub_id(repo_id) or len(repo_id) > _LONGEST_ID:
        raise InvalidRequest(f"{repo_id!r:.200} is not a repository name on the Hub; give it as org/name")
    return repo_id


def check_local(folder: str | Path, **options: object) -> None:
    """Raise InvalidRequest if options of the Hub are given with a local folder, where they would have no effect.

    Args:
        options: the options by name; None and ``local_files_only=False`` count as not given.
    """
    given = [name for name, value in options.items() if value is not None and (name, value) != (_LOCAL, False)]
    if given:
        raise InvalidRequest(
            f"{folder} is a local folder, and {' and '.join(given)} only apply to students on the Hub; remove them"
        )


def client(token: str | bool | None = None) -> Any:
    """Return the Hub's client. It sends the name of this library and nothing about the machine (no telemetry)."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="redif-sdk", library_version=redif_sdk.__version__)


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids downloads."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit: its size, and its SHA-256 or, if it is no LFS file, the SHA-1 of git."""

    path: str
    size: int | None
    sha256: str | None
    git_sha1: str | None


def remote_files(
    api: Any, repo_id: str, revision: str | None, kind: str = "model"
) -> tuple[Any, dict[str, RemoteFile]]:
    """Return the Hub's description of `repo_id` at `revision`, and its files by path. `kind` is "model" or "space".

    Raises the client's own errors.
    """
    info = api.repo_info(repo_id, repo_type=kind, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    files = {}
    for sibling in info.siblings or []:
        lfs = sibling.lfs.sha256 if sibling.lfs is not None else None
        sha1 = sibling.blob_id if lfs is None else None
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size, lfs, sha1)
    return info, files


def place(repo_id: str, revision: str | None) -> str:
    """Return the name of a repository, or of one revision of it, for messages."""
    return f"{repo_id} at {revision}" if revision else repo_id


@contextmanager
def translated(
    repo_id: str, revision: str | None = None, *, doing: str, token: str | bool | None = None
) -> Iterator[None]:
    """Turn the errors of the Hub's client into HubError, with a message of one line that says what to do."""
    errors = _errors()
    try:
        yield
    except RedifError:
        raise
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _meaning(_cause(error), repo_id, revision, doing, token) from error


def _cause(error: BaseException) -> BaseException:
    """The error behind "not in the cache either", "error while uploading" and "cannot force a download"."""
    errors, cause = _errors(), error.__cause__
    wrapped = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError | ValueError)
    return _cause(cause) if wrapped and isinstance(cause, errors.HTTPError | OSError) else error


def _errors() -> Any:
    """The client's errors. HTTPError is what it takes from its HTTP library, httpx or another by its release."""
    from huggingface_hub import errors

    return errors


def _meaning(
    error: BaseException, repo_id: str, revision: str | None, doing: str, token: str | bool | None
) -> HubError:
    errors = _errors()
    failed = f"cannot {doing} {place(repo_id, revision)}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{failed}: it is gated; accept its terms on its page at the Hub, and give a token of that account "
            f"({TOKEN})",
            kind="gated",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if has_token(token):
            return HubError(
                f"{failed}: there is no such repository, or the token may not see it; check the name and the token",
                kind="not-found",
            )
        return HubError(
            f"{failed}: there is no such repository, or it is private and no token was given ({TOKEN})",
            kind="private",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{failed}: it has no such branch, tag or commit; see its page at the Hub", kind="revision")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{failed}: the Hub has disabled it", kind="forbidden")
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, failed)
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return not_cached(failed)
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return HubError(f"{failed}: the connection failed ({_line(error)}); try again", kind="network")
    # The client says so of a file or an answer that came short, and of whatever fails while it uploads.
    if isinstance(error, RuntimeError | json.JSONDecodeError) or "Consistency check failed" in str(error):
        return HubError(f"{failed}: the transfer failed ({_line(error)}); try again", kind="network")
    return HubError(f"{failed}: {_line(error)}")


def not_cached(failed: str) -> HubError:
    """Return the error for a file that is not cached while downloads are switched off."""
    return HubError(
        f"{failed}: it is not in the cache, and downloads are switched off (HF_HUB_OFFLINE, local_files_only)",
        kind="offline",
    )


def _refusal(error: Any, failed: str) -> HubError:
    """Return the error for an answer whose status has no class of its own in the client."""
    status = error.response.status_code
    said = _line(error.server_message or error)
    if status == 429:
        wait = error.response.headers.get("Retry-After") or (_RETRY.search(str(error)) or [None, None])[1]
        seconds = float(wait) if wait is not None and wait.isdigit() else None
        when = f"try again in {seconds:.0f} seconds" if seconds is not None else "try again later"
        return HubError(f"{failed}: too many requests; {when}", kind="rate-limit", retry_after=seconds)
    if status == 401:
        return HubError(f"{failed}: the Hub does not accept the token ({said}); make a new one", kind="token")
    if status == 403:
        return HubError(f"{failed}: the token may not do that ({said}); give one with the right to", kind="forbidden")
    if status in (409, 412):
        return HubError(
            f"{failed}: somebody else changed it meanwhile ({said}); look at it, and try again", kind="conflict"
        )
    if status >= 500 or status == 408:
        return HubError(f"{failed}: the Hub failed with status {status} ({said}); try again later", kind="server")
    return HubError(f"{failed}: the Hub answered with status {status}: {said}")


def has_token(token: str | bool | None) -> bool:
    """Whether requests carry a token: the given one, or that of ``HF_TOKEN`` or ``hf auth login``."""
    from huggingface_hub import get_token

    return isinstance(token, str) or (token is not False and get_token() is not None)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
