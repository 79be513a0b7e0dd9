"""The nodes, in ComfyUI's protocol. Images are those of `redif_sdk.FastPipeline` for the same seed, bit for bit.

redif_sdk is imported when a node runs, so that ComfyUI starts without it and the error is the node's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RUNTIMES = ["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
PRECISIONS = ["auto", "exact", "fp32", "fp16", "bf16", "int8", "int8wo", "int4wo"]
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
BATCH = 8  # images per call: the progress bar moves, and ComfyUI may interrupt, between two calls


class RedifLoadStudent:
    """Loads a student: a folder, or an id on the Hub."""

    CATEGORY = "redif"
    DESCRIPTION = "Loads a few-step student of redif-sdk from a folder, or from the Hugging Face Hub by its id."
    RETURN_TYPES = ("REDIF_STUDENT",)
    RETURN_NAMES = ("student",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        folder = "A folder, the name of a folder below models/redif, or an id on the Hub (org/name)."
        return {
            "required": {
                "student": ("STRING", {"default": "", "tooltip": folder}),
                "runtime": (RUNTIMES, {"tooltip": "What computes; auto: the fastest one that is installed."}),
                "precision": (PRECISIONS, {"tooltip": "exact: the same image for a seed on every machine."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, student: str) -> bool | str:
        if not student.strip():
            return "student is empty; give a folder, or an id on the Hub (org/name)"
        place = found(student)
        if Path(place).is_dir() and not (Path(place) / "redif.json").is_file():
            return f"{place} has no redif.json; give the folder of a student"
        return True

    @classmethod
    def IS_CHANGED(cls, student: str, **others: Any) -> str:
        """Another value when the student's folder was made anew: then it is loaded again."""
        manifest = Path(found(student)) / "redif.json"
        return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else student

    def load(self, student: str, runtime: str, precision: str) -> tuple[Any]:
        try:
            from redif_sdk import FastPipeline
        except ModuleNotFoundError as error:
            raise RuntimeError(f'{error.name} is not installed; pip install "redif-sdk[cpu]"') from None
        return (FastPipeline.from_pretrained(found(student), runtime=runtime, precision=precision),)


class RedifSample:
    """Makes images with a student, from noise or from images."""

    CATEGORY = "redif"
    DESCRIPTION = "Makes images with a student: from noise, from images (strength), or inside a mask."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        label = "Number or name of a class, for class-conditional students."
        steps = "Inference steps; 0: the student's default."
        side = "In pixels, for students of several sizes; 0: the student's own."
        seed = {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}
        share = {"default": 0.8, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Share of the steps, from an image."}
        return {
            "required": {
                "student": ("REDIF_STUDENT",),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "For text-to-image students."}),
                "class_label": ("STRING", {"default": "", "tooltip": label}),
                "seed": ("INT", seed),
                "num_inference_steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": steps}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
                "width": ("INT", {"default": 0, "min": 0, "max": 16384, "tooltip": side}),
                "height": ("INT", {"default": 0, "min": 0, "max": 16384, "tooltip": side}),
                "strength": ("FLOAT", share),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "To start from: batch_size images of each."}),
                "mask": ("MASK", {"tooltip": "What is 1 is painted anew; the rest of the image stays."}),
            },
        }

    def sample(
        self,
        student: Any,
        prompt: str,
        class_label: str,
        seed: int,
        num_inference_steps: int,
        batch_size: int,
        width: int,
        height: int,
        strength: float,
        image: Any = None,
        mask: Any = None,
    ) -> tuple[Any]:
        import torch

        if mask is not None and image is None:
            raise ValueError("a mask is given without an image; connect the image to start from")
        label: int | str = class_label.strip()
        label = int(label) if label.lstrip("-").isdecimal() else label
        asked: dict[str, Any] = {
            "prompt": prompt.strip() or None,
            "class_labels": None if label == "" else label,
            "num_inference_steps": num_inference_steps or None,
            "height": height or None,
            "width": width or None,
        }
        starts = [{}] if image is None else [begun | {"strength": strength} for begun in starts_of(image, mask)]
        moved = progress(len(starts) * batch_size)
        made = []
        for place, start in enumerate(starts):
            for first in range(0, batch_size, BATCH):
                count = min(BATCH, batch_size - first)
                seeds = [(seed, place * batch_size + first + index) for index in range(count)]
                out = student(num_images_per_prompt=count, seed=seeds, output_type="np", **asked, **start)
                made.append(out.images)
                moved(count)
        levels = np.concatenate(made)
        return (torch.from_numpy(levels.repeat(3, 3) if levels.shape[3] == 1 else levels),)


def found(student: str) -> str:
    """The folder that a user means: itself, or one below ComfyUI's models/redif; else what was given."""
    given = student.strip()
    try:
        from folder_paths import models_dir
    except ImportError:  # outside ComfyUI
        return given
    below = Path(models_dir) / "redif" / given
    return str(below) if not Path(given).is_dir() and below.is_dir() else given


def starts_of(images: Any, masks: Any) -> Iterator[dict[str, Any]]:
    """What each image of an IMAGE (B, H, W, C) starts with; a MASK (B, H, W), or one for all, takes its size."""
    from PIL import Image

    count = len(images)
    if masks is not None and len(masks) not in (1, count):
        raise ValueError(f"{len(masks)} masks for {count} images; connect one for all, or one for each")
    for place in range(count):
        pixels = np.clip(images[place].cpu().numpy(), 0, 1)
        start: dict[str, Any] = {"image": pixels}
        if masks is not None:
            levels = np.clip(masks[place if len(masks) > 1 else 0].cpu().numpy(), 0, 1)
            mask = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
            start["mask_image"] = mask.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
        yield start


def progress(total: int) -> Callable[[int], None]:
    """What counts finished images on ComfyUI's progress bar, and lets it interrupt; nothing outside ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return lambda count: None
    bar = ProgressBar(total)

    def moved(count: int) -> None:
        bar.update(count)
        throw_exception_if_processing_interrupted()

    return moved


NODE_CLASS_MAPPINGS = {"RedifLoadStudent": RedifLoadStudent, "RedifSample": RedifSample}
NODE_DISPLAY_NAME_MAPPINGS = {"RedifLoadStudent": "Load Student (redif)", "RedifSample": "Sample Student (redif)"}
