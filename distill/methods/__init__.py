"""Distillation methods: a file a method, their protocol, and the registry of names."""

from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.registry import METHODS, make_method, method_names

__all__ = ["METHODS", "Loss", "Method", "make_method", "method_names"]
