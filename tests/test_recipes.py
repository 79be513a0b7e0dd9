"""recipes/: each is valid for the settings' models, of a supported pipeline, and its figures are those noted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.presets import resolve
from redif_sdk.distill.teachers import adapters, unet2d
from redif_sdk.distill.teachers.registry import UNET_2D, adapter_named
from redif_sdk.models.families import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FACT = re.compile(r"^# ([a-z]+): (.+)$", re.M)
#: Pipelines of a UNet2DModel and its scheduler: that network's adapter takes them, whatever their class.
OF_UNET_2D = ("DDPMPipeline", "DDIMPipeline")
RESERVE = 0.85  # of the GPU's memory: the rest is for the decoder, the rewards, CUDA and what the allocator loses


def facts(path: Path) -> dict[str, str]:
    return dict(FACT.findall(path.read_text(encoding="utf-8")))


def figures() -> dict[str, dict[str, float]]:
    rows = json.loads((ROOT / "docs/results/recipes.json").read_text())["rows"]
    return {row["recipe"]: row for row in rows}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_a_valid_run_of_a_supported_teacher(path: Path) -> None:
    about = facts(path)
    pipeline = about["pipeline"]
    name = UNET_2D if pipeline in OF_UNET_2D else pipeline
    assert adapter_named(name) in {adapters.text_to_image, adapters.class_to_image, unet2d.pixels}
    text = pipeline in LAYOUTS
    config = resolve({}, file=path, text=text)
    assert isinstance(config, DistillConfig)
    written = yaml.safe_load(path.read_text())
    del written["preset"]
    assert {key: getattr(config, key) for key in written} == written  # none is overridden or ignored
    command = next(line for line in path.read_text().splitlines() if line.startswith("#   redif distill"))
    assert command.split()[3] == about["teacher"]
    assert f"--config recipes/{path.name}" in command
    assert ("--prompts" in command) == text
    assert path.stem.endswith(f"-{about['gpu'].split()[0]}gb")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_its_shapes_take_fits_the_gpu_that_it_names(path: Path) -> None:
    gib = figures()[path.stem]["peak_gib"]
    assert gib <= RESERVE * int(facts(path)["gpu"].split()[0]) * 1e9 / 2**30


def test_every_family_has_a_recipe_and_the_page_has_all_figures() -> None:
    shapes = {facts(path)["shape"] for path in RECIPES}
    assert shapes == {"sd15", "sdxl", "sd3", "flux", "pixart", "dit", "unet2d"}
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    for name, row in figures().items():
        (line,) = (line for line in page.splitlines() if f"]({name}.yaml)" in line)
        assert f"| {row['peak_gib']:.1f} GiB |" in line
        assert "not run" in line or "measured" in line
    assert set(figures()) == {path.stem for path in RECIPES}
