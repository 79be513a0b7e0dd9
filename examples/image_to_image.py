"""Start from an image, and paint a part of one anew; no training, any student.

    python examples/image_to_image.py
    python examples/image_to_image.py student --image photo.jpg --prompt "a blue heart" --mask mask.png

A student of K steps has K strengths: the last floor(strength K) steps are run. White in the mask is painted anew.
"""

import argparse
from pathlib import Path

from PIL import Image
from shipped import shipped_student

from redif_sdk import FastPipeline
from redif_sdk.images import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", type=Path, help="folder or Hub id; default: the one that ships")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/from-image.png"))
    parser.add_argument("--image", type=Path, help="default: one that the student makes of --first")
    parser.add_argument("--first", default="red heart", help="prompt, or class, of that image")
    parser.add_argument("--prompt", default="a blue heart", help="what shall become of it")
    parser.add_argument("--mask", type=Path, help="white is painted anew; default: the right half")
    parser.add_argument("--steps", type=int, help="default: the first number that the student supports")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with FastPipeline.from_pretrained(args.student or shipped_student()) as pipe:
        steps = args.steps or pipe.manifest.supported_steps[0]
        image = Image.open(args.image) if args.image else pipe(args.first, num_inference_steps=steps, seed=1).images[0]
        if args.mask:
            mask = Image.open(args.mask).convert("L")
        else:
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (image.width // 2, 0, *image.size))
        common = {"image": image, "num_inference_steps": steps, "seed": args.seed}
        made = [pipe(args.prompt, strength=kept / steps, **common).images[0] for kept in range(1, steps + 1)]
        painted = pipe(args.prompt, mask_image=mask, **common).images[0]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    row = [image.convert(painted.mode).resize(painted.size), *made, painted]
    contact_sheet(row, columns=len(row)).save(args.output)
    print(f"{args.output}: the image, {steps} strengths from little to all, and the masked part painted anew")


if __name__ == "__main__":
    main()
