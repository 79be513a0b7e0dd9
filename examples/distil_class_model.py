"""A class-conditional model to a student of few steps: trained, saved, exported, and used without torch.

    python examples/distil_class_model.py
    python examples/distil_class_model.py path/to/your/UNet2DModel --steps 4 --preset balanced --updates 0

The teacher is a folder with a `UNet2DModel` and a scheduler, or a teacher that ships. `--updates 0` takes the preset's
own number; the default is a short look at what happens. A run that was cut goes on when it is started again.
"""

import argparse
from pathlib import Path

from redif_sdk import FastPipeline
from redif_sdk.distill import DistillConfig, distill
from redif_sdk.distill.presets import preset
from redif_sdk.distill.training.checkpoint import CHECKPOINT
from redif_sdk.export import export
from redif_sdk.images import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="fashion-mnist", help="folder, Hub id, or a shipped teacher")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/classes"))
    parser.add_argument("--steps", type=int, default=2, help="network calls an image")
    parser.add_argument("--preset", default="fast", choices=["fast", "balanced", "best"])
    parser.add_argument("--updates", type=int, default=40, help="optimiser updates; 0: as many as the preset has")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 1, 3, 7], help="classes to draw at the end")
    args = parser.parse_args()

    settings = preset(args.preset, args.steps)  # regression, then reinforcement by the texture reward
    if args.updates:
        settings |= {"updates": args.updates, "schedule_updates": 2}
    training = args.output.with_suffix(".training")  # a checkpoint, and log.jsonl to follow the run
    resume = (training / CHECKPOINT).exists()
    student = distill(args.teacher, DistillConfig(**settings), folder=training, resume=resume)
    if student.worse:
        print(f"the run did not help: {student.worse}")  # then it holds the weights that it began with
    student.save_pretrained(args.output, overwrite=True)
    (training / CHECKPOINT).unlink()
    export(args.output)

    with FastPipeline.from_pretrained(args.output) as pipe:
        out = pipe(class_labels=args.classes, num_images_per_prompt=4, seed=0)
    image = args.output.with_suffix(".png")
    contact_sheet(out.images, columns=4).save(image)
    print(f"{args.output}: a student of {args.steps} steps; its images, a row for each class: {image}")


if __name__ == "__main__":
    main()
