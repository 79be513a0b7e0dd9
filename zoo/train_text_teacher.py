"""Train the mini Stable Diffusion on captioned emoji: ``python -m zoo.train_text_teacher -o DIR``, from the root.

Four stages, each with its own checkpoint. The autoencoder comes first; with it every image becomes a latent once, and
its decoder alone is trained further. The text encoder learns which latents a caption describes, as CLIP's did; then
UNet and text encoder are trained together, the latter at a tenth of the rate (v-prediction, one caption in ten empty,
for guidance). Every batch is a function of its index, so a run that was killed and resumed takes the path of one that
was not. Then `publish_text_teacher.py` writes the folder. On a busy CPU two processes of one thread each are faster
than one of two: ``OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m zoo.train_text_teacher -o DIR``.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import autocast, cpu_has_bf16
from redif_sdk.distill.teachers.folders import TEACHER_FILE
from redif_sdk.distill.training.checkpoint import save_state
from redif_sdk.errors import InvalidRequest
from redif_sdk.progress import Progress
from redif_sdk.results import machine
from zoo import captions
from zoo.captions import Captioned
from zoo.mini_sd import (
    ARCHITECTURES,
    Architecture,
    TextDenoiser,
    TextReader,
    Trained,
    build_autoencoder,
    build_scheduler,
    build_tokenizer,
    fetch_vocabulary,
    pixels,
    read_pipeline,
    tokenize,
    used_tokens,
)
from zoo.publish_text_teacher import Effort, publish

STAGES = ("autoencoder", "decoder", "text", "diffusion", "publish")
TRAINED = STAGES[:-1]
LATENTS_FILE = "latents.npz"
WARMUP = 200  # updates
COOLDOWN = 0.3  # the last part of the updates, in which the learning rate falls to 0
SHIFT = 4  # largest shift of the autoencoder's images, in pixels
SQUARE_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 1.0, 0.5, 1e-4
COLOUR_WEIGHT, COLOUR_BLOCK = 10.0, 4  # the colour term's blocks, in pixels
CAPTION_DROPOUT = 0.1
TEXT_RATE = 0.1  # the text encoder's learning rate relative to the UNet's


@dataclass(frozen=True)
class Settings:
    """Settings of one stage. ``samples``: training samples in all; the learning rate falls towards their end."""

    samples: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    seed: int = 0
    architecture: str = ""

    @property
    def updates(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def rate(self, update: int) -> float:
        """The learning rate: a warm-up, then constant, then linear to 0."""
        left = (self.updates - update) / max(1.0, COOLDOWN * self.updates)
        return self.learning_rate * min(1.0, (update + 1) / WARMUP, left)


class Clock:
    """The seconds that one call may train: all stages together, the same for all processes."""

    def __init__(self, seconds: float | None) -> None:
        self._ends = math.inf if seconds is None else time.monotonic() + seconds

    def over(self) -> bool:
        return math.isfinite(self._ends) and bool(draws.agreed(float(time.monotonic() > self._ends))[0])


def read_checkpoint(path: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of a stage in ``path``; None if there is none.

    Raises:
        InvalidRequest: it was trained with other settings. ``samples`` may be larger than before.
    """
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    known, asked = dict(state["settings"]), asdict(settings)
    known.pop("samples"), asked.pop("samples")
    if known != asked:
        differ = ", ".join(f"{name} {known.get(name)!r}" for name in asked if known.get(name) != asked[name])
        raise InvalidRequest(f"{path} was trained with {differ}; give the same settings or another folder")
    return state


def train(
    stage: str,
    network: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    settings: Settings,
    folder: Path,
    clock: Clock,
    *,
    checkpoint_seconds: float = 60.0,
) -> tuple[nn.Module, dict[str, Any], bool]:
    """Train ``network``, or continue from ``folder/STAGE.pt``; ``loss(network, update)`` is this process's mean.

    Returns the averaged network, the facts of its training, and whether all of its samples were seen.
    """
    path = folder / f"{stage}.pt"
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    parameters = [p for p in network.parameters() if p.requires_grad]
    slow = {id(p) for p in network.text_encoder.parameters()} if isinstance(network, TextDenoiser) else set()
    groups = [
        {"params": [p for p in parameters if (id(p) in slow) == slower], "rate": rate}
        for slower, rate in ((True, TEXT_RATE), (False, 1.0))
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start, spent, losses = 0, 0.0, []
    state = read_checkpoint(path, settings)
    if state is not None:
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent, losses = state["update"], state["seconds"], state["losses"]
    began = saved = time.monotonic()

    def facts(update: int) -> dict[str, Any]:
        return {
            "samples": update * settings.batch_size,
            "seconds": spent + time.monotonic() - began,
            "settings": asdict(settings),
            "losses": losses,
        }

    def save(update: int) -> None:
        if draws.rank() == 0:
            whole = {"network": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state({**whole, "update": update, **facts(update)}, path)

    update, running = start, float("nan")
    with Progress(quiet=draws.rank() > 0).stage(f"{stage}: {settings.updates} updates") as show:
        while update < settings.updates and not clock.over():
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(update) * group["rate"]
            value = loss(network, update)
            optimizer.zero_grad()
            value.backward()
            draws.average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            decay = min(settings.ema_decay, (1 + update) / (10 + update))
            torch._foreach_lerp_(list(ema.parameters()), [p.data for p in network.parameters()], 1 - decay)
            update += 1
            running = value.item() if math.isnan(running) else 0.98 * running + 0.02 * value.item()
            if update % 500 == 0:
                losses.append([update, running])
            show(update / settings.updates, f"loss {running:.4f}")
            if time.monotonic() - saved > checkpoint_seconds:
                save(update)
                saved = time.monotonic()
    if update > start:
        save(update)
    return ema, facts(update), update >= settings.updates


def autoencoder_loss(
    data: Captioned, settings: Settings, architecture: Architecture
) -> Callable[[nn.Module, int], Tensor]:
    """L1 and L2 of pixels, L1 of differences to neighbours, L2 of coarse colours, and a little KL.

    Without the colour term rare colours are learnt late: green was brown after 30,000 samples. Images are shifted by
    some pixels, and half of them mirrored.
    """
    images, size = torch.tensor(data.images), settings.batch_size
    mine, shape = draws.share(size), (architecture.latent_channels, *(architecture.latent_size,) * 2)

    def loss(vae: nn.Module, update: int) -> Tensor:
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + update)
        index = torch.randint(0, len(images), (size,), generator=draw)
        moved = torch.randint(0, 2 * SHIFT + 1, (size, 2), generator=draw)
        mirrored = torch.rand(size, generator=draw) < 0.5
        noise = torch.randn((size, *shape), generator=draw)
        batch = []
        for place in range(size)[mine]:
            image = F.pad(images[index[place]], (SHIFT,) * 4, value=255)
            top, left = moved[place].tolist()
            image = image[:, top : top + architecture.image_size, left : left + architecture.image_size]
            batch.append(image.flip(2) if mirrored[place] else image)
        x = torch.stack(batch).float() / 127.5 - 1
        with autocast():
            posterior = vae.encode(x).latent_dist  # type: ignore[operator]
            made = vae.decode(posterior.mean + posterior.std * noise[mine]).sample.float()  # type: ignore[operator]
        error = made - x
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        colours = F.avg_pool2d(error - error.mean(1, keepdim=True), COLOUR_BLOCK)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        squares = SQUARE_WEIGHT * (error**2).mean() + COLOUR_WEIGHT * (colours**2).mean()
        return error.abs().mean() + squares + EDGE_WEIGHT * edges + KL_WEIGHT * kl

    return loss


def captions_of(data: Captioned, index: Tensor, keys: Tensor) -> list[str]:
    """One caption of each image ``index`` (B,); ``keys`` (B,) select it."""
    return [
        captions.caption(data.subjects[place], data.styles[place], key)
        for place, key in zip(index.tolist(), keys.tolist(), strict=True)
    ]


def text_loss(
    data: Captioned, latents: Tensor, tokenizer: CLIPTokenizer, settings: Settings
) -> Callable[[nn.Module, int], Tensor]:
    """:class:`TextReader`'s loss on newly drawn captions, cut to the longest, which changes no state."""
    size = settings.batch_size
    mine = draws.share(size)

    def loss(reader: nn.Module, update: int) -> Tensor:
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + update)
        index = torch.randint(0, len(latents), (size,), generator=draw)[mine]
        keys = torch.randint(0, captions.KEYS, (size,), generator=draw)[mine]
        ids = tokenize(tokenizer, captions_of(data, index, keys))
        longest = int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1
        value: Tensor = reader(ids[:, :longest], latents[index])
        return value

    return loss


def diffusion_loss(
    data: Captioned, latents: Tensor, tokenizer: CLIPTokenizer, settings: Settings
) -> Callable[[nn.Module, int], Tensor]:
    """Mean squared error of v = alpha noise - sigma x0 (Salimans and Ho 2022, appendix D), on scaled latents."""
    alphas_cumprod, size = build_scheduler().alphas_cumprod, settings.batch_size
    mine = draws.share(size)

    def loss(denoiser: nn.Module, update: int) -> Tensor:
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + update)
        index = torch.randint(0, len(latents), (size,), generator=draw)
        keys = torch.randint(0, captions.KEYS, (size,), generator=draw)
        t = torch.randint(0, len(alphas_cumprod), (size,), generator=draw)[mine]
        noise = torch.randn((size, *latents.shape[1:]), generator=draw)[mine]
        dropped = torch.rand(size, generator=draw) < CAPTION_DROPOUT
        drawn = captions_of(data, index[mine], keys[mine])
        drawn = ["" if gone else text for text, gone in zip(drawn, dropped[mine].tolist(), strict=True)]
        alpha = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        x0 = latents[index[mine]]
        with autocast():
            v: Tensor = denoiser(alpha * x0 + sigma * noise, t.float(), tokenize(tokenizer, drawn))
        return ((v.float() - (alpha * noise - sigma * x0)) ** 2).mean()

    return loss


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: Captioned, folder: Path) -> tuple[Tensor, float]:
    """Latents of all images (N, C, h, w), scaled to a deviation of 1, and the scale; cached in ``folder``."""
    path, identity = folder / LATENTS_FILE, fingerprint(vae)
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["autoencoder"]) == identity and len(kept["latents"]) == len(data):
                return torch.tensor(kept["latents"]), float(kept["scaling_factor"])
    parts = [vae.encode(pixels(part)).latent_dist.mean for part in np.array_split(data.images, -(-len(data) // 64))]
    latents = torch.cat(parts).contiguous()  # the order of sums must be that of a later read
    scaling_factor = round(1 / float(latents.std()), 5)
    latents *= scaling_factor
    buffer = io.BytesIO()
    np.savez(buffer, latents=latents.numpy(), scaling_factor=scaling_factor, autoencoder=np.array(identity))
    atomic_write(path, buffer.getvalue())
    return latents, scaling_factor


def read_published(folder: Path, vae: AutoencoderKL, denoiser: TextDenoiser) -> dict[str, Any]:
    """Fill both networks with the weights of a published teacher; returns the facts of its training.

    Raises:
        InvalidRequest: the folder is not a teacher of this architecture.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / TEACHER_FILE).read_text(encoding="utf-8"))["training"]
        read_pipeline(denoiser, vae, folder)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise InvalidRequest(
            f"training cannot continue from {folder}: {said:.300}; name a folder that this script published, and its "
            "--architecture"
        ) from error
    return facts


def run(
    folder: Path,
    data: Captioned,
    vocabulary: Path,
    architecture: Architecture,
    autoencoder: Settings,
    decoder: Settings,
    text: Settings,
    diffusion: Settings,
    *,
    stages: tuple[str, ...] = TRAINED,
    initial: Path | None = None,
    seconds: float | None = None,
    checkpoint_seconds: float = 60.0,
) -> Trained | None:
    """Run all stages, as far as ``stages`` and ``seconds`` go; finished stages are read. None if not all are finished.

    ``initial``: a published teacher with whose weights decoder, UNet and text encoder start; the stages that made them
    are left out.
    """
    draws.init_distributed()
    folder.mkdir(parents=True, exist_ok=True)
    clock, training = Clock(seconds), data.training
    tokenizer = build_tokenizer(vocabulary, architecture.max_length)
    used = used_tokens(tokenizer, captions.texts(sorted(set(data.subjects), key=lambda subject: subject.name)))
    words = (architecture, used, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)

    def stage(name: str, network: nn.Module, loss: Callable[[nn.Module, int], Tensor], settings: Settings) -> Any:
        own = clock if name in stages else Clock(0.0)
        return train(name, network, loss, settings, folder, own, checkpoint_seconds=checkpoint_seconds)

    torch.manual_seed(autoencoder.seed)
    vae = build_autoencoder(architecture)
    torch.manual_seed(diffusion.seed)
    denoiser = TextDenoiser(*words)
    if initial is not None:
        facts = read_published(initial, vae, denoiser)
        facts["earlier"] = [*facts.get("earlier", []), {name: facts[name] for name in ("decoder", "diffusion")}]
        vae.eval()
    else:
        facts = {}
        loss = autoencoder_loss(training, autoencoder, architecture)
        vae, facts["autoencoder"], done = stage("autoencoder", vae, loss, autoencoder)
        if not done or stages == ("autoencoder",):
            return None
    with draws.main_process_first():
        latents, scaling_factor = encode_all(vae, training, folder)
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.requires_grad_(False)  # the latents stay as they are
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    vae, facts["decoder"], done = stage("decoder", vae, autoencoder_loss(training, decoder, architecture), decoder)
    if "decoder" in stages and (not done or stages == ("decoder",)):
        return None
    if initial is None:
        torch.manual_seed(text.seed)
        reader, facts["text"], done = stage(
            "text", TextReader(*words), text_loss(training, latents, tokenizer, text), text
        )
        if not done or not {"diffusion", "publish"} & set(stages):
            return None
        denoiser.text_encoder.load_state_dict(reader.text_encoder.state_dict())
    loss = diffusion_loss(training, latents, tokenizer, diffusion)
    trained, facts["diffusion"], done = stage("diffusion", denoiser, loss, diffusion)
    facts["processor"], facts["precision"] = machine()["processor"], "bf16" if cpu_has_bf16() else "fp32"
    return Trained(vae, trained, tokenizer, facts) if done or stages == ("publish",) else None


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for checkpoints and latents.")],
    stage: Annotated[str, typer.Option(help="all, or one of autoencoder, decoder, text, diffusion, publish.")] = "all",
    publish_to: Annotated[
        Path | None, typer.Option("--publish", help="Where the teacher's folder goes; default OUTPUT/teacher.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="A published teacher with whose weights decoder, UNet and text encoder start."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop training after so long; run again to continue.")] = None,
    samples: Annotated[int, typer.Option(help="Training samples of text encoder and UNet.")] = 850_000,
    autoencoder_samples: Annotated[int, typer.Option(help="Training samples of the autoencoder.")] = 42_000,
    decoder_samples: Annotated[int, typer.Option(help="Training samples of its decoder alone, after it.")] = 36_000,
    text_samples: Annotated[int, typer.Option(help="Training samples of the text encoder before it.")] = 600_000,
    batch_size: int = 32,
    autoencoder_batch_size: int = 16,
    text_batch_size: int = 256,
    learning_rate: float = 1e-3,
    autoencoder_learning_rate: float = 2e-3,
    decoder_learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    autoencoder_ema_decay: float = 0.99,  # of the decoder too
    seed: int = 0,
    architecture: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = "64-128",
    vocabulary: Annotated[Path | None, typer.Option(help="CLIP's merges; default: out of pip's wheel.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with emoji-64.npz; default $REDIF_DATA/captions.")
    ] = None,
    checkpoint_seconds: float = 60.0,
    bank: Annotated[bool, typer.Option(help="Publish outputs for distillation with it.")] = True,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves the default.")] = 0,
) -> None:
    """Train the text-to-image teacher, then write its folder and card. Run again with the same folder to resume."""
    if architecture not in ARCHITECTURES:
        raise typer.BadParameter(f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    if stage not in ("all", *STAGES):
        raise typer.BadParameter(f"{stage!r} is not one of all, {', '.join(STAGES)}")
    if initial is not None and stage in ("autoencoder", "text"):
        raise typer.BadParameter(
            f"{initial} has this part already; --initial goes with decoder, diffusion, publish, all"
        )
    if threads:
        torch.set_num_threads(threads)
    draws.init_distributed()
    data = captions.load(data_dir)
    with draws.main_process_first():
        vocabulary = vocabulary or fetch_vocabulary(output)
    settings = partial(Settings, seed=seed, architecture=architecture)
    trained = run(
        output,
        data,
        vocabulary,
        ARCHITECTURES[architecture],
        settings(autoencoder_samples, autoencoder_batch_size, autoencoder_learning_rate, autoencoder_ema_decay),
        settings(decoder_samples, autoencoder_batch_size, decoder_learning_rate, autoencoder_ema_decay),
        settings(text_samples, text_batch_size, learning_rate, ema_decay),
        settings(samples, batch_size, learning_rate, ema_decay),
        stages=STAGES if stage == "all" else (stage,),
        initial=initial,
        seconds=seconds,
        checkpoint_seconds=checkpoint_seconds,
    )
    if trained is None:
        if draws.rank() == 0:
            typer.echo(f"{output}: not all is trained yet; run again to go on")
    elif stage in ("all", "publish") and draws.rank() == 0:
        figures = publish(trained, data, publish_to or output / "teacher", Effort() if bank else Effort(bank={}))
        typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
