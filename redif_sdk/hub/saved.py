"""What a loaded pipeline does with its student's files: copy them, push them to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.artifact.examples import example_conditions
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import MANIFEST_NAME
from redif_sdk.errors import IntegrityError, InvalidRequest
from redif_sdk.hub.pull import Remote
from redif_sdk.hub.push import push
from redif_sdk.hub.target import Pushed

__all__ = ["SavedStudent"]


class SavedStudent:
    """A student in a folder, of which some files may still be on the Hub."""

    _student: StudentFolder
    _remote: Remote | None  # source of the files that were not downloaded

    @property
    def student(self) -> StudentFolder:
        """The checked folder."""
        return self._student

    def example_conditions(self, count: int = 1) -> dict[str, NDArray[Any]]:
        """Conditions to try a student on arrays with: the first ``count`` of its examples, (B, ...) by name.

        Raises:
            InvalidRequest: It takes no arrays.
        """
        if self._student.manifest.arrays is None:
            raise InvalidRequest(f"{self._student.manifest.name} takes no arrays, so it has no example conditions")
        return example_conditions(self._student, range(count))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Copy the student to `folder`, checking every file; `folder` appears complete or not at all.

        A student from the Hub is first downloaded whole. Raises InvalidRequest if `folder` exists and is not empty, and
        `overwrite` is not set.
        """
        student = self._whole()
        if Path(folder).resolve().is_relative_to(student.path.resolve()):
            raise InvalidRequest(f"{folder} is inside the student's own folder; give another one")
        with atomic_folder(Path(folder), overwrite=overwrite) as new:
            student.copy_to(new)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        tags: Sequence[str] = (),
        git_tag: str | None = None,
        token: str | bool | None = None,
        allow_unverified: bool = False,
        dry_run: bool = False,
    ) -> Pushed:
        """Push the student to the Hub as ``org/name``; `redif_sdk.hub.push` describes the arguments.

        Raises ParityError if the student did not pass its gate, unless `allow_unverified` is set, and HubError.
        """
        return push(
            self._whole(),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            tags=tags,
            git_tag=git_tag,
            token=token,
            allow_unverified=allow_unverified,
            dry_run=dry_run,
        )

    def _whole(self) -> StudentFolder:
        """The student with every file. Raises IntegrityError if it changed since it was loaded."""
        student = self._student if self._remote is None else self._remote.whole()
        current = StudentFolder(student.path)
        if current.manifest.digest != self._student.manifest.digest:
            raise IntegrityError(f"{MANIFEST_NAME} of {student.path} was altered since it was loaded; load it again")
        return student
