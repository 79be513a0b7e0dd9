"""Images that a caller gives, for image to image and inpainting: opened, checked, and brought to a student's size.

PIL decodes an image's pixels when they are first asked for, so its size is checked before that.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs.request import GenerationRequest
from redif_sdk.sampling.entry import steps_of
from redif_sdk.sampling.table import StepTable

__all__ = ["DEFAULT_STRENGTH", "Given", "Start", "all_anew", "open_image"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
LARGEST_FILE = 64 << 20  # bytes
LARGEST_IMAGE = 1 << 26  # pixels
DEFAULT_STRENGTH = 0.8  # strength, without a mask, as in diffusers
MOST_TIMES = 16  # the pixels of a student's own size, unless a size is asked for
REPAINTED = 128  # of 255: a mask's value from which on a place is painted anew

_FAULTS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Given:
    """B images to start from.

    Attributes:
        images: uint8 (B, H, W, C), of the student's size and channels.
        masks: bool (B, H, W): where to paint anew; None: everywhere.
        steps: The table's last rows that are run.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_] | None
    steps: int

    @property
    def kind(self) -> str:
        """What is begun with, for a mark."""
        return "image" if self.masks is None else "mask"


@dataclass(frozen=True)
class Start:
    """Images and masks of a call, decoded.

    Attributes:
        images: One for all that are made, or one for each prompt.
        masks: One for each of these; None: there are none.
        strength: As the caller gave it.
        size: (height, width) in pixels that is to be made; None: the student's own.
    """

    images: list[Image.Image]
    masks: list[Image.Image] | None
    strength: float | None
    size: tuple[int | None, int | None]

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        image: Any,
        mask_image: Any,
        strength: float | None,
        height: int | None,
        width: int | None,
    ) -> Start | None:
        """What a call starts from; None: from noise.

        A student of several sizes makes the size of the first image, cut to what the student takes, unless another is
        asked for; one of a single size its own.

        Raises:
            InvalidRequest: An argument is no image, too large, or damaged; masks and images differ in number or size;
                there is no image for the mask or the strength; or an inpainting student is given no image or no mask.
        """
        if manifest.network.inpainting and (image is None or mask_image is None):
            missing = " and ".join(n for n, given in (("image", image), ("mask_image", mask_image)) if given is None)
            raise InvalidRequest(
                f"{manifest.name} is an inpainting model: give {missing} too, an image and a mask that is white where "
                "it is painted anew"
            )
        if image is None:
            if mask_image is not None or strength is not None:
                name = "strength" if mask_image is None else "mask_image"
                raise InvalidRequest(f"{name} is given without image; give the image to start from")
            return None
        images = [_read(one, f"image {place}") for place, one in enumerate(_listed(image, "image"))]
        masks = None
        if mask_image is not None:
            masks = [_read(one, f"mask {place}") for place, one in enumerate(_listed(mask_image, "mask_image"))]
            if len(masks) not in (1, len(images)):
                raise InvalidRequest(f"{len(masks)} masks for {len(images)} images; give one for all, or one for each")
            masks = masks * len(images) if len(masks) == 1 else masks
            for mask, pixels in zip(masks, images, strict=True):
                if mask.size != pixels.size:
                    raise InvalidRequest(
                        f"a mask has {mask.width} x {mask.height} pixels, its image {pixels.width} x "
                        f"{pixels.height}; give a mask of the image's size"
                    )
        size = (height, width)
        if height is None and width is None and manifest.latents.dynamic:
            size = _own_size(manifest, images[0])
        return cls(images, masks, strength, size)

    def steps(self, table: StepTable) -> int:
        """The table's last rows that are run. Raises InvalidRequest if there are none."""
        return steps_of(table, self.strength, DEFAULT_STRENGTH if self.masks is None else 1.0)

    def fitted(self, manifest: Manifest, request: GenerationRequest) -> Given:
        """Images and masks for a checked request: scaled to its size, and what is beyond it cut evenly.

        Raises:
            InvalidRequest: Images in another number than prompts; or no step is left to run (`steps_of`).
        """
        steps = self.steps(request.table)
        count = len(request.seeds)
        if count % len(self.images):
            raise InvalidRequest(
                f"{len(self.images)} images to start from, and {count} to make; give one for all, or one a prompt"
            )
        channels = manifest.postprocess.channels(manifest.latents.channels)
        height, width = (side * manifest.postprocess.scale for side in request.size)
        fit, each = partial(ImageOps.fit, size=(width, height)), count // len(self.images)
        levels = [np.asarray(fit(_coloured(one, channels), method=Image.Resampling.LANCZOS)) for one in self.images]
        images = np.stack(levels).reshape(-1, height, width, channels).repeat(each, 0)
        if self.masks is None:
            return Given(images, None, steps)
        grey = [np.asarray(fit(_grey(one), method=Image.Resampling.NEAREST)) for one in self.masks]
        return Given(images, (np.stack(grey) >= REPAINTED).repeat(each, 0), steps)


def all_anew(manifest: Manifest) -> dict[str, Any]:
    """The arguments of a call of an inpainting student that paints the whole image anew; none for another student."""
    if not manifest.network.inpainting:
        return {}
    height, width, _ = manifest.image_shape
    return {"image": Image.new("RGB", (width, height), "grey"), "mask_image": Image.new("L", (width, height), "white")}


def open_image(
    source: str | Path | bytes,
    name: str = "the image",
    *,
    formats: tuple[str, ...] = FORMATS,
    most: int = LARGEST_IMAGE,
) -> Image.Image:
    """An image file, or its bytes, decoded: of one of ``formats``, and of at most so many pixels.

    Raises:
        InvalidRequest: It is not there, is too large, is of no known format, is cut, or holds several images.
    """
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with Path(source).open("rb") as file:
                data = file.read(LARGEST_FILE + 1)
        except OSError as error:
            raise InvalidRequest(f"{source} cannot be read: {error.strerror or error}") from error
    if len(data) > LARGEST_FILE:
        raise InvalidRequest(f"{name} has more than {LARGEST_FILE >> 20} MB; give a smaller file")
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # refused below
            image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"{name} is none of {', '.join(formats)}, or is damaged; give another file") from error
    except _FAULTS as error:
        raise InvalidRequest(f"{name} cannot be read ({_line(error)}); give another file") from error
    return _decoded(image, name, most)


def _own_size(manifest: Manifest, image: Image.Image) -> tuple[int | None, int | None]:
    """(height, width) of what a student of several sizes makes of ``image``; None: on that axis it has one size."""
    latents, scale = manifest.latents, manifest.postprocess.scale
    own = latents.height * latents.width * scale**2
    if image.width * image.height > MOST_TIMES * own:
        raise InvalidRequest(
            f"the image has {image.width} x {image.height} pixels, more than {MOST_TIMES} times those of "
            f"{manifest.name}'s own {latents.width * scale} x {latents.height * scale}; give height and width, or a "
            "smaller image"
        )
    unit, most = scale * latents.multiple, scale * (latents.largest or LARGEST_IMAGE)
    height, width = (min(most, max(unit, side // unit * unit)) for side in (image.height, image.width))
    return height if "height" in latents.dynamic else None, width if "width" in latents.dynamic else None


def _listed(given: Any, name: str) -> list[Any]:
    """The images of one, a list of them, or an array (B, H, W, C)."""
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim == 4 else [given]
    if isinstance(given, str | bytes | Path):
        raise InvalidRequest(f"{name} is a {type(given).__name__}; open it first, with PIL.Image.open")
    if isinstance(given, Sequence):
        if not given:
            raise InvalidRequest(f"{name} is an empty list; give at least one image")
        return list(given)
    return [given]


def _read(given: Any, name: str) -> Image.Image:
    """One image as PIL has it: itself, or uint8 or float [0, 1] (H, W) or (H, W, C)."""
    if isinstance(given, Image.Image):
        return _decoded(given, name)
    if not isinstance(given, np.ndarray):
        raise InvalidRequest(f"{name} is a {type(given).__name__}; give a PIL image or an array (H, W, C)")
    if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in (1, 3, 4)) or 0 in given.shape:
        raise InvalidRequest(f"{name} has shape {given.shape}; give (H, W) or (H, W, C) of 1, 3 or 4 channels")
    if given.dtype.kind == "f":
        if not np.isfinite(given).all() or given.min() < 0 or given.max() > 1:
            raise InvalidRequest(f"{name} holds numbers outside 0 to 1; give floats in [0, 1], or uint8")
        given = np.rint(given * 255).astype(np.uint8)
    elif given.dtype == np.bool_:
        given = given.astype(np.uint8) * 255
    elif given.dtype != np.uint8:
        raise InvalidRequest(f"{name} has dtype {given.dtype}; give uint8, or floats in [0, 1]")
    return Image.fromarray(given[:, :, 0] if given.ndim == 3 and given.shape[2] == 1 else given)


def _decoded(image: Image.Image, name: str, most: int = LARGEST_IMAGE) -> Image.Image:
    """An image with its pixels read, turned as its EXIF says."""
    if image.width * image.height > most:
        raise InvalidRequest(f"{name} has {image.width} x {image.height} pixels; give at most {most >> 20} million")
    try:
        frames = getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format  # which a copy has not
            return turned
    except _FAULTS as error:
        raise InvalidRequest(f"{name} is damaged or cut ({_line(error)}); give another one") from error
    raise InvalidRequest(f"{name} holds {frames} frames; give a single image")


def _coloured(image: Image.Image, channels: int) -> Image.Image:
    """An image of 1 (grey), 3 or 4 channels of 8 bits; what is transparent lies on white."""
    if image.mode.startswith("I"):  # 16 or 32 bits of grey
        levels = np.asarray(image, np.float64)
        most = 65535 if levels.max(initial=0) > 255 else 255
        image = Image.fromarray(np.rint(np.clip(levels, 0, most) * (255 / most)).astype(np.uint8))
    elif image.mode == "F":
        raise InvalidRequest("an image of floating-point numbers has no range that is known; give 8 or 16 bits")
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def _grey(mask: Image.Image) -> Image.Image:
    """A mask of 8 bits. One that is transparent somewhere is painted anew there, as in OpenAI's API."""
    if mask.mode in ("RGBA", "LA") and mask.getchannel("A").getextrema() != (255, 255):
        return ImageOps.invert(mask.getchannel("A"))
    return _coloured(mask, 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
