"""Teachers' folders, as diffusers saves them: where one lies, and what is in it. No pickle is read.

``redif_teacher.json`` beside ``model_index.json`` says what diffusers has no place for (`TEACHER_FILE`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redif_sdk.artifact.untrusted.configs import check_config
from redif_sdk.distill.teachers import components, weights
from redif_sdk.distill.teachers.facts import read_facts
from redif_sdk.distill.teachers.known_schedulers import check_class
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel, first_line
from redif_sdk.hub import fetch, is_hub_id
from redif_sdk.textfile import read_json_file

__all__ = [
    "SHIPPED",
    "TEACHER_FILE",
    "UNetFolder",
    "load_autoencoder",
    "load_pipeline",
    "load_unet",
    "locate",
    "part_folder",
    "pipeline_name",
    "unet_files",
]

SHIPPED = Path(__file__).parent.parent / "shipped"
TEACHER_FILE = "redif_teacher.json"
HUB_FILES = (
    TEACHER_FILE,
    "model_index.json",
    *(f"*/*.{kind}" for kind in ("json", "safetensors", "txt", "model")),  # networks, schedulers, tokenizers
    *("config.json", "scheduler_config.json", "diffusion_pytorch_model*"),  # a UNet2DModel in the folder itself
)
UNET_PARTS = ("unet", "scheduler")


@dataclass(frozen=True)
class UNetFolder:
    """A UNet2DModel and the configuration of its scheduler, from a folder that need not hold a whole pipeline."""

    name: str
    unet: Any
    scheduler: dict[str, Any]


def locate(source: str | Path) -> tuple[Path, str | None]:
    """The folder of a teacher: a shipped one by its name, a folder itself, or the download of a Hub id.

    Returns:
        The folder, and of a download its commit.
    """
    if (SHIPPED / str(source) / TEACHER_FILE).is_file():
        return SHIPPED / str(source), None
    if not Path(source).exists() and is_hub_id(str(source)):
        folder = fetch(str(source), HUB_FILES)
        return folder, folder.name
    return Path(source), None


def pipeline_name(folder: Path) -> str:
    """The class of the pipeline in ``folder``; "" where ``model_index.json`` does not say.

    Raises:
        InvalidRequest: there is no such folder.
    """
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir() and p.name[0] not in "._"))
        raise InvalidRequest(
            f"{folder} is no folder and no shipped teacher; give a diffusers folder or one of: {known}"
        )
    return str(_index(folder).get("_class_name", ""))


def is_unet_with_scheduler(pipeline: Any) -> bool:
    """Whether a pipeline has a UNet2DModel and a scheduler, which is all that a teacher of pixels needs."""
    from diffusers import UNet2DModel

    network, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    return isinstance(network, UNet2DModel) and scheduler is not None


def unet_files(folder: Path) -> tuple[Path, Path] | None:
    """Where ``folder`` has a UNet2DModel's config.json and its scheduler's configuration: in ``unet/`` and
    ``scheduler/``, or in the folder itself, as DDPMPipeline also loads them. None: it has no UNet2DModel."""
    network = part_folder(folder, "unet") / "config.json"
    scheduler = part_folder(folder, "scheduler") / "scheduler_config.json"
    if not (network.is_file() and scheduler.is_file()):
        return None
    return (network, scheduler) if _json(network, folder).get("_class_name") == "UNet2DModel" else None


def load_unet(
    folder: Path, variant: str | None = None, *, mapped: bool = False, half: Any = None
) -> tuple[UNetFolder, dict[str, Any]]:
    """A UNet2DModel and its scheduler's configuration, and what ``redif_teacher.json`` says.

    Args:
        variant: of the weights, such as fp16; None: the plain files, or the only variant.
        mapped, half: as for `weights.load_network`.

    Raises:
        InvalidRequest: a file is missing or cannot be read, or the weights are not whole.
        UnsupportedModel: the network is of another class or quantised, or the folder has parts that are not used.
    """
    from diffusers import UNet2DModel

    if (found := unet_files(folder)) is None:
        raise _no_unet(folder)
    network, scheduler = found
    components.check_used(folder.name, UNET_PARTS, _parts(folder) | _other_networks(folder))
    about, configuration = _about(folder), _json(scheduler, folder)
    with without_bars():
        unet = _network(UNet2DModel, network.parent, variant, folder, mapped=mapped, half=half)
    return UNetFolder(folder.name, unet, configuration), about


def _no_unet(folder: Path) -> InvalidRequest | UnsupportedModel:
    for name, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        if not (part_folder(folder, name) / file).is_file():
            return InvalidRequest(f"{folder} is no teacher: {name}/{file} is missing; give a folder saved by diffusers")
    class_name = _json(part_folder(folder, "unet") / "config.json", folder).get("_class_name")
    return UnsupportedModel(f"{folder}/unet is a {class_name}; this adapter takes UNet2DModel")


def load_pipeline(
    folder: Path, variant: str | None = None, *, whole: bool = False, mapped: bool = False, half: Any = None
) -> tuple[Any, dict[str, Any]]:
    """A pipeline from its folder, and what ``redif_teacher.json`` says. Nothing is fetched, no pickle is read.

    Every network is loaded by `weights.load_network`, so its weights are whole. What a student never has, such as a
    safety checker, is left out, whether its folder is there or not.

    Args:
        variant: of the weights, such as fp16; None: the plain files, or the only variant.
        whole: leave nothing out.
        mapped, half: as for `weights.load_network`.

    Raises:
        InvalidRequest: it cannot be loaded, or weights are not whole.
        UnsupportedModel: a network is quantised.
    """
    from diffusers import DiffusionPipeline

    about, parts = _about(folder), _parts(folder)
    if "scheduler" in parts and parts["scheduler"][0] == "diffusers":
        check_class(parts["scheduler"][1])
    given: dict[str, Any] = dict.fromkeys([] if whole else components.left_out(folder.name, parts))
    if "safety_checker" in given:
        given["requires_safety_checker"] = False
    _check_variant(folder, parts, variant)
    with without_bars():
        for name, part in parts.items():
            if name not in given and (kind := components.network_class(*part)) is not None:
                given[name] = _network(kind, part_folder(folder, name), variant, folder, mapped=mapped, half=half)
            elif name not in given:
                components.check_tokenizer_files(part[1], part_folder(folder, name))
        given |= dict.fromkeys(name for name, kind in _index(folder).items() if kind == [None, None])
        try:
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, **given)
        except (MemoryError, RedifError):
            raise
        except Exception as error:  # tokenizers raise plain ones
            raise InvalidRequest(
                f"the pipeline in {folder} cannot be loaded: {first_line(error)}; copy it again"
            ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, about


def load_autoencoder(source: str | Path, kinds: Sequence[str], *, mapped: bool = False) -> Any:
    """The autoencoder in a folder, or of a Hub id, that saved it alone; TAESD is one.

    Args:
        source: the folder or the id.
        kinds: the classes that are taken.
        mapped: as for `weights.load_network`.

    Raises:
        InvalidRequest: it is not there, or its weights are not whole.
        UnsupportedModel: it is of another class.
    """
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        folder = fetch(str(source), HUB_FILES)
    if not (folder / "config.json").is_file():
        raise InvalidRequest(f"{source} is no decoder: config.json is missing; give the folder of an autoencoder")
    name = _json(folder / "config.json", folder).get("_class_name")
    if name not in kinds:
        raise UnsupportedModel(f"the decoder in {source} is a {name}; use {' or '.join(kinds)}")
    with without_bars():
        return _network(components.network_class("diffusers", str(name)), folder, None, folder, mapped=mapped)


def part_folder(folder: Path, name: str) -> Path:
    """Where diffusers looks for a pipeline's part: a folder of its name, else the pipeline's own."""
    return folder / name if (folder / name).is_dir() else folder


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    return _json(path, folder) if path.is_file() else {}


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts that ``model_index.json`` names, as (library, class)."""
    return {
        name: (kind[0], kind[1])
        for name, kind in _index(folder).items()
        if isinstance(kind, list) and len(kind) == 2 and all(isinstance(one, str) for one in kind)
    }


def _other_networks(folder: Path) -> dict[str, tuple[str, str]]:
    """Networks that lie beside a UNet2DModel without being named: an autoencoder, say, whose latents it draws."""
    found = {}
    for path in sorted(folder.glob("*/config.json")):
        name = _json(path, folder).get("_class_name")
        if isinstance(name, str) and name != "UNet2DModel":
            found[path.parent.name] = ("diffusers", name)
    return found


def _network(kind: Any, place: Path, variant: str | None, folder: Path, **options: Any) -> Any:
    """One network of ``folder``, with its configuration checked first. ``options``: of `weights.load_network`."""
    path = place / "config.json"
    if not path.is_file():
        raise InvalidRequest(f"{folder} is not whole: {path.relative_to(folder)} is missing; copy the folder again")
    config = _json(path, folder)
    weights.refuse_quantised(config, str(place))
    check_config(config, str(path))
    return weights.load_network(kind, place, variant, **options)


def _check_variant(folder: Path, parts: dict[str, tuple[str, str]], variant: str | None) -> None:
    """Raise InvalidRequest where no part of a pipeline has the variant that was asked for."""
    if variant is None:
        return
    places = {part_folder(folder, name) for name in parts} | {folder}
    if not any(variant in weights.variants(place) for place in places):
        known = sorted({str(name) for place in places for name in weights.variants(place) if name is not None})
        raise InvalidRequest(
            f"{folder} has no weights of the variant {variant!r}; it has {', '.join(known) or 'the plain files only'}"
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars and the remarks of transformers and diffusers while they load and save a file: what matters of
    these is raised, or logged in one line."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = [(log, log.is_progress_bar_enabled()) for log in (ours, theirs)]
    for log, _ in before:
        log.disable_progress_bar()
    loud = [(log, log.get_verbosity()) for log in (ours, theirs)]
    for log, _ in loud:
        log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        for log, level in loud:
            log.set_verbosity(level)
        for log, shown in before:
            if shown:
                log.enable_progress_bar()


def _about(folder: Path) -> dict[str, Any]:
    return read_facts(folder / TEACHER_FILE) if (folder / TEACHER_FILE).exists() else {}


def _json(path: Path, folder: Path) -> dict[str, Any]:
    found = read_json_file(path, f"a file of the teacher {folder.name}")
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}, not an object; copy the teacher again")
    return found
