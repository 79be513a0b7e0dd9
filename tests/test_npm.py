"""The npm package of the browser's generator: packed, installed into an empty folder, and used by Node."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.export import export
from redif_sdk.export.web import RUNTIME_VERSION

ROOT = Path(__file__).resolve().parent.parent
NO_NPM = "no npm here: install Node.js"

USE = """
import { loadStudent, normals, SEED_LIMIT } from "redif-web";
import * as ort from "onnxruntime-node";
import { pathToFileURL } from "node:url";

const counted = [];
const onProgress = (done, total) => counted.push([done, total]);
const student = await loadStudent(pathToFileURL(process.argv[2]), { ort, onProgress });
const images = [];
for (const request of JSON.parse(process.argv[3])) {
  const { height, width, pixels } = await student.generate({ ...request, seed: BigInt(request.seed) });
  images.push({ height, width, pixels: Buffer.from(pixels).toString("base64") });
}
const seen = [];
const stepped = await student.generate({ classLabel: 1, steps: 3, seed: 7 }, { onStep: (step) => seen.push(step) });
const refused = [];
const wrong = [{ classLabel: null }, { classLabel: 10 }, { steps: 9 }, { seed: -1 }, { height: 5 }];
for (const request of wrong.map((each) => ({ classLabel: 1, ...each }))) {
  refused.push(await student.generate(request).then(() => "", (error) => `${error.name}: ${error.message}`));
}
const missing = await loadStudent(pathToFileURL(process.argv[2] + "-not"), { ort }).catch((error) => error.message);
const aborted = await student.generate({ classLabel: 1 }, { signal: AbortSignal.abort() }).catch((error) => error.name);
const last = counted.at(-1);
const { name, steps } = student;
const noise = normals(7n, 0n, 0, 4).length;
const limit = String(SEED_LIMIT);
const raw = Buffer.from(stepped.pixels).toString("base64");
console.log(JSON.stringify({ name, steps, images, seen, refused, missing, aborted, last, stepped: raw, noise, limit }));
"""

TYPED = """
import { loadStudent, type GeneratedImage } from "redif-web";
const student = await loadStudent("https://example.org/student");
const signal = AbortSignal.timeout(9);
const image: GeneratedImage = await student.generate({ classLabel: "Dress", seed: 7n }, { signal });
export const first: number = image.pixels[0];
// @ts-expect-error: a seed is a number
await student.generate({ seed: "7" });
"""


def npm(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        ["npm", *command, "--no-audit", "--no-fund"], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("npm") is None, reason=NO_NPM)
def test_the_package_holds_the_pages_own_code(tmp_path: Path) -> None:
    package = packed(tmp_path)
    subprocess.run(["tar", "xzf", package.name], cwd=package.parent, check=True)
    inside = package.parent / "package"
    found = {path.relative_to(inside).as_posix() for path in inside.rglob("*") if path.is_file()}
    code = {"dist/generator.js", "dist/noise.js", "dist/worker.js"}
    assert found == code | {"dist/LICENSE", "README.md", "index.d.ts", "index.js", "package.json"}
    for name in code:
        assert (inside / name).read_bytes() == (ROOT / "export/page" / Path(name).name).read_bytes()
    described = json.loads((inside / "package.json").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (described["version"], described["license"]) == (project["version"], project["license"])


def packed(folder: Path) -> Path:
    """The tarball, packed in a copy, so that nothing is written into the checkout."""
    for name in ("integrations/npm", "export/page"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("dist", "node_modules"))
    shutil.copy(ROOT / "LICENSE", folder)
    npm("pack", cwd=folder / "integrations/npm")
    (tarball,) = (folder / "integrations/npm").glob("*.tgz")
    return tarball


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason=NO_NPM)
def test_node_makes_the_pipelines_images(tiny_student: Path, tmp_path: Path) -> None:
    export(tiny_student, ["web"], web_dir=tmp_path / "web")
    tarball = packed(tmp_path / "package")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "package.json").write_text(json.dumps({"type": "module", "private": True}))
    engine = f"onnxruntime-node@{RUNTIME_VERSION}"
    npm("install", str(tarball), engine, "typescript@5", "--ignore-scripts", "--omit=peer", cwd=empty)
    (empty / "use.js").write_text(USE)
    asked: list[dict[str, Any]] = [
        {"classLabel": 3, "steps": 2, "seed": "7", "index": 5},
        {"classLabel": "d", "steps": 3, "seed": str(2**64 - 1), "index": 0},
    ]
    command = ["node", "use.js", str(tmp_path / "web"), json.dumps(asked)]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", precision="fp32")
    for image, request in zip(told["images"], asked, strict=True):
        seed = [(int(request["seed"]), request["index"])]
        steps = request["steps"]
        ours = pipe(class_labels=3, seed=seed, num_inference_steps=steps, output_type="uint8").images[0]
        assert levels_off(image["pixels"], ours) <= 1
    ours = pipe(class_labels=1, seed=7, num_inference_steps=3, output_type="uint8").images[0]
    assert levels_off(told["stepped"], ours) <= 1
    assert (told["seen"], told["name"], told["steps"]) == ([0, 1], "tiny", [2, 3])
    assert told["last"][0] == told["last"][1] > 0
    for message, said in zip(
        told["refused"],
        ("give 0 to 9, or one of a, b", "classLabel is 10", "choose from 2, 3", "seed is -1", "height is 5; give 28"),
        strict=True,
    ):
        assert message.startswith("RangeError: ")
        assert said in message
    assert "student.json cannot be had (404)" in told["missing"]
    assert (told["aborted"], told["noise"], told["limit"]) == ("AbortError", 4, str(2**64))
    (empty / "typed.ts").write_text(TYPED)
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]
    compiler = empty / "node_modules/.bin/tsc"
    typed = subprocess.run(
        [compiler, *options, "typed.ts"],
        cwd=empty,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert typed.returncode == 0, typed.stdout


def levels_off(pixels: str, wanted: np.ndarray) -> int:
    """The largest difference between RGBA and a grey image."""
    made = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(*wanted.shape[:2], 4)
    assert (made[:, :, 3] == 255).all()
    return int(np.abs(made[:, :, :3].astype(int) - wanted.astype(int)).max())
