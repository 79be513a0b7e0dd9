"""Names that the manifest lists: out of the folder, not portable, not to be read, listed twice."""

from __future__ import annotations

import numpy as np

from .student import ALL, GOLDEN, Student, case, each
from .zips import npy, zipped

BAD_PATHS = {
    "parent": "../outside/secret.json",
    "parents": "unet/../../outside/secret.json",
    "absolute": "/etc/passwd.json",
    "drive": "C:\\Windows\\win.json",
    "drive_relative": "C:win.json",
    "share": "\\\\server\\share\\x.json",
    "backslash": "..\\outside\\secret.json",
    "here": "./unet/config.json",
    "empty_part": "unet//config.json",
    "empty": "",
    "trailing_slash": "unet/config.json/",
    "console": "unet/CON.json",
    "nul": "nul.json",
    "port": "unet/com1.txt",
    "trailing_dot": "unet/config.json.",
    "trailing_blank": "unet/config.json ",
    "leading_blank": " unet/config.json",
    "stream": "unet/config.json:evil.json",
    "percent": "..%2foutside%2fsecret.json",
    "home": "~/x.json",
    "variable": "$HOME/x.json",
    "nul_byte": "unet/config.json\0.json",
    "newline": "unet/a\nb.json",
    "option": "-rf.json",
    "wildcard": "unet/*.json",
    "deep": "a/" * 9 + "x.json",
    "long": "a" * 300 + ".json",
    "dots": ".../x.json",
    "fullwidth_dots": "\uff0e\uff0e/outside/secret.json",
    "cyrillic": "un\u0435t/config.json",
    "combining": "unet/cafe\u0301.json",
    "zero_width": "unet/con\u200bfig.json",
    "bidi": "unet/\u202enosj.config.json",
    "escape": "unet/\x1b[31mx.json",
    "c1_pickle": "unet/\x9b31mx.pkl",
    "bidi_pickle": "unet/\u202elkp.txt.pkl",
    "delete_pickle": "unet/\x7f.pkl",
}


@each("path traversal", ALL, r"redif\.json|path|name in a student|pickle", BAD_PATHS)
def listed_file(student: Student, path: str) -> None:
    student.set("files.0.path", path)


@each(
    "path traversal",
    ALL,
    r"unsafe path|name in a student",
    {name: BAD_PATHS[name] for name in ("parent", "absolute", "drive", "share", "stream", "trailing_dot")},
)
def graph_file(student: Student, path: str) -> None:
    student.graph_set("file", path)


@each("path traversal", ALL, "unsafe path", {name: BAD_PATHS[name] for name in ("parent", "absolute", "share")})
def graph_data(student: Student, path: str) -> None:
    student.graph_set("data", [path])


@each("path traversal", ALL, "unsafe path", {name: BAD_PATHS[name] for name in ("parent", "absolute", "share")})
def golden_file(student: Student, path: str) -> None:
    student.set("golden.0.file", path)


@each(
    "path traversal",
    (*ALL, "network", "student"),
    r"unsafe path|name in a student",
    {"parent": "../outside", "absolute": "/etc", "drive": "C:\\x", "here": ".", "console": "aux"},
)
def network_folder(student: Student, path: str) -> None:
    student.set("network.folder", path)


@each(
    "path traversal",
    ("verify",),
    "cannot be read as npz",
    {"parent": "../x.npy", "absolute": "/tmp/x.npy", "backslash": "..\\x.npy", "drive": "C:\\x.npy", "nul": "x\0.npy"},
)
def npz_member(student: Student, name: str) -> None:
    student.put(GOLDEN, zipped({name: npy(np.zeros(3))}))


@case("path traversal", ALL, "cannot be listed")
def manifest_lists_itself(student: Student) -> None:
    student.put("redif.json", (student.folder / "redif.json").read_bytes())


@case("path traversal", ALL, "cannot be listed")
def card_listed(student: Student) -> None:
    student.put("README.md", b"# x\n")


@case("path traversal", ALL, "listed twice")
def names_differ_by_case(student: Student) -> None:
    student.put("unet/Config.json", b"{}")


@case("path traversal", ALL, "listed twice")
def a_file_twice(student: Student) -> None:
    document = student.document()
    document["files"].append(document["files"][0])
    student.sign(document)
