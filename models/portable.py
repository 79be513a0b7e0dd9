"""Whether a network can be written by training and read by export: decided by the network itself, before any work.

Export makes each network of its class and its configuration, and fills it with the saved weights. So a network is
portable if the same class with the same configuration has the same modules, the same weights by name and shape, and the
same settings. `distill`, `import`, `doctor` and `export` ask the functions here, and say the same.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from redif_sdk.errors import InvalidRequest, UnsupportedModel, first_line, some_of
from redif_sdk.models.copies import named_parts, private_copy, refuse_absent, unwrapped
from redif_sdk.models.families import ENCODERS

__all__ = [
    "check_encoder_class",
    "check_finite",
    "check_library_network",
    "check_own_network",
    "check_pipeline",
    "filled",
    "is_library_network",
    "refuse_saved_adapters",
]

#: Settings of a module that change its memory or speed, and not what it computes.
_HARMLESS = {"training", "gradient_checkpointing", "is_gradient_checkpointing", "use_slicing", "use_tiling"}
_PRIVATE = {"FreeU": ("s1", "s2", "b1", "b2")}
_ADAPTED = (".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".base_layer.", ".lora_embedding_A.")


def is_library_network(module: nn.Module) -> bool:
    """Whether the network's class is one of diffusers' own, so that export finds it by its name."""
    return _library_class(module, "diffusers")


def _library_class(module: nn.Module, package: str) -> bool:
    kind = type(module)
    if kind.__module__.partition(".")[0] != package:
        return False
    return getattr(importlib.import_module(package), kind.__name__, None) is kind


def check_pipeline(pipeline: Any, *, loaded: bool = False, library: bool = True) -> None:
    """Raise UnsupportedModel if a part of a pipeline cannot be saved, loaded and exported again.

    Args:
        pipeline: An object whose attributes are networks.
        loaded: A library has just made the networks of a folder, so their modules are those of their classes.
        library: The networks must be of diffusers and transformers; else only their values are looked at.
    """
    for name, part in named_parts(pipeline):
        if library:
            check_library_network(part, name, loaded=loaded)
        else:
            refuse_absent(part, name)
            check_finite(part, name)


def check_library_network(module: nn.Module, name: str, *, loaded: bool = False) -> None:
    """Raise UnsupportedModel unless export can make this network of its class, its configuration and its weights.

    Args:
        module: A network of diffusers, or a text encoder of transformers.
        name: What the error calls it, e.g. "unet".
        loaded: Its library has just made it, so its modules are those of its class.
    """
    refuse_absent(module, name)
    text = name.startswith("text_encoder")
    if text and type(module).__name__ not in ENCODERS:
        raise UnsupportedModel(
            f"the pipeline's {name} is a {type(module).__name__}, which is not supported; use {', '.join(ENCODERS)}"
        )
    if not _library_class(module, "transformers" if text else "diffusers"):
        raise UnsupportedModel(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}, which is no class of "
            f"{'transformers' if text else 'diffusers'}; a network of your own can be a student: "
            "distill(teacher, student=...)"
        )
    if not loaded:
        _check_structure(module, _fresh(module, name), name)
    check_finite(module, name)


def check_own_network(module: nn.Module, name: str) -> None:
    """Raise UnsupportedModel for a network of the caller's own whose weights cannot be trained or saved.

    Of such a network the weights are saved, and its class by name only. It is exported with
    ``export(folder, network=module)``.
    """
    refuse_absent(module, name)
    if not any(True for _ in module.parameters()):
        raise UnsupportedModel(f"{name}, a {type(module).__name__}, has no weights to train")
    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"{name}: {key} of its state_dict is a {type(value).__name__}; only tensors are saved"
            )
        if value.is_sparse or value.is_complex() or value.layout is not torch.strided:
            raise UnsupportedModel(f"{name}: {key} is sparse or complex, which safetensors does not save")
    check_finite(module, name)


def filled(module: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> nn.Module:
    """A copy of ``module`` in float32 and evaluation mode, with these weights. The module is not changed.

    Raises:
        InvalidRequest: names or shapes are not those of the module.
    """
    made = copy.deepcopy(private_copy(module, "the network")).float()
    ours = made.state_dict()
    kept = {(value.data_ptr(), tuple(value.shape)) for key, value in ours.items() if key in weights and value.numel()}
    shared = {key for key, value in ours.items() if (value.data_ptr(), tuple(value.shape)) in kept}
    problems = [f"{key} is missing" for key in ours if key not in weights and key not in shared and ours[key].numel()]
    problems += [f"{key} is not the module's" for key in weights if key not in ours]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, the module's {tuple(ours[key].shape)}"
        for key in ours.keys() & weights.keys()
        if ours[key].shape != weights[key].shape
    ]
    if problems:
        raise InvalidRequest(
            f"the weights in {where} are not those of a {type(made).__name__}: {some_of(sorted(problems), 3)}; "
            "give the module that was trained"
        )
    made.load_state_dict(weights, strict=False)
    return made


def check_encoder_class(class_path: str) -> None:
    """Raise UnsupportedModel for a text encoder that is not called here."""
    module, _, kind = class_path.rpartition(".")
    if module.partition(".")[0] != "transformers" or kind not in ENCODERS:
        raise UnsupportedModel(
            f"the text encoder {class_path} is not supported; use transformers' {', '.join(ENCODERS)}"
        )


def check_finite(module: nn.Module, name: str) -> None:
    """Raise UnsupportedModel, naming the first tensor, if a weight is NaN or infinite."""
    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        # a sum is finite where all values are, and reads the tensor once
        wide = torch.complex64 if value.is_complex() else torch.float32
        if math.isfinite(abs(complex(value.detach().sum(dtype=wide)))):
            continue
        wrong = int((~torch.isfinite(value)).sum())
        if wrong:
            raise UnsupportedModel(
                f"{name}: {wrong} of {value.numel()} values of {key} are NaN or infinite; load the weights again, in "
                "float32 or bfloat16 if they were converted to float16"
            )


def _fresh(module: Any, name: str) -> nn.Module:
    """The module that its class makes of its configuration, without values."""
    try:
        with torch.device("meta"):
            if hasattr(module, "from_config"):
                made: nn.Module = type(module).from_config(dict(module.config))
                return made
            made = type(module)(module.config)
            return made
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{name}: its configuration makes no {type(module).__name__} ({first_line(error, 200)}); a saved "
            "student could not be loaded"
        ) from error


def _check_structure(module: nn.Module, fresh: nn.Module, name: str) -> None:
    """Modules, weights, functions and settings are those of ``fresh``."""
    remedy = "undo what was added to it, or load the pipeline anew"
    theirs = dict(fresh.named_modules())
    for key, part in module.named_modules():
        where = f"{name}.{key}" if key else name
        if "forward" in vars(part):
            raise UnsupportedModel(
                f"{where} has another forward than its class, which a saved student would not have; {remedy}"
            )
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith(("transformers.", "torch.")) for hook in hooks):
            raise UnsupportedModel(f"{where} has forward hooks, which a saved student would not have; remove them")
        other = theirs.get(key)
        if other is None or type(unwrapped(part)) is not type(other):
            made = "nothing" if other is None else f"a {type(other).__name__}"
            raise UnsupportedModel(
                f"{where} is a {type(part).__name__}, and its configuration makes {made} of it; {remedy}"
            )
        _check_settings(vars(part), vars(other), where)
    _check_weights(_shapes(module), _shapes(fresh), name, remedy)


def _check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """The numbers of a module are those of a fresh one."""
    for feature, names in _PRIVATE.items():
        if any(ours.get(key) is not None and theirs.get(key) is None for key in names):
            raise UnsupportedModel(
                f"{where}: {feature} is on, which a saved student would not have; call disable_freeu()"
            )
    for key, value in ours.items():
        if key.startswith("_") or key in _HARMLESS or not isinstance(value, bool | int | float):
            continue
        wanted = theirs.get(key, value)
        if isinstance(wanted, bool | int | float) and value != wanted:
            raise UnsupportedModel(
                f"{where}.{key} is {value}, and its configuration makes it {wanted}; a saved student would have "
                f"{wanted}: set it in the configuration"
            )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def _check_weights(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], name: str, remedy: str
) -> None:
    if more := sorted(ours.keys() - theirs.keys()):
        raise UnsupportedModel(f"{name} has weights that its configuration does not make: {some_of(more, 3)}; {remedy}")
    if fewer := sorted(theirs.keys() - ours.keys()):
        raise UnsupportedModel(f"{name} lacks weights that its configuration asks for: {some_of(fewer, 3)}; {remedy}")
    if wrong := next((key for key in ours if ours[key] != theirs[key]), None):
        raise UnsupportedModel(
            f"{name}: {wrong} has shape {ours[wrong]}, and its configuration makes {theirs[wrong]}; {remedy}"
        )


def refuse_saved_adapters(folder: Path) -> None:
    """Raise UnsupportedModel for a pipeline's folder that was saved with LoRA layers still in its networks."""
    for path in sorted(folder.glob("*/*.safetensors")):
        if found := next((key for key in _tensor_names(path) if any(part in key for part in _ADAPTED)), None):
            raise UnsupportedModel(
                f"{path} was saved with LoRA layers in it ({found}); load that pipeline where it was made, call "
                "fuse_lora() and unload_lora_weights(), and save it again"
            )


def _tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file's header; none, if it cannot be read: its loader says why."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []
