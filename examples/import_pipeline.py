"""Any pipeline of diffusers as it is, without training: to ONNX, and from then on without torch.

    python examples/import_pipeline.py
    python examples/import_pipeline.py stabilityai/sdxl-turbo --steps 1 4 --guidance-scale 1 --prompt "a red fox"
    python examples/import_pipeline.py your/sd15 --steps 20 --scheduler DDIMScheduler --lora style.safetensors:0.8

Few-step pipelines (Turbo, Lightning, LCM, Hyper, schnell) keep their speed; the others gain an engine, and a start for
`redif distill`.
"""

import argparse
import shutil
from pathlib import Path

from redif_sdk import FastPipeline
from redif_sdk.distill import import_pipeline
from redif_sdk.export import export
from redif_sdk.images import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", default="mini-sd", help="folder, Hub id, or a shipped teacher's name")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/imported"))
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="numbers of steps that it shall support")
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's own; few-step pipelines want 1")
    parser.add_argument("--scheduler", help="class to use in place of a scheduler that is no step table")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merged into the weights")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="fp32, fp16, bf16, int8, int8wo, int4wo")
    parser.add_argument("--prompt", default="red heart", help="or the name of a class")
    args = parser.parse_args()

    shutil.rmtree(args.output, ignore_errors=True)
    import_pipeline(
        args.pipeline,
        args.output,
        args.steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        loras=args.lora,
    )
    export(args.output, precisions=args.precision)  # each graph is compared with torch before it is written

    with FastPipeline.from_pretrained(args.output) as pipe:
        out = pipe(args.prompt, num_images_per_prompt=4, seed=0)
    image = args.output.with_suffix(".png")
    contact_sheet(out.images).save(image)
    print(f"{args.output}: 4 images in {out.timings['total']:.2f} s on {out.runtime_info['runtime']}: {image}")


if __name__ == "__main__":
    main()
