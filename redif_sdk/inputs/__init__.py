"""Checks of what a caller asks for, before anything is computed."""

from redif_sdk.inputs.guiding import (
    DEFAULT_NAG,
    NAG_SCALE,
    NEGATIVE_EMBEDS,
    Guiding,
    check_guidance,
    guiding_inputs,
    own_nulls,
)
from redif_sdk.inputs.like_diffusers import OUTPUT_TYPES, check_output, precision_of
from redif_sdk.inputs.named import EMBEDS, Conditions, refuse_arrays
from redif_sdk.inputs.request import (
    LONGEST_PROMPT,
    Asked,
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
    "DEFAULT_NAG",
    "EMBEDS",
    "LONGEST_PROMPT",
    "NAG_SCALE",
    "NEGATIVE_EMBEDS",
    "OUTPUT_TYPES",
    "Asked",
    "Conditions",
    "GenerationRequest",
    "Guiding",
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
    "guiding_inputs",
    "own_nulls",
    "precision_of",
    "refuse_arrays",
]
