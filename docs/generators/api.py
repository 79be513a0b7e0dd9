"""One page for each public name of the three packages, and for the protocols that the guides use.

mkdocstrings writes the pages' text from signatures and docstrings; here is only which names there are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from redif_sdk import errors

__all__ = ["MORE", "PACKAGES", "nav", "pages", "place", "public_names"]

PACKAGES = ("redif_sdk", "redif_sdk.distill", "redif_sdk.export")
#: Names beside those of `__all__` that the guides tell people to import.
MORE = (
    "redif_sdk.sampling.table.NoiseSchedule",
    "redif_sdk.distill.rewards.Batch",
    "redif_sdk.distill.rewards.protocol.Reward",
    "redif_sdk.distill.rewards.protocol.LearningReward",
    "redif_sdk.distill.methods.protocol.Method",
    "redif_sdk.distill.teachers.registry.register",
    "redif_sdk.export.tensorrt.build_engines",
    "redif_sdk.export.web.build_page",
    "redif_sdk.runtimes.protocol.Runtime",
    "redif_sdk.runtimes.protocol.RuntimeInfo",
)
#: What mkdocstrings shows of objects whose members are described elsewhere.
_WITHOUT_MEMBERS = {
    "redif_sdk.distill.DistillConfig": "Every field is in [Settings](../../settings.md).",
    "redif_sdk.Manifest": "Every field is in [The manifest](../../manifest.md).",
}


def public_names() -> dict[str, list[str]]:
    """The names of each package's ``__all__``."""
    return {package: list(import_module(package).__all__) for package in PACKAGES}


def place(name: str) -> str:
    """The page of a public name, given with its package: errors share one page."""
    if name.rpartition(".")[2] in errors.__all__ and name.startswith("redif_sdk."):
        return "reference/errors.md"
    return f"reference/api/{name.rpartition('.')[0]}/{name.rpartition('.')[2]}.md"


def _own_page(name: str) -> str:
    """The page of one name. Values that are no class and no function are written as they are."""
    package, _, short = name.rpartition(".")
    value: Any = getattr(import_module(package), short)
    if not callable(value):
        shown = "the installed version of redif-sdk" if short == "__version__" else f"`{value!r}`"
        return f"# {short.strip('_')}\n\n`{name}`: {shown}.\n"
    text = f"# {short}\n\n::: {name}\n    options:\n      heading_level: 2\n"
    if short == "FastPipeline":
        text += "      inherited_members: true\n"
    if name in _WITHOUT_MEMBERS:
        text += f"      members: false\n\n{_WITHOUT_MEMBERS[name]}\n"
    return text


def pages() -> dict[str, str]:
    """Markdown by page, of all names that have a page of their own."""
    names = [f"{package}.{name}" for package, found in public_names().items() for name in found]
    return {place(name): _own_page(name) for name in (*names, *MORE) if place(name) != "reference/errors.md"}


def nav() -> list[dict[str, Any]]:
    """The part of the navigation that holds these pages."""
    entries: list[dict[str, Any]] = []
    for package, names in public_names().items():
        own = [{name: place(f"{package}.{name}")} for name in names if "errors.md" not in place(f"{package}.{name}")]
        entries.append({package: own})
    more = [{name.rpartition(".")[2]: place(name)} for name in MORE]
    return [*entries, {"Protocols and helpers": more}]
