"""Another decoder for a student: an autoencoder's files in place of its own, as a tiny one (TAESD) for a large one.

Files are copied, nothing is trained. How far the images are from those of the decoder that was there is measured on the
golden latents, and said in the student's figures.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Decoder
from redif_sdk.artifact.untrusted.configs import check_config
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.export.golden import read_golden
from redif_sdk.export.networks import load_decoder
from redif_sdk.hub import fetch, is_hub_id
from redif_sdk.models.families import AUTOENCODERS
from redif_sdk.textfile import read_json_file

__all__ = ["compared", "replace_decoder"]

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?(\.[A-Za-z0-9_-]+)?\.safetensors")
_INDEX = "model_index.json"
#: Pipelines that shift latents before they decode them.
_SHIFTED = ("StableDiffusion3Pipeline", "FluxPipeline")


def replace_decoder(student: StudentFolder, new: Path, source: str | Path) -> Manifest:
    """Put an autoencoder into `new`, a copy of the student, in place of its own.

    Args:
        student: The student.
        new: The copy, to which only this process writes.
        source: The autoencoder's folder as diffusers saves it, or a Hub id.

    Returns:
        The manifest of `new`.

    Raises:
        InvalidRequest: The folder is not there, or its autoencoder decodes other latents.
        UnsupportedModel: The student has no decoder, or the autoencoder is of another class than `AUTOENCODERS`.
    """
    manifest = student.manifest
    old = manifest.postprocess.decoder
    if old is None:
        raise UnsupportedModel(f"the images of {manifest.name} are pixels, which need no decoder")
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        folder = fetch(str(source), ("config.json", "*.safetensors"))
    described = _described(folder, old, manifest)
    target = new / old.folder
    shutil.rmtree(target)
    target.mkdir()
    for path in _weights(folder):
        shutil.copyfile(path, target / _WEIGHTS.sub(r"diffusion_pytorch_model\1.safetensors", path.name))
    shutil.copyfile(folder / "config.json", target / "config.json")
    index: Any = read_json_file(new / _INDEX, "the student's pipeline")
    if old.folder in index:
        index[old.folder] = ["diffusers", described.class_path.partition(".")[2]]
        (new / _INDEX).write_text(json.dumps(index, indent=2))
    post = manifest.postprocess.model_copy(update={"decoder": described})
    return write_manifest(new, manifest.model_copy(update={"postprocess": post, "graphs": [], "golden": []}))


def compared(student: StudentFolder, new: StudentFolder) -> dict[str, Any]:
    """A row for the manifest's metrics: the images of `new` against those of the student's former decoder.

    Args:
        student: The student with its former decoder.
        new: The one with the other decoder, and with golden files.
    """
    import torch

    former, renewed = (one.manifest.postprocess.decoder for one in (student, new))
    decoder = load_decoder(student)
    assert former is not None
    assert renewed is not None
    assert decoder is not None
    errors = []
    with torch.no_grad():
        for entry in new.manifest.golden:
            record = read_golden(new, entry)
            for latents, image in zip(torch.from_numpy(record.latents), record.images, strict=True):
                wanted = ((decoder(latents[None])[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
                errors.append(float(np.mean((wanted - image) ** 2)))
    error = float(np.mean(errors))
    return {
        "decoder": renewed.class_path,
        "in_place_of": former.class_path,
        "num_samples": len(errors),
        "psnr": round(10 * math.log10(255**2 / error), 2) if error else None,
    }


def _described(folder: Path, old: Decoder, manifest: Manifest) -> Decoder:
    """What the manifest says of the autoencoder in `folder`, which must decode what the `old` one decodes."""
    if not (folder / "config.json").is_file():
        raise InvalidRequest(f"{folder} is no decoder: config.json is missing; give the folder of an autoencoder")
    config: Any = read_json_file(folder / "config.json", "the decoder's configuration")
    check_config(config, str(folder / "config.json"))
    kind = config.get("_class_name")
    if kind not in AUTOENCODERS:
        raise UnsupportedModel(f"the decoder in {folder} is a {kind}; use {' or '.join(AUTOENCODERS)}")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UnsupportedModel(
            f"the decoder in {folder} normalises its latents channel by channel, which is not supported"
        )
    widths = config.get("block_out_channels", config.get("decoder_block_out_channels"))
    scale = 2 ** (len(widths) - 1) if isinstance(widths, list) else None
    for what, has, needs in (
        ("latent channels", config.get("latent_channels"), manifest.latents.channels),
        ("pixels a latent on each side", scale, old.scale),
        ("channels of an image", config.get("out_channels"), old.channels),
    ):
        if has != needs:
            raise InvalidRequest(f"the decoder in {folder} has {has} {what}, and {manifest.name} {needs}; use another")
    shifted = manifest.network.pipeline in _SHIFTED
    return old.model_copy(
        update={
            "class_path": f"diffusers.{kind}",
            "scaling_factor": float(config.get("scaling_factor", 1.0)),
            "shift_factor": float(config.get("shift_factor") or 0.0) if shifted else 0.0,
        }
    )


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of one variant; the plain ones where there are several."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(path.name):
            found.setdefault(match[2] or "", []).append(path)
    chosen = found.get("") or next(iter(found.values()), None)
    if not chosen:
        raise InvalidRequest(f"{folder} holds no weights (*.safetensors) of an autoencoder; copy it again")
    return chosen
