"""Checks of what a caller asks for, before anything is computed."""

from redif_sdk.inputs.like_diffusers import OUTPUT_TYPES, check_guidance, check_output, precision_of
from redif_sdk.inputs.request import (
    EMBEDS,
    LONGEST_PROMPT,
    Asked,
    Conditions,
    GenerationRequest,
    Labels,
    Seeds,
    check_conditions,
    check_latents,
    check_noise,
    check_request,
    check_size,
    count_of,
)

__all__ = [
    "EMBEDS",
    "LONGEST_PROMPT",
    "OUTPUT_TYPES",
    "Asked",
    "Conditions",
    "GenerationRequest",
    "Labels",
    "Seeds",
    "check_conditions",
    "check_guidance",
    "check_latents",
    "check_noise",
    "check_output",
    "check_request",
    "check_size",
    "count_of",
    "precision_of",
]
