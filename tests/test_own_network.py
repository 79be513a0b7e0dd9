"""A student whose network is any torch module: saved, exported, and from then on a student like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blackbox import CONFIG, black_box
from mixture import Conditional, make_teacher
from networks import Tiny
from torch import Tensor, nn

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.distill import Student, distill, import_pipeline, load_student
from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel
from redif_sdk.export import export, verify
from redif_sdk.export.verify import summary
from redif_sdk.hub.push import check_gate
from redif_sdk.sampling.noise import noise

pytestmark = pytest.mark.filterwarnings("ignore::redif_sdk.errors.WorseThanStart")


class Tied(nn.Module):
    """Two layers that share their weights; a table that is computed and not saved; an output with ``.sample``."""

    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(16.0) / 16, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Any:
        hidden = self.first(x.flatten(1)) + self.get_buffer("table") + t[:, None] / 1000
        return self.Output(self.second(hidden.tanh()).view_as(x))


def distilled(network: nn.Module, folder: Path, classes: bool = False) -> Student:
    teacher = make_teacher() if classes else black_box()
    student = distill(teacher, CONFIG, student=network, progress=False)
    student.save_pretrained(folder)
    return student


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    folder = tmp_path_factory.mktemp("own") / "student"
    student = distilled(Conditional(), folder, classes=True)
    export(folder, network=Conditional(), batches=(1, 2), runtimes=["onnxruntime"])
    return student, folder


def test_the_folder_names_the_class_and_has_the_weights(tmp_path: Path) -> None:
    student = distilled(Tiny(), tmp_path / "student")
    manifest = StudentFolder(tmp_path / "student").manifest
    assert manifest.network.class_path == "networks.Tiny"
    assert manifest.network.call == "x, t, condition"
    files = {entry.path for entry in manifest.files}
    assert files == {"model_index.json", "network/model.safetensors", "scheduler/scheduler_config.json"}
    again = load_student(tmp_path / "student", network=Tiny())
    assert np.array_equal(again.images(3, 4), student.images(3, 4))


def test_from_then_on_it_is_a_student_like_any_other(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    rows = verify(folder, ["onnxruntime"])
    assert summary(rows) == ""
    assert {row["component"] for row in rows} >= {"denoiser", "generator", "loop"}
    pipe = FastPipeline.from_pretrained(folder, runtime="onnxruntime")
    found = pipe(class_labels=[0, 1], seed=[(5, 0), (5, 1)], output_type="uint8").images
    start = torch.from_numpy(noise([(5, 0), (5, 1)], student.teacher.shape)[0])
    with torch.no_grad():
        wanted = student.policy().sample(start, torch.tensor([0, 1])).clamp(-1, 1)
    levels = ((wanted + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - levels).max() <= 1
    assert "FastPipeline" in (folder / "README.md").read_text()
    check_gate(StudentFolder(folder), allow_unverified=False)  # push takes it


def test_its_class_is_never_imported(exported: tuple[Student, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name in the manifest is text: nothing follows it, whatever it is."""
    _, folder = exported
    monkeypatch.setitem(sys.modules, "mixture", None)  # importing it would now raise ImportError
    assert FastPipeline.from_pretrained(folder)(class_labels=[0], seed=1).images
    verify(folder, ["onnxruntime"])
    with pytest.raises(UnsupportedModel, match=r"is a mixture\.Conditional, no class of diffusers.*network=module"):
        load_student(folder)
    with pytest.raises(UnsupportedModel, match=r"mixture\.Conditional is not a class of diffusers; .*network=module"):
        export(folder)


def test_shared_weights_and_other_outputs(tmp_path: Path) -> None:
    student = distilled(Tied(), tmp_path / "student")
    export(tmp_path / "student", network=Tied(), batches=(1,), runtimes=["onnxruntime"])
    assert np.array_equal(load_student(tmp_path / "student", network=Tied()).images(0, 2), student.images(0, 2))


def test_another_module_is_refused(exported: tuple[Student, Path]) -> None:
    _, folder = exported
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InvalidRequest, match=r"not those of a Conditional: body\.0\.bias has shape \(64,\)"):
        export(folder, network=Conditional(width=32))
    with pytest.raises(InvalidRequest, match=r"not those of a Tiny: .* is not the module's"):
        load_student(folder, network=Tiny())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_training_goes_on_from_its_folder(exported: tuple[Student, Path]) -> None:
    _, folder = exported
    again = distill(make_teacher(), CONFIG, student=Conditional(), start=folder, progress=False)
    assert isinstance(again.inner, Conditional)


def test_a_black_box_is_imported_with_its_module(tmp_path: Path) -> None:
    manifest = import_pipeline(black_box(), tmp_path / "student", [1, 2])
    assert manifest.network.is_own
    export(tmp_path / "student", network=Tiny(), batches=(1,), runtimes=["onnxruntime"])


def test_what_it_can_and_cannot_do_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    distill(black_box(), CONFIG)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("the student is a Tiny: its weights are saved")
    assert "export(folder, network=module)" in lines[0]


def test_a_pipeline_keeps_a_network_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines

    from redif_sdk.distill import Teacher

    monkeypatch.setattr(Teacher, "follow", lambda *_: pytest.fail("the teacher was sampled"))
    with pytest.raises(UnsupportedModel, match="a DiTPipeline is saved with a network of diffusers"):
        distill(pipelines.dit(), CONFIG, student=Tiny(), progress=False)


def test_manifests_of_older_formats_are_read(tmp_path: Path) -> None:
    """A 1.3 manifest says nothing of `call`."""
    distilled(Tiny(), tmp_path / "student")
    document = json.loads((tmp_path / "student" / "redif.json").read_text())
    document["network"] |= {"class_path": "diffusers.UNet2DModel"}
    del document["network"]["call"]
    old = Manifest.model_validate(document | {"format_version": "1.3"})
    assert old.network.call == "diffusers"
    changed = old.model_copy(update={"network": old.network.model_copy(update={"call": "os.system"})})
    with pytest.raises(ManifestError, match="network"):
        Manifest.from_bytes(changed.digested().to_bytes())
