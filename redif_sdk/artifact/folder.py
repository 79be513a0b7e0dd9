"""A student's folder: `write_manifest` lists and hashes its files, `StudentFolder` reads them if they are unaltered.

`manifest.py` defines ``redif.json``, `paths.py` opens files safely, `untrusted/` checks what is in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.manifest import CARD_LIMIT, CARD_NAME, FORMAT_VERSION, MANIFEST_NAME, Manifest
from redif_sdk.artifact.paths import (
    FOREIGN_FOLDERS,
    MappedFile,
    check_kind,
    check_pickle,
    hash_file,
    list_files,
    locate,
    read_checked,
    read_start,
    shown,
)
from redif_sdk.artifact.records import FileEntry, Graph
from redif_sdk.artifact.untrusted import contents
from redif_sdk.artifact.untrusted.onnx import check_graph
from redif_sdk.artifact.untrusted.safetensors import safetensors_header, safetensors_header_size
from redif_sdk.errors import IntegrityError, ManifestError

__all__ = ["StudentFolder", "write_manifest"]

_Content = TypeVar("_Content", bytes, MappedFile)

MANIFEST_LIMIT = 4 << 20  # bytes; ours have some ten thousand
TOKENIZER = "tokenizer.json"  # by this name `contents.check` knows what to look for
UNHASHED = frozenset({MANIFEST_NAME, CARD_NAME, ".gitattributes"})  # the Hub edits the last two by itself


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of `folder` (except README.md, .gitattributes, redif.json), and write ``redif.json`` atomically.

    Returns:
        The manifest with `files` and `digest` filled in.

    Raises:
        ManifestError: The manifest is not valid, or a file is of a kind that a student may not hold.
        IntegrityError: A link leaves the folder.
    """
    folder = Path(folder)
    entries = []
    for path in list_files(folder):
        if path not in UNHASHED:
            check_kind(path)
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
    """A checked view of a student's folder: only listed files are read, and only if they are unaltered and harmless.

    Args:
        path: The folder.
        repair: Called with the path of a file that is missing or altered, which is then read once more. A student
            from the Hub downloads it again.

    Attributes:
        manifest: The checked manifest.
        manifest_bytes: The bytes of ``redif.json``. Written anew, a manifest of an older format would have another
            digest.

    Raises:
        ManifestError: `path` is not a student, or holds a pickle.
        IntegrityError: The manifest was altered.
    """

    def __init__(self, path: str | Path, *, repair: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._repair = repair
        if not self.path.is_dir():
            raise ManifestError(f"{self.path} is not a folder; give the folder of a student")
        if not (self.path / MANIFEST_NAME).exists():
            raise ManifestError(
                f"{self.path} has no {MANIFEST_NAME}, so it is not a student; run redif distill or redif import"
            )
        self.manifest_bytes = read_checked(self.path, MANIFEST_NAME, limit=MANIFEST_LIMIT)
        self.manifest = Manifest.from_bytes(self.manifest_bytes, f"{self.path / MANIFEST_NAME}")
        self._entries = {entry.path: entry for entry in self.manifest.files}
        self._check_uses()
        for path in list_files(self.path):
            check_pickle(path)

    def _check_uses(self) -> None:
        """Check that graphs, golden files and tokenizers are listed and of the right kinds."""
        kinds = [(graph.file, ".onnx") for graph in self.manifest.graphs]
        kinds += [(golden.file, ".npz") for golden in self.manifest.golden]
        kinds += [(file, ".data") for graph in self.manifest.graphs for file in graph.data]
        text = self.manifest.text
        kinds += [(tokenizer.file, TOKENIZER) for tokenizer in (text.tokenizers if text else [])]
        kinds += [(arrays.examples, ".npz")] if (arrays := self.manifest.arrays) else []
        for file, kind in kinds:
            if file not in self._entries:
                raise IntegrityError(f"{file} is used by {self.path} but is not in its list of files; export it again")
            if kind not in (PurePosixPath(file).suffix, PurePosixPath(file).name):
                raise ManifestError(f"{file} of {self.path} is used as a {kind} file; export it again")

    def read(self, relative: str) -> bytes:
        """The bytes of a listed file, hashed and checked by its kind.

        Raises:
            IntegrityError: The file is not listed, missing, altered or hostile; the message names it.
        """
        self._check_header(self._entry(relative))
        data = self.read_bytes(relative)
        contents.check(relative, data, f"{relative} in {self.path}")
        return data

    def read_bytes(self, relative: str) -> bytes:
        """The bytes of a listed file, hashed but not checked further. Raises IntegrityError."""
        return self._bytes(self._entry(relative))

    def read_graph(self, graph: Graph) -> tuple[bytes, dict[str, bytes]]:
        """The bytes of a graph and of its data files by name, hashed and checked (`untrusted/onnx.py`).

        Raises:
            IntegrityError: As for `read`.
        """
        data = [self._entry(path) for path in graph.data]
        return self._model(graph), {PurePosixPath(entry.path).name: self._bytes(entry) for entry in data}

    def map_graph(self, graph: Graph) -> tuple[bytes, dict[str, MappedFile]]:
        """As `read_graph`, with the data files mapped (`paths.MappedFile`)."""
        data = [self._entry(path) for path in graph.data]
        return self._model(graph), {PurePosixPath(entry.path).name: self._mapped(entry) for entry in data}

    def _mapped(self, entry: FileEntry) -> MappedFile:
        return self._repaired(entry, partial(MappedFile, self.path, entry.path, size=entry.bytes, sha256=entry.sha256))

    def _model(self, graph: Graph) -> bytes:
        """The bytes of a graph without its data files, hashed and checked."""
        model = self._bytes(self._entry(graph.file))
        sizes = {PurePosixPath(path).name: self._entry(path).bytes for path in graph.data}
        check_graph(model, graph, sizes, f"{graph.file} in {self.path}")
        return model

    def _entry(self, relative: str) -> FileEntry:
        entry = self._entries.get(relative)
        if entry is None:
            raise IntegrityError(f"{relative} is not in the list of files of {self.path}; export the student again")
        return entry

    def _bytes(self, entry: FileEntry) -> bytes:
        limit = contents.limit_of(entry.path)
        if limit is not None and entry.bytes > limit:
            raise IntegrityError(
                f"{entry.path} in {self.path} has {entry.bytes} bytes; at most {limit} of such a file are read"
            )
        read = partial(read_checked, self.path, entry.path, limit=entry.bytes, size=entry.bytes, sha256=entry.sha256)
        return self._repaired(entry, read)

    def _repaired(self, entry: FileEntry, read: Callable[[], _Content]) -> _Content:
        """What `read` returns; once more after a repair where the file is not what the manifest lists."""
        try:
            return read()
        except IntegrityError:
            if self._repair is None:
                raise
        self._repair(entry.path)
        return read()

    def sha256(self, relative: str) -> str:
        """The SHA-256 of a listed file, by the manifest. Raises IntegrityError if it is not listed."""
        return self._entry(relative).sha256

    def files(self, folder: str) -> list[str]:
        """The listed files below `folder`."""
        return [path for path in self._entries if path.startswith(f"{folder}/")]

    def check_all(self) -> None:
        """Check every file of the folder.

        Raises:
            IntegrityError: A listed file is missing, altered or hostile, or another file is there.
            ManifestError: The card holds active content.
        """
        for path in list_files(self.path):
            if path not in self._entries and path not in UNHASHED:
                raise IntegrityError(
                    f"{shown(path)} in {self.path} is not in the list of files; remove it, or make the student again"
                )
        if (self.path / CARD_NAME).exists():
            _check_card(read_checked(self.path, CARD_NAME, limit=CARD_LIMIT), self.path)
        graphs = {graph.file: graph for graph in self.manifest.graphs}
        data = {file for graph in self.manifest.graphs for file in graph.data}
        for entry in self.manifest.files:
            if entry.path in graphs:
                self._model(graphs[entry.path])
            elif entry.path.endswith((".onnx", ".data")) and entry.path not in data:
                raise IntegrityError(f"{entry.path} in {self.path} belongs to no graph of the manifest; remove it")
            elif contents.limit_of(entry.path) is not None:
                self.read(entry.path)
            else:
                self._check_large(entry)

    def tensors(self, relative: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every tensor of a listed safetensors file by name, from its header, which is checked.

        Raises:
            IntegrityError: The file is missing, or its header is not valid.
        """
        entry = self._entry(relative)
        where = f"{entry.path} in {self.path}"
        size = safetensors_header_size(read_start(self.path, entry.path, 8), entry.bytes, where)
        header = read_start(self.path, entry.path, 8 + size)[8:]
        return safetensors_header(header, entry.bytes - 8 - size, where)

    def _check_header(self, entry: FileEntry) -> None:
        """Check the header of a safetensors file before all of it is read."""
        if entry.path.endswith(".safetensors"):
            self.tensors(entry.path)

    def _check_large(self, entry: FileEntry) -> None:
        """Check the hash of a large file piece by piece."""
        self._check_header(entry)
        if hash_file(self.path, entry.path, size=entry.bytes) != (entry.bytes, entry.sha256):
            raise self._altered(entry.path)

    def copy_to(self, target: Path, *, without: tuple[str, ...] = ()) -> None:
        """Copy the student's files into the folder `target`, checking their hashes.

        Args:
            target: An existing folder.
            without: Top-level folders to leave out. Then ``redif.json`` is not copied either, since it would not fit.

        Raises:
            IntegrityError: A file is missing or altered.
        """
        for entry in self.manifest.files:
            if entry.path.split("/")[0] in without:
                continue
            copied = hash_file(self.path, entry.path, target / entry.path, size=entry.bytes)
            if copied != (entry.bytes, entry.sha256):
                raise self._altered(entry.path)
        for name in sorted(UNHASHED - {MANIFEST_NAME}):
            if (self.path / name).exists():
                (target / name).write_bytes(read_checked(self.path, name, limit=CARD_LIMIT))
        if not without:
            atomic_write(target / MANIFEST_NAME, self.manifest_bytes)

    def keep_foreign(self, target: Path) -> None:
        """Copy version control's files (`FOREIGN_FOLDERS`) into `target`, which will replace this folder."""
        for name in FOREIGN_FOLDERS:
            if (self.path / name).is_dir():
                shutil.copytree(locate(self.path, name), target / name, symlinks=True)

    def _altered(self, path: str) -> IntegrityError:
        return IntegrityError(
            f"{path} in {self.path} was altered: it is not what the manifest lists; fetch or export it again"
        )


def _check_card(data: bytes, folder: Path) -> None:
    """Raise ManifestError unless a card is text. Its HTML is not judged: whatever shows a card sanitises it."""
    try:
        if "\0" not in data.decode():
            return
    except UnicodeDecodeError:
        pass
    raise ManifestError(f"{folder / CARD_NAME} is not UTF-8 text; correct it, or remove it")
