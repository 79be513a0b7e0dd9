"""What stands where a file should: links out of the folder, pipes, sockets, folders, too many files."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from .student import ALL, CONFIG, GRAPH, WHOLE, Student, case, each


@each("links", WHOLE, rf"{CONFIG}.*leaves the folder", {"up": "../../outside/secret.json", "passwd": "/etc/passwd"})
def link_out(student: Student, target: str) -> None:
    student.free(CONFIG).symlink_to(target)


@each(
    "links",
    WHOLE,
    rf"{CONFIG}",
    {
        "zero": "/dev/zero",
        "environ": "/proc/self/environ",
        "memory": "/proc/self/mem",
        "descriptor": "/proc/self/fd/0",
        "root": "/proc/self/root/etc/passwd",
        "tty": "/dev/tty",
    },
)
def link_to_device(student: Student, target: str) -> None:
    student.free(CONFIG).symlink_to(target)


@case("links", ("load", "verify", "copy", "save"), "leaves the folder")
def manifest_link_out(student: Student) -> None:
    (student.outside / "redif.json").write_bytes((student.folder / "redif.json").read_bytes())
    student.free("redif.json").symlink_to("../outside/redif.json")


@case("links", ALL, rf"{GRAPH}.*leaves the folder")
def graph_link_out(student: Student) -> None:
    shutil.copy(student.folder / GRAPH, student.outside / "g.onnx")
    student.free(GRAPH).symlink_to("../../outside/g.onnx")


@case("links", ("verify", "copy", "student", "network"), "leaves the folder|not in the list|config.json")
def folder_link_out(student: Student) -> None:
    shutil.copytree(student.folder / "unet", student.outside / "unet")
    shutil.rmtree(student.folder / "unet")
    (student.folder / "unet").symlink_to("../outside/unet", target_is_directory=True)


@case("links", ("verify", "copy", "student", "network"), "config|other")
def link_loop(student: Student) -> None:
    student.free(CONFIG).symlink_to("other.json")
    (student.folder / "unet" / "other.json").symlink_to("config.json")


@case("links", ("verify", "copy"), "not in the list|reached|missing")
def link_to_itself(student: Student) -> None:
    shutil.rmtree(student.folder / "unet")
    (student.folder / "unet").symlink_to("unet")


@case("links", ("verify", "copy", "student", "network"), "leaves the folder|not in the list")
def link_chain(student: Student) -> None:
    place = student.free(CONFIG).parent
    for index in range(30):
        (place / f"l{index}.json").symlink_to(f"l{index + 1}.json")
    (place / "l30.json").symlink_to("../../outside/secret.json")
    (place / "config.json").symlink_to("l0.json")


@case("links", ("copy", "save"), r"README\.md.*leaves the folder")
def card_link_out(student: Student) -> None:
    student.free("README.md").symlink_to("../outside/secret.json")


@case("links", ("copy", "save"), r"\.gitattributes.*leaves the folder")
def attributes_link_out(student: Student) -> None:
    student.free(".gitattributes").symlink_to("../outside/secret.json")


@case("links", WHOLE, "not in the list")
def version_control_link_out(student: Student) -> None:
    (student.folder / ".git").symlink_to("../outside", target_is_directory=True)


def _cache(student: Student) -> tuple[Path, Path]:
    """The student laid out as in a Hub cache: (the snapshot, blobs). It becomes the student's folder."""
    repository = student.place / "hub" / "models--evil--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    student.folder.rename(snapshot)
    student.folder = snapshot
    return snapshot, repository / "blobs"


@each(
    "links",
    ("verify", "copy"),
    rf"{CONFIG}.*leaves the folder",
    {
        "up": "../../../blobs/../../../outside/secret.json",
        "deeper": "../../../blobs/x/y",
        "sibling": "../../../../models--other--x/blobs/y",
        "refs": "../../../refs/main",
    },
)
def fake_cache(student: Student, target: str) -> None:
    snapshot, blobs = _cache(student)
    for place in (blobs / "x" / "y", blobs.parents[1] / "models--other--x" / "blobs" / "y", blobs.parent / "refs/main"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(target)


@case("links", WHOLE, rf"{CONFIG}.*leaves the folder")
def fake_cache_blob_link(student: Student) -> None:
    snapshot, blobs = _cache(student)
    (blobs / "abc").symlink_to("../../../outside/secret.json")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../blobs/abc")


@case("links", WHOLE, rf"{CONFIG}.*leaves the folder")
def fake_cache_blobs_link(student: Student) -> None:
    snapshot, blobs = _cache(student)
    blobs.rmdir()
    blobs.symlink_to("../../outside", target_is_directory=True)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("../../../blobs/secret.json")


@case("links", WHOLE, "altered")
def hard_link_listed(student: Student) -> None:
    os.link(student.outside / "secret.json", student.free(CONFIG))


@case("links", WHOLE, "not in the list")
def hard_link_unlisted(student: Student) -> None:
    os.link(student.outside / "secret.json", student.folder / "unet" / "more.json")


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # the path of a socket may have 107 characters
    server = socket.socket(socket.AF_UNIX)
    server.bind(place.name)
    os.chdir(here)


def _folder(place: Path) -> None:
    place.mkdir()


NO_FILES = {"fifo": _fifo, "socket": _socket, "folder": _folder}


@each("no file", WHOLE, rf"{CONFIG}", NO_FILES)
def config(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free(CONFIG))


@each("no file", ALL, rf"{GRAPH}", NO_FILES)
def graph(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free(GRAPH))


@each("no file", ALL, r"redif\.json", NO_FILES)
def manifest(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free("redif.json"))


@each("no file", ("copy", "save"), r"README\.md", NO_FILES)
def card(student: Student, make: Callable[[Path], None]) -> None:
    make(student.free("README.md"))


@each("no file", WHOLE, "not in the list", {"fifo": _fifo, "socket": _socket})
def unlisted(student: Student, make: Callable[[Path], None]) -> None:
    make(student.folder / "unet" / "more.json")


@each("no file", WHOLE, "not in the list", {"fifo": _fifo, "socket": _socket})
def clutter(student: Student, make: Callable[[Path], None]) -> None:
    make(student.folder / "unet" / ".DS_Store")


@case("links", WHOLE, "not in the list")
def clutter_linked(student: Student) -> None:
    (student.folder / "desktop.ini").symlink_to("/etc/passwd")


@case("no file", ALL, "more than 10000 files")
def much_clutter(student: Student) -> None:
    for index in range(20_000):
        (student.folder / "unet" / f"._{index}.json").touch()


@case("no file", ALL, "more than 10000 files")
def many_files(student: Student) -> None:
    for index in range(20_000):
        (student.folder / "unet" / f"{index}.json").touch()


@case("no file", ALL, "deep|files")
def deep_folders(student: Student) -> None:
    place = os.open(student.folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
