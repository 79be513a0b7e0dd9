"""What `redif export --target web` writes and refuses, and its noise in Node. Its page is tested in tests/browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from redif_sdk.artifact.web_folder import check_page
from redif_sdk.errors import ExportError, InvalidRequest, UnsupportedModel
from redif_sdk.export import export
from redif_sdk.export.web import RUNTIME_VERSION, build_page
from redif_sdk.inputs.images import _coloured, open_image
from redif_sdk.marks.xmp import mark_of, packet_of
from redif_sdk.sampling.noise import normals

ROOT = Path(__file__).resolve().parent.parent
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here: install Node.js")

DRAWS = [(0, 0, 0, 1001), (123456789012345, 7, 3, 400), (2**64 - 1, 2**64 - 1, 2**32 - 1, 100_001), (2**32, 5, 1, 1)]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here: install Node.js")
def test_the_noise_is_pythons_bit_for_bit(tmp_path: Path) -> None:
    script = tmp_path / "draw.mjs"
    script.write_text(
        f"import {{ normals }} from {json.dumps((ROOT / 'export/page/noise.js').as_uri())};\n"
        f"for (const [seed, index, slot, count] of {json.dumps([[str(n) for n in draw] for draw in DRAWS])}) {{\n"
        "  const drawn = normals(BigInt(seed), BigInt(index), Number(slot), Number(count));\n"
        "  process.stdout.write(Buffer.from(drawn.buffer, drawn.byteOffset, drawn.byteLength));\n}\n"
    )
    written = subprocess.run(["node", script], capture_output=True, check=True, timeout=60).stdout
    wanted = np.concatenate([normals(*draw) for draw in DRAWS])
    assert np.array_equal(np.frombuffer(written, dtype=np.uint32), wanted.view(np.uint32))


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here: install Node.js")
def test_an_image_is_brought_to_size_as_in_python(tmp_path: Path) -> None:
    """Every value is Pillow's: larger and smaller images, cut on either axis, grey, colours, and transparent ones."""
    script, drawn = tmp_path / "fit.mjs", np.random.default_rng(0)
    cases = [(57, 91, 28, 28), (28, 28, 28, 28), (40, 28, 28, 28), (9, 200, 36, 28), (11, 5, 16, 24), (700, 9, 12, 20)]
    wanted, calls = b"", []
    for place, (height, width, *size) in enumerate(cases):
        rgba = drawn.integers(0, 256, (height, width, 4), dtype=np.uint8)
        rgba[..., 3] |= 255 * (place % 2)
        (tmp_path / str(place)).write_bytes(rgba.tobytes())
        for channels in (1, 3, 4):
            fitted = ImageOps.fit(
                _coloured(Image.fromarray(rgba), channels), size=(size[1], size[0]), method=Image.Resampling.LANCZOS
            )
            wanted += np.asarray(fitted).tobytes()
            calls.append([place, height, width, *size, channels])
    script.write_text(
        f"import {{ fit }} from {json.dumps((ROOT / 'export/page/fit.js').as_uri())};\n"
        "import { readFileSync } from 'node:fs';\n"
        f"for (const [place, rows, width, h, w, channels] of {json.dumps(calls)}) {{\n"
        f"  const all = new Uint8Array(readFileSync({json.dumps(str(tmp_path))} + '/' + place));\n"
        "  const read = (top, count) => all.subarray(top * width * 4, (top + count) * width * 4);\n"
        "  process.stdout.write(Buffer.from(fit({ width, height: rows, read }, h, w, channels)));\n}\n"
    )
    written = subprocess.run(["node", script], capture_output=True, check=True, timeout=60).stdout
    assert written == wanted


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here: install Node.js")
def test_a_files_mark_is_pythons_whatever_the_student_is_called(tmp_path: Path) -> None:
    """Grey, colours and transparency come back as they were drawn, and what made them: names, scripts, large seeds."""
    script, name = tmp_path / "save.mjs", '<"tiny"> é {made} $& & \\ 😀'
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    pixels[..., 1:3] = pixels[..., :1]
    script.write_text(
        f"import {{ markOf, png }} from {json.dumps((ROOT / 'export/page/png.js').as_uri())};\n"
        "import { writeFileSync } from 'node:fs';\n"
        f"const config = {{ name: {json.dumps(name)}, digest: 'd', precision: 'fp32' }};\n"
        f"const request = {{ classLabel: 3, steps: 2, seed: {2**64 - 1}n, index: {2**53 + 1}n, height: 6, width: 5, "
        "begin: { mask: [] } };\n"
        f"const image = {{ height: 6, width: 5, pixels: Uint8ClampedArray.from({pixels.ravel().tolist()}) }};\n"
        f"for (const [channels, packet] of [[1, {json.dumps(packet_of('{made}'))}], [3, null], [4, null]]) {{\n"
        "  const blob = await png([{ ...image, channels }], 1, packet, [markOf(config, request)]);\n"
        "  writeFileSync(`${process.argv[2]}/${channels}.png`, Buffer.from(await blob.arrayBuffer()));\n}\n"
    )
    subprocess.run(["node", script, tmp_path], check=True, timeout=60)
    found = [open_image(tmp_path / f"{channels}.png") for channels in (1, 3, 4)]
    assert mark_of(found[0]) == [
        {"student": name, "digest": "d", "precision": "fp32", "num_inference_steps": 2, "height": 6, "width": 5}
        | {"begins_with": "mask", "seed": 2**64 - 1, "index": 2**53 + 1, "class_label": 3}
    ]
    assert [image.info for image in found[1:]] == [{}, {}]
    for image, channels in zip(found, (1, 3, 4), strict=True):
        assert np.array_equal(np.asarray(image).reshape(6, 5, channels), pixels[..., :channels])


@pytest.fixture(scope="module")
def page(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("no npm here: install Node.js")
    folder = tmp_path_factory.mktemp("page") / "web"
    export(tiny_student, ["web"], web_dir=folder)
    return folder


def test_the_folder_is_whole_and_a_space(page: Path) -> None:
    config = check_page(page)
    assert set(config["engines"]) == {"wasm", "webgpu"}
    assert config["startsFrom"] == ["image", "mask"]
    assert {path.name for path in (page / "model").iterdir()} == {"generator.fp32.onnx", "denoiser.fp32.onnx"}
    _, head, body = (page / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["sdk"] == "static"
    assert yaml.safe_load(head)["license"] == "mit"
    assert "# tiny, in your browser" in body
    assert "Microsoft" in (page / "THIRD_PARTY.txt").read_text()
    for path in page.glob("*.*"):  # no address that a visitor's browser would follow by itself
        if path.suffix in (".html", ".js", ".css"):
            assert "://" not in path.read_text().replace("http://www.w3.org/2000/svg", "")


def test_it_is_replaced_unless_somebody_worked_in_it(page: Path, tiny_student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(page, tmp_path / "web"))
    (copy / ".git").mkdir()
    (copy / ".git/HEAD").write_text("ref: refs/heads/main\n")
    build_page(tiny_student, copy, engines=("wasm",))
    assert not (copy / "ort/ort.webgpu.min.mjs").exists()
    assert (copy / ".git/HEAD").read_text() == "ref: refs/heads/main\n"
    (copy / "CNAME").write_text("example.org\n")
    with pytest.raises(InvalidRequest, match=r"CNAME in .* is not part of the page"):
        build_page(tiny_student, copy)
    (copy / "CNAME").unlink()
    (copy / "style.css").write_text("body { color: red }")
    with pytest.raises(InvalidRequest, match=r"style.css of the page in .* was changed"):
        build_page(tiny_student, copy)
    assert (copy / "style.css").read_text() == "body { color: red }"


def test_what_it_refuses(
    tiny_student: Path, bare_student: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
) -> None:
    with pytest.raises(ExportError, match=r"has no graphs in fp32, which a page runs; make them first: redif export"):
        build_page(bare_student, tmp_path / "web")
    with pytest.raises(InvalidRequest, match="precision is 'bf16'; a page takes one of fp32, fp16, int8"):
        build_page(tiny_student, tmp_path / "web", precision="bf16")
    with pytest.raises(InvalidRequest, match="engines are webgpu; give wasm"):
        build_page(tiny_student, tmp_path / "web", engines=("webgpu",))
    with pytest.raises(InvalidRequest, match="is inside the student's folder"):
        build_page(tiny_student, tiny_student / "web")
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    if shutil.which("npm"):
        with pytest.raises(InvalidRequest, match=r"mine holds no student\.json"):
            build_page(tiny_student, other)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("family", ["stable_diffusion", "dit"])
def test_students_with_more_than_a_network_are_refused_before_the_work(tmp_path: Path, family: str) -> None:
    import pipelines

    from redif_sdk.distill import import_pipeline

    prompts = pipelines.PROMPTS if family == "stable_diffusion" else None
    folder = tmp_path / "student"
    import_pipeline(getattr(pipelines, family)(), folder, steps=[2], prompts=prompts)
    does = "takes prompts" if prompts else "decodes its latents with a network"
    for refused in (lambda: export(folder, ["onnx", "web"]), lambda: build_page(folder, tmp_path / "web")):
        with pytest.raises(
            UnsupportedModel, match=rf"{does}, which is not supported in a page; serve it instead: redif serve"
        ):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert not (folder / "onnx").exists()


def test_without_npm_it_says_what_to_do(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=rf"npm is not installed, and a page needs onnxruntime-web@{RUNTIME_VERSION}"):
        build_page(tiny_student, tmp_path / "web")
    assert not (tmp_path / "web").exists()


def test_what_npm_brings_is_checked(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process in npm's place brings an archive with other files; and one that fails is quoted."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(binaries), prepend=os.pathsep)
    script = binaries / "npm"
    inside = tmp_path / "package/dist"
    inside.mkdir(parents=True)
    (inside / "ort.wasm.min.mjs").write_text("fetch('https://evil.example')")
    script.write_text(
        f"#!{sys.executable}\nimport sys, tarfile\n"
        "with tarfile.open(sys.argv[-1] + '/x.tgz', 'w:gz') as tar:\n"
        f"    tar.add({str(tmp_path / 'package')!r}, 'package')\n"
    )
    script.chmod(0o755)
    with pytest.raises(
        ExportError, match=r"ort.wasm.min.mjs of onnxruntime-web@.* has another SHA-256 than this release"
    ):
        build_page(tiny_student, tmp_path / "web")
    script.write_text("#!/bin/sh\necho 'ENOTFOUND registry' >&2\nexit 1\n")
    with pytest.raises(ExportError, match=r"npm could not bring onnxruntime-web@.*ENOTFOUND registry"):
        build_page(tiny_student, tmp_path / "web")
    assert not (tmp_path / "web").exists()


@needs_npm
def test_the_command(tiny_student: Path, page: Path, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    student = copy_of(tiny_student)
    redif = [sys.executable, "-m", "redif_sdk.cli.main", "export", str(student), "--target", "web"]
    code = "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *redif[3:], "--web-engine", "wasm", "--no-marks", "--json", "-"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["folder"] == str(tmp_path / "tiny-web")
    made = check_page(tmp_path / "tiny-web")
    assert (made["name"], made["mark"]) == ("tiny", None)
    assert "python -m http.server" in done.stderr
    assert not list(student.glob("*web*"))
    wrong = subprocess.run(
        [sys.executable, "-c", code, "export", str(student), "--web-dir", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "redif: --web-dir needs --target web"
