"""The methods by name. A new one is a module beside this file, and a line in `METHODS`."""

from __future__ import annotations

from redif_sdk.distill.methods.cdm import Cdm
from redif_sdk.distill.methods.consistency import Consistency
from redif_sdk.distill.methods.dmd import Dmd
from redif_sdk.distill.methods.dmd2 import Dmd2
from redif_sdk.distill.methods.draft import Draft
from redif_sdk.distill.methods.grpo import Grpo
from redif_sdk.distill.methods.progressive import Progressive
from redif_sdk.distill.methods.protocol import Method
from redif_sdk.distill.methods.redif import ReDiF
from redif_sdk.distill.methods.regression import Regression
from redif_sdk.distill.methods.sgmd import Sgmd
from redif_sdk.errors import InvalidRequest

__all__ = ["METHODS", "make_method", "method_names"]

METHODS: dict[str, type[Method]] = {
    "redif": ReDiF,
    "regression": Regression,
    "progressive": Progressive,
    "dmd": Dmd,
    "dmd2": Dmd2,
    "cdm": Cdm,
    "sgmd": Sgmd,
    "consistency": Consistency,
    "draft": Draft,
    "grpo": Grpo,
}


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(METHODS)


def make_method(name: str) -> Method:
    """A new object of the method ``name``.

    Raises:
        InvalidRequest: there is no such method.
    """
    if name not in METHODS:
        raise InvalidRequest(f"unknown method {name!r}; choose from {', '.join(method_names())}")
    return METHODS[name]()
