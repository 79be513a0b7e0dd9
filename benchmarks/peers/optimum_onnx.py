"""Draws one image twice with optimum-onnx: FOLDER STEPS SIDE; prints the seconds of each call."""

import sys
import time

from optimum.onnxruntime import ORTStableDiffusionPipeline

folder, steps, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline = ORTStableDiffusionPipeline.from_pretrained(folder, provider="CPUExecutionProvider")
pipeline.set_progress_bar_config(disable=True)
for _ in range(2):
    began = time.perf_counter()
    pipeline("a cat", num_inference_steps=steps, guidance_scale=1.0, height=side, width=side, output_type="np")
    print(time.perf_counter() - began, flush=True)
