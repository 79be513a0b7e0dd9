"""Draws one image twice with OpenVINO GenAI: FOLDER STEPS SIDE; prints the seconds of each call."""

import sys
import time

import openvino_genai

folder, steps, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
for _ in range(2):
    began = time.perf_counter()
    pipeline.generate("a cat", num_inference_steps=steps, guidance_scale=1.0, height=side, width=side, rng_seed=0)
    print(time.perf_counter() - began, flush=True)
