"""NaN and infinite values in images are errors on every path, though the fused graph gives uint8."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.artifact.records import Graph
from redif_sdk.drawing import Drawing
from redif_sdk.errors import NonFiniteOutput, RedifError, RuntimeUnavailable
from redif_sdk.runtimes import finite, onnxruntime
from tests.nonfinite import BAD_CLASS, poisoned


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=["nan", "inf"])
def broken(request: pytest.FixtureRequest, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned(tiny_student, tmp_path_factory.mktemp("poisoned") / "tiny", request.param)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_fused_graph_names_the_images(broken: Path, tiny_student: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    pipe = FastPipeline.from_pretrained(broken, runtime=runtime, precision="fp32", num_threads=1)
    assert pipe.runtime_info["component"] == "generator"
    with pytest.raises(
        NonFiniteOutput, match=r"2 of 4 images hold NaN or infinite values \(positions 1, 3\)"
    ) as caught:
        pipe(class_labels=[0, BAD_CLASS, 1, BAD_CLASS], seed=0)
    assert caught.value.images == (1, 3)
    assert isinstance(caught.value, RedifError)
    assert isinstance(caught.value, RuntimeError)
    sound = FastPipeline.from_pretrained(tiny_student, runtime=runtime, precision="fp32", num_threads=1)
    wanted = sound(class_labels=[0, 1], seed=0, output_type="uint8").images
    assert np.array_equal(pipe(class_labels=[0, 1], seed=0, output_type="uint8").images, wanted)


def test_single_steps_name_the_images(broken: Path) -> None:
    pipe = FastPipeline.from_pretrained(broken, runtime="onnxruntime", num_threads=1)
    with pytest.raises(NonFiniteOutput) as caught:
        pipe(class_labels=[0, BAD_CLASS], seed=0, callback_on_step_end=lambda *_: None)
    assert caught.value.images == (1,)
    with pytest.raises(NonFiniteOutput):
        list(pipe.stream(class_labels=BAD_CLASS, seed=0))
    with pytest.raises(NonFiniteOutput):
        pipe.generate_array(np.zeros((1, 1, 4, 14, 14), np.float32), [BAD_CLASS])
    assert len(list(pipe.stream(class_labels=0, seed=0))) == 2


def test_an_engine_that_gives_uint8_alone_is_checked_by_single_steps(
    broken: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As TensorRT's: the images of NaN are constant, so these are computed again, where it can be done."""

    def unchanged(model: bytes, graph: Graph) -> tuple[bytes, Graph]:
        return model, graph

    monkeypatch.setattr(onnxruntime, "with_levels", unchanged)
    pipe = FastPipeline.from_pretrained(broken, runtime="onnxruntime", num_threads=1)
    with pytest.raises(NonFiniteOutput) as caught:
        pipe(class_labels=[0, BAD_CLASS], seed=0)
    assert caught.value.images == (1,)

    def absent(*_: object) -> None:
        raise RuntimeUnavailable("no denoiser")

    monkeypatch.setattr(Drawing, "_stepped", absent)
    assert pipe(class_labels=[0], seed=0).images
    assert not caplog.text
    pipe(class_labels=[BAD_CLASS], seed=0)
    assert "constant images were not checked for NaN: no denoiser" in caplog.text


def test_only_the_generator_of_our_exporter_is_changed(tiny_student: Path) -> None:
    manifest = FastPipeline.from_pretrained(tiny_student).manifest
    for component in ("generator", "denoiser"):
        graph = manifest.graph(component, "fp32")
        assert graph is not None
        data = (tiny_student / graph.file).read_bytes()
        model, changed = finite.with_levels(data, graph)
        assert (model != data) == (component == "generator")
        assert [spec.name for spec in changed.outputs][1:] == [finite.LEVELS] * (component == "generator")
        assert finite.with_levels(b"another exporter's", graph) == (b"another exporter's", graph)


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteOutput([1, 2], 4)))
    assert (error.images, error.batch, str(error)) == ((1, 2), 4, str(NonFiniteOutput([1, 2], 4)))
