"""A page for a student in 20 lines: python examples/gradio_demo.py [STUDENT] [PORT]. `redif demo` is the large one."""

import sys

import gradio as gr
from shipped import shipped_student

from redif_sdk import FastPipeline

pipe = FastPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else shipped_student())
about = pipe.manifest.condition
examples = getattr(about, "examples", None) or about.class_names


def paint(prompt: str, count: int, seed: int) -> list:
    return pipe(prompt, num_images_per_prompt=int(count), seed=int(seed)).images


prompt, count = gr.Textbox(examples[0], label="Prompt"), gr.Slider(1, 8, 4, step=1, label="Images")
images = gr.Gallery(columns=4, format="png", show_label=False)
rows = [[text, 4, 0] for text in examples[:6]]
page = gr.Interface(paint, [prompt, count, gr.Number(0, label="Seed")], images, examples=rows, flagging_mode="never")
page.launch(server_port=int(sys.argv[2]) if len(sys.argv) > 2 else None)
