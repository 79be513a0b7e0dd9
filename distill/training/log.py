"""The log of a run: JSON lines, and accelerate's tracker beside them. The first process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.training.checkpoint import CHECKPOINT

__all__ = ["GRID", "LOG", "RunLog"]

LOG = "log.jsonl"
GRID = 10  # images of the student, and of the teacher, that a tracker is shown


class RunLog:
    """Writes rows to ``folder``; without a folder, or on any process but the first, it writes nothing."""

    def __init__(self, folder: Path | None, config: DistillConfig, resumed_at: int | None) -> None:
        """``resumed_at``: the checkpoint's update. Later lines are of updates that will be made again: they go."""
        writes = folder is not None and not draws.rank()
        self.lines: TextIO | None = _open(folder, resumed_at) if folder is not None and writes else None
        self.tracker: Any = _tracker(folder, config) if folder is not None and writes else None

    def write(self, row: dict[str, Any]) -> None:
        """One line; to the tracker its numbers, at the row's ``update``."""
        if self.lines:
            self.lines.write(json.dumps(row) + "\n")
            self.lines.flush()
        if self.tracker:
            self.tracker.log({key: value for key, value in row.items() if isinstance(value, float)}, step=row["update"])

    def show(self, student: Tensor, teacher: Tensor, update: int) -> None:
        """To the tracker a grid of the student's images (N, C, H, W) in [-1, 1] over the teacher's."""
        levels = ((torch.cat([student, teacher]) + 1) * 127.5).round().to(torch.uint8)
        if self.tracker and levels.shape[1] in (1, 3):
            grid = levels.unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
            images = {"student over teacher": grid[None].cpu().numpy()}
            self.tracker.log_images(images, step=update, dataformats="NHWC")

    def close(self) -> None:
        """End the files."""
        if self.lines:
            self.lines.close()
        if self.tracker:
            self.tracker.finish()


def _open(folder: Path, resumed_at: int | None) -> TextIO:
    """The log, cut back to what the checkpoint knows."""
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
    tracker.store_init_configuration({key: value for key, value in flat.items() if isinstance(value, str | float)})
    return tracker
