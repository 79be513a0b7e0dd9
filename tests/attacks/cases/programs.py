"""What runs when it is loaded: pickles under all kinds of names, compiled engines, programs, class paths."""

from __future__ import annotations

import io
import struct

import numpy as np

from .student import ALL, GOLDEN, GRAPH, WEIGHTS, WHOLE, Bomb, Student, case, each
from .zips import zipped


def _named(*names: str) -> dict[str, str]:
    """Names of files or classes, as values of cases."""
    return {name.replace("/", "_").replace(".", "_"): name for name in names}


PICKLES = ("bin", "pt", "ckpt", "joblib", "pkl", "PT", "pt.json", "npy", "pth", "pickle", "h5", "dill")


@each("pickles", (*ALL, "student", "network"), "can hold a pickle", _named(*PICKLES))
def unlisted_pickle(student: Student, suffix: str) -> None:
    student.put(f"unet/diffusion_pytorch_model.{suffix}", student.pickle, listed=False)


@each("pickles", (*ALL, "student"), "can hold a pickle", _named(*PICKLES[:7]))
def listed_pickle(student: Student, suffix: str) -> None:
    student.put(f"more/deep/x.{suffix}", student.pickle)


@case("pickles", ("student", "network"), "pickle|safetensors")
def pickle_only_weights(student: Student) -> None:
    student.drop(WEIGHTS)
    student.free(WEIGHTS)
    student.put("unet/diffusion_pytorch_model.bin", student.pickle, listed=False)


@case("pickles", (*WHOLE, "student", "network"), "safetensors")
def pickle_named_safetensors(student: Student) -> None:
    student.put(WEIGHTS, student.pickle)


@case("pickles", ("verify",), "cannot be read as npz")
def pickle_named_npz(student: Student) -> None:
    student.put(GOLDEN, student.pickle)


@case("pickles", WHOLE, "cannot be read as npz")
def object_arrays(student: Student) -> None:
    data = io.BytesIO()
    np.savez(data, x=np.array([Bomb(str(student.marker))], dtype=object), allow_pickle=True)
    student.put(GOLDEN, data.getvalue())


@case("pickles", WHOLE, "cannot be read as npz")
def pickle_in_npz(student: Student) -> None:
    student.put(GOLDEN, zipped({"x.pkl": student.pickle}))


@case("pickles", WHOLE, "cannot be read as npz")
def code_in_npy_header(student: Student) -> None:
    header = f"{{'descr': open({str(student.marker)!r}, 'w'), 'fortran_order': False, 'shape': (1,), }}\n".encode()
    student.put(GOLDEN, zipped({"x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)}))


@case("pickles", (*WHOLE,), "belongs to no graph")
def pickle_named_data(student: Student) -> None:
    student.put("onnx/weights.data", student.pickle)


@case("pickles", ALL, "no ONNX model")
def pickle_named_onnx(student: Student) -> None:
    student.put(GRAPH, student.pickle)


ENGINES = ("onnx/generator.engine", "onnx/x.plan", "lib/evil.so", "evil.dll", "onnx/x.trt", "x.timing")


@each("engines", ALL, "compiled engines never travel", _named(*ENGINES))
def listed_engine(student: Student, name: str) -> None:
    student.put(name, b"\x7fELF" + bytes(60))


@each("engines", WHOLE, "not in the list", _named(*ENGINES[:3]))
def unlisted_engine(student: Student, name: str) -> None:
    student.put(name, b"\x7fELF" + bytes(60), listed=False)


@each(
    "engines",
    ALL,
    "holds no files of this kind",
    {"py": "evil.py", "sh": "run.sh", "html": "x.html", "none": "Makefile"},
)
def listed_program(student: Student, name: str) -> None:
    student.put(name, b"import os\n")


@case("engines", WHOLE, "not in the list")
def unlisted_program(student: Student) -> None:
    student.put("unet/__init__.py", f"open({str(student.marker)!r}, 'w')".encode(), listed=False)


CLUTTER = ("x.pkl~", "._x.so", ".x.pt.swp", "#x.bin#", "__MACOSX/evil.py", "unet/x.engine~", "thumbs.db.py")


@each("engines", WHOLE, "not in the list|can hold a pickle", _named(*CLUTTER))
def named_almost_like_clutter(student: Student, name: str) -> None:
    student.put(name, student.pickle, listed=False)


@each("engines", ALL, "holds no files of this kind", _named("desktop.ini", "unet/Thumbs.db"))
def listed_clutter(student: Student, name: str) -> None:
    student.put(name, student.pickle)


@each("pickles", ALL, "not a valid name|can hold a pickle", _named(".DS_Store", "unet/._config.json", "x.json~"))
def listed_hidden_clutter(student: Student, name: str) -> None:
    student.put(name, student.pickle)


CLASSES = ("os.system", "posix.system", "tiny.evil.Network", "builtins.eval", "torch.load", "diffusers.utils.os.system")


@each("engines", ("network",), "diffusers", _named(*CLASSES), error="UnsupportedModel")
def class_path(student: Student, name: str) -> None:
    student.put("evil.py", f"open({str(student.marker)!r}, 'w')".encode(), listed=False)
    student.set("network.class_path", name)
