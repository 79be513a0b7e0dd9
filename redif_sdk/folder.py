"""A student's folder: `write_manifest` lists and hashes its files, `StudentFolder` reads them if they are unaltered.

What ``redif.json`` says is `manifest.py`; how a file is opened safely is `files.py`; nothing here knows torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from redif_sdk.errors import IntegrityError, ManifestError
from redif_sdk.files import FOREIGN_FOLDERS, atomic_write, hash_file, list_files, locate, read_checked
from redif_sdk.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest

__all__ = ["StudentFolder", "write_manifest"]

MANIFEST_LIMIT = 8 << 20  # bytes; ours have some ten thousand
UNHASHED = frozenset({MANIFEST_NAME, "README.md", ".gitattributes"})  # the Hub edits the last two by itself


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of `folder` (except README.md, .gitattributes, redif.json), and write ``redif.json`` atomically.

    Returns the manifest with `files` and `digest` filled in. Raises ManifestError for a file of a kind that may not be
    there, IntegrityError for a link that leaves the folder.
    """
    folder = Path(folder)
    entries = []
    for path in list_files(folder):
        if path not in UNHASHED:
            size, sha256 = hash_file(folder, path)
            entries.append({"path": path, "bytes": size, "sha256": sha256})
    # Validated anew: model_copy does not validate, and a caller may have changed any field that way.
    content = manifest.model_dump(mode="json") | {"files": entries, "digest": "", "format_version": FORMAT_VERSION}
    try:
        complete = Manifest.model_validate(content).digested()
    except ValidationError as error:
        raise ManifestError(f"the manifest of {folder} is not valid: {error}") from error
    atomic_write(folder / MANIFEST_NAME, complete.to_bytes())
    return complete


class StudentFolder:
    """A checked view of a student's folder: only listed files are read, and only if they are unaltered."""

    def __init__(self, path: str | Path) -> None:
        """Read and check ``redif.json``. ManifestError if `path` is no student, IntegrityError if it was altered."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise ManifestError(f"{self.path} is not a folder; give the folder of a student")
        if not (self.path / MANIFEST_NAME).exists():
            raise ManifestError(
                f"{self.path} has no {MANIFEST_NAME}, so it is no student; make one with redif distill or import"
            )
        data = read_checked(self.path, MANIFEST_NAME, limit=MANIFEST_LIMIT)
        self.manifest = Manifest.from_bytes(data, f"{self.path / MANIFEST_NAME}")
        self._entries = {entry.path: entry for entry in self.manifest.files}
        used = [file for graph in self.manifest.graphs for file in (graph.file, *graph.data)]
        for file in (*used, *(golden.file for golden in self.manifest.golden)):
            if file not in self._entries:
                raise IntegrityError(f"{file} is used by {self.path} but is not in its list of files; export it again")

    def read(self, relative: str) -> bytes:
        """The bytes of a listed file, from one open, hashed before they are returned. IntegrityError names the file."""
        entry = self._entries.get(relative)
        if entry is None:
            raise IntegrityError(f"{relative} is not in the list of files of {self.path}, so it is not read")
        return read_checked(self.path, relative, limit=entry.bytes, size=entry.bytes, sha256=entry.sha256)

    def sha256(self, relative: str) -> str:
        """The hash that a listed file has, or is refused. IntegrityError if it is not listed."""
        entry = self._entries.get(relative)
        if entry is None:
            raise IntegrityError(f"{relative} is not in the list of files of {self.path}")
        return entry.sha256

    def files(self, folder: str) -> list[str]:
        """The listed files below `folder`."""
        return [path for path in self._entries if path.startswith(f"{folder}/")]

    def check_all(self) -> None:
        """Raise IntegrityError, naming the file, unless all listed files are there, unaltered, and nothing else is."""
        for entry in self.manifest.files:
            if hash_file(self.path, entry.path) != (entry.bytes, entry.sha256):
                raise self._altered(entry.path)
        for path in list_files(self.path):
            if path not in self._entries and path not in UNHASHED:
                raise IntegrityError(
                    f"{path} in {self.path} is not in the list of files; remove it, or make the student again"
                )

    def copy_to(self, target: Path, *, without: tuple[str, ...] = ()) -> None:
        """Copy the student into the folder `target`, hashing on the way; top-level folders in `without` are left out.

        ``redif.json`` is copied too unless something is left out (a part of a student needs a manifest of its own).
        """
        for entry in self.manifest.files:
            if entry.path.split("/")[0] in without:
                continue
            if hash_file(self.path, entry.path, copy_to=target / entry.path) != (entry.bytes, entry.sha256):
                raise self._altered(entry.path)
        for name in sorted(UNHASHED - {MANIFEST_NAME}):
            if (self.path / name).exists():
                hash_file(self.path, name, copy_to=target / name)
        if not without:
            atomic_write(target / MANIFEST_NAME, self.manifest.to_bytes())

    def keep_foreign(self, target: Path) -> None:
        """Copy what version control left in the folder (`FOREIGN_FOLDERS`), for when `target` will replace it."""
        for name in FOREIGN_FOLDERS:
            if (self.path / name).is_dir():
                shutil.copytree(locate(self.path, name), target / name, symlinks=True)

    def _altered(self, path: str) -> IntegrityError:
        return IntegrityError(
            f"{path} in {self.path} was altered: it is not what the manifest lists; fetch or export it again"
        )
