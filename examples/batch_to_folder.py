"""A file of prompts to a folder of images. A run that was cut goes on where it stopped, to the same images.

    python examples/batch_to_folder.py
    python examples/batch_to_folder.py student --prompts prompts.txt -n 4 --batch 16 -o images

The folder is one that `datasets` loads (imagefolder): metadata.jsonl has the text and the seed of each file. Images are
written beside their place and moved there, so that none is half written. Prompts may be added at the end of the file.
"""

import argparse
import json
import sys
from pathlib import Path

from shipped import shipped_student

from redif_sdk import FastPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", type=Path, help="folder or Hub id; default: the one that ships")
    parser.add_argument("--prompts", type=Path, help="one a line; default: the student's own examples")
    parser.add_argument("-n", "--per-prompt", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/batch"))
    parser.add_argument("--batch", type=int, default=8, help="images that are computed at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = FastPipeline.from_pretrained(args.student or shipped_student())
    own = pipe.manifest.condition
    lines = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else []
    prompts = [line for line in lines if line.strip()] or getattr(own, "examples", None) or own.class_names
    rows = []
    for line, prompt in enumerate(prompts):
        for copy in range(args.per_prompt):
            place = line * args.per_prompt + copy  # its noise: (seed, place), whatever shares its batch
            rows.append({"file_name": f"{line:05}-{copy:02}.png", "text": prompt, "seed": [args.seed, place]})
    listing = "".join(json.dumps(row) + "\n" for row in rows)
    index = args.output / "metadata.jsonl"
    if index.exists() and not listing.startswith(index.read_text(encoding="utf-8")):
        sys.exit(f"{args.output} holds images of other prompts, numbers or seeds; choose another folder with -o")
    args.output.mkdir(parents=True, exist_ok=True)
    index.write_text(listing, encoding="utf-8")

    todo = [row for row in rows if not (args.output / row["file_name"]).exists()]
    print(f"{len(rows) - len(todo)} of {len(rows)} images are there already")
    for start in range(0, len(todo), args.batch):
        part = todo[start : start + args.batch]
        out = pipe([row["text"] for row in part], seed=[tuple(row["seed"]) for row in part])
        for row, image in zip(part, out.images, strict=True):
            partial = args.output / f".{row['file_name']}"
            image.save(partial)
            partial.replace(args.output / row["file_name"])
        print(f"{start + len(part)} of {len(todo)}: {len(part) / out.timings['total']:.1f} images a second")


if __name__ == "__main__":
    main()
