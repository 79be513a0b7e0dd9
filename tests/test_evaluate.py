"""The judge: distances against known values and against torchmetrics, and the controls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch

from redif_sdk.distill import import_pipeline
from redif_sdk.distill.evaluation.arena import Arena, evaluate_folder, print_table
from redif_sdk.distill.measures.distances import (
    Judge,
    Statistics,
    frechet_distance,
    frechet_distance_of,
    frechet_distance_to,
    kernel_distance,
    std_match,
)
from redif_sdk.distill.measures.features import embed, name_of
from redif_sdk.distill.measures.neighbours import neighbours, spread
from redif_sdk.distill.measures.spectrum import Spectrum
from redif_sdk.distill.teachers.adapters import drawing
from redif_sdk.distill.teachers.base import Teacher


def draw(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_frechet_distance_of_known_gaussians() -> None:
    a = Statistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Statistics(np.array([1.0, 0.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4)  # commuting: sum of (s1 - s2)^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [4, 50])
def test_both_forms_of_the_distance_agree(count: int) -> None:
    """Fewer samples than features, and more: with singular covariances too."""
    x, y = draw(count, 0), draw(count, 1, 1.5, 0.3)
    both = frechet_distance(Statistics.of(x), Statistics.of(y))
    assert frechet_distance_of(x, y) == pytest.approx(both, rel=1e-5)
    assert frechet_distance_to(x, Statistics.of(y)) == pytest.approx(both, rel=1e-5)
    many = Statistics.of(draw(50, 1, 1.5, 0.3))
    assert frechet_distance_to(x, many) == pytest.approx(frechet_distance(Statistics.of(x), many), rel=1e-5)


def test_frechet_and_kernel_distance_equal_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = draw(60, 0).double(), draw(60, 1, 1.5, 0.3).double()
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance_of(x, y) == pytest.approx(float(theirs), rel=1e-6)
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)


def test_precision_and_recall_tell_quality_from_coverage() -> None:
    reference = draw(200, 0)
    same = neighbours(reference, reference)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert same.density == pytest.approx(1, abs=0.4)
    narrow = neighbours(0.2 * draw(200, 1), reference)
    assert narrow.precision > 0.95
    assert narrow.recall < 0.3
    assert narrow.coverage < 0.6
    assert narrow.density > 1.5, "all lie in the middle, where the balls overlap"
    far = neighbours(draw(200, 2, shift=50), reference)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_density_and_coverage_of_points_on_a_line() -> None:
    """Naeem et al. 2020, section 3: an outlier of the reference makes no ball that takes all."""
    line = torch.arange(10.0)[:, None]
    outlier = torch.cat([line, torch.tensor([[1000.0]])])
    found = neighbours(torch.linspace(200, 240, 10)[:, None], outlier)
    assert found.precision == 1.0  # the outlier's ball reaches everything
    assert found.coverage == pytest.approx(1 / 11)
    assert found.density == pytest.approx(1 / 5)


def test_spread_is_within_conditions() -> None:
    """Two classes far apart: the distance between them is not variety."""
    conditions = torch.arange(100) % 2
    apart = 50.0 * conditions[:, None]
    wide, narrow = draw(100, 0) + apart, 0.5 * draw(100, 0) + apart
    assert spread(narrow, conditions) == pytest.approx(0.5 * (spread(wide, conditions) or 0), rel=1e-4)
    assert (spread(narrow, None) or 0) > 0.8 * (spread(wide, None) or 0)
    assert spread(wide, torch.arange(100)) is None, "no condition has two images"


def test_a_student_that_learnt_its_noises_alone_is_told_by_unpaired_figures() -> None:
    """Paired figures of the teacher's own images are perfect; those against other noises have the teacher's floor."""
    images = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target, others = images[:48], images[48:]
    judge = Judge(target, lambda images: images.flatten(1), others=lambda: others, conditions=torch.arange(48) % 3)
    itself, collapsed = judge.quality(target), judge.quality(target[:1].expand(48, -1, -1, -1).contiguous())
    assert itself.fd_teacher == pytest.approx(0, abs=1e-6)
    assert itself.fd_unpaired is not None
    assert itself.fd_unpaired > 1
    assert itself.spread == pytest.approx(1)
    assert collapsed.spread == pytest.approx(0, abs=1e-6)
    assert (collapsed.coverage or 0) < 0.2 < (itself.coverage or 0)
    alone = Judge(target, lambda images: images.flatten(1)).quality(target)
    assert (alone.fd_unpaired, alone.precision, alone.coverage) == (None, None, None)


def test_features_are_named_by_what_they_see() -> None:
    names = [name_of(torch.zeros(1, 3, *size)) for size in ((28, 28), (32, 48), (64, 64))]
    assert names == ["efficientnet-lite0-32px", "efficientnet-lite0-32px", "efficientnet-lite0-64px"]


def test_std_match_sets_the_paired_statistics() -> None:
    images, target = torch.rand(5, 1, 8, 8), 2 * torch.rand(5, 1, 8, 8) - 1
    matched = std_match(images, target)
    torch.testing.assert_close(matched.mean((1, 2, 3)), target.mean((1, 2, 3)))
    torch.testing.assert_close(matched.std((1, 2, 3)), target.std((1, 2, 3)))


def test_the_gain_control_undoes_lost_contrast() -> None:
    """A student whose only fault is contrast is nearly perfect after the control; the raw figure shows the fault."""
    target = 0.8 * (2 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1)
    judge = Judge(target, lambda images: images.clamp(-1, 1).flatten(1))
    faded = judge.quality(target / 1.2)
    assert faded.gain == 1.2
    assert faded.fd_teacher_gain < 1e-6 < faded.fd_teacher
    assert faded.fd_teacher_std < 1e-6
    perfect = judge.quality(target)
    assert (perfect.fd_teacher, perfect.mse) == (pytest.approx(0, abs=1e-8), 0)


def test_the_judge_sees_the_256_levels_of_a_file() -> None:
    image = torch.linspace(-1, 1, 28 * 28).view(1, 1, 28, 28)
    features = embed(image)
    assert features.shape == (1, 1280)
    levels = ((image + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(features, embed(levels))
    assert torch.equal(embed(3 * image), embed((3 * image).clamp(-1, 1)))


# ---------------------------------------------------------------------- patterns


def test_a_lattice_is_a_peak_and_noise_has_none() -> None:
    noise = 0.3 * torch.randn(400, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    plain = Spectrum.of(noise)
    assert all(0.8 < peak < 1.2 for peak in (plain.nyquist_rows, plain.nyquist_columns, plain.nyquist_both))
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(20), indexing="ij")
    lattices = {"nyquist_rows": rows, "nyquist_columns": columns, "nyquist_both": rows + columns}
    for name, place in lattices.items():
        marked = Spectrum.of(noise + 0.1 * (1 - 2 * (place % 2)))
        assert getattr(marked, name) > 10
        assert marked.grid == getattr(marked, name)
        assert all(getattr(marked, other) < 1.2 for other in lattices if other != name)
    odd = Spectrum.of(noise[:, :, :15, :19])
    assert (odd.nyquist_rows, odd.nyquist_columns, odd.nyquist_both, odd.grid) == (None, None, None, None)


def test_fine_detail_is_the_energy_of_high_frequencies() -> None:
    noise = 0.2 * torch.randn(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    share = 1 - torch.pi * 0.35**2  # of the square of frequencies
    assert Spectrum.of(noise).fine_energy == pytest.approx(0.04 * share, rel=0.03)
    assert Spectrum.of(blurred).fine_energy < 0.1 * Spectrum.of(noise).fine_energy
    assert Spectrum.of(100 * noise).fine_energy < 1, "images are seen clamped"


def test_text_students_are_judged_on_prompts_that_are_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    pipelines.stable_diffusion(pipelines.ddim(), **pipelines.ONE_BLOCK).save_pretrained(folder)
    about = {"name": "drawn", "prompts": ["red heart", "blue star"], "num_inference_steps": 2, "guidance_scale": 1.5}
    (folder / "redif_teacher.json").write_text(json.dumps(about | {"held_out": ["purple cow", "red star", "a box"]}))
    import_pipeline(folder, tmp_path / "student", [1], guidance_scale=1.0)
    teacher = Teacher.load(folder)
    other = drawing(teacher, ["purple cow"])
    assert (other.name, other.guidance_scale, other.shape) == ("drawn", 1.5, teacher.shape)
    assert other.prompts is not None
    assert other.prompts.texts == ["purple cow"]
    assert other.fingerprint != teacher.fingerprint, "its pairs are others"
    alone = drawing(teacher, ["red heart", "blue star"])
    assert alone.identity == teacher.identity
    held, trained, given = (
        evaluate_folder(tmp_path / "student", folder, 16, baselines=False, **options)
        for options in ({}, {"trained_prompts": True}, {"prompts": ["purple cow", "red star", "a box"]})
    )
    assert [rows[1]["prompts"] for rows in (held, trained, given)] == ["held out", "trained on", "given"]
    assert held[1]["mse"] == given[1]["mse"] != trained[1]["mse"]
    assert held[1]["spread"] is not None


def test_a_student_that_the_judges_network_rewarded_is_flagged(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = Teacher.load("fashion-mnist")
    arena = Arena.of(teacher, 16)
    latents = arena.pairs.target
    rows = [arena.row("redif", 1, latents, reward=reward) for reward in ("texture+lpips", "texture", None)]
    assert [row["rewarded_by_judge"] for row in rows] == [True, False, False]
    assert {"grid", "nyquist_both", "fine_energy"} <= set(rows[0])
    assert rows[0]["fine_energy"] == pytest.approx(1)
    print_table(rows)
    said = capsys.readouterr().out
    assert "redif (texture+lpips) was rewarded by the judge's own network" in said
    assert "redif (texture) was" not in said
    assert "grid" in said
