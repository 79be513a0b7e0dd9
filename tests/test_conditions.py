"""A teacher that is conditioned on a user's own arrays: distilled, rewarded, saved, exported and run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from blocks import ROOT, blocks
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Guidance
from redif_sdk.cli.main import app
from redif_sdk.distill import (
    ConditionData,
    DistillConfig,
    Student,
    Teacher,
    distill,
    import_pipeline,
    load_student,
    pool,
)
from redif_sdk.distill.rewards import Batch, EndpointReward
from redif_sdk.distill.teachers.base import Teacher as AnyTeacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel
from redif_sdk.export import export, verify
from redif_sdk.export.verify import summary
from redif_sdk.sampling.noise import noise
from redif_sdk.serving.local import LocalBackend
from redif_sdk.serving.settings import ServeSettings
from tests.test_reward_server import reward_server

pytestmark = pytest.mark.filterwarnings("ignore::redif_sdk.errors.WorseThanStart")

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "pool_size": 32, "batch_size": 8}
Seen = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def enlarge() -> ModuleType:
    """The example of docs/adapters.md, as it stands there."""
    (block,) = [block for block in blocks(ROOT / "docs/adapters.md", "python") if block.title == "enlarge.py"]
    module = ModuleType("enlarge")
    sys.modules["enlarge"] = module
    exec(compile(block.code, "enlarge.py", "exec"), vars(module))
    return module


def run(enlarge: ModuleType, **settings: Any) -> Student:
    torch.manual_seed(0)
    given = {"method": "regression", "updates": 3} | settings
    return distill(enlarge.make_teacher(), DistillConfig.checked(**SETTINGS | given), progress=False)


@pytest.fixture(scope="module")
def exported(enlarge: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    folder = tmp_path_factory.mktemp("arrays") / "student"
    student = run(enlarge)
    student.save_pretrained(folder)
    export(folder, network=enlarge.Network(), batches=(1, 3), runtimes=["onnxruntime"])
    return student, folder


def wanted(student: Student, asked: Mapping[str, Any], seeds: list[tuple[int, int]]) -> np.ndarray:
    """What torch makes of arrays that are not in the data."""
    start = torch.from_numpy(noise(seeds, student.teacher.shape)[0])
    with torch.no_grad():
        images = student.policy().sample(start, student.teacher.ask(asked)).clamp(-1, 1)
    return ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()


def test_the_exported_student_is_torchs(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    assert summary(verify(folder, ["onnxruntime"])) == ""
    pipe = FastPipeline.from_pretrained(folder, runtime="onnxruntime")
    asked = {"image": np.random.default_rng(5).uniform(-1, 1, (3, 1, 4, 4)), "invert": [0, 1, 0]}
    seeds = [(5, 0), (5, 1), (6, 0)]
    found = pipe(conditions=asked, seed=seeds, output_type="uint8").images
    assert np.abs(found.astype(int) - wanted(student, asked, seeds)).max() <= 1
    twice = pipe(conditions=asked, num_images_per_prompt=2, seed=3, output_type="uint8").images
    rows = {name: np.repeat(np.asarray(value), 2, axis=0) for name, value in asked.items()}
    assert np.abs(twice.astype(int) - wanted(student, rows, [(3, index) for index in range(6)])).max() <= 1
    drawn = noise(seeds, student.teacher.shape)
    assert np.array_equal(pipe.generate_array(drawn, asked), found)
    *_, last = pipe.stream(conditions={name: value[:1] for name, value in asked.items()}, seed=[(5, 0)])
    assert np.abs(np.asarray(last).astype(int) - found[0, :, :, 0]).max() <= 1


def test_the_condition_decides_the_image(exported: tuple[Student, Path]) -> None:
    """A graph that had dropped an input would give the same image for both."""
    pipe = FastPipeline.from_pretrained(exported[1], runtime="onnxruntime")
    small = np.full((1, 1, 4, 4), 0.8)
    light, dark = (pipe(conditions={"image": small, "invert": [n]}, seed=0).images[0] for n in (0, 1))
    assert np.mean(light) > np.mean(dark) + 100


def test_the_folder_says_what_it_takes(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    manifest = StudentFolder(folder).manifest
    assert manifest.task == "array-conditional"
    assert manifest.arrays is not None
    specs = {spec.name: (spec.dtype, spec.shape) for spec in manifest.arrays.tensors}
    assert specs == {"image": ("float32", ["batch", 1, 4, 4]), "invert": ("int64", ["batch"])}
    graph = manifest.graph("generator", "fp32")
    assert graph is not None
    kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.load(folder / graph.file).graph.input}
    assert (kinds["image"], kinds["invert"]) == (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    pipe = FastPipeline.from_pretrained(folder)
    examples = pipe.example_conditions(3)
    assert student.teacher.data is not None
    for name, value in student.teacher.data(torch.arange(3)).items():
        assert np.array_equal(examples[name], value.numpy())
    card = (folder / "README.md").read_text()
    assert "conditions=pipe.example_conditions()" in card
    assert "--condition example" in card
    assert (folder / "samples/steps-2.png").is_file()


def test_it_loads_again_and_trains_on(exported: tuple[Student, Path], enlarge: ModuleType) -> None:
    student, folder = exported
    again = load_student(folder, network=enlarge.Network())
    assert np.array_equal(again.images(3, 4), student.images(3, 4))
    teacher = enlarge.make_teacher()
    config = DistillConfig.checked(**SETTINGS, method="regression", updates=1)
    distill(teacher, config, student=enlarge.Network(), start=folder, progress=False)


def test_what_does_not_fit_is_refused(exported: tuple[Student, Path], enlarge: ModuleType) -> None:
    pipe = FastPipeline.from_pretrained(exported[1])
    image = np.zeros((1, 1, 4, 4))
    with pytest.raises(InvalidRequest, match=r"conditions must be image \(batch, 1, 4, 4\), invert \(batch\) by name"):
        pipe(seed=0)
    with pytest.raises(InvalidRequest, match=r"takes image, invert, not image$"):
        pipe(conditions={"image": image})
    with pytest.raises(InvalidRequest, match=r"image has shape \(1, 1, 5, 4\); give \(batch, 1, 4, 4\)"):
        pipe(conditions={"image": np.zeros((1, 1, 5, 4)), "invert": [0]})
    with pytest.raises(InvalidRequest, match="batch sizes"):
        pipe(conditions={"image": image, "invert": [0, 1]})
    with pytest.raises(InvalidRequest, match="give conditions, and no prompt"):
        pipe("a cat", conditions={"image": image, "invert": [0]})
    with pytest.raises(InvalidRequest, match="conditioned on arrays of one size"):
        export(exported[1], network=enlarge.Network(), sizes=[(16, 16)])
    with pytest.raises(UnsupportedModel, match=r"conditioned on arrays \(image, invert\), which redif serve"):
        LocalBackend({"student": pipe}, ServeSettings())


def test_another_student_takes_no_arrays(tiny_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(tiny_student)
    with pytest.raises(InvalidRequest, match="conditions is not supported: it takes no arrays"):
        pipe(conditions={"image": np.zeros((1, 1, 4, 4))}, seed=0)
    with pytest.raises(InvalidRequest, match="takes no arrays"):
        pipe.example_conditions()


def test_generate_reads_arrays_images_and_numbers(exported: tuple[Student, Path], tmp_path: Path) -> None:
    student, folder = exported
    levels = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "small.png")
    np.save(tmp_path / "small.npy", (levels / np.float32(127.5) - 1)[None, None])
    found, command = [], ["generate", str(folder)]
    for name in ("small.png", "small.npy"):
        conditions = ["--condition", f"image={tmp_path / name}", "--condition", "invert=1"]
        done = CliRunner().invoke(app, [*command, *conditions, "--seed", "4", "-o", str(tmp_path / f"{name}.out.png")])
        assert done.exit_code == 0, done.output
        found.append(np.asarray(Image.open(tmp_path / f"{name}.out.png")).astype(int))
    asked = {"image": levels[None, None] / 127.5 - 1, "invert": [1]}
    expected = wanted(student, asked, [(4, 0)])[0, :, :, 0]
    assert all(np.abs(image - expected).max() <= 1 for image in found)
    example = [*command, "--condition", "example", "-o", str(tmp_path / "example.png")]
    assert CliRunner().invoke(app, example).exit_code == 0
    refused = CliRunner().invoke(app, [*command, "--condition", "mask=3", "-o", str(tmp_path / "no.png")])
    assert "its inputs are image, invert" in str(refused.exception)
    assert not (tmp_path / "no.png").exists()


def test_a_reward_sees_the_arrays(enlarge: ModuleType) -> None:
    seen: Seen = []

    def closeness(batch: Batch) -> Tensor:
        seen.append(batch.conditions)
        assert batch.class_labels is None
        assert batch.prompts is None
        return -(batch.images - enlarge.enlarged(batch.conditions)).square().mean((1, 2, 3))

    run(enlarge, method="redif", reward=closeness, updates=2, schedule_updates=0)
    assert {name: value.dtype for name, value in seen[-1].items()} == {"image": torch.float32, "invert": torch.int64}
    assert len(seen[-1]["image"]) == len(seen[-1]["invert"]) > 0


def test_a_method_sees_what_was_asked_for(enlarge: ModuleType) -> None:
    teacher = enlarge.make_teacher()
    config = DistillConfig.checked(**SETTINGS, method="regression", updates=1)
    context = Trainer(teacher, config, pool.compute(teacher, 16, "train")).context
    asked = context.asked(context.pairs[3:5])
    assert asked.prompts is None
    assert asked.class_labels is None
    assert torch.equal(asked.tensors["invert"], teacher.data(torch.tensor([3, 4]))["invert"])
    classes = AnyTeacher.load("fashion-mnist").asked(torch.tensor([1, 0]))
    assert classes.class_names == ["Trouser", "T-shirt/top"]
    assert classes.tensors["class_labels"].tolist() == [1, 0]


@pytest.mark.parametrize("reward", ["feature", "discriminator"])
def test_rewards_that_know_classes_take_rows_of_arrays_for_none(enlarge: ModuleType, reward: str) -> None:
    run(enlarge, method="redif", reward=reward, updates=2, schedule_updates=0)


def test_a_reward_over_http_sees_them_too(enlarge: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text(
        "import numpy as np\n"
        "def score(images, conditions):\n"
        "    assert 'wide' not in conditions\n"
        "    small = np.stack([np.asarray(image, np.float64) for image in conditions['image']])\n"
        "    return small[:, 0, 0] + 1000 * conditions['invert'] + 10000 * conditions['pair'][:, 1]\n"
    )
    rows = 70  # more than a request takes
    image = torch.linspace(-1, 1, rows).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    data = {"image": image, "invert": np.arange(rows) % 2, "pair": np.tile([1.0, 2.0], (rows, 1))}
    teacher = Teacher.from_callable(
        lambda x, t, conditions: x,
        schedule=enlarge.SCHEDULE,
        prediction_type="sample",
        shape=(1, 8, 8),
        student=enlarge.Network(),
        conditions=data | {"wide": np.full((rows, 2000), 3.0)},
    )
    grey = torch.zeros(rows, 1, 8, 8)
    with reward_server(tmp_path / "scorer.py", "score") as url:
        found = EndpointReward(url)(Batch(grey, grey, torch.arange(rows), teacher))
    expected = ((image[:, 0, 0, 0] + 1) * 127.5).round() + 1000 * (torch.arange(rows) % 2) + 20000
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected)


def test_a_run_is_resumed_bit_for_bit_and_another_data_set_is_not(enlarge: ModuleType, tmp_path: Path) -> None:
    config = DistillConfig.checked(**SETTINGS, method="regression", updates=4, checkpoint_seconds=0)
    teacher = enlarge.make_teacher()
    pairs = pool.compute(teacher, 32, "train")
    torch.manual_seed(1)
    whole = Trainer(teacher, config, pairs).run()

    class StopError(Exception):
        pass

    def stop(share: float, figures: dict[str, float]) -> None:
        if share >= 0.75:
            raise StopError

    with pytest.raises(StopError):
        Trainer(teacher, config, pairs, tmp_path, on_progress=stop).run()
    resumed = Trainer(teacher, config, pairs, tmp_path).run(resume=True)
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = Teacher.from_callable(
        enlarge.denoiser,
        schedule=enlarge.SCHEDULE,
        prediction_type="sample",
        shape=(1, 8, 8),
        student=enlarge.Network(),
        conditions={"image": np.zeros((9, 1, 4, 4)), "invert": np.zeros(9, int)},
        num_inference_steps=10,
        value_range=(-1, 1),
    )
    with pytest.raises(InvalidRequest, match="of a run with other settings"):
        Trainer(other, config, pairs, tmp_path).run(resume=True)


# ---------------------------------------------------------------- the data


def test_data_comes_from_arrays_files_and_functions(tmp_path: Path) -> None:
    arrays = {"image": np.random.default_rng(0).normal(size=(7, 1, 2, 2)), "label": np.arange(7, dtype=np.uint8)}
    np.savez(tmp_path / "data.npz", **arrays)
    calls: list[int] = []

    def row(place: int) -> dict[str, Any]:
        calls.append(place)
        return {name: value[place] for name, value in arrays.items()}

    index = torch.tensor([6, 0, 6, 3])
    function = ConditionData.from_function(row, 7)
    every = [ConditionData.of(arrays), ConditionData.of(tmp_path / "data.npz"), function]
    for data in every:
        found = data(index)
        assert found["label"].tolist() == [6, 0, 6, 3]
        assert found["label"].dtype == torch.int64
        np.testing.assert_array_equal(found["image"].numpy(), arrays["image"].astype(np.float32)[index])
    function(index)
    assert sorted(calls) == [0, 3, 6]  # each row is read once
    assert every[0].digest == every[1].digest
    changed = ConditionData.of(arrays | {"label": np.arange(7) + 1})
    assert changed.digest != every[0].digest
    asked = every[0].ask({"image": np.ones((2, 1, 2, 2)), "label": [4, 5]})
    assert asked.tolist() == [8, 9]  # after the rows and guidance's null
    assert every[0](asked)["label"].tolist() == [4, 5]
    assert every[0](index)["label"].tolist() == [6, 0, 6, 3]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "0 arrays; give 1 to 8"),
        ({"noise": np.zeros((2, 1))}, "'noise' cannot name a condition"),
        ({"a b": np.zeros((2, 1))}, "'a b' cannot name a condition"),
        ({"a": np.zeros((2, 1)), "b": np.zeros(3)}, r"different lengths \(a 2, b 3\)"),
        ({"a": np.array([1.0, np.nan])}, "a holds NaN"),
        ({"a": np.array(["x"])}, "a has dtype <U1"),
        ({"a": np.zeros((0, 3))}, "at least one row"),
    ],
)
def test_data_that_cannot_be_a_condition_is_refused(arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        ConditionData.of(arrays)


def test_rows_of_a_function_must_be_alike(tmp_path: Path) -> None:
    data = ConditionData.from_function(lambda place: {"image": np.zeros((1, 2 + place))}, 3)
    with pytest.raises(
        InvalidRequest, match=r"condition 1 has image \(1, 3\) float32; all have image \(1, 2\) float32"
    ):
        data(torch.tensor([1]))
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(InvalidRequest, match=r"no\.npz cannot be read"):
        ConditionData.of(tmp_path / "no.npz")


def black_box(enlarge: ModuleType, **more: Any) -> AnyTeacher:
    settings = {"schedule": enlarge.SCHEDULE, "prediction_type": "sample", "num_inference_steps": 4, **more}
    return Teacher.from_callable(enlarge.denoiser, shape=(1, 8, 8), student=enlarge.Network(), **settings)


def test_guidance_mixes_with_the_null_arrays(enlarge: ModuleType) -> None:
    arrays = {"image": np.full((4, 1, 4, 4), 0.5), "invert": np.zeros(4, int)}
    null = {"image": np.zeros((1, 4, 4)), "invert": 0}
    plain = black_box(enlarge, conditions=arrays)
    guided = black_box(enlarge, conditions=ConditionData.of(arrays, null=null), guidance=Guidance(scale=3.0))
    x, t, condition = torch.zeros(2, 1, 8, 8), torch.full((2,), 999.0), torch.tensor([0, 1])
    mean = plain(x, t, condition).mean()
    torch.testing.assert_close(guided(x, t, condition).mean(), 3 * mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(InvalidRequest, match="guidance needs conditions for its unconditional half"):
        black_box(enlarge, conditions=arrays, guidance=Guidance(scale=3.0))
    with pytest.raises(InvalidRequest, match="num_classes and conditions exclude each other"):
        black_box(enlarge, conditions=arrays, num_classes=3)


def test_a_guided_teacher_on_arrays_is_distilled_not_imported(enlarge: ModuleType, tmp_path: Path) -> None:
    arrays = {"image": np.full((4, 1, 4, 4), 0.5), "invert": np.zeros(4, int)}
    data = ConditionData.of(arrays, null={"image": np.zeros((1, 4, 4)), "invert": 0})
    teacher = black_box(enlarge, conditions=data, guidance=Guidance(scale=3.0), value_range=(-1, 1))
    with pytest.raises(UnsupportedModel, match="guided and conditioned on arrays"):
        import_pipeline(teacher, tmp_path / "no", [2])
    import_pipeline(teacher, tmp_path / "student", [2], guidance_scale=1)
    assert StudentFolder(tmp_path / "student").manifest.arrays is not None


def test_altered_examples_are_refused(enlarge: ModuleType, tmp_path: Path) -> None:
    from redif_sdk.artifact.examples import example_conditions
    from redif_sdk.artifact.folder import write_manifest

    folder = tmp_path / "student"
    run(enlarge, updates=1).save_pretrained(folder)
    manifest = StudentFolder(folder).manifest
    np.savez_compressed(folder / "conditions/examples.npz", **{"conditions.image": np.zeros((2, 1, 4, 4), np.float32)})
    write_manifest(folder, manifest)
    with pytest.raises(ManifestError, match="does not hold the conditions of its manifest"):
        example_conditions(StudentFolder(folder), [0])
    document = json.loads((folder / "redif.json").read_text())
    document["condition"]["tensors"][0]["name"] = "noise"
    with pytest.raises(ValueError, match="'noise' cannot name a condition"):
        type(manifest).model_validate(document)
