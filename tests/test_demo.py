"""The demo without a browser: what it makes, what it refuses, its chart, and the endpoints that programs call.

What a visitor sees and does is tested in tests/browser.
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.record import record
from redif_sdk.demo import charts
from redif_sdk.demo.charts import CALLS, DISTANCE, MILLISECONDS, SAMPLER, frame, points
from redif_sdk.demo.present import card_text, figures
from redif_sdk.demo.studio import NOTHING, SAME_STEPS, Studio, parse_seed, random_seed
from redif_sdk.errors import InvalidRequest
from redif_sdk.marks.signature import signature_of
from redif_sdk.marks.xmp import mark_of
from redif_sdk.safety import SafetyFilter
from tests.prompted import EXAMPLES, build_prompted
from tests.test_safety_filter import SIDE, classifier, described
from tests.test_signature import certificate, private

ROOT = Path(__file__).resolve().parent.parent
REDIF = (sys.executable, "-c", "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main; main()")


@pytest.fixture(scope="module")
def pipe(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")


@pytest.fixture(scope="module")
def studio(pipe: FastPipeline) -> Studio:
    """The student is its own teacher: their pictures must be equal."""
    return Studio({"tiny": pipe}, pipe)


def arrays(pictures: list[tuple[Image.Image, str]]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture, _ in pictures])


@pytest.mark.parametrize("previews", [False, True])
def test_its_pictures_are_the_pipelines(studio: Studio, pipe: FastPipeline, previews: bool) -> None:
    order = studio.order("tiny", "c", 3, "7:2", 10, previews=previews, compare=SAME_STEPS)
    *before, last = studio.make(order)
    seeds = [(7, 2 + place) for place in range(10)]
    wanted = pipe(["c"] * 10, num_inference_steps=3, seed=seeds, output_type="uint8").images[..., 0]
    assert np.array_equal(arrays(last.images), wanted)
    assert np.array_equal(arrays(last.compared), wanted)
    assert [caption for _, caption in last.images][:2] == ["seed 7:2", "seed 7:3"]
    assert last.done == 10
    assert last.seconds > 0
    assert len(before) > 1  # something is shown before all is there
    if previews:
        estimates = list(pipe.stream("c", num_inference_steps=3, seed=[(7, 2)]))
        assert np.array_equal(arrays(last.formed[:2]), np.stack([np.asarray(each) for each in estimates[:2]]))
        assert len(last.formed) == 20


def test_a_wish_that_cannot_be_is_told_what_can(studio: Studio, pipe: FastPipeline, plain_student: Path) -> None:
    for wish, said in (
        (("tiny", "c", 5, "0", 1), "choose from 2, 3"),
        (("other", "c", 2, "0", 1), "there are tiny"),
        (("tiny", "c", 2, "x", 1), "give an integer, as in 7, or 7:2"),
        (("tiny", "c", 2, str(1 << 64), 1), "below 2^64"),
        (("tiny", "c", 2, "0", 17), "request 1 to 16"),
        (("tiny", "c", 2, "0", 1.5), "request 1 to 16"),
    ):
        with pytest.raises(InvalidRequest, match=re.escape(said)):
            studio.order(*wish)
    with pytest.raises(InvalidRequest, match="is not a class of tiny"):
        list(studio.make(studio.order("tiny", "zebra", 2, "0", 1)))
    with pytest.raises(InvalidRequest, match="use one of nothing"):
        studio.order("tiny", "c", 2, "0", 1, compare="Monet")
    plain = FastPipeline.from_pretrained(plain_student, runtime="onnxruntime")
    with pytest.raises(InvalidRequest, match="cannot be the teacher of"):
        Studio({"tiny": pipe}, plain)
    assert Studio({"plain": plain}).comparisons() == [NOTHING]


def test_seeds() -> None:
    assert parse_seed(" 7 ") == (7, 0)
    assert parse_seed(f"{(1 << 64) - 1}:12") == ((1 << 64) - 1, 12)
    assert len({random_seed() for _ in range(20)}) > 15
    for text in ("", "-1", "1:2:3", "7:", "٣", "1e3"):
        with pytest.raises(InvalidRequest, match="the seed is"):
            parse_seed(text)


def shown(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """The components that the page has for these students' measurements, by their kind."""
    return {type(part).__name__: part for part in charts.show(points(manifests))}


@pytest.mark.filterwarnings("ignore")
def test_the_plot_shows_what_was_measured(
    tiny_student: Path, copy_of: Callable[[Path], Path], pipe: FastPipeline
) -> None:
    assert "redif eval DIR --save" in shown({"tiny": pipe.manifest})["Markdown"].value
    folder = copy_of(tiny_student)
    quality = [
        {"method": "teacher", "num_inference_steps": 50, "network_calls": 100, "fd_teacher": 0.0},
        {"method": "dpm-solver++", "num_inference_steps": 2, "network_calls": 4, "fd_teacher": 17.5},
        {"method": "ddim", "num_inference_steps": 2, "network_calls": 2, "fd_teacher": 7.25},
    ]
    by_calls = shown({"<b>tiny": record(folder, quality)})["ScatterPlot"]
    assert (by_calls.x, by_calls.y, by_calls.color) == (CALLS, DISTANCE, SAMPLER)
    speed = {"batch": 1, "num_inference_steps": 2, "runtime": "onnxruntime", "precision": "fp32"}
    manifest = record(
        folder,
        [
            speed | {"contender": "fastpipeline", "seconds_median": 0.004},
            speed | {"contender": "onnxruntime", "seconds_median": 0.003},
            speed | {"contender": "fastpipeline", "seconds_median": 0.0004, "batch": 8},
            speed | {"contender": "diffusers-pipeline", "seconds_median": 0.2, "num_inference_steps": 50},
        ],
    )
    table = frame(points({"tiny": manifest})).set_index(SAMPLER)
    assert table[MILLISECONDS]["tiny, 2 steps"] == pytest.approx(4)
    assert table[MILLISECONDS]["teacher 50"] == pytest.approx(200)
    assert np.isnan(table[MILLISECONDS]["dpm-solver++ 2"])
    assert dict(table[DISTANCE]) == {"tiny, 2 steps": 7.25, "teacher 50": 0.0, "dpm-solver++ 2": 17.5}
    parts = shown({"tiny": manifest})
    assert parts["ScatterPlot"].x == MILLISECONDS
    assert len(parts["ScatterPlot"].value["data"]) == 2  # what was not timed is in the table alone
    assert len(parts["Dataframe"].value["data"]) == 3


def test_a_card_shows_its_own_pictures_and_asks_nobody(tiny_student: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = StudentFolder(copy_of(tiny_student))
    text = card_text(folder.manifest, folder)
    assert not text.startswith("---")
    assert "](data:image/png;base64," in text
    (folder.path / "README.md").write_text(
        "# mine\n\n![a cat](https://example.org/cat.png)\n\n![x](samples/../../y.png)"
    )
    assert card_text(folder.manifest, folder).split() == ["#", "mine", "*a", "cat*", "*x*"]


# ---------------------------------------------------------------------- the command, and its endpoints


@contextmanager
def demo_of(*folders: Path, options: Sequence[str | Path] = ()) -> Iterator[str]:
    """The address of `redif demo` in a process of its own, which ends cleanly when it is told to."""
    process = subprocess.Popen(
        [*REDIF, "demo", *map(str, folders), "--port", str(free_port()), *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_PROXY": "*"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{', '.join(folder.name for folder in folders)} at "), process.communicate()[1]
    try:
        yield line.partition(" at ")[2].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def address(tiny_student: Path) -> Iterator[str]:
    with demo_of(tiny_student) as url:
        yield url


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.filterwarnings("ignore")
def test_the_documented_client_works(address: str, pipe: FastPipeline, tmp_path: Path) -> None:
    """The example of docs/serving.md, run as it stands but for the address and the class."""
    text = (ROOT / "docs/serving.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "# gradio_client" in block)
    assert "http://127.0.0.1:7860" in example
    example = example.replace("http://127.0.0.1:7860", address).replace("Bag", "c").replace("=4", "=3")
    scope: dict[str, Any] = {}
    exec(compile(example, "docs/serving.md", "exec"), scope)
    picture = np.asarray(Image.open(scope["file"]).convert("L"))
    wanted = pipe("c", num_inference_steps=3, seed=7, output_type="uint8").images[0, :, :, 0]
    assert np.array_equal(picture, wanted)
    assert scope["details"]["seeds"] == [["7", 0], ["7", 1]]
    scope["client"].close()


@pytest.mark.filterwarnings("ignore")
def test_the_endpoints_tell_programs_what_is_wrong(address: str) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    students = client.predict(api_name="/students")
    assert [student["name"] for student in students] == ["tiny"]
    assert students[0]["classes"] == list("abcdefghij")
    assert students[0]["num_inference_steps"] == [2, 3]
    with pytest.raises(Exception, match="is not a class of tiny"):
        client.predict(prompt="zebra", api_name="/generate")
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/students", "/generate"}
    client.close()


@pytest.mark.filterwarnings("ignore")
def test_a_page_of_prompts(tiny_student: Path, tmp_path: Path) -> None:
    """A text-to-image student, with a class-conditional one beside it in the same page."""
    from gradio_client import Client

    folder = build_prompted(tmp_path / "prompted")
    prompted = FastPipeline.from_pretrained(folder, runtime="onnxruntime")
    with demo_of(folder, tiny_student) as url:
        client = Client(url, verbose=False)
        students = client.predict(api_name="/students")
        assert [(student["prompts"], bool(student["classes"])) for student in students] == [
            (EXAMPLES, False),
            (None, True),
        ]
        made = client.predict(prompt="Blue star!", num_inference_steps=3, seed="7", num_images=2, api_name="/generate")
        wanted = prompted("Blue star!", num_images_per_prompt=2, num_inference_steps=3, seed=7, output_type="uint8")
        shown = np.stack([np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in made[0]])
        assert np.abs(shown.astype(int) - wanted.images).max() <= 1
        marks = [mark_of(Image.open(io.BytesIO(Path(entry["image"]).read_bytes())))[0] for entry in made[0]]
        assert [(mark["prompt"], mark["seed"], mark["index"]) for mark in marks] == [
            ("Blue star!", 7, n) for n in (0, 1)
        ]
        assert client.predict(prompt="c", student="tiny", height=28, width=28, api_name="/generate")[0]
        with pytest.raises(Exception, match="prompt is required, for example"):
            client.predict(prompt=None, api_name="/generate")
        client.close()


def half_flagged(pipe: FastPipeline, folder: Path) -> tuple[Path, list[bool]]:
    """A safety filter that flags some of the images of class "c" of seed 7, and which of the first four."""
    images = pipe("c", num_images_per_prompt=4, num_inference_steps=3, seed=7, output_type="uint8").images
    file = classifier(folder / "bright.onnx")
    scores = SafetyFilter.load(file, size=(SIDE, SIDE), classes=(1,)).scores(np.repeat(images, 3, axis=3))
    threshold = float(np.sort(scores)[1:3].mean())
    return described(file, threshold=threshold, action="raise"), (scores > threshold).tolist()


def test_a_studio_says_which_images_are_blocked(tiny_student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    """Of the student's images, of previews, and of the teacher's; nobody's request ends with an error."""
    file, flags = half_flagged(pipe, tmp_path)
    filtering = FastPipeline.from_pretrained(
        tiny_student, runtime="onnxruntime", safety_filter=SafetyFilter.load(file, action="black")
    )
    studio = Studio({"tiny": filtering}, filtering)
    *_, last = studio.make(studio.order("tiny", "c", 3, "7", 4, compare=SAME_STEPS))
    assert last.blocked == flags
    captions = [f"seed 7{f':{n}' * bool(n)}{', blocked by the safety filter' * flag}" for n, flag in enumerate(flags)]
    assert [caption for _, caption in last.images] == captions
    assert [caption for _, caption in last.compared] == captions
    assert [image.getbbox() is None for image, _ in last.images] == flags
    assert "**2 blocked by the safety filter**" in figures(last)
    none = FastPipeline.from_pretrained(
        tiny_student, runtime="onnxruntime", safety_filter=SafetyFilter.load(file, action="black", threshold=-1.0)
    )
    *_, last = Studio({"tiny": none}).make(studio.order("tiny", "c", 3, "7", 1, previews=True))
    assert [caption for _, caption in last.formed] == [
        f"1, step {step}, blocked by the safety filter" for step in (1, 2)
    ]
    *_, last = Studio({"tiny": pipe}).make(studio.order("tiny", "c", 3, "7", 1))
    assert last.blocked is None
    assert "blocked" not in figures(last)


@pytest.mark.filterwarnings("ignore")
def test_the_page_blocks_and_signs(tiny_student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    """`redif demo` with a filter and a certificate: flagged images are black and said, and every file is signed."""
    pytest.importorskip("c2pa")
    from gradio_client import Client

    file, flags = half_flagged(pipe, tmp_path)
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "cert.pem").write_bytes(certificate("Tester", key, "Root", root))
    (tmp_path / "key.pem").write_bytes(private(key))
    options = ["--safety-filter", file, "--c2pa-cert", tmp_path / "cert.pem", "--c2pa-key", tmp_path / "key.pem"]
    wanted = pipe("c", num_images_per_prompt=4, num_inference_steps=3, seed=7, output_type="uint8").images[..., 0]
    with demo_of(tiny_student, options=options) as url:
        client = Client(url, verbose=False)
        gallery, *_, report, details = client.predict(
            prompt="c", num_inference_steps=3, seed="7", num_images=4, api_name="/generate"
        )
        client.close()
    assert details["nsfw_content_detected"] == flags
    assert "2 blocked by the safety filter" in report
    for entry, flag, image in zip(gallery, flags, wanted, strict=True):
        assert ("blocked by the safety filter" in entry["caption"]) == flag
        data = Path(entry["image"]).read_bytes()
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert np.array_equal(shown, np.zeros_like(image) if flag else image)
        signed = signature_of(data, "PNG")
        assert signed is not None
        assert signed.unchanged
        assert mark_of(Image.open(io.BytesIO(data)))[0]["seed"] == 7


def test_a_visitors_image_is_started_from(tiny_student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    """As the editor sends it: what is painted over is made anew, the rest stays; with few steps the least there is."""
    from gradio_client import Client, handle_file

    height, width, _ = pipe.manifest.image_shape
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert("L")
    given.convert("RGBA").save(tmp_path / "given.png")
    painted = Image.new("RGBA", (width, height))
    painted.paste((255, 255, 255, 255), (4, 4, 20, 12))
    painted.save(tmp_path / "painted.png")
    mask = Image.new("L", (width, height))
    mask.paste(255, (4, 4, 20, 12))
    steps = max(pipe.manifest.supported_steps)
    asked: dict[str, Any] = {"seed": "7", "num_inference_steps": steps, "num_images": 2, "api_name": "/generate"}
    wanted: dict[str, Any] = {"seed": 7, "num_inference_steps": steps, "num_images_per_prompt": 2}
    with demo_of(tiny_student) as url:
        client = Client(url, verbose=False)
        for layers, strength, more in (
            ([], 0.5, {"strength": 0.5}),
            ([], 0.05, {"strength": 1 / steps}),
            ([handle_file(tmp_path / "painted.png")], 0.5, {"mask_image": mask}),
        ):
            value = {"background": handle_file(tmp_path / "given.png"), "layers": layers, "composite": None}
            made = client.predict(prompt="d", image=value, strength=strength, previews=True, **asked)
            shown = [np.asarray(Image.open(io.BytesIO(Path(entry["image"]).read_bytes()))) for entry in made[0]]
            plain = pipe("d", image=given, output_type="uint8", **wanted, **more).images[..., 0]
            assert np.abs(np.stack(shown).astype(int) - plain.astype(int)).max() <= 1, more
            rows = steps if layers else max(1, int(strength * steps))
            assert len(made[2]["value"] if isinstance(made[2], dict) else made[2]) == 2 * (rows - 1)  # after each step
        empty = {"background": None, "layers": [], "composite": None}
        made = client.predict(prompt="d", image=empty, strength=0.5, **asked)
        first = np.asarray(Image.open(io.BytesIO(Path(made[0][0]["image"]).read_bytes())))
        assert np.abs(first.astype(int) - pipe("d", output_type="uint8", **wanted).images[0, ..., 0]).max() <= 1
        client.close()


def test_a_studio_of_prompts(tmp_path: Path, pipe: FastPipeline) -> None:
    folder = build_prompted(tmp_path / "prompted")
    prompted = FastPipeline.from_pretrained(folder, runtime="onnxruntime")
    studio = Studio({"prompted": prompted}, prompted)
    studio.warm_up()
    order = studio.order("prompted", "red heart", 3, "5", 2, previews=True, compare=SAME_STEPS)
    *_, last = studio.make(order)
    wanted = prompted("red heart", num_images_per_prompt=2, num_inference_steps=3, seed=5, output_type="uint8").images
    assert np.abs(arrays(last.images).astype(int) - wanted).max() <= 1
    assert np.array_equal(arrays(last.images), arrays(last.compared))
    assert len(last.formed) == 4
    with pytest.raises(InvalidRequest, match="prompt is required"):
        list(studio.make(studio.order("prompted", None, 3, "5", 1)))
    with pytest.raises(InvalidRequest, match="kinds of prompt differ"):
        Studio({"prompted": prompted}, pipe)


def test_the_command_refuses(
    tiny_student: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from redif_sdk.cli.main import main

    def error(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["redif", "demo", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert caught.value.code == 2, said
        assert len(said.strip().splitlines()) == 1, said
        return said

    assert "redif import" in error(tiny_student, "--teacher", teacher_folder)
    assert "two students are named tiny" in error(tiny_student, tiny_student)
    assert "--c2pa-cert needs --c2pa-key too" in error(tiny_student, "--c2pa-cert", "cert.pem")
    assert "no.onnx" in error(tiny_student, "--safety-filter", "no.onnx")


def test_the_command_refuses_a_port_that_is_in_use(tiny_student: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [*REDIF, "demo", str(tiny_student), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "is the port in use?" in done.stderr


@pytest.mark.slow
def test_a_teacher_of_redif_import_is_shown_beside(teacher_folder: Path, tmp_path: Path) -> None:
    """What the command says of a pipeline that only torch runs is true: import it, export it, and it is shown."""
    from redif_sdk.distill.student import import_pipeline
    from redif_sdk.distill.teachers.base import Teacher
    from redif_sdk.export import export

    import_pipeline(Teacher.load(teacher_folder), tmp_path / "few", [2])
    import_pipeline(Teacher.load(teacher_folder), tmp_path / "many", [5, 2])
    pipes = []
    for name in ("few", "many"):
        export(tmp_path / name, batches=[1])
        pipes.append(FastPipeline.from_pretrained(tmp_path / name, runtime="onnxruntime"))
    studio = Studio({"few": pipes[0]}, pipes[1])
    assert studio.comparisons() == [NOTHING, "the teacher at 5 steps", SAME_STEPS]
    label = None if pipes[0].manifest.condition is None else "0"
    for compare, equal in ((SAME_STEPS, True), ("the teacher at 5 steps", False)):
        *_, last = studio.make(studio.order("few", label, 2, "3", 2, compare=compare))
        assert np.array_equal(arrays(last.images), arrays(last.compared)) == equal
