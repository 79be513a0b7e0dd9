"""A teacher that is no diffusers model, and a student network of your own.

    python examples/callable_teacher.py

Any function (x, t, condition) will do: a network of yours, a score model, a service. This one has no weights at all: it
is the exact denoiser of four images, E[x0 | x_t] = sum_i w_i x_i with w = softmax(log N(x_t; a x_i, s^2 I)).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from redif_sdk import FastPipeline
from redif_sdk.distill import DistillConfig, Teacher, distill
from redif_sdk.export import export
from redif_sdk.images import contact_sheet
from redif_sdk.sampling.table import NoiseSchedule

BANK = Path(__file__).resolve().parent.parent / "distill/shipped/fashion-mnist/bank.npz"
DATA = torch.from_numpy(np.load(BANK)["train"][:4] / 127.5 - 1).float()  # (4, 1, 28, 28) in [-1, 1]
SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


def denoise(x: torch.Tensor, t: torch.Tensor, condition: None) -> torch.Tensor:
    """The clean image that is expected of x at the times t."""
    a, s = (
        torch.from_numpy(levels[t.long().numpy()]).float()[:, None] for levels in (SCHEDULE.alphas, SCHEDULE.sigmas)
    )
    far = torch.cdist(x.flatten(1) / a, DATA.flatten(1)).square() * (a / s).square() / 2
    return ((-far).softmax(1) @ DATA.flatten(1)).view_as(x)


class Network(nn.Module):  # called as (x, t, condition), as every student network of your own is
    def __init__(self, pixels: int = DATA[0].numel(), width: int = 512) -> None:
        super().__init__()
        first, second, last = nn.Linear(pixels + 1, width), nn.Linear(width, width), nn.Linear(width, pixels)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: None = None) -> torch.Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000], 1)).view_as(x)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/callable"))
    parser.add_argument("--updates", type=int, default=300)
    args = parser.parse_args()
    kind = {"schedule": SCHEDULE, "prediction_type": "sample", "shape": (1, 28, 28), "value_range": (-1, 1)}
    teacher = Teacher.from_callable(denoise, **kind, student=Network(), num_inference_steps=25, name="exact-denoiser")
    config = DistillConfig(num_inference_steps=2, reward="pixel", warm_start=0.9, updates=args.updates, batch_size=128)
    distill(teacher, config).save_pretrained(args.output, overwrite=True)
    export(args.output, network=Network())  # gets the folder's weights; its class is named there and never imported
    with FastPipeline.from_pretrained(args.output) as pipe:
        contact_sheet(pipe(num_images_per_prompt=16, seed=0).images).save(image := args.output.with_suffix(".png"))
    print(f"{args.output}: a student without diffusers; its images: {image}")
