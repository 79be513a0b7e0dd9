"""A filter for generated images: any ONNX classifier, run without torch."""

from redif_sdk.safety.classifier import SafetyFilter, filtered
from redif_sdk.safety.spec import FilterSpec

__all__ = ["FilterSpec", "SafetyFilter", "filtered"]
