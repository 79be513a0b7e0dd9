"""Text that people write: prompts, names, settings, keys, in the encodings and with the marks that editors leave.

A file is UTF-8, or UTF-16 or UTF-32 with a byte order mark; lines end as on any system. Whatever is wrong with a file
is one InvalidRequest that names it, and the line.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from redif_sdk.errors import InvalidRequest

__all__ = ["LARGEST_TEXT", "folded", "forbidden_character", "read_json_file", "read_lines", "read_text_file"]

LARGEST_TEXT = 256 << 20  # bytes

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARK = "\ufeff"  # also inside a file, where several were joined
_LINE_ENDS = re.compile("\r\n|\r|\n")
#: Control characters that are no white space, halves of surrogate pairs, and numbers that are no characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def folded(text: str) -> str:
    """`text` on one line: every run of white space is one space, and byte order marks are gone."""
    return " ".join(text.replace(_MARK, "").split())


def forbidden_character(text: str) -> str | None:
    """The first character that no text holds, as "U+0007", or None."""
    found = _FORBIDDEN.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


def read_text_file(path: str | Path, what: str, *, limit: int = LARGEST_TEXT) -> str:
    """The text of a file without its byte order mark.

    Args:
        path: The file. A pipe is read too, as a shell makes it for ``<(command)``.
        what: What it should be, for messages: "the prompts".
        limit: Most bytes.

    Raises:
        InvalidRequest: It is missing, no file, too large, or no text in an encoding that its first bytes tell.
    """
    data = _read(Path(path), what, limit)
    encoding, skip = next(((name, len(mark)) for mark, name in _MARKS if data.startswith(mark)), ("utf-8", 0))
    try:
        text = data[skip:].decode(encoding)
    except UnicodeDecodeError as error:
        good = data[skip : skip + error.start].decode(encoding, errors="replace")
        raise InvalidRequest(
            f"{path}, line {_line(good)}: the byte 0x{data[skip + error.start]:02x} is not {encoding.upper()}, so "
            f"{what} cannot be read; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise InvalidRequest(
            f"{path}, line {_line(text.partition(chr(0))[0])}: a NUL byte, so {what} cannot be read; save the file as "
            f"UTF-8 text"
        )
    return text


def read_lines(path: str | Path, what: str, *, limit: int = LARGEST_TEXT) -> list[tuple[int, str]]:
    """(line number from 1, text) of each line of a file that holds more than white space, folded.

    Raises:
        InvalidRequest: As `read_text_file`, and for a control character in a line.
    """
    found = []
    for number, line in enumerate(_LINE_ENDS.split(read_text_file(path, what, limit=limit)), 1):
        if text := folded(line):
            if bad := forbidden_character(text):
                raise InvalidRequest(f"{path}, line {number}: it holds the control character {bad}; remove it")
            found.append((number, text))
    return found


def read_json_file(path: str | Path, what: str, *, limit: int = 1 << 26) -> Any:
    """The value of a JSON file that a person may have edited.

    Raises:
        InvalidRequest: As `read_text_file`, and where it is no JSON, with the line.
    """
    text = read_text_file(path, what, limit=limit)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"{where}: {error.msg}, so {what} cannot be read; correct the JSON") from error
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(f"{path}: {what} cannot be read ({type(error).__name__}); correct the JSON") from error


def _read(path: Path, what: str, limit: int) -> bytes:
    """The bytes of a regular file or a pipe, at most `limit`."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe nobody writes to is empty
    try:
        if path.is_dir():
            raise InvalidRequest(f"{path} is a folder; give the file with {what}")
        with os.fdopen(os.open(path, flags), "rb") as file:
            kind = os.fstat(file.fileno())
            if not (stat.S_ISREG(kind.st_mode) or stat.S_ISFIFO(kind.st_mode)):
                raise InvalidRequest(f"{path} is a device, not a file; give the file with {what}")
            if hasattr(os, "set_blocking"):
                os.set_blocking(file.fileno(), True)
            data = file.read(limit + 1)
    except InvalidRequest:
        raise  # it is a ValueError too
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path} does not exist; give the file with {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path} cannot be read ({reason}); give the file with {what}") from error
    except MemoryError as error:
        raise InvalidRequest(f"{path} does not fit into memory; give a smaller file with {what}") from error
    if len(data) > limit:
        raise InvalidRequest(f"{path} has more than {limit:,} bytes; give a smaller file with {what}")
    return data


def _line(before: str) -> int:
    """The number, from 1, of the line that follows on `before`."""
    return len(_LINE_ENDS.findall(before)) + 1
