"""One student in several precisions: how large each is, how fast, and how far its images are from fp32.

    python examples/export_and_quantise.py
    python examples/export_and_quantise.py student --precision fp32 int8 int4wo --prompt Dress

int8 computes in 8 bits; int8wo and int4wo only store weights in 8 and 4 bits, which is what large models want. `export`
holds each against torch (the parity gate) and refuses to write one that is not close enough.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from shipped import shipped_student

from redif_sdk import FastPipeline
from redif_sdk.export import export
from redif_sdk.images import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", type=Path, help="folder of a student; default: the one that ships")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/quantised"), help="a copy of it")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int8wo"], help="the first is compared with")
    parser.add_argument("--prompt", default="red heart", help="or the name of a class")
    parser.add_argument("--rounds", type=int, default=10, help="calls that are timed")
    args = parser.parse_args()

    shutil.rmtree(args.output, ignore_errors=True)
    shutil.copytree(args.student or shipped_student(), args.output)
    manifest = export(args.output, precisions=args.precision)

    first, shown = None, []
    print("precision   denoiser   ms an image   PSNR (dB)")
    for precision in args.precision:
        graph = next(g for g in manifest.graphs if (g.component, g.precision) == ("denoiser", precision))
        size = sum((args.output / name).stat().st_size for name in (graph.file, *graph.data))
        with FastPipeline.from_pretrained(args.output, runtime="onnxruntime", precision=precision) as pipe:
            images = pipe(args.prompt, num_images_per_prompt=4, seed=0).images
            times = []
            for seed in range(args.rounds):
                began = time.perf_counter()
                pipe(args.prompt, seed=seed)
                times.append(time.perf_counter() - began)
        levels = np.stack([np.asarray(image, np.float64) for image in images])
        first = levels if first is None else first
        error = np.square(levels - first).mean()
        psnr = f"{10 * np.log10(255**2 / error):.1f}" if error else "equal"
        print(f"{precision:<9}{size / 1e6:>9.1f} MB{1000 * np.median(times):>13.1f}{psnr:>12}")
        shown += images
    contact_sheet(shown, columns=4).save(args.output.with_suffix(".png"))
    print(f"a row for each precision: {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
