"""What people are shown: the names of files on disk, and model cards."""

from __future__ import annotations

import os

from .student import ALL, MIB, WHOLE, Student, case, each


@each(
    "names on disk",
    WHOLE,
    "not in the list|no name",
    {
        "escape": "a\x1b[2Jb.json",
        "newline": "a\nRefused: no.json",
        "c1": "a\x9b31m.json",
        "bidi": "\u202enosj.json",
        "zero_width": "re\u200bdif.json",
        "cyrillic": "r\u0435dif.json",
        "fullwidth": "\uff52edif.json",
        "undecodable": b"\xff\xfe.json",
        "blank": " ",
    },
)
def disk(student: Student, own: str | bytes) -> None:
    (student.folder / os.fsdecode(own)).write_text("{}")


@each(
    "names on disk",
    ALL,
    "pickle",
    {"escape": "a\x1b[2Jb.pkl", "newline": "a\nb.pt", "bidi": "\u202etxt.bin", "undecodable": b"\xff.pkl"},
)
def disk_pickle(student: Student, own: str | bytes) -> None:
    (student.folder / os.fsdecode(own)).write_bytes(student.pickle)


# ---------------------------------------------------------------- model cards

CARDS = {"nul": "# x\0\n", "large": "x" * (10 * MIB)}


@each("model cards", WHOLE, r"README\.md", CARDS)
def readme(student: Student, text: str) -> None:
    (student.folder / "README.md").write_text(text)


ENCODINGS = {"utf16": "utf-16", "utf32": "utf-32", "utf16_no_mark": "utf-16-le", "latin1": "latin-1"}


@each("model cards", WHOLE, r"README\.md", ENCODINGS)
def readme_in(student: Student, encoding: str) -> None:
    (student.folder / "README.md").write_bytes("# une carte à part\n".encode(encoding))


@case("model cards", ("copy", "save"), r"README\.md")
def readme_of_64_gb(student: Student) -> None:
    student.sparse("README.md", 64 << 30, listed=False)


@case("model cards", ("copy", "save"), r"\.gitattributes")
def attributes_of_64_gb(student: Student) -> None:
    student.sparse(".gitattributes", 64 << 30, listed=False)
