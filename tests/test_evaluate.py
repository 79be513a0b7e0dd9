"""The judge: distances against known values and against torchmetrics, and the controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redif_sdk.distill.evaluation.arena import Arena, print_table
from redif_sdk.distill.measures.distances import (
    Judge,
    Statistics,
    frechet_distance,
    frechet_distance_of,
    kernel_distance,
    precision_recall,
    std_match,
)
from redif_sdk.distill.measures.features import embed
from redif_sdk.distill.measures.spectrum import Spectrum
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
    assert frechet_distance_of(x, y) == pytest.approx(frechet_distance(Statistics.of(x), Statistics.of(y)), rel=1e-5)


def test_frechet_and_kernel_distance_equal_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = draw(60, 0).double(), draw(60, 1, 1.5, 0.3).double()
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance_of(x, y) == pytest.approx(float(theirs), rel=1e-6)
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)


def test_precision_and_recall_tell_quality_from_coverage() -> None:
    reference = draw(200, 0)
    assert precision_recall(reference, reference) == (1.0, 1.0)
    narrow = precision_recall(0.2 * draw(200, 1), reference)
    assert narrow[0] > 0.95
    assert narrow[1] < 0.3
    assert precision_recall(draw(200, 2, shift=50), reference) == (0.0, 0.0)


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
    assert perfect.recall == 1.0


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
