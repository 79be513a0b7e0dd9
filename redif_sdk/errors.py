"""The errors that the package raises on purpose.

::

    RedifError
    ├── ManifestError        redif.json is missing, malformed, or of an unknown version
    │   └── IntegrityError   a file is missing, altered, or not where it may be
    ├── UnsupportedModel     a model, schedule or prediction type that is not supported
    ├── RuntimeUnavailable   the requested engine, device or precision is not available
    ├── ExportError          a graph could not be built
    ├── ParityError          a graph does not compute what its source computes
    ├── HubError             the Hub refused, or could not be reached; `kind` says which
    ├── TrainingDiverged     an in-training check failed
    ├── NonFiniteOutput      generated images hold NaN or infinite values; also a RuntimeError
    ├── UnsafeContent        generated images were flagged by the safety filter
    └── InvalidRequest       an argument is wrong; also a ValueError

and one warning, WorseThanStart: a distillation ended worse than its untrained start.

A message says what is wrong with which value, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "RedifError",
    "ManifestError",
    "IntegrityError",
    "UnsupportedModel",
    "RuntimeUnavailable",
    "ExportError",
    "ParityError",
    "HubError",
    "TrainingDiverged",
    "NonFiniteOutput",
    "UnsafeContent",
    "InvalidRequest",
    "WorseThanStart",
    "first_line",
    "some_of",
]


class RedifError(Exception):
    """Base of every error that the package raises on purpose."""


class ManifestError(RedifError):
    """``redif.json`` is missing, malformed, or of a version that this release does not read."""


class IntegrityError(ManifestError):
    """A file of the student is missing, altered, or lies outside its folder."""


class UnsupportedModel(RedifError):
    """A model, noise schedule or prediction type that is not supported."""


class RuntimeUnavailable(RedifError):
    """The requested engine, device or precision is not available. No other is used instead."""


class ExportError(RedifError):
    """A graph could not be built."""


class ParityError(RedifError):
    """A graph does not compute what its source computes."""


class HubError(RedifError):
    """The Hub refused a request, or could not be reached.

    `kind`, for programs: "not-found" (no such repository), "private" (no such repository, or a private one, and no
    token was given), "gated", "revision" (no such branch, tag or commit), "token" (it is not valid), "forbidden",
    "rate-limit", "conflict" (somebody else changed the repository, or it holds something else), "network", "offline"
    (downloads are switched off, and the cache does not have it), "server" (the Hub failed), "altered" (what arrived is
    not what was sent), "other". `retry_after`: seconds until the Hub wants to be asked again, where it said so.
    """

    def __init__(self, message: str, *, kind: str = "other", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class TrainingDiverged(RedifError):
    """An in-training check failed; the message names the check and its value."""


class _OfImages(RedifError):
    """Some images of a batch cannot be shown.

    Attributes:
        images: positions of these images in the batch, ascending.
        batch: number of images in the batch.
    """

    def __init__(self, images: Sequence[int], batch: int, message: str) -> None:
        self.images, self.batch = tuple(images), batch
        super().__init__(message)

    def __reduce__(self) -> tuple[type[_OfImages], tuple[tuple[int, ...], int]]:
        return type(self), (self.images, self.batch)  # it travels between processes


def _places(images: Sequence[int]) -> str:
    return ", ".join(map(str, images[:8])) + ", ..." * (len(images) > 8)


class NonFiniteOutput(_OfImages, RuntimeError):
    """Generated images hold NaN or infinite values, so there is nothing to show.

    Attributes:
        images: positions of these images in the batch, ascending.
        batch: number of images in the batch.
    """

    def __init__(self, images: Sequence[int], batch: int) -> None:
        message = (
            f"{len(images)} of {batch} images hold NaN or infinite values (positions {_places(images)}); "
            f'use precision="exact", or check the student with redif verify'
        )
        super().__init__(images, batch, message)


class UnsafeContent(_OfImages):
    """Generated images were flagged by the safety filter, so there is nothing to show.

    Attributes:
        images: positions of these images in the batch, ascending.
        batch: number of images in the batch.
    """

    def __init__(self, images: Sequence[int], batch: int) -> None:
        message = (
            f"the safety filter flagged {len(images)} of {batch} images (positions {_places(images)}); give another "
            f"prompt or seed"
        )
        super().__init__(images, batch, message)


class InvalidRequest(RedifError, ValueError):
    """An argument is wrong: its value, its shape, or what it asks for."""


class WorseThanStart(UserWarning):
    """A distillation ended worse than its untrained start; `Student.worse` has the same sentence."""


def first_line(error: object, most: int | None = 300) -> str:
    """The first line of a foreign error's message, at most ``most`` characters of it, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def some_of(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
