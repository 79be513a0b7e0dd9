"""The weights of one component from its folder: all of them, or a refusal that names the tensors.

Only safetensors are read. diffusers and transformers fill a tensor that a file lacks at random, or leave it without
values; both say so in their loading report, which is read here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel, first_line, some_of
from redif_sdk.models.hollow import as_stored, keep_mapped

__all__ = ["LARGE", "check_weights", "find_variant", "link_weights", "load_network", "refuse_quantised", "variants"]

#: The names of weight files without their endings: diffusers' and transformers'.
STEMS = ("diffusion_pytorch_model", "model")
_NUMBER = r"-\d{5}-of-\d{5}"
_SHARD = f"(?:{_NUMBER})?"
_FILE = re.compile(rf"({'|'.join(STEMS)}){_SHARD}(?:\.([A-Za-z0-9_-]+?))?{_SHARD}\.safetensors")
#: Formats that run code, or that nothing here reads.
_OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx")
#: Unexpected tensors that no forward pass reads: buffers that older releases saved.
_NEVER_READ = re.compile(r"(^|\.)position_ids$")
_NAMED = 6  # tensors in a message
#: Weights above which a network is trained by adapters, and a text encoder stays in its files.
LARGE = 400_000_000
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_variant(folder: Path, asked: str | None = None) -> str | None:
    """The variant of the safetensors in ``folder``: ``asked`` where it is there, else the plain files, else the only
    variant.

    Raises:
        InvalidRequest: there are no safetensors, or several variants and no plain files.
    """
    found = variants(folder)
    if asked is not None and asked in found:
        return asked
    if None in found:
        return None
    if len(found) == 1:
        return next(iter(found))
    if found:
        names = ", ".join(sorted(str(name) for name in found))
        raise InvalidRequest(f"{folder} holds the variants {names} of its weights; choose one with --variant NAME")
    if others := sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS):
        raise InvalidRequest(
            f"{folder} holds {others[0]} and no safetensors, and other formats are not read since they can run code; "
            "convert it: load the pipeline in diffusers with use_safetensors=False, then save_pretrained(FOLDER)"
        )
    if strange := sorted(path.name for path in folder.glob("*.safetensors")):
        raise InvalidRequest(
            f"{folder} holds {strange[0]}, and diffusers reads {' or '.join(STEMS)}.safetensors; rename it"
        )
    raise InvalidRequest(
        f"{folder} holds no weights (*.safetensors); copy the folder again, or convert weights of another format"
    )


def variants(folder: Path) -> set[str | None]:
    """The variants of the safetensors in ``folder``; None among them: the plain files."""
    return {match[2] for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}


def load_network(
    kind: Any, folder: Path, variant: str | None = None, *, mapped: bool = False, half: torch.dtype | None = None
) -> Any:
    """The network in ``folder``, of a class of diffusers or transformers, in float32 and in evaluation mode.

    A text encoder of more than `LARGE` weights is ``mapped`` in any case.

    Args:
        kind: the class.
        variant: of the weights, such as fp16; where the folder lacks it, and for None, what `find_variant` chooses.
        mapped: leave the weights in the folder's files, in the dtype that they have there (see `models.hollow`).
        half: the dtype of a network of diffusers of more than `LARGE` weights; None: float32.

    Raises:
        InvalidRequest: weights are missing, unexpected, of another shape, or cannot be read.
        UnsupportedModel: the network is quantised.
    """
    options: dict[str, Any] = {"variant": find_variant(folder, variant)}
    ours = kind.__module__.startswith("diffusers")
    try:
        held = _held(folder, options["variant"])
        large = held > LARGE
        mapped = mapped or (large and not ours)
        loaded = half if large and half is not None and ours else torch.float32
        dtype = stored_dtype(folder, options["variant"]) if mapped else loaded
        if ours:
            options |= {"torch_dtype": dtype}
        else:
            _refuse_larger(kind, folder, held)
            # its default is the dtype of the file; and a tensor of another shape is only named in the report
            options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
        with as_stored(kind) if mapped else nullcontext():
            network, report = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except (MemoryError, RedifError):
        raise
    except Exception as error:  # what a class makes of a strange configuration may be of any kind
        raise InvalidRequest(
            f"the weights in {folder} cannot be loaded: {first_line(error)}; check config.json, or copy it again"
        ) from error
    _check_report(report, folder, type(network).__name__)
    check_weights(network, str(folder))
    for module in network.modules():
        if module.training:
            module.training = False
    if mapped:
        return keep_mapped(network, _files(folder, options["variant"]))
    return nn.Module.to(network, loaded)  # diffusers' own warns of what it then does not do


def stored_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """The dtype of all floating-point weights of a variant in ``folder``; float32, if they have several."""
    found = {_FLOATS[kind] for kind, _ in _headers(folder, variant) if kind in _FLOATS}
    return found.pop() if len(found) == 1 else torch.float32


def _held(folder: Path, variant: str | None) -> int:
    """The number of weights of a variant in ``folder``."""
    return sum(math.prod(shape) for _, shape in _headers(folder, variant))


def _headers(folder: Path, variant: str | None) -> Iterator[tuple[str, Sequence[int]]]:
    """The dtype, as safetensors call it, and the shape of every tensor of a variant in ``folder``."""
    from safetensors import safe_open

    for path in _files(folder, variant):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                yield tensor.get_dtype(), tensor.get_shape()


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a variant in ``folder``."""
    found = ((path, _FILE.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [path for path, match in found if match and match[2] == variant]


def link_weights(files: Sequence[Path], folder: Path) -> None:
    """Hard links to weight files in ``folder``, under the names that they have without a variant, and their index.

    Raises:
        InvalidRequest: the file system makes no link.
    """
    from safetensors import safe_open

    places: dict[str, str] = {}
    for path in files:
        stem = next(stem for stem in STEMS if path.name.startswith(stem))
        number = re.search(_NUMBER, path.name)
        name = f"{stem}{number[0] if number else ''}.safetensors"
        try:
            os.link(path.resolve(), folder / name)
        except OSError as error:
            raise InvalidRequest(
                f"{path} cannot be linked to {folder} ({first_line(error)}); leave out --link to copy the weights"
            ) from error
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(path.stat().st_size for path in files)}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _refuse_larger(kind: Any, folder: Path, held: int) -> None:
    """Raise InvalidRequest where config.json asks for far more weights than are held: transformers would make them."""
    with torch.device("meta"):
        network = kind(kind.config_class.from_pretrained(folder))
        wanted = sum(parameter.numel() for parameter in network.parameters())
    if wanted > 2 * held:  # tied weights count twice before they are tied
        raise InvalidRequest(
            f"{folder}/config.json asks for {wanted:,} weights and the files hold {held:,}; copy the folder again"
        )


def _check_report(report: Mapping[str, Iterable[Any]], folder: Path, name: str) -> None:
    """Raise InvalidRequest unless a loading report of diffusers or transformers is empty."""
    faults = {}
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(f"{what}_keys") or ())
        if left := [key for key in keys if not (what == "unexpected" and _NEVER_READ.search(key))]:
            faults[what] = left
    if faults:
        said = "; ".join(f"{what}: {some_of(keys, _NAMED)}" for what, keys in faults.items())
        raise InvalidRequest(
            f"the weights in {folder} are not those of this config.json's {name} ({said}); "
            "copy them again, or rename the tensors"
        )
    if errors := list(report.get("error_msgs") or ()):
        raise InvalidRequest(f"the weights in {folder} cannot be loaded: {first_line(errors[0])}; copy them again")


def check_weights(network: nn.Module, where: str) -> None:
    """Raise for a network that is quantised, or whose tensors have no values (torch's meta device).

    Raises:
        InvalidRequest: a tensor has no values; the message names it.
        UnsupportedModel: the network is quantised.
    """
    config: Any = getattr(network, "config", None)
    refuse_quantised(config if isinstance(config, Mapping) else getattr(config, "__dict__", {}), where)
    if getattr(network, "is_quantized", False) or getattr(network, "hf_quantizer", None) is not None:
        raise _quantised(where)
    empty = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if empty:
        raise InvalidRequest(f"{where} has tensors without values: {some_of(sorted(empty), _NAMED)}; load it whole")
    if any(not parameter.dtype.is_floating_point for parameter in network.parameters()):
        raise _quantised(where)


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModel for a configuration that names a quantiser."""
    if config.get("quantization_config") is not None:
        raise _quantised(where)


def _quantised(where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where} is quantised, which is not supported; dequantise it first: load the unquantised weights, or call "
        "dequantize() on the network in diffusers, and save it again"
    )
