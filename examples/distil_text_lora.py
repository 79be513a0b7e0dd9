"""Text to image by low-rank adapters: only they are trained, and they are merged into the student at the end.

    python examples/distil_text_lora.py
    python examples/distil_text_lora.py runwayml/sd15 --prompts prompts.txt --steps 4 --rank 64 --updates 2000

The teacher is sampled with its own guidance; the student learns the guided output at one network call a step. Prompts
are a file with one a line; a few hundred that are like those of your users are a good start. For large models see
recipes/, and look at `redif distill ... --dry-run` first: it says how much time and memory a run takes.
"""

import argparse
from pathlib import Path

from redif_sdk import FastPipeline
from redif_sdk.distill import DistillConfig, distill
from redif_sdk.export import export
from redif_sdk.images import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="mini-sd", help="folder, Hub id, or a shipped teacher")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/text"))
    parser.add_argument("--prompts", type=Path, help="one a line; default: those of the teacher's folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--pool", type=int, default=256, help="images that the teacher makes to train on")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--draw", nargs="+", default=["red heart", "a blue circle", "evergreen tree", "glowing star"])
    args = parser.parse_args()

    config = DistillConfig(
        num_inference_steps=args.steps,
        lora_rank=args.rank,
        learning_rate=2e-3,  # adapters want more than all weights, which take 4e-4
        pool_size=args.pool,
        batch_size=16,
        updates=args.updates,
        schedule_updates=3,  # the times of the steps are learnt first; the presets take 20
        warm_start=0.8,  # that share of the run is regression onto the teacher's latents, the rest follows the reward
        reward="texture",
        reward_space="latents",  # the decoder is not run while training
    )
    prompts = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else None
    distill(args.teacher, config, prompts=prompts).save_pretrained(args.output, overwrite=True)
    export(args.output)

    with FastPipeline.from_pretrained(args.output) as pipe:
        images = pipe(args.draw, num_images_per_prompt=2, seed=0).images
    image = args.output.with_suffix(".png")
    contact_sheet(images, columns=2).save(image)
    print(f"{args.output}: a student of {args.steps} steps; its images, a row for each prompt: {image}")


if __name__ == "__main__":
    main()
