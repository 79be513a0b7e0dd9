"""The data set that is made from npm's packages, and a colour teacher's way to its folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from redif_sdk.distill.evaluation import datasets as data
from redif_sdk.errors import InvalidRequest
from zoo import emoji
from zoo.publish_teacher import DATA, TeacherFigures, card, grid, train_classifier
from zoo.train_teacher import ARCHITECTURES, build_network

CHARACTERS = [f"1f6{index:02x}" for index in range(60)]


def tarball(path: Path, style: str, size: int) -> None:
    """A package as npm packs it: a dot in the middle of a clear picture for each character."""
    picture = Image.new("RGBA", (size, size))
    picture.paste((255, 0, 0, 255), (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP" if style == "Fluent" else "PNG", lossless=True)
    listed = [
        {"unified": code.upper(), "non_qualified": None, "category": emoji.CATEGORIES[index % 9]}
        for index, code in enumerate(CHARACTERS)
    ]
    files = {emoji.PACKAGES[style][1].format(code): buffer.getvalue() for code in CHARACTERS}
    files["package/emoji.json"] = json.dumps([*listed, {**listed[0], "category": "Component"}]).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("emoji")
    names = ("emoji-datasource-google-16.0.0", "emoji-datasource-twitter-16.0.0", "lobehub-fluent-emoji-3d-1.1.0")
    for style, name in zip(emoji.PACKAGES, names, strict=True):
        tarball(made / f"{name}.tgz", style, 256 if style == "Fluent" else 64)
    import typer

    app = typer.Typer()
    app.command()(emoji.main)
    result = CliRunner().invoke(app, ["-o", str(made / "out"), "--packages", str(made)])
    assert result.exit_code == 0, result.output
    assert "180 images" in result.output
    return made / "out"


def test_pictures_are_on_white_and_characters_are_in_one_split(folder: Path) -> None:
    train, test = data.load("emoji", "train", folder), data.load("emoji", "test", folder)
    assert len(train.images) + len(test.images) == 3 * len(CHARACTERS)
    assert len(test.images) > 0
    assert len(test.images) % 3 == 0  # a character is held out in all its styles
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.class_names == emoji.CLASSES
    for split in (train, test):
        assert np.all(split.images[:, :, 0, 0] == 255)
        assert np.all(split.images[:, :, 16, 16] == np.array([255, 0, 0]))
    assert emoji.held_out("1f600") == emoji.held_out("1f600")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"python -m zoo\.emoji"):
        data.load("emoji", "train", tmp_path)
    with pytest.raises(InvalidRequest, match="known: fashion-mnist, emoji"):
        data.load("cifar", "train", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(InvalidRequest, match="install npm, or put the package"):
        emoji.fetch(tmp_path)


def test_a_colour_teacher_is_judged_and_described(folder: Path) -> None:
    train, test = data.load("emoji", "train", folder), data.load("emoji", "test", folder)
    network = build_network("unet-32-64-96", train, 2)
    assert (network.config.in_channels, network.config.sample_size) == (12, 16)
    assert network.config.num_class_embeds == len(emoji.CLASSES) + 1
    _, accuracy = train_classifier(train, test, seed=0, epochs=1)
    assert 0 <= accuracy <= 1
    assert grid(torch.zeros(8, 3, 32, 32), 4).size == (256, 128)
    about = {"name": "emoji", "class_names": list(emoji.CLASSES), "guidance_scale": 1.5, "pixel_shuffle": 2}
    about |= {"null_class": 27, "data": DATA["emoji"]["data"]}
    about["training"] = {"architecture": "unet-32-64-96", "batch_size": 64, "learning_rate": 1e-3, "ema_decay": 0.999}
    about["training"] |= {"label_dropout": 0.1, "seed": 0, "precision": "fp32", "processor": "one"}
    figures = TeacherFigures(
        samples=1, seconds=60, parameters=2_400_000, classifier_accuracy=0.5, class_agreement=0.5,
        agreement_by_class=[0.5] * 27, fd_real=9, fd_real_floor=1, fd_self_floor=1, precision=0.5, recall=0.5,
        nyquist=(2.0, 1.0, None), nyquist_real=(1.0, 1.0, None), fine_energy=0.9,
        image_shape=(3, 32, 32), training_images=5015, test_images=649,
    )  # fmt: skip
    text = card(about, figures)
    assert "12 x 16 x 16" in text
    assert "CC-BY 4.0" in text
    assert "649 real test images" in text
    assert "(real images: 1.0, 1.0, -; a grid is seen from 3 on) | 2.0, 1.0, - |" in text
    assert "fashion" not in text.lower()
    assert "unet-32-64-96" in ARCHITECTURES
