"""Loads a student's networks into torch, from bytes that were checked against its manifest.

Only classes of diffusers and transformers are loaded, since importing any other name would run its code. Files are read
through `StudentFolder`, or mapped from a copy that was checked when it was made. Nothing is downloaded. The weights of
large networks stay in these files, in the dtype that they have there: see `redif_sdk.models.hollow`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file as map_safetensors

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import TextEncoder
from redif_sdk.errors import ExportError, UnsupportedModel
from redif_sdk.models.copies import private_copy
from redif_sdk.models.families import LatentDecoder, LatentEncoder, TextEncoders
from redif_sdk.models.hollow import as_stored, streamed
from redif_sdk.models.portable import check_encoder_class, check_finite, filled

__all__ = ["LARGE", "encoder_of", "given_network", "is_large", "load_decoder", "load_encoders", "load_network"]

#: Parameters from which on a network is large: a call takes seconds, eight images gigabytes.
LARGE = 200_000_000

#: What a class or its loader raises for a configuration or weights that are not its own.
_MISFITS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)


def is_large(network: torch.nn.Module) -> bool:
    """Whether a network has at least `LARGE` parameters."""
    return sum(parameter.numel() for parameter in network.parameters()) >= LARGE


def load_network(student: StudentFolder, checked: Path | None = None) -> torch.nn.Module:
    """The student's network in float32, in evaluation mode.

    Args:
        student: The student's folder.
        checked: A copy of the folder that only this process writes to, made by `StudentFolder.copy_to`: the weights of
            large networks are read from it when they are used. None: all weights are read into memory.

    Raises:
        UnsupportedModel: Its class is not one of diffusers'; give such a network to `export` yourself.
        ExportError: The weights do not fit the class.
        IntegrityError: A file was altered.
    """
    network = student.manifest.network
    return _diffusers(
        student,
        network.class_path,
        network.folder,
        "give the network in Python: export(folder, network=module)",
        checked,
    )


def given_network(student: StudentFolder, module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the caller's module in float32, in evaluation mode, with the folder's weights where it has some.

    Raises:
        InvalidRequest: They are not the module's.
        UnsupportedModel: The module cannot be copied.
    """
    folder = student.manifest.network.folder
    if not any(file.endswith(".safetensors") for file in student.files(folder)):
        return private_copy(module, "the network").float()
    return filled(module, _weights(student, folder), f"{student.path}/{folder}").requires_grad_(False)


def load_decoder(student: StudentFolder, checked: Path | None = None) -> LatentDecoder | None:
    """The student's decoder in float32, or None if its latents are pixels. As `load_network`."""
    decoder = student.manifest.postprocess.decoder
    if decoder is None:
        return None
    autoencoder = _diffusers(
        student, decoder.class_path, decoder.folder, "only diffusers' autoencoders are supported", checked
    )
    if not hasattr(autoencoder, "decode"):
        raise UnsupportedModel(f"{decoder.class_path} has no decode method; name one of diffusers' autoencoders")
    return LatentDecoder(autoencoder, decoder.scaling_factor, decoder.shift_factor).eval()


def encoder_of(decoder: LatentDecoder) -> LatentEncoder:
    """The encoder that belongs to a decoder."""
    return LatentEncoder(decoder.autoencoder, decoder.scaling_factor, decoder.shift_factor).eval()


def load_encoders(student: StudentFolder, checked: Path | None = None) -> TextEncoders | None:
    """The student's text encoders in float32, as one module, or None if it is not a text-to-image model.

    Arguments as of `load_network`.

    Raises:
        UnsupportedModel: A class or the pipeline is not supported.
        ExportError: The weights do not fit, or transformers is not installed.
        IntegrityError: A file was altered.
    """
    text, pipeline = student.manifest.text, student.manifest.network.pipeline
    if text is None:
        return None
    if pipeline is None:
        raise UnsupportedModel(
            f"{student.path} does not name the pipeline of its text encoders; set network.pipeline in its manifest"
        )
    encoders = TextEncoders(
        [_encoder(student, part, checked) for part in text.encoders], pipeline, _fixed(text.tensors[0].shape)
    )
    names = [tensor.name for tensor in text.tensors]
    if list(encoders.names) != names:
        raise UnsupportedModel(
            f"the text encoders of a {pipeline} give {', '.join(encoders.names)}, and {student.path} takes "
            f"{', '.join(names)}; import the pipeline again"
        )
    return encoders.eval()


def _fixed(shape: list[int | str]) -> list[int]:
    """A tensor's shape without its batch axis."""
    return [size for size in shape[1:] if isinstance(size, int)]


# ---------------------------------------------------------------------- diffusers


def _diffusers(student: StudentFolder, path: str, folder: str, remedy: str, checked: Path | None) -> torch.nn.Module:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] != "diffusers":
        raise UnsupportedModel(f"{path} is not a class of diffusers; {remedy}")
    kind = getattr(importlib.import_module("diffusers"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module) and hasattr(kind, "from_config")):
        raise UnsupportedModel(f"{path} is not a network of the installed diffusers; update diffusers")
    weights = _weights(student, folder, checked)
    try:
        network = _fill(kind, json.loads(student.read(f"{folder}/config.json")), weights)
    except _MISFITS as error:
        raise _misfit(student, folder, name, error) from error
    return _ready(network, folder, checked)


def _ready(network: torch.nn.Module, folder: str, checked: Path | None) -> torch.nn.Module:
    """The network in float32 and evaluation mode, its values checked."""
    check_finite(network, folder)
    network.eval().requires_grad_(False)
    return streamed(network) if checked is not None and is_large(network) else network.float()


def _fill(kind: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network of `config` with `weights`. Its own are never allocated: a configuration may ask for any number."""
    with torch.device("meta"):
        network: torch.nn.Module = kind.from_config(config)
    network.load_state_dict(weights, assign=True)  # RuntimeError unless names and shapes are those of the weights
    if any(buffer.is_meta for buffer in network.buffers()):  # such as are computed and not saved
        with init_empty_weights(include_buffers=False):
            network = kind.from_config(config)
        network.load_state_dict(weights, assign=True)
    return network


def _weights(student: StudentFolder, folder: str, checked: Path | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`: one file, or the shards of one. Mapped, where there is a
    checked copy of the student."""
    shards = [file for file in student.files(folder) if file.endswith(".safetensors")]
    if not shards:
        raise ExportError(
            f"{student.path}/{folder} holds no safetensors file, so it has no weights; import the model again"
        )
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            tensors = load_safetensors(student.read(shard)) if checked is None else map_safetensors(checked / shard)
        except SafetensorError as error:
            raise ExportError(f"{shard} in {student.path} is not a valid safetensors file: {error}") from error
        if twice := sorted(weights.keys() & tensors.keys()):
            raise ExportError(
                f"{student.path}/{folder} holds the tensor {twice[0]} in two files; keep one variant of the weights"
            )
        weights |= tensors
    return weights


def _misfit(student: StudentFolder, folder: str, name: str, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:300]
    return ExportError(f"the weights and config.json in {student.path}/{folder} make no {name}: {reason}")


# ---------------------------------------------------------------------- transformers


def _encoder(student: StudentFolder, part: TextEncoder, checked: Path | None) -> torch.nn.Module:
    check_encoder_class(part.class_path)
    name = part.class_path.rpartition(".")[2]
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ExportError(f"the text encoder {name} needs transformers ({error}); pip install transformers") from error
    weights = _weights(student, part.folder, checked)
    try:
        config = _config(getattr(transformers, name), json.loads(student.read(f"{part.folder}/config.json")))
        with _quiet_transformers(), as_stored(getattr(transformers, name)):
            encoder = _fill_transformer(getattr(transformers, name), config, weights, _dtype(weights, checked))
    except _MISFITS as error:
        raise _misfit(student, part.folder, name, error) from error
    return _ready(encoder, part.folder, checked)


def _config(kind: Any, document: dict[str, Any]) -> Any:
    """The configuration of the class, with the fields that the class itself declares.

    Fields of the base class may choose code: attention from the Hub, fused layers, a quantiser.
    """
    own = kind.config_class
    fields = {*inspect.signature(own.__init__).parameters, *inspect.get_annotations(own)}
    return own(**{name: value for name, value in document.items() if name in fields})


def _dtype(weights: dict[str, torch.Tensor], checked: Path | None) -> torch.dtype:
    """What weights are loaded in: mapped ones in their own dtype, which copies none; mixed ones in float32."""
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    return kinds.pop() if checked is not None and len(kinds) == 1 else torch.float32


def _fill_transformer(kind: Any, config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """The text encoder of `config` with `weights`, by transformers' own loader from memory.

    The loader handles names of older releases, tied weights and computed buffers. It also initialises missing weights,
    so the sizes are compared first, and its report is checked.
    """
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in kind(config).parameters())
    held = sum(tensor.numel() for tensor in weights.values())
    if wanted > 2 * held:  # tied weights count twice before they are tied
        raise ValueError(f"config.json asks for {wanted} weights, and the files hold {held}")
    encoder: torch.nn.Module
    encoder, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[what]:
            raise ValueError(f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, report[what])))}")
    return encoder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the loader's tables and progress bars; weights that do not fit are raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
