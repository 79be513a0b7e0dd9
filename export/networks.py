"""Loads a student's networks into torch, from bytes that were checked against its manifest.

Only classes of diffusers and transformers are loaded, since importing any other name would run its code. Files are read
through `StudentFolder` only, and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import TextEncoder
from redif_sdk.errors import ExportError, UnsupportedModel
from redif_sdk.models.copies import private_copy
from redif_sdk.models.families import LatentDecoder, TextEncoders
from redif_sdk.models.portable import check_encoder_class, check_finite, filled

__all__ = ["given_network", "load_decoder", "load_encoders", "load_network"]

#: What a class or its loader raises for a configuration or weights that are not its own.
_MISFITS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)


def load_network(student: StudentFolder) -> torch.nn.Module:
    """The student's network in float32, in evaluation mode.

    Raises:
        UnsupportedModel: Its class is not one of diffusers'; give such a network to `export` yourself.
        ExportError: The weights do not fit the class.
        IntegrityError: A file was altered.
    """
    network = student.manifest.network
    return _diffusers(
        student, network.class_path, network.folder, "give the network in Python: export(folder, network=module)"
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


def load_decoder(student: StudentFolder) -> LatentDecoder | None:
    """The student's decoder in float32, or None if its latents are pixels. Raises as `load_network` does."""
    decoder = student.manifest.postprocess.decoder
    if decoder is None:
        return None
    autoencoder = _diffusers(student, decoder.class_path, decoder.folder, "only diffusers' autoencoders are supported")
    if not hasattr(autoencoder, "decode"):
        raise UnsupportedModel(f"{decoder.class_path} has no decode method; name one of diffusers' autoencoders")
    return LatentDecoder(autoencoder, decoder.scaling_factor, decoder.shift_factor).eval()


def load_encoders(student: StudentFolder) -> TextEncoders | None:
    """The student's text encoders in float32, as one module, or None if it is not a text-to-image model.

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
        [_encoder(student, part) for part in text.encoders], pipeline, _fixed(text.tensors[0].shape)
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


def _diffusers(student: StudentFolder, path: str, folder: str, remedy: str) -> torch.nn.Module:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] != "diffusers":
        raise UnsupportedModel(f"{path} is not a class of diffusers; {remedy}")
    kind = getattr(importlib.import_module("diffusers"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module) and hasattr(kind, "from_config")):
        raise UnsupportedModel(f"{path} is not a network of the installed diffusers; update diffusers")
    weights = _weights(student, folder)
    try:
        network = _fill(kind, json.loads(student.read(f"{folder}/config.json")), weights)
    except _MISFITS as error:
        raise _misfit(student, folder, name, error) from error
    check_finite(network, folder)
    return network.float().eval().requires_grad_(False)


def _fill(kind: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network of `config` with `weights`. Its own are never allocated: a configuration may ask for any number."""
    with torch.device("meta"):
        network: torch.nn.Module = kind.from_config(config)
    network.load_state_dict(weights, assign=True)  # RuntimeError unless names and shapes are those of the weights
    if any(buffer.is_meta for buffer in network.buffers()):  # such as are computed and not saved
        network = kind.from_config(config)
        network.load_state_dict(weights)
    return network


def _weights(student: StudentFolder, folder: str) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`: one file, or the shards of one."""
    shards = [file for file in student.files(folder) if file.endswith(".safetensors")]
    if not shards:
        raise ExportError(
            f"{student.path}/{folder} holds no safetensors file, so it has no weights; import the model again"
        )
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            tensors = load_safetensors(student.read(shard))
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


def _encoder(student: StudentFolder, part: TextEncoder) -> torch.nn.Module:
    check_encoder_class(part.class_path)
    name = part.class_path.rpartition(".")[2]
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ExportError(f"the text encoder {name} needs transformers ({error}); pip install transformers") from error
    weights = _weights(student, part.folder)
    try:
        config = _config(getattr(transformers, name), json.loads(student.read(f"{part.folder}/config.json")))
        with _quiet_transformers():
            encoder = _fill_transformer(getattr(transformers, name), config, weights)
    except _MISFITS as error:
        raise _misfit(student, part.folder, name, error) from error
    check_finite(encoder, part.folder)
    return encoder.float().eval().requires_grad_(False)


def _config(kind: Any, document: dict[str, Any]) -> Any:
    """The configuration of the class, with the fields that the class itself declares.

    Fields of the base class may choose code: attention from the Hub, fused layers, a quantiser.
    """
    own = kind.config_class
    fields = {*inspect.signature(own.__init__).parameters, *inspect.get_annotations(own)}
    return own(**{name: value for name, value in document.items() if name in fields})


def _fill_transformer(kind: Any, config: Any, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
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
        dtype=torch.float32,
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
