"""Draws one image twice with diffusers, compiled: FOLDER STEPS SIDE; prints the seconds of each call."""

import sys
import time

import torch
from diffusers import DiffusionPipeline

folder, steps, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
pipeline.unet = torch.compile(pipeline.unet)
pipeline.vae.decoder = torch.compile(pipeline.vae.decoder)
for _ in range(2):
    began = time.perf_counter()
    pipeline("a cat", num_inference_steps=steps, guidance_scale=1.0, height=side, width=side, output_type="np")
    print(time.perf_counter() - began, flush=True)
