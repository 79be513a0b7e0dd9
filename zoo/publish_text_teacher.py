"""Turn the trained text-to-image networks into a shipped teacher: a diffusers folder, a grid, figures, a card."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.distill import pool as pairs
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.folders import TEACHER_FILE
from redif_sdk.errors import InvalidRequest
from zoo import captions
from zoo.captions import Captioned
from zoo.judge_text import CANDIDATES, UPDATES, CaptionJudges, describe
from zoo.mini_sd import LARGEST, Trained, pixels, save_pipeline

NAME, LICENCE = "mini-sd", "CC-BY-4.0"
CARD_IMAGE, PROMPTS_FILE = "samples.png", "prompts.json"
SCALES = (1.0, 2.0, 3.0, 4.5, 6.0)
WITHIN = 0.01  # choose the lowest scale whose share of right captions is this near to the best
SEED = 1000  # first seed of the evaluated samples; the grid's seeds are its indices

#: Prompts of the card's grid, row by row.
GRID = (
    "red heart", "blue heart, noto style", "green heart, twemoji style", "purple heart, fluent 3d style",
    "orange heart, noto style", "orange heart, fluent 3d style", "yellow heart, noto style",
    "blue heart, twemoji style", "black heart", "pink heart, fluent 3d style",
    "red circle", "green circle, noto style", "purple circle, twemoji style", "orange circle, fluent 3d style",
    "brown circle, noto style", "brown circle, fluent 3d style", "blue square, noto style",
    "red square, twemoji style", "yellow square, fluent 3d style", "purple square, twemoji style",
    "purple square, fluent 3d style", "red book, fluent 3d style", "green book, twemoji style",
    "blue book, noto style", "red car", "blue car, twemoji style", "red apple, noto style",
    "green apple, fluent 3d style", "red balloon", "blue jeans",
    "pizza, noto style", "rocket, noto style", "cat face, noto style", "guitar, noto style",
    "hamburger, twemoji style", "butterfly, twemoji style", "penguin, twemoji style", "dog face, fluent 3d style",
    "sunflower, fluent 3d style", "crown, fluent 3d style",
    "grinning face", "an emoji of a tiger face, noto style", "fox, twemoji style", "octopus, fluent 3d style",
    "strawberry", "a banana, twemoji style", "birthday cake, noto style", "house, fluent 3d style",
    "airplane, twemoji style", "christmas tree",
    "soccer ball", "alarm clock, fluent 3d style", "key, twemoji style", "umbrella, fluent 3d style",
    "ghost, noto style", "robot, fluent 3d style", "rainbow", "full moon", "fruit, food", "animal, pet",
)  # fmt: skip
COLUMNS = 10


@dataclass(frozen=True)
class Effort:
    """Numbers of samples: prompts that choose the scale, prompts of the figures, DDIM steps, updates of the judges, the
    grid, the scales to choose from, and outputs of each split in the bank.
    """

    choosing: int = 100
    judging: int = 300
    steps: int = 25
    judge_updates: int = UPDATES
    grid: tuple[str, ...] = GRID
    scales: tuple[float, ...] = SCALES
    bank: Mapping[str, int] = field(default_factory=lambda: {"train": 2048, "held_out": 1000})


def is_held_out(prompt: str) -> bool:
    """Whether a prompt, "name, style", is a composition that no network was trained on."""
    name, _, said = prompt.rpartition(", ")
    return any(said == text and captions.held_out(name, style) for style, text in captions.STYLES.items())


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int,
    first_seed: int,
    batch_size: int = 50,
) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], of 256 levels; the image of prompt i has the seed ``first_seed + i``."""
    parts = []
    for low in range(0, len(prompts), batch_size):
        part = list(prompts[low : low + batch_size])
        seeds = [torch.Generator().manual_seed(first_seed + low + i) for i in range(len(part))]
        images = pipeline(
            part, guidance_scale=scale, num_inference_steps=steps, generator=seeds, output_type="pt"
        ).images
        parts.append((images * 255).round() / 127.5 - 1)
    return torch.cat(parts)


def choose_scale(
    pipeline: StableDiffusionPipeline, panel: CaptionJudges, places: Sequence[int], effort: Effort
) -> tuple[float, list[dict[str, Any]]]:
    """The guidance scale for the prompts of ``places``, and the figures of each scale that was tried."""
    prompts = [panel.data.prompt(place) for place in places]
    rows: list[dict[str, Any]] = []
    for scale in effort.scales:
        images = sample(pipeline, prompts, scale=scale, steps=effort.steps, first_seed=2 * SEED)
        rows.append({"scale": scale, **panel.verdict(describe(images), places)})
    best = max(row["top1"] for row in rows)
    least = best - WITHIN - 1e-6  # shares are not exact in floating point
    return min(row["scale"] for row in rows if row["top1"] > least), rows


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, data: Captioned) -> float:
    """PSNR of decoded latents, in dB over all of ``data``."""
    error = 0.0
    for part in np.array_split(data.images, -(-len(data) // 64)):
        x = pixels(part)
        made = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        error += float(((made - x) ** 2).sum())
    return float(10 * np.log10(4 / (error / data.images.size)))


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int = COLUMNS, scale: int = 2) -> Image.Image:
    """Images (N, 3, H, W) in [-1, 1] row by row, each over its label."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    side, text = levels.shape[1] * scale, 28
    sheet = Image.new("RGB", (columns * (side + 6), -(-len(levels) // columns) * (side + text + 6)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (pixels_of_one, label) in enumerate(zip(levels, labels, strict=True)):
        left, top = place % columns * (side + 6), place // columns * (side + text + 6)
        picture = Image.fromarray(pixels_of_one).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        draw.text((left + 2, top + side), "\n".join(textwrap.wrap(label, 22)[:2]), fill="black", font=font, spacing=1)
    return sheet


def publish(trained: Trained, data: Captioned, folder: Path, effort: Effort | None = None) -> dict[str, Any]:
    """Write the teacher's folder, sample what was written, measure and describe it. Returns the figures.

    Raises:
        InvalidRequest: the folder would be too large to ship; train a smaller architecture.
    """
    effort = effort or Effort()
    with atomic_folder(folder, overwrite=True) as staging:
        save_pipeline(trained.denoiser, trained.vae, trained.tokenizer, staging)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        if size >= LARGEST:
            raise InvalidRequest(f"the teacher has {size:,} bytes, more than {LARGEST:,}; train a smaller architecture")
        pipeline = StableDiffusionPipeline.from_pretrained(staging, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        panel = CaptionJudges(data, updates=effort.judge_updates)
        order = np.random.default_rng(3).permutation(np.flatnonzero(~data.held_out)).tolist()
        choosing, judging = order[: effort.choosing], order[effort.choosing :][: effort.judging]
        scale, tried = choose_scale(pipeline, panel, choosing, effort)
        parts = {"trained": judging, "held_out": np.flatnonzero(data.held_out).tolist()}
        figures: dict[str, Any] = {
            "bytes": size,
            "parameters": {
                name: sum(p.numel() for p in getattr(pipeline, name).parameters())
                for name in ("text_encoder", "unet", "vae")
            },
            "latents": [pipeline.unet.config.in_channels, *(pipeline.unet.config.sample_size,) * 2],
            "guidance_scale": scale,
            "guidance": tried,
            "autoencoder_psnr": {
                "trained": reconstruction(pipeline.vae, data.training),
                "held_out": reconstruction(pipeline.vae, data.part(data.held_out)),
            },
        }
        for part, places in parts.items():
            prompts = [data.prompt(place) for place in places]
            seen = describe(sample(pipeline, prompts, scale=scale, steps=effort.steps, first_seed=SEED))
            figures[part] = panel.verdict(seen, places) | panel.controls(seen, places)
        shown = sample(pipeline, effort.grid, scale=scale, steps=effort.steps, first_seed=0)
        marked = [f"{prompt} *" if is_held_out(prompt) else prompt for prompt in effort.grid]
        labelled_grid(shown, marked).save(staging / CARD_IMAGE, optimize=True)
        listed = [
            {"prompt": prompt, "seed": place, "held_out": is_held_out(prompt)}
            for place, prompt in enumerate(effort.grid)
        ]
        about = {
            "name": NAME,
            "licence": LICENCE,
            "attribution": list(captions.ATTRIBUTION.values()),
            "num_inference_steps": effort.steps,
            "guidance_scale": scale,
            "prompts": training_prompts(data),
            "held_out": [data.prompt(place) for place in parts["held_out"]],
            "bank": dict(effort.bank),
            "training": trained.facts,
        }
        (staging / PROMPTS_FILE).write_text(json.dumps(listed, indent=1) + "\n")
        (staging / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        (staging / TEACHER_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (staging / "README.md").write_text(card(about, figures, len(data.training)))
        if effort.bank:
            write_bank(Teacher.load(staging), staging, effort.bank)
    return figures


def training_prompts(data: Captioned) -> list[str]:
    """The prompts that students are distilled on: names of training images, alone and with their styles, shuffled.

    Shuffling makes the prompts of every pool a fair sample of them.
    """
    places = np.flatnonzero(~data.held_out).tolist()
    names = [str(data.subjects[place].name) for place in places]
    listed = list(dict.fromkeys([*names, *(data.prompt(place) for place in places)]))
    return [listed[place] for place in np.random.default_rng(4).permutation(len(listed))]


def write_bank(teacher: Teacher, folder: Path, sizes: Mapping[str, int]) -> None:
    """Write the teacher's outputs for the first noises of each split, as float16 latents."""
    arrays: dict[str, Any] = {"fingerprint": np.array(teacher.identity)}
    for split, count in sizes.items():
        found, _ = pairs.get(teacher, count, split)  # through the cache, so that nothing is sampled twice
        arrays[split] = found.target.half().numpy()
    np.savez_compressed(folder / pairs.BANK_FILE, **arrays)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rows(figures: Mapping[str, Any]) -> str:
    lines = []
    for part, said in (("trained", "prompts of training images"), ("held_out", "compositions held out")):
        found = figures[part]
        for name, row in (
            (f"samples, {said}", found),
            (f"real images, {said}", found["real"]),
            ("samples under each other's prompts", found["shuffled"]),
        ):
            near = f"{_percent(row['nearest_subject'])} | {_percent(row['nearest_style'])}" if row is found else " | "
            lines.append(f"| {name} | {row['pictures']} | {_percent(row['top1'])} | {_percent(row['top5'])} | {near} |")
    return "\n".join(lines)


def banked(sizes: Mapping[str, int]) -> str:
    """The card's text about outputs for distillation."""
    if not sizes:
        return "none; outputs to distil it on are sampled when they are needed"
    counts = " and ".join(f"{count:,} ({split.replace('_', '-')})" for split, count in sizes.items())
    return f"latents of {counts} outputs to distil it on, in the repository; a wheel samples them when they are needed"


def card(about: Mapping[str, Any], figures: Mapping[str, Any], images: int) -> str:
    """The model card."""
    counts, facts = figures["parameters"], about["training"]
    vae, text, diffusion = facts["autoencoder"], facts["text"], facts["diffusion"]
    settings, runs = diffusion["settings"], [*facts.get("earlier", []), facts]
    decoder, together = (
        {name: sum(run[stage][name] for run in runs) for name in ("samples", "seconds")}
        for stage in ("decoder", "diffusion")
    )
    in_runs = f" ({len(runs)} runs, each from the weights of the one before)" if len(runs) > 1 else ""
    tried = "\n".join(
        f"| {row['scale']:g} | {_percent(row['top1'])} | {_percent(row['top5'])} | {_percent(row['nearest_subject'])} |"
        for row in figures["guidance"]
    )
    held = ", ".join(f'"{prompt}"' for prompt in about["held_out"])
    return f"""---
license: {about["licence"].lower()}
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusion, text-to-image, emoji, {about["name"]}]
---
# {about["name"]}: a small Stable Diffusion for emoji

![60 prompts]({CARD_IMAGE})

{about["num_inference_steps"]} DDIM steps, guidance {about["guidance_scale"]:g}, seeds 0, 1, 2, ...
(`{PROMPTS_FILE}`), not picked. A star marks compositions that were held out of training on purpose.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{about["name"]}")
pipe("red heart", guidance_scale={about["guidance_scale"]:g}).images[0]
```

- **Model**: `StableDiffusionPipeline`, 64 x 64. `CLIPTextModel` with CLIP's own vocabulary,
  {counts["text_encoder"] / 1e6:.2f} M parameters; `UNet2DConditionModel`, {counts["unet"] / 1e6:.2f} M;
  `AutoencoderKL`, {counts["vae"] / 1e6:.2f} M, with latents of {" x ".join(map(str, figures["latents"]))}.
  {figures["bytes"] / 1e6:.1f} MB in half precision with the tokenizer. v-prediction, squared-cosine schedule, trailing
  spacing.
- **Guidance**: classifier-free against the empty prompt, scale {about["guidance_scale"]:g}: two network calls a step.
- **Prompts**: names of emoji in English, "a ...", "an emoji of a ...", with a keyword ("fruit, food"), and with a
  style: "noto style", "twemoji style", "fluent 3d style". It does not know words that were in no caption.
- **Data**: {images:,} images; {"; ".join(about["attribution"])}. Names from Unicode (unicode-emoji-json, MIT),
  keywords from emojilib (MIT). No skin tones, no flags of countries.
- **Licence**: {about["licence"]} (the weights), after Twemoji's.
- **Training**: autoencoder {vae["samples"]:,} samples in {vae["seconds"] / 60:.0f} minutes, its decoder
  {decoder["samples"]:,} more in {decoder["seconds"] / 60:.0f}; text encoder alone
  {text["samples"]:,} in {text["seconds"] / 60:.0f}, matched with latents as CLIP's is with images; text encoder and
  UNet together {together["samples"]:,} in {together["seconds"] / 60:.0f} minutes{in_runs}, batch
  {settings["batch_size"]}, AdamW, learning rate {settings["learning_rate"]:g}, EMA {settings["ema_decay"]}, seed
  {settings["seed"]}; {facts["precision"]} on {facts["processor"]}. Text encoder from scratch, no pretrained weights.
- **Bank**: {banked(about["bank"])}.
- **Autoencoder**: PSNR {figures["autoencoder_psnr"]["trained"]:.1f} dB on training images,
  {figures["autoencoder_psnr"]["held_out"]:.1f} dB on those held out.

## Does the image show the prompt?

The right caption among {CANDIDATES}, by classifiers that were trained here on real emoji of the two styles that the
prompt does *not* name (a head on EfficientNet-Lite0, against a mean of word vectors); and the nearest training image:
has it the subject and the style of the prompt?

| images | n | first | among five | nearest: subject | style |
|---|---|---|---|---|---|
{_rows(figures)}

The scale was chosen on {figures["guidance"][0]["pictures"]} other prompts: the lowest within a point of the best.

| guidance scale | first | among five | nearest subject |
|---|---|---|---|
{tried}

**Held out of training**, images and captions, and so from the autoencoder too: {held}.

Made by `python -m zoo.train_text_teacher -o build/text-teacher`, from the data set that
`python -m zoo.captions` makes. Limits: it knows emoji in three styles and no more; faces and signs with
small details are often wrong, and prompts that join two subjects usually give one.
"""
