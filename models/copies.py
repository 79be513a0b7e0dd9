"""Private copies of a caller's networks: nothing that is done to a copy reaches the caller's object.

A copy shares the memory of the weights, which are only read, and owns all else: flags, modules, hooks. What others
wrapped around a network (torch.compile, DataParallel) or put into it (LoRA adapters) is taken off, or merged.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from redif_sdk.errors import InvalidRequest, UnsupportedModel, first_line, some_of

__all__ = ["adapted_layers", "merged", "named_parts", "private_copy", "private_pipeline", "sharing", "unwrapped"]

_log = logging.getLogger(__name__)

#: What a pipeline has besides, and what nothing here calls.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "image_processor")
#: What accelerate puts into a module to move its weights around.
_OFFLOAD = ("_hf_hook", "_old_forward", "forward")
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside wrappers that compute the same: torch.compile, DataParallel, peft's model around adapters."""
    while True:
        kind = type(module)
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            module = getattr(module, _WRAPPERS[kind.__name__])
        elif kind.__module__.startswith("peft.") and hasattr(module, "get_base_model"):
            prompt: Any = module
            if getattr(prompt.active_peft_config, "is_prompt_learning", False):
                raise UnsupportedModel(f"{kind.__name__} learns prompts, which is not supported; give its base model")
            module = prompt.get_base_model()
        else:
            return module


def private_copy(module: nn.Module, name: str = "the network") -> Any:
    """A copy of ``module`` in evaluation mode, without gradients; its weights share the memory of the caller's.

    Adapters of peft are merged into weights of the copy's own, as far as they are active.

    Args:
        module: The caller's network.
        name: What an error calls it.

    Raises:
        UnsupportedModel: Its weights are not there (offloaded, sharded), it is quantised, or it cannot be copied.
    """
    module = unwrapped(module)
    refuse_absent(module, name)
    memo: dict[int, Any] = {}
    try:
        own = _own_weights(module)
        for parameter in module.parameters():
            value = parameter.detach()
            value = value.clone() if id(parameter) in own else value
            memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
        memo |= {id(buffer): buffer.detach() for buffer in module.buffers()}
        for part in reversed(list(module.modules())):  # what is inside comes first
            if _is_offloaded(part):
                memo |= {id(vars(part)[key]): None for key in _OFFLOAD if key in vars(part)}
            if (inner := unwrapped(part)) is not part:
                memo[id(part)] = copy.deepcopy(inner, memo)
        made: nn.Module = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{name} cannot be copied ({first_line(error, 200)}); give a plain torch module"
        ) from error
    for part in made.modules():
        if "_hf_hook" in vars(part):
            for key in _OFFLOAD:
                vars(part).pop(key, None)
    return merged(made, name).eval().requires_grad_(False)


def sharing(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares the weights that are not trained, and owns those that are."""
    memo: dict[int, Any] = {id(weight): weight for weight in module.parameters() if not weight.requires_grad}
    return copy.deepcopy(module, memo)


def private_pipeline(pipeline: Any) -> Any:
    """A copy of a caller's pipeline whose networks are :func:`private_copy`, with schedulers and tokenizers of its own.

    An object without attributes to copy is returned as it is.
    """
    if not hasattr(pipeline, "__dict__"):
        return pipeline
    made = copy.copy(pipeline)
    for name, value in list(vars(pipeline).items()):
        if isinstance(value, nn.Module) and name not in UNUSED:
            setattr(made, name, private_copy(value, name))
        elif "scheduler" in name or "tokenizer" in name:
            setattr(made, name, copy.deepcopy(value))
    for part in (part for _, part in named_parts(made)):
        for switch in ("disable_tiling", "disable_slicing"):  # they save memory, and tiles change the image
            if callable(getattr(part, switch, None)) and hasattr(part, "use_tiling"):
                getattr(part, switch)()
    return made


def named_parts(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    """The networks of a pipeline that are used, by name."""
    for name, value in vars(pipeline).items() if hasattr(pipeline, "__dict__") else ():
        if isinstance(value, nn.Module) and name not in UNUSED:
            yield name, value


def refuse_absent(module: nn.Module, name: str) -> None:
    """Raise for weights that are elsewhere, are moved or cast by hooks, or are not plain numbers.

    Raises:
        InvalidRequest: tensors have no values; the message names them.
        UnsupportedModel: the network is sharded, quantised, or has hooks of diffusers.
    """
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise UnsupportedModel(f"{name}: {key} has no shape yet; call the network once, then give it")
        if type(value).__name__ == "DTensor":
            raise UnsupportedModel(f"{name}: {key} is sharded over processes; give the whole network")
    empty = sorted(key for key, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta)
    if empty:
        raise InvalidRequest(
            f"{name} has tensors without values: {some_of(empty, 6)}; load it whole, without device_map and "
            "without offloading"
        )
    for key, part in module.named_modules():
        if "_diffusers_hook" in vars(part):
            raise UnsupportedModel(
                f"{f'{name}.{key}'.rstrip('.')} has hooks of diffusers (group offloading, layerwise casting, a cache), "
                "which a saved student would not have; load the pipeline without them"
            )
    if found := _quantised(module):
        raise UnsupportedModel(
            f"{name} is quantised ({found}), which is not supported; dequantise it first: load the unquantised "
            "weights, or call dequantize() on the network in diffusers"
        )


def _quantised(module: nn.Module) -> str:
    """What says that a network's weights are quantised; empty: nothing does."""
    config = getattr(module, "config", None)
    settings = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    named = settings.get("quantization_config")
    if named is not None and getattr(module, "is_quantized", True):
        return f"quantization_config {_kind(named)}"
    for key, part in module.named_modules():
        package = type(part).__module__
        if package.startswith(("bitsandbytes", "optimum.quanto", "torchao", "torch.ao", "auto_gptq", "awq")):
            return f"{key} is a {package.partition('.')[0]} {type(part).__name__}"
        if package.startswith(("diffusers.quantizers", "transformers.integrations")):
            return f"{key} is a {type(part).__name__}"
    for key, value in module.named_parameters():
        if type(value.data) is not torch.Tensor:
            return f"{key} is a {type(value.data).__name__}"
        if not value.is_complex() and not (value.is_floating_point() and value.element_size() > 1):
            return f"{key} is {str(value.dtype).removeprefix('torch.')}"
    return ""


def _kind(config: Any) -> str:
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or type(config).__name__)


def _is_offloaded(part: nn.Module) -> bool:
    """Whether accelerate moves this module's weights when it is called."""
    return type(vars(part).get("_hf_hook")).__module__.startswith("accelerate.")


def adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers by name."""
    return [
        (key, part)
        for key, part in module.named_modules()
        if hasattr(part, "base_layer") and type(part).__module__.startswith("peft.")
    ]


def _own_weights(module: nn.Module) -> set[int]:
    """The weights that adapters will be merged into, which must not share the caller's memory."""
    return {id(weight) for _, layer in adapted_layers(module) for weight in layer.get_base_layer().parameters()}


def merged(module: nn.Module, name: str) -> nn.Module:
    """``module`` with peft's layers replaced by plain ones that compute the same. It is changed."""
    adapters: set[str] = set()
    for key, layer in adapted_layers(module):
        try:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            elif not layer.disable_adapters:
                if not layer.merged and layer.active_adapters:
                    layer.merge(safe_merge=True)
                adapters |= set(layer.merged_adapters)
            plain = layer.get_base_layer()
        except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            raise UnsupportedModel(
                f"{name}: the adapters of {key} cannot be merged ({first_line(error, 200)}); merge them, then call "
                "unload_lora_weights()"
            ) from error
        parent, _, attribute = key.rpartition(".")
        setattr(module.get_submodule(parent), attribute, plain)
    for mark in ("peft_config", "_hf_peft_config_loaded", "active_adapter"):
        vars(module).pop(mark, None)
    if adapters:
        _log.info("%s: the adapters %s are merged into its weights", name, ", ".join(sorted(adapters)))
    return module
