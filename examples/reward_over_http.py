"""A reward of your own, in a process of its own: the trainer sends images over HTTP and gets a number for each.

    python examples/reward_over_http.py

`score` below is the reward. It runs wherever its own packages are, on another machine too; the trainer needs no
gradient of it. Here this script starts the server and then trains. By hand it is two commands:

    redif serve-reward examples/reward_over_http.py:score --port 8001
    redif distill fashion-mnist -o student --steps 2 --reward texture+http://127.0.0.1:8001/score
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

REDIF = [sys.executable, "-c", "from redif_sdk.cli.main import main; main()"]  # the command redif of this environment


def score(images, class_names):
    """How bright each image is, and footwear the other way round: it shall be dark."""
    levels = [np.asarray(image.convert("L"), np.float32).mean() / 255 for image in images]
    footwear = {"Sandal", "Sneaker", "Ankle boot"}
    return [-level if name in footwear else level for level, name in zip(levels, class_names or levels, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="fashion-mnist")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/rewarded"))
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--weight", type=float, default=1.0, help="of this reward; the texture reward's is 1")
    args = parser.parse_args()

    server = subprocess.Popen(
        [*REDIF, "serve-reward", f"{__file__}:score", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()  # "... is asked at http://127.0.0.1:PORT/score (API: ...)"
        address = next(word for word in line.split() if word.startswith("http"))

        from redif_sdk.distill import DistillConfig, distill  # here: the server imports this file too, without torch

        reward = {"texture": 1.0, address: args.weight}  # each is normalised first, so units do not matter
        small = {"batch_size": 16, "schedule_updates": 2, "updates": args.updates}  # a look at it, and no more
        config = DistillConfig(num_inference_steps=2, reward=reward, warm_start=0.5, **small)
        distill(args.teacher, config).save_pretrained(args.output, overwrite=True)
        print(f"{args.output}: rewarded by {address}; next: redif export {args.output}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
