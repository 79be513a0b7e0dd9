"""The adapters that make teachers of pipelines, by the names of the pipelines' classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from redif_sdk.distill.teachers import folders
from redif_sdk.errors import RedifError, UnsupportedModel, first_line

if TYPE_CHECKING:
    from redif_sdk.distill.teachers.base import Teacher

__all__ = [
    "UNET_2D",
    "Adapter",
    "adapted",
    "adapter_named",
    "adapter_of",
    "is_ours",
    "no_adapter",
    "register",
    "supported",
]

Adapter = Callable[..., "Teacher"]
_ADAPTERS: dict[str, Adapter] = {}
UNET_2D = "UNet2DModel"  # the adapter of every pipeline that is this network and a scheduler


def register(*pipelines: str) -> Callable[[Adapter], Adapter]:
    """Make a function ``(pipeline, **options) -> Teacher`` the adapter of these classes of pipelines, by name.

    ``options`` are those of :meth:`Teacher.from_diffusers`: ``prompts``, ``height``, ``width`` and
    ``num_inference_steps``, each of them None where the caller leaves it open; and ``about``, what a folder's
    ``redif_teacher.json`` says. The adapters of this package register themselves when it is imported.
    """

    def keep(adapter: Adapter) -> Adapter:
        _ADAPTERS.update(dict.fromkeys(pipelines, adapter))
        return adapter

    return keep


def supported() -> list[str]:
    """The names of the classes of pipelines that have an adapter."""
    return sorted(set(_ADAPTERS) - {UNET_2D})


def adapter_of(pipeline: Any) -> Adapter:
    """The adapter of a pipeline: its class's own, else that of UNet2DModel where it holds one and a scheduler.

    Raises:
        UnsupportedModel: no adapter takes it. The message names those that there are, and how to add one.
    """
    name = type(pipeline).__name__
    if name not in _ADAPTERS and folders.is_unet_with_scheduler(pipeline):
        name = UNET_2D
    if name not in _ADAPTERS:
        raise no_adapter(name)
    return _ADAPTERS[name]


def adapter_named(name: str) -> Adapter | None:
    """The adapter of a class of pipelines, if it has one of its own."""
    return _ADAPTERS.get(name)


def is_ours(adapter: Adapter) -> bool:
    """Whether an adapter is one of this package, which knows what a pipeline's images do not need."""
    return (getattr(adapter, "__module__", None) or "").startswith("redif_sdk.")


def no_adapter(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"no adapter takes a {name}; there are adapters for {', '.join(supported())}, and for any UNet2DModel with "
        "its scheduler. Write one of your own (docs/adapters.md), or pass the network to Teacher.from_callable"
    )


def adapted(pipeline: Any, **options: Any) -> Teacher:
    """The teacher that a pipeline's adapter makes of it. A configuration that breaks the adapter is refused."""
    adapter = adapter_of(pipeline)
    try:
        return adapter(pipeline, **options)
    except (RedifError, MemoryError, ImportError):
        raise
    except Exception as error:  # strange values in a configuration raise errors of any kind
        raise UnsupportedModel(
            f"the {type(pipeline).__name__} cannot be used as a teacher: {type(error).__name__}: {first_line(error)}; "
            "check the configurations of its parts"
        ) from error
