"""Turn a trained checkpoint into a shipped teacher: a diffusers folder, a bank of its outputs, figures, a card.

The class agreement is measured by a classifier that is trained on the real images and used for nothing else.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.distill import pool as pairs
from redif_sdk.distill.evaluation import datasets as data
from redif_sdk.distill.evaluation.arena import Arena
from redif_sdk.distill.evaluation.judged import JUDGED_FILE, write_judged
from redif_sdk.distill.measures.distances import Statistics, frechet_distance
from redif_sdk.distill.measures.features import NETWORK, embed
from redif_sdk.distill.measures.neighbours import neighbours
from redif_sdk.distill.measures.reference import REFERENCE_FILE
from redif_sdk.distill.measures.spectrum import Spectrum
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.folders import TEACHER_FILE

#: The card's text about a data set: licence of the weights, the data, the limits, and where the bank is.
DATA = {
    "fashion-mnist": {
        "licence": "MIT",
        "data": "Fashion-MNIST (Zalando Research, MIT)",
        "limits": "28 x 28 grey garments, ten classes; not a model of people or of fashion at large.",
        "needs": "Debian's\n`dataset-fashion-mnist`",
        "bank": "",
    },
    "emoji": {
        "licence": "CC-BY-4.0",
        "data": "Noto Emoji (Google, Apache-2.0), Twemoji (Twitter, CC-BY 4.0), Fluent 3D (Microsoft, MIT)",
        "limits": "32 x 32 images in the manner of three emoji sets; few show an existing character.",
        "needs": "the data\nset that `python -m zoo.emoji` makes",
        "bank": ", in the repository; a wheel leaves them out, and\n  samples them when they are needed",
    },
}
STEPS = 50  # of DDIM, in bank and figures
CARD_IMAGE = "samples.png"
BASELINES = (1, 2, 4, 8)  # steps of untrained DDIM that are judged once


@dataclass(frozen=True)
class TeacherFigures:
    samples: int
    seconds: float
    parameters: int
    classifier_accuracy: float
    class_agreement: float
    agreement_by_class: list[float]
    fd_real: float
    fd_real_floor: float
    fd_self_floor: float
    precision: float
    recall: float
    nyquist: tuple[float | None, float | None, float | None]  # rows, columns, both (`Spectrum`)
    nyquist_real: tuple[float | None, float | None, float | None]
    fine_energy: float  # over the real images'
    image_shape: tuple[int, int, int]
    training_images: int
    test_images: int


class Classifier(nn.Sequential):
    """The classifier of class agreement: four convolutions with batch norm, for square images of ``size`` pixels."""

    def __init__(self, num_classes: int, channels: int = 1, size: int = 28) -> None:
        widths, layers, side = (channels, 32, 32, 64, 64), [], -(-size // 4)
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, stride=1 + k % 2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * side**2, num_classes))


def train_classifier(
    train: data.ImageData, test: data.ImageData, *, seed: int, epochs: int = 4
) -> tuple[nn.Module, float]:
    """Train the classifier on real images; returns it and its accuracy on the real test set."""
    torch.manual_seed(seed)
    network = Classifier(len(train.class_names), train.images.shape[1], train.images.shape[-1])
    images, labels = torch.tensor(train.images).float() / 127.5 - 1, torch.tensor(train.labels)
    steps = epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    for step in range(steps):
        index = order[step * 128 : (step + 1) * 128]
        loss = F.cross_entropy(network(images[index]), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    held = torch.tensor(test.images).float() / 127.5 - 1
    return network, float((classify(network, held) == torch.tensor(test.labels)).float().mean())


@torch.no_grad()
def classify(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part).argmax(1) for part in images.split(500)])


def save_network(network: UNet2DModel, scheduler: DDIMScheduler, about: dict[str, Any], folder: Path) -> None:
    """Write the diffusers folder and ``redif_teacher.json``.

    The class table keeps its last entry, 'no class' (label dropout): guidance needs it.
    """
    network.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / TEACHER_FILE).write_text(json.dumps(about, indent=2) + "\n")


def write_bank(
    teacher: Teacher, folder: Path, on_batch: Callable[[int], object] | None = None, *, known: Path | None = None
) -> dict[str, Tensor]:
    """Sample the teacher on the pool and on the held-out noises; keep its images as uint8, in the folder.

    ``known``: a folder whose bank is reused if it has the same weights and guidance.
    """
    if known is not None and (known / pairs.BANK_FILE).is_file():
        known_teacher = replace(teacher, folder=known)
        held = {s: pairs.shipped(known_teacher, count, s) for s, count in pairs.PIXEL_BANK_SIZES.items()}
        if all(part is not None for part in held.values()):
            shutil.copy(known / pairs.BANK_FILE, folder)
            return {split: teacher.images(part.target) for split, part in held.items() if part is not None}
    images: dict[str, Tensor] = {}
    arrays: dict[str, Any] = {"fingerprint": np.array(teacher.identity)}
    for split, count in pairs.PIXEL_BANK_SIZES.items():
        target = pairs.compute(teacher, count, split, on_batch=on_batch).target
        levels = ((teacher.images(target).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images[split], arrays[split] = levels.float() / 127.5 - 1, levels.numpy()
    np.savez_compressed(folder / pairs.BANK_FILE, **arrays)
    return images


def write_reference(test: data.ImageData, folder: Path) -> Statistics:
    """Mean and covariance (its upper triangle) of the real test images' features, float32."""
    real = Statistics.of(embed(torch.tensor(test.images).float() / 127.5 - 1))
    upper = np.triu_indices(len(real.mean))
    np.savez_compressed(
        folder / REFERENCE_FILE,
        features=np.array(NETWORK),
        mean=real.mean.astype(np.float32),
        covariance=real.covariance[upper].astype(np.float32),
    )
    return real


def judge_once(teacher: Teacher, folder: Path) -> None:
    """Judge the teacher and untrained DDIM once, over all held-out noises, into ``judged.npz`` in ``folder``."""
    (folder / JUDGED_FILE).unlink(missing_ok=True)  # what it holds would be taken over
    arena = Arena.of(teacher, pairs.PIXEL_BANK_SIZES["held_out"])
    floor = arena.floor()
    assert floor is not None
    rows = [arena.teacher_row(), *(arena.ddim_row(steps) for steps in BASELINES)]
    write_judged(teacher, arena.judge.reference, rows, floor, folder / JUDGED_FILE)


def grid(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Images (N, 1 or 3, H, W) in [-1, 1], row by row."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    rows = [torch.cat(list(levels[low : low + columns]), 1) for low in range(0, len(levels), columns)]
    together = torch.cat(rows).numpy()
    picture = Image.fromarray(together[..., 0] if together.shape[-1] == 1 else together)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def publish(
    name: str,
    network: UNet2DModel,
    scheduler: DDIMScheduler,
    folder: Path,
    *,
    training: dict[str, Any],
    pixel_shuffle: int,
    guidance_scale: float = 1.0,
    data_dir: str | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> TeacherFigures:
    """Write the shipped teacher's folder and measure it. ``training`` is shown in the card unchanged."""
    train, test = data.load(name, "train", data_dir), data.load(name, "test", data_dir)
    about = {
        "name": name,
        "licence": DATA[name]["licence"],
        "data": DATA[name]["data"],
        "num_classes": len(train.class_names),
        "class_names": list(train.class_names),
        "num_inference_steps": STEPS,
        "pixel_shuffle": pixel_shuffle,
        "guidance_scale": guidance_scale,
        "null_class": len(train.class_names),
        "training": training,
    }
    with atomic_folder(folder, overwrite=True) as staging:
        save_network(network, scheduler, about, staging)
        teacher = Teacher.from_diffusers(staging)
        images = write_bank(teacher, staging, on_batch, known=folder)
        real = write_reference(test, staging)
        judge_once(replace(teacher, name=name, folder=staging), staging)
        judge, accuracy = train_classifier(train, test, seed=11)
        held, labels = images["held_out"], teacher.labels(np.arange(len(images["held_out"])))
        assert labels is not None
        right = (classify(judge, held) == labels).float()
        features = embed(held)
        real_features = embed(torch.tensor(test.images[:2000]).float() / 127.5 - 1)
        half = Statistics.of(embed(torch.tensor(train.images[:2000]).float() / 127.5 - 1))
        cover = neighbours(features, real_features)
        ours = Statistics.of(features)
        figures = TeacherFigures(
            samples=training["samples"],
            seconds=training["seconds"],
            parameters=sum(p.numel() for p in network.parameters()),
            classifier_accuracy=accuracy,
            class_agreement=float(right.mean()),
            agreement_by_class=[float(right[labels == c].mean()) for c in range(len(train.class_names))],
            fd_real=frechet_distance(ours, real),
            fd_real_floor=frechet_distance(half, real),
            fd_self_floor=frechet_distance(ours, Statistics.of(embed(images["train"]))),
            precision=cover.precision,
            recall=cover.recall,
            nyquist=_peaks(seen := Spectrum.of(held)),
            nyquist_real=_peaks(wanted := Spectrum.of(torch.tensor(test.images).float() / 127.5 - 1)),
            fine_energy=seen.fine_energy / wanted.fine_energy,
            image_shape=tuple(train.images.shape[1:]),
            training_images=len(train.images),
            test_images=len(test.images),
        )
        columns = len(train.class_names) if len(train.class_names) > 10 else 20
        grid(held[: 5 * columns], columns).save(staging / CARD_IMAGE, optimize=True)
        (staging / "README.md").write_text(card(about, figures))
        (staging / "figures.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")
    return figures


def _peaks(spectrum: Spectrum) -> tuple[float | None, float | None, float | None]:
    return spectrum.nyquist_rows, spectrum.nyquist_columns, spectrum.nyquist_both


def card(about: dict[str, Any], figures: TeacherFigures) -> str:
    """The model card."""
    training, scale, said = about["training"], about["guidance_scale"], DATA[about["name"]]
    factor, size = about["pixel_shuffle"], figures.image_shape
    latents = (size[0] * factor**2, size[1] // factor, size[2] // factor)
    shape, tests = " x ".join(map(str, latents)), f"{figures.test_images:,}"
    view = f"the images themselves, {shape}"
    if factor > 1:
        view = (
            f"the\n  `pixel_unshuffle({factor})` view of the images: {shape}. Apply "
            f"`torch.nn.functional.pixel_shuffle(x, {factor})` to its output"
        )
    peaks, real = (
        ", ".join("-" if peak is None else f"{peak:.1f}" for peak in part)
        for part in (figures.nyquist, figures.nyquist_real)
    )
    by_class = "\n".join(
        f"| {name} | {100 * share:.1f} % |"
        for name, share in zip(about["class_names"], figures.agreement_by_class, strict=True)
    )
    command = f"python -m zoo.train_teacher {about['name']} -o build/teacher --architecture {training['architecture']}"
    grown = training.get("grown_from")
    begun = f"\n  Its lower levels began as {grown}." if grown else ""
    return f"""---
license: {said["licence"].lower()}
library_name: diffusers
tags: [diffusion, class-conditional, {about["name"]}]
---
# {about["name"]}: a class-conditional diffusion teacher

![Samples, one column a class]({CARD_IMAGE})

Samples ({STEPS} DDIM steps, seeds of the held-out bank; classes in turn, so that a column has
one class), not picked.

- **Model**: diffusers `UNet2DModel`, {figures.parameters / 1e6:.2f} M parameters ({training["architecture"]}), on
  {view}.
  v-prediction, squared-cosine schedule, 1000 times, sampled with DDIM, trailing spacing,
  {STEPS} steps, eta 0.
- **Guidance**: classifier-free, scale {scale:g}, against entry {about["null_class"]} of the class table ('no class'):
  two network calls a step, {2 * STEPS} an image. Bank and figures are of the guided teacher.
- **Data**: {about["data"]}, {figures.training_images:,} training images; the {tests} test images were used for the
  reference statistics only.
- **Licence**: {said["licence"]} (the weights).
- **Training**: {figures.samples:,} samples, batch {training["batch_size"]}, AdamW, peak learning rate
  {training["learning_rate"]:g} with a cosine to 0, EMA {training["ema_decay"]}, label dropout
  {training["label_dropout"]}, seed {training["seed"]},
  {training["precision"]} on {training["processor"]}: {figures.seconds / 60:.0f} minutes.{begun}
- **Bank**: 4,096 training and 2,000 held-out outputs as uint8{said["bank"]}.

| figure (2,000 samples of {STEPS} steps, EfficientNet-Lite0 features) | value |
|---|---|
| held-out classifier: accuracy on the real test set | {100 * figures.classifier_accuracy:.2f} % |
| the same classifier sees the requested class in | {100 * figures.class_agreement:.2f} % |
| Frechet distance to the {tests} real test images | {figures.fd_real:.1f} |
| the same for 2,000 real training images (floor) | {figures.fd_real_floor:.1f} |
| Frechet distance of two of its own sets, 2,000 against 4,096 (floor) | {figures.fd_self_floor:.1f} |
| precision / recall against real test images | {figures.precision:.2f} / {figures.recall:.2f} |
| peaks at the Nyquist frequency: rows, columns, both (real images: {real}; a grid is seen from 3 on) | {peaks} |
| energy above .35 cycles a pixel, over the real images' | {figures.fine_energy:.2f} |

| class | agreement |
|---|---|
{by_class}

Made by `{command}`, which needs {said["needs"]}.
Limits: {said["limits"]}
"""
