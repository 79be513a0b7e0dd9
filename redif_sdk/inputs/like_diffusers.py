"""Arguments that diffusers' pipelines take and a student does not, or otherwise: checked, and said in its terms."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from redif_sdk.errors import InvalidRequest

__all__ = ["OUTPUT_TYPES", "check_output", "precision_of"]

OUTPUT_TYPES = ("pil", "np", "uint8", "pt", "latent")
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def check_output(output_type: str, generator: object, tensors: Sequence[str], safety_filter: object = None) -> None:
    """Check what diffusers' pipelines take beside the request itself.

    Raises:
        InvalidRequest: An unknown `output_type`; a generator; or another tensor for callbacks than the latents;
            latents as output with a safety filter, which sees images.
    """
    if output_type not in OUTPUT_TYPES:
        raise InvalidRequest(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
    if output_type == "pt" and importlib.util.find_spec("torch") is None:
        raise InvalidRequest("output_type pt needs torch, which is not installed; use np")
    if output_type == "latent" and safety_filter is not None:
        raise InvalidRequest("output_type latent is not supported with a safety filter, which sees images; use np")
    if generator is not None:
        raise InvalidRequest(
            "generator is not supported, since noise is drawn without torch; give seed=, the same everywhere, or what "
            "the generator draws as latents=torch.randn(shape, generator=generator)"
        )
    if unknown := [name for name in tensors if name != "latents"]:
        raise InvalidRequest(f"callbacks are given the latents alone, not {', '.join(map(str, unknown))}")


def precision_of(precision: str, torch_dtype: object) -> str:
    """`precision`, or what diffusers' `torch_dtype` means.

    Raises:
        InvalidRequest: Both are given, or the dtype has no precision.
    """
    if torch_dtype is None:
        return precision
    name = str(torch_dtype).removeprefix("torch.")
    if precision != "auto" or name not in DTYPES:
        known = ", ".join(f"{dtype} is precision={own}" for dtype, own in DTYPES.items())
        raise InvalidRequest(f"torch_dtype is {torch_dtype}; give precision alone ({known})")
    return DTYPES[name]
