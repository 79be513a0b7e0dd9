"""Models that are distilled. Importing this package registers its adapters, which `Teacher.from_diffusers` looks up."""

from redif_sdk.distill.teachers import adapters, unet2d

__all__ = ["adapters", "unet2d"]
