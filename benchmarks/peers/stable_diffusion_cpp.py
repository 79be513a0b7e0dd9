"""Draws one image twice with stable-diffusion.cpp: FOLDER STEPS SIDE; prints the seconds of each call."""

import sys
import time

from stable_diffusion_cpp import StableDiffusion

folder, steps, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline = StableDiffusion(model_path=folder, wtype="f32", n_threads=2, vae_decode_only=True, verbose=False)
for _ in range(2):
    began = time.perf_counter()
    pipeline.generate_image(
        "a cat",
        sample_steps=steps,
        cfg_scale=1.0,
        height=side,
        width=side,
        sample_method="lcm",
        scheduler="lcm",
        seed=0,
    )
    print(time.perf_counter() - began, flush=True)
