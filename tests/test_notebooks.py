"""examples/notebooks: kept without outputs, and executed from the first cell to the last."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redif_sdk.artifact.folder import StudentFolder

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["deploy.ipynb", "distil.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_kept_without_outputs_and_can_be_read(name: str) -> None:
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1
    assert len(cells) - len(code) >= len(code) * 0.75, "prose comes before code"
    assert "".join(cells[0]["source"]).startswith("# ")
    assert set(notebook["metadata"]["kernelspec"].values()) == {"Python 3", "python", "python3"}


def executed(name: str, parameters: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The code cells after a run in `folder`; `parameters` is added to the cell that is tagged so."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent.parent))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "\n" + parameters
    client = nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cells: list[dict[str, Any]]) -> list[np.ndarray]:
    """The PNG outputs, in order."""
    found = [
        output.data["image/png"]
        for cell in cells
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def printed(cells: list[dict[str, Any]]) -> str:
    return "".join(output.text for cell in cells for output in cell["outputs"] if output.get("name") == "stdout")


Run = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda name, parameters: executed(name, parameters, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_distil(run: Run, tmp_path: Path) -> None:
    cells = run("distil.ipynb", "UPDATES = 4")
    said = printed(cells)
    assert "fashion-mnist: T-shirt/top" in said
    assert "in levels of 255: " in said
    assert len(images(cells)) == 3
    assert all(image.std() > 10 for image in images(cells))
    assert (tmp_path / "student" / "redif.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_deploy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    from shipped import shipped_student

    cells = run("deploy.ipynb", f"STUDENT = {str(shipped_student())!r}")
    shown = images(cells)
    assert len(shown) == 4
    assert all(image.std() > 10 for image in shown)
    heart, *_ = np.split(shown[2], 4, axis=1)
    red, _, blue = heart[80:110, 80:110].mean((0, 1))
    assert red > 150 > blue
    said = printed(cells)
    assert "largest difference in levels of 255: " in said
    name = StudentFolder(shipped_student()).manifest.name
    assert f"{{'student': '{name}'" in said, "the mark in the file names the student"
