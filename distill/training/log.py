"""The log of a run: JSON lines and images, and accelerate's tracker beside them. The first process writes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.rewards import reward_names
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.checkpoint import CHECKPOINT

__all__ = ["ABOUT", "IMAGES", "LOG", "RunLog", "strip_of"]

LOG, ABOUT, IMAGES = "log.jsonl", "run.json", "images"
GAP = 16  # times as wide is an image as the gap after it
LARGEST_TILE = 96  # pixels of a side of an image that is kept


class RunLog:
    """Writes rows to ``folder``; without a folder, or on any process but the first, it writes nothing."""

    def __init__(self, folder: Path | None, config: DistillConfig, resumed_at: int | None) -> None:
        """``resumed_at``: the checkpoint's update. Later lines are of updates that will be made again: they go."""
        writes = folder is not None and not draws.rank()
        self.folder = folder if writes else None
        self.lines: TextIO | None = _open(folder, resumed_at) if folder is not None and writes else None
        self.tracker: Any = _tracker(folder, config) if folder is not None and writes else None

    def write(self, row: dict[str, Any]) -> None:
        """One line; to the tracker its numbers, at the row's ``update``."""
        if self.lines:
            self.lines.write(json.dumps(row) + "\n")
            self.lines.flush()
        if self.tracker:
            self.tracker.log({key: value for key, value in row.items() if isinstance(value, float)}, step=row["update"])

    def about(self, teacher: Teacher, config: DistillConfig, captions: Sequence[str]) -> None:
        """What the run is, for its report: ``run.json``."""
        if self.folder is None:
            return
        reward = config.get("reward")
        told: dict[str, Any] = {"teacher": teacher.name, "teacher_steps": teacher.num_inference_steps}
        told["captions"] = list(captions)
        told |= {name: getattr(config, name) for name in ("method", "num_inference_steps", "seed", "batch_size")}
        told["rewards"] = [] if reward is None else reward_names(reward)  # an address can hold a password
        told["judge"] = [] if config.get("judge") is None else reward_names(config.get("judge"))
        document = json.dumps(told, ensure_ascii=False)
        atomic_write(self.folder / ABOUT, document.encode())

    def show(self, student: Tensor, teacher: Tensor, update: int) -> None:
        """Keep a strip of the student's images (N, C, H, W) in [-1, 1], and once the teacher's; to the tracker one over
        the other."""
        if self.folder is None or student.shape[1] not in (1, 3):
            return
        (self.folder / IMAGES).mkdir(exist_ok=True)
        strips = {f"update-{update:08d}": student} | ({} if update else {"teacher": teacher})
        for name, images in strips.items():
            buffer = io.BytesIO()
            strip_of(images).save(buffer, "PNG", optimize=True)
            atomic_write(self.folder / IMAGES / f"{name}.png", buffer.getvalue())
        if self.tracker:
            grid = np.concatenate([np.asarray(strip_of(part).convert("RGB")) for part in (student, teacher)])
            self.tracker.log_images({"student over teacher": grid[None]}, step=update, dataformats="NHWC")

    def close(self) -> None:
        """End the files."""
        if self.lines:
            self.lines.close()
        if self.tracker:
            self.tracker.finish()


def strip_of(images: Tensor) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] side by side, with transparent gaps, each side at most `LARGEST_TILE` pixels."""
    side = max(images.shape[-2:])
    if side > LARGEST_TILE:
        size = [max(1, round(length * LARGEST_TILE / side)) for length in images.shape[-2:]]
        images = torch.nn.functional.interpolate(images.float(), size=size, mode="area")
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    gap = max(1, levels.shape[-1] // GAP)
    tiles = torch.cat([levels, torch.full_like(levels[:, :1], 255)], 1).permute(0, 2, 3, 1).numpy()
    row = np.concatenate([np.pad(tile, ((0, 0), (0, gap), (0, 0))) for tile in tiles], axis=1)[:, :-gap]
    return Image.fromarray(row, "LA" if row.shape[-1] == 2 else "RGBA")


def _open(folder: Path, resumed_at: int | None) -> TextIO:
    """The log, cut back to what the checkpoint knows."""
    for image in folder.glob(f"{IMAGES}/update-*.png"):
        if resumed_at is None or int(image.stem.partition("-")[2]) > resumed_at:
            image.unlink()
    for left in folder.glob(f".{CHECKPOINT}.*"):  # a write that a kill cut short
        left.unlink()
    path, kept = folder / LOG, []
    if resumed_at is not None and path.is_file():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["update"] <= resumed_at:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the line that the kill cut short
    folder.mkdir(parents=True, exist_ok=True)
    log = path.open("w")
    log.writelines(kept)
    log.flush()
    return log


def _tracker(folder: Path, config: DistillConfig) -> Any:
    """accelerate's tracker in the run's folder, if the settings name one."""
    if config.tracker is None:
        return None
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState(cpu=not torch.cuda.is_available())  # which process this is: trackers write on the first alone
    tracker = TensorBoardTracker(folder.name, folder.parent)
    tracker.start()
    flat = config.model_dump(mode="json", fallback=str)
    for name in ("reward", "judge"):
        if flat.get(name) is not None:
            flat[name] = "+".join(reward_names(config.get(name)))
    tracker.store_init_configuration({key: value for key, value in flat.items() if isinstance(value, str | float)})
    return tracker
