"""Export and the parity gate: real graphs of tiny networks, against torch and against plain diffusers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import SMALL, build_student
from test_pipeline import hub_cache

from redif_sdk import FastPipeline, StepTable
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.paths import MappedFile, list_files
from redif_sdk.artifact.records import Latents, Network, Postprocess
from redif_sdk.errors import (
    ExportError,
    IntegrityError,
    InvalidRequest,
    ManifestError,
    ParityError,
    RuntimeUnavailable,
    UnsupportedModel,
)
from redif_sdk.export import build, export, store, trace, verify
from redif_sdk.export.onnx import GraphDenoiser
from redif_sdk.export.verify import THRESHOLDS, Threshold, summary
from redif_sdk.images import to_uint8
from redif_sdk.runtimes import runnable

Copy = Callable[[Path], Path]


class Passing(torch.nn.Module):
    """Returns its input, whatever the time: the pictures are the noise, through the table and the postprocessing."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample * 1.0,)


class Convolution(torch.nn.Module):
    """A network that diffusers does not know, with weights of some kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(sample) + timestep[:, None, None, None] / 1000


def custom_student(folder: Path, **changes: Any) -> Path:
    """A colour student whose network is no class of diffusers: 12 x 4 x 4 latents, 3 x 8 x 8 pictures in [0, 255]."""
    (folder / "net").mkdir(parents=True)
    (folder / "net" / "config.json").write_text("{}")
    row = [500.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # x' = x0 = f
    fields: dict[str, Any] = {
        "name": "custom",
        "licence": "mit",
        "task": "unconditional",
        "step_tables": [StepTable(np.array([row]), "sample", init_scale=0.5).to_dict()],
        "latents": Latents(channels=12, height=4, width=4),
        "postprocess": Postprocess(pixel_shuffle=2, value_range=(0.0, 255.0)),
        "network": Network(class_path="my.own.Network", folder="net"),
    }
    write_manifest(folder, Manifest(**(fields | changes)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in list_files(folder)}


# ---------------------------------------------------------------- the chain


@pytest.mark.parametrize("student", ["tiny_student", "plain_student"])
def test_torch_the_numpy_loop_and_the_fused_graph_agree(student: str, request: pytest.FixtureRequest) -> None:
    rows = verify(request.getfixturevalue(student))
    assert summary(rows) == ""
    assert {row["runtime"] for row in rows} == {"numpy", *runnable()}
    found = {(row["component"], row["num_inference_steps"], row["batch"]) for row in rows}
    assert found == {(c, k, b) for c in ("noise", "denoiser", "loop", "generator") for k in (2, 3) for b in (1, 8)}
    for row in rows:
        assert row["nonfinite"] == 0
        assert row["max_abs"] <= (1 if row["component"] in ("loop", "generator") else 1e-4)
        assert row["relative_rmse"] <= 1e-4
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize("batch", [1, 8])
def test_plain_diffusers_draws_the_same_pictures(tiny_student: Path, batch: int) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(tiny_student / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(tiny_student / "scheduler")
    scheduler.set_timesteps(2)
    latents = torch.randn(batch, 4, 14, 14, generator=torch.Generator().manual_seed(batch))
    labels = torch.arange(batch) % 10
    x = latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            f = unet(x, t.float().expand(batch), class_labels=labels).sample
            x = scheduler.step(f, t, x).prev_sample
    expected = (torch.nn.functional.pixel_shuffle(x, 2) * 127.5 + 127.5).clamp(0, 255).round()

    pipe = FastPipeline.from_pretrained(tiny_student, num_threads=1)
    out = pipe(class_labels=labels.tolist(), latents=latents, num_inference_steps=2, output_type="uint8")
    assert np.abs(out.images.astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert out.images.std() > 10  # not a blank that anything would match


def test_a_batch_larger_than_at_export(tiny_student: Path) -> None:
    # diffusers' upsampling has a branch at batch 64 that torch.export could have taken for a bound
    pipe = FastPipeline.from_pretrained(tiny_student, num_threads=1)
    images = pipe(class_labels=1, num_images_per_prompt=66, seed=0, output_type="uint8").images
    alone = pipe(class_labels=1, seed=[(0, 65)], output_type="uint8").images
    assert np.abs(images[65].astype(int) - alone[0]).max() <= 1


def test_the_graphs_are_what_the_manifest_says(tiny_student: Path) -> None:
    manifest = StudentFolder(tiny_student).manifest
    for graph in manifest.graphs:
        model = onnx.load(tiny_student / graph.file)
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == [spec.name for spec in graph.inputs]
        data = model.SerializeToString()
        assert str(Path.home()).encode() not in data
        assert b".py" not in data  # no stack traces, with paths of the machine that made it
    generator, denoiser = (onnx.load(tiny_student / f"onnx/{name}.fp32.onnx") for name in ("generator", "denoiser"))
    weights = sum(len(tensor.raw_data) for tensor in denoiser.graph.initializer)
    outside = sum(tensor.ByteSize() for tensor in generator.graph.initializer)
    assert weights > 2_000_000
    assert outside < 500  # the weights are in the loop's body, once
    assert generator.ByteSize() < denoiser.ByteSize() + 10_000
    assert [spec.name for spec in manifest.graphs[1].inputs] == ["noise", "table", "init_scale", "class_labels"]
    assert manifest.graphs[1].outputs[0].shape == ["batch", 28, 28, 1]


def test_exporting_twice_gives_the_same_bytes(plain_student: Path, tmp_path: Path) -> None:
    """Twice here: torch rounds otherwise with another number of threads, which tests before this one may have set."""
    first, second = (Path(shutil.copytree(plain_student, tmp_path / name / "plain")) for name in ("first", "second"))
    export(first, runtimes=["onnxruntime"])
    export(second, runtimes=["onnxruntime"])
    assert contents(first) == contents(second)


def test_only_the_first_channels_of_a_learned_variance_network_are_used(plain_student: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(plain_student / "unet").eval()
    x, t = torch.randn(2, 4, 14, 14), torch.full((2,), 500.0)
    with torch.no_grad():
        output = unet(x, t).sample
        assert output.shape[1] == 8
        assert torch.equal(GraphDenoiser(unet, 4)(x, t), output[:, :4])


# ---------------------------------------------------------------- networks and postprocessing of one's own


def test_a_network_of_ones_own_and_the_postprocessing_to_the_last_level(tmp_path: Path) -> None:
    folder = custom_student(tmp_path / "custom")
    with pytest.raises(UnsupportedModel, match=r"my\.own\.Network is not a class of diffusers"):
        export(folder)
    free = Latents(channels=12, height=4, width=4, dynamic=["width"])
    with pytest.raises(UnsupportedModel, match=r"Passing has no down_blocks.*latents\.multiple"):
        export(custom_student(tmp_path / "free", latents=free), network=Passing())
    manifest = export(folder, network=Passing())
    pipe = FastPipeline.from_pretrained(folder, num_threads=1)

    # Every tie of rounding, both ends of the range, and every place of the shuffle; init_scale is one half.
    values = np.array([0.5, 1.5, 2.5, 253.5, 254.5, 255.5, -0.5, -3.0, 300.0, 0.4999, 100.25], dtype=np.float32)
    x = np.resize(values, (3, 12, 4, 4)).astype(np.float32)
    x[2] = np.arange(192).reshape(12, 4, 4)
    images = pipe(num_images_per_prompt=3, latents=2 * x, output_type="uint8").images
    expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(x), 2).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert np.array_equal(images, expected.numpy())
    assert np.array_equal(images, to_uint8(x, manifest.postprocess))
    assert pipe(latents=x[:1]).images[0].mode == "RGB"


def test_weights_that_fit_in_no_protobuf_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST_FILE", 0)
    folder = custom_student(tmp_path / "large")
    manifest = export(folder, network=Convolution())
    assert [graph.component for graph in manifest.graphs] == ["denoiser"]
    assert manifest.graphs[0].data == ["onnx/denoiser.fp32.onnx.data"]
    assert (folder / "onnx/denoiser.fp32.onnx.data").stat().st_size >= 12 * 12 * 9 * 4
    images = FastPipeline.from_pretrained(folder, num_threads=1)(seed=0, output_type="uint8").images
    assert images.std() > 0
    linked = hub_cache(folder, tmp_path / "hub")
    for engine in ("onnxruntime", "openvino"):
        again = FastPipeline.from_pretrained(linked, runtime=engine)(seed=0, output_type="uint8").images
        assert np.abs(again.astype(int) - images).max() <= 1
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "hardlink_to", lambda self, target: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only"))
        )
        with pytest.raises(RuntimeUnavailable, match=r'hard link .* Read-only; .* use runtime="onnxruntime"'):
            FastPipeline.from_pretrained(linked, runtime="openvino")
    data = bytearray((folder / "onnx/denoiser.fp32.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "onnx/denoiser.fp32.onnx.data").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"denoiser\.fp32\.onnx\.data"):
        FastPipeline.from_pretrained(folder)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_that_change_while_an_engine_reads_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Engines open the file themselves, after it was hashed."""
    monkeypatch.setattr(store, "LARGEST_FILE", 0)
    folder = custom_student(tmp_path / "large")
    export(folder, network=Convolution())
    weights = folder / "onnx/denoiser.fp32.onnx.data"
    hashed = MappedFile.__init__

    def then_replaced(self: MappedFile, *given: Any, **more: Any) -> None:
        hashed(self, *given, **more)
        other = tmp_path / "other"
        other.write_bytes(bytes(weights.stat().st_size))
        other.replace(weights)

    monkeypatch.setattr(MappedFile, "__init__", then_replaced)
    with pytest.raises(IntegrityError, match=r"denoiser\.fp32\.onnx\.data .* was replaced or written to"):
        FastPipeline.from_pretrained(folder, runtime=engine)


# ---------------------------------------------------------------- refusals, each of which leaves the folder as it was


def test_a_failed_gate_raises_and_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = custom_student(tmp_path / "custom")
    before = contents(tmp_path)
    monkeypatch.setitem(THRESHOLDS, "fp32", (Threshold("relative_rmse", -1.0), Threshold("max_abs", 1)))  # type: ignore[misc]
    with pytest.raises(ParityError, match=r"denoiser fp32 on onnxruntime, 1 steps, batch 1: relative_rmse"):
        export(folder, network=Convolution())
    assert contents(tmp_path) == before


def test_a_graph_that_onnx_runtime_does_not_run_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another engine takes it: what torch's exporter gets wrong, engines may read differently."""
    folder = custom_student(tmp_path / "custom")
    before = contents(tmp_path)

    def with_a_miss(*arguments: Any) -> list[dict[str, Any]]:
        rows = verify(*arguments)
        missed = dict.fromkeys(rows[0]) | {"precision": "fp32", "runtime": "onnxruntime", "reason": "no such node"}
        return [*rows, missed]

    monkeypatch.setattr(build, "verify", with_a_miss)
    monkeypatch.setattr(build, "nvidia_driver", lambda: None)
    with pytest.raises(ExportError, match="do not run as they should: fp32 on onnxruntime: no such node"):
        export(folder, network=Convolution())
    assert contents(tmp_path) == before


def test_truncated_weights(bare_student: Path, copy_of: Copy) -> None:
    folder = copy_of(bare_student)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(1000)
    before = contents(folder.parent)
    with pytest.raises(ManifestError, match=r"diffusion_pytorch_model\.safetensors"):
        export(folder)
    assert contents(folder.parent) == before
    write_manifest(folder, StudentFolder(folder).manifest)  # even if somebody lists it so
    with pytest.raises(ManifestError, match=r"diffusion_pytorch_model\.safetensors .* is not a valid safetensors file"):
        export(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_weights_of_another_network(bare_student: Path, copy_of: Copy) -> None:
    folder = copy_of(bare_student)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 96]}))
    write_manifest(folder, StudentFolder(folder).manifest)
    with pytest.raises(ExportError, match="make no UNet2DModel"):
        export(folder)


def test_a_full_disk_leaves_the_folder_as_it_was(
    bare_student: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(bare_student)
    before = contents(folder.parent)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)  # the first thing that export writes of its own
    with pytest.raises(OSError, match="No space left"):
        export(folder)
    assert contents(folder.parent) == before


@pytest.mark.parametrize(
    "options", [{"targets": ["coreml"]}, {"precisions": ["fp7"]}, {"targets": []}, {"precisions": []}, {"batches": []}]
)
def test_what_this_release_cannot_export_is_refused(bare_student: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"use |at least one"):
        export(bare_student, **options)


def test_files_that_an_export_would_lose_stop_it(bare_student: Path, copy_of: Copy) -> None:
    folder = copy_of(bare_student)
    (folder / "samples.png").write_bytes(b"mine")
    with pytest.raises(IntegrityError, match=r"samples\.png"):
        export(folder)
    assert (folder / "samples.png").read_bytes() == b"mine"


# ---------------------------------------------------------------- the gate notices


def test_verify_needs_an_export(bare_student: Path) -> None:
    with pytest.raises(ManifestError, match="redif export"):
        verify(bare_student)


def test_verify_writes_nothing(tiny_student: Path) -> None:
    before = contents(tiny_student.parent), tiny_student.stat().st_mtime_ns
    verify(tiny_student)
    assert (contents(tiny_student.parent), tiny_student.stat().st_mtime_ns) == before


def resign(folder: Path) -> None:
    write_manifest(folder, StudentFolder(folder).manifest)


def test_a_graph_of_other_weights_fails_although_its_hash_is_right(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    model = onnx.load(folder / "onnx/denoiser.fp32.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.02), largest.name))
    onnx.save(model, folder / "onnx/denoiser.fp32.onnx")
    resign(folder)
    failed = [row for row in verify(folder) if not row["passed"]]
    assert {row["component"] for row in failed} >= {"denoiser"}
    assert not any(row["component"] in ("generator", "noise") for row in failed)
    assert "denoiser fp32 on onnxruntime" in summary(failed)


def test_values_that_are_not_finite_fail(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    model = onnx.load(folder / "onnx/denoiser.fp32.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(4, np.nan, np.float32), bias.name))
    onnx.save(model, folder / "onnx/denoiser.fp32.onnx")
    resign(folder)
    failed = [row for row in verify(folder) if not row["passed"]]
    assert {row["component"] for row in failed} == {"denoiser", "loop"}
    assert all(row["nonfinite"] > 0 for row in failed)
    json.dumps(failed, allow_nan=False)


def test_golden_files_that_cannot_be_used(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    path = folder / "golden/steps-2-batch-1.npz"
    with np.load(path) as arrays:
        good = dict(arrays)
    for bad in (
        {name: value for name, value in good.items() if name != "f"},
        good | {"images": good["images"][:, :20]},
        good | {"images": np.array([{"a": 1}], dtype=object)},  # would need pickle
    ):
        np.savez(path, **bad)
        resign(folder)
        with pytest.raises(ManifestError, match=r"golden/steps-2-batch-1\.npz"):
            verify(folder)
    path.write_bytes(b"not a zip")
    resign(folder)
    with pytest.raises(ManifestError, match=r"golden/steps-2-batch-1\.npz"):
        verify(folder)


@pytest.mark.slow
def test_a_second_network_of_the_same_kind_is_traced_once_and_exported_alike(tmp_path: Path, monkeypatch: Any) -> None:
    """Tracing is reused with other weights in place; the graph is the one that a fresh trace would give."""
    folders = [build_student(tmp_path / f"seed-{seed}", seed=seed, **SMALL) for seed in (1, 2)]
    traces = []
    real = trace._torch_export

    def counted(*args: Any) -> onnx.ModelProto:
        traces.append(1)
        return real(*args)

    monkeypatch.setattr(trace, "_torch_export", counted)
    monkeypatch.setattr(trace, "_traced", {})
    for folder in folders:
        export(folder)
    assert len(traces) == 1
    reused = (folders[1] / "onnx" / "denoiser.fp32.onnx").read_bytes()
    assert reused != (folders[0] / "onnx" / "denoiser.fp32.onnx").read_bytes()
    trace._traced.clear()
    export(folders[1])
    assert (folders[1] / "onnx" / "denoiser.fp32.onnx").read_bytes() == reused
