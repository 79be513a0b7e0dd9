"""Decoding in tiles: every pixel once, no seam, and only tiles in memory."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_once import made
from numpy.typing import NDArray
from test_export_text import export_sd

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.tiles import decode_in_tiles, starts

SCALE = 2


def enlarged(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """A decoder that looks at one latent for each pixel."""
    return latents[:, :3].repeat(SCALE, 2).repeat(SCALE, 3)


@given(extent=st.integers(1, 300), tile=st.integers(4, 80))
def test_tiles_cover_an_axis_and_overlap(extent: int, tile: int) -> None:
    overlap = max(1, tile // 4)
    found = starts(extent, tile, overlap)
    assert found[0] == 0
    assert found[-1] + tile >= extent
    assert found[-1] == max(0, extent - tile)
    assert all(0 < later - earlier <= tile - overlap for earlier, later in itertools.pairwise(found))


@given(height=st.integers(1, 40), width=st.integers(1, 40), tile=st.integers(4, 16))
def test_a_local_decoder_gives_the_whole_image(height: int, width: int, tile: int) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32)
    seen = []

    def decode(piece: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(piece.shape[2:])
        return enlarged(piece)

    found = decode_in_tiles(decode, latents, tile)
    np.testing.assert_allclose(found, enlarged(latents), rtol=0, atol=1e-6)
    assert all(max(shape) <= tile for shape in seen)


def test_where_tiles_differ_they_fade_into_each_other() -> None:
    """A decoder that adds another constant to each tile: no two neighbours are further apart than a fade's step."""
    numbers = iter(range(100))

    def decode(piece: NDArray[np.float32]) -> NDArray[np.float32]:
        return enlarged(np.zeros_like(piece)) + np.float32(next(numbers) % 2)

    found = decode_in_tiles(decode, np.zeros((1, 4, 20, 20), np.float32), 8)
    for axis in (2, 3):
        assert 0 < np.abs(np.diff(found, axis=axis)).max() < 0.5


@pytest.fixture(scope="module")
def student() -> FastPipeline:
    """Stable Diffusion's parts, two pixels a latent, free sizes."""
    return FastPipeline.from_pretrained(made("sd", export_sd), runtime="onnxruntime", precision="fp32")


def test_an_image_in_tiles_is_close_to_the_whole_one(student: FastPipeline) -> None:
    asked = {"seed": 3, "height": 96, "width": 80, "output_type": "np"}
    whole, tiled = (student("red heart", decode_tile=tile, **asked).images for tile in (None, 16))
    assert tiled.shape == whole.shape
    assert np.abs(tiled - whole).max() > 0  # it was another computation
    assert 10 * np.log10(1 / np.mean((tiled - whole) ** 2)) > 20
    small = [student("red heart", decode_tile=tile, seed=3, output_type="uint8").images for tile in (None, 8)]
    assert np.array_equal(*small)  # one tile is the image


def test_wrong_tiles_are_refused(student: FastPipeline, tiny_student: Path) -> None:
    for tile in (0, 3, -8, True, 2.5):
        with pytest.raises(InvalidRequest, match="decode_tile"):
            student("red heart", decode_tile=tile)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(InvalidRequest, match="no decoder"):
        FastPipeline.from_pretrained(tiny_student)(class_labels=1, decode_tile=16)


def test_a_decoder_of_one_size_takes_no_tiles(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("sd", export_sd), tmp_path / "student"))
    manifest = StudentFolder(folder).manifest
    latents = manifest.latents.model_copy(update={"dynamic": []})
    write_manifest(folder, manifest.model_copy(update={"latents": latents}))
    with pytest.raises(InvalidRequest, match="--sizes"):
        FastPipeline.from_pretrained(folder)("red heart", decode_tile=4)


def test_low_memory_keeps_no_graph_and_gives_the_same_image(student: FastPipeline) -> None:
    frugal = FastPipeline.from_pretrained(
        made("sd", export_sd), runtime="onnxruntime", precision="fp32", low_memory=True
    )
    asked = {"seed": 3, "output_type": "uint8", "decode_tile": 8}
    for _ in range(2):  # the second time they are loaded again
        out = frugal("red heart", **asked)
        assert np.array_equal(out.images, student("red heart", **asked).images)
        assert {"text_encoder", "denoiser", "decoder"}.isdisjoint(frugal._components._loaded)
        assert out.runtime_info["component"] == "denoiser"
    assert [image.size for image in frugal.stream("red heart", seed=3)]
    assert pickle.loads(pickle.dumps(frugal))._components._low_memory
