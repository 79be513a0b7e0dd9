"""The part of the page in which a visitor gives an image to start from, and paints over what is to be made anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

__all__ = ["image_editor", "image_of", "strength_slider"]

PAINT = "rgba(79, 70, 229, 0.6)"  # seen on any image, and what is below it too
BRUSHES = 8  # in the side of an image


def image_editor(side: int) -> gr.ImageEditor:
    """The editor: upload or paste an image, and paint over what is to be made anew.

    Args:
        side: of the images that are usual here, in pixels: a brush covers a part of it.
    """
    return gr.ImageEditor(
        show_label=False,
        type="pil",
        format="png",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(max(2, side // BRUSHES), colors=[PAINT], default_color=PAINT, color_mode="fixed"),
        buttons=[],
        height=320,
        elem_id="editor",
    )


def strength_slider() -> gr.Slider:
    """How many of the steps are run from the image."""
    return gr.Slider(
        0.05,
        1,
        value=0.8,
        step=0.05,
        label="Strength",
        info="How far from the image; without effect where it is painted over.",
    )


def image_of(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """(image, mask) of the editor's value: white is what was painted over. None: no image; nothing was painted."""
    background = (value or {}).get("background")
    if background is None or not background.getbbox():  # an empty canvas is transparent everywhere
        return None, None
    mask = Image.new("L", background.size)
    for layer in (value or {}).get("layers") or []:
        painted = layer.convert("RGBA").getchannel("A").point(lambda level: 255 if level else 0)
        mask = ImageChops.lighter(mask, painted.resize(background.size, Image.Resampling.NEAREST))
    return background, mask if mask.getbbox() else None
