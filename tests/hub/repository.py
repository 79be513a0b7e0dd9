"""What a repository of the stand-in holds: files in git and in LFS, commits, refs, and who may see it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.data *.ftz *.gz *.h5 *.jpeg *.jpg *.joblib *.mlmodel *.model *.msgpack *.npy "
    "*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.png *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar "
    "*.tar.* *.tflite *.tgz *.wasm *.webp *.xz *.zip *.zst *tfevents*"
)
_LFS = " filter=lfs diff=lfs merge=lfs -text\n"
GITATTRIBUTES = "".join(pattern + _LFS for pattern in _PATTERNS.split()).encode()
LARGEST_REGULAR = 10 << 20

_SPECIAL_REFS = re.compile(r"refs/(heads|tags|pr)/(.+)")


@dataclass(frozen=True)
class Blob:
    """One file's content, in git or in LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """The SHA-1 that git gives to the file, or to its LFS pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of all files. It never changes, so that a reader sees all of a commit or nothing of it."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    head: str


@dataclass
class Repository:
    """A repository's settings, refs, commits and LFS objects. Tests may change the settings at any time."""

    name: str
    kind: str = "model"
    private: bool = False
    gated: str | bool = False
    disabled: bool = False
    granted: set[str] = field(default_factory=set)  # users who accepted the terms of a gated repository
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS contents by SHA-256, committed or not
    announced: dict[str, int] = field(default_factory=dict)  # LFS objects that may be uploaded, with their sizes

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, ref or (short) commit id stands for."""
        if match := _SPECIAL_REFS.fullmatch(revision):
            space, name = match.groups()
            if space == "pr":
                pull = self.pulls.get(int(name)) if name.isdigit() else None
                return pull.head if pull else None
            return (self.branches if space == "heads" else self.tags).get(name)
        if found := self.branches.get(revision) or self.tags.get(revision):
            return found
        if re.fullmatch(r"[0-9a-f]{5,40}", revision):
            found_ids = [oid for oid in self.commits if oid.startswith(revision)]
            return found_ids[0] if len(found_ids) == 1 else None
        return None

    def move(self, revision: str, oid: str) -> bool:
        """Let a branch or an open pull request point to `oid`; whether there is such a one."""
        match = _SPECIAL_REFS.fullmatch(revision)
        if match and match[1] == "pr" and match[2].isdigit() and int(match[2]) in self.pulls:
            self.pulls[int(match[2])].head = oid
            return True
        name = match[2] if match and match[1] == "heads" else revision
        if name not in self.branches:
            return False
        self.branches[name] = oid
        return True

    def commit(self, parent: str | None, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        """Keep a new commit. No ref points to it yet."""
        tree = json.dumps(sorted((path, blob.oid) for path, blob in files.items()))
        seed = f"{self.kind} {self.name} {len(self.commits)} {parent} {title} {message} {author} {tree}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, dict(files))
        self.commits[commit.oid] = commit
        return commit

    def is_lfs(self, path: str, size: int, sample: bytes, files: Mapping[str, Blob]) -> bool:
        """What .gitattributes says; else by size, and by whether it looks like text."""
        if size == 0:
            return False
        attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        if any(git_match(path, pattern) for pattern in patterns):
            return True
        return size > LARGEST_REGULAR or b"\0" in sample


def git_match(path: str, pattern: str) -> bool:
    return fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern.replace("/**/", "/*"))
