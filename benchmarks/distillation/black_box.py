"""A reward without a gradient: follow an HTTP server's reward while keeping the quality.

``python -m benchmarks.distillation.black_box [-o FILE]``: a one-step student is first aligned with its teacher. Then
the reward is a server that returns minus the size in bytes of each image's JPEG, which has no gradient. `redif` follows
it in two ways: alone, with a regression term of several weights; and beside the alignment's own reward, at several
weights of the bytes. Each is a point of the trade-off between bytes and distance to the teacher. The controls continue
for the same number of updates with regression alone, and with the alignment's reward alone. `draft` refuses the same
reward. Evaluated on the validation noises in EfficientNet-Lite0's features.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.distillation.run import VALIDATION_SEED, settings_of
from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill import DistillConfig, Teacher
from redif_sdk.distill import pool as pairs
from redif_sdk.distill.evaluation.arena import outputs
from redif_sdk.distill.measures import features
from redif_sdk.distill.measures.distances import Judge
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest
from redif_sdk.images import to_pil
from redif_sdk.results import document, write_json

ANCHORS = (16.0, 4.0, 2.0, 1.0, 0.5, 0.25)
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of the bytes; texture's weight is 1
ALONE, BESIDE = "redif, bytes alone", "redif, bytes beside texture"
QUALITY = 90
HERE = Path(__file__).parent


def jpeg_bytes(picture: Image.Image) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


class Answer(BaseHTTPRequestHandler):
    """The server side of `EndpointReward`: base64 PNG images in, one number for each out."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pictures = [Image.open(io.BytesIO(base64.b64decode(png))) for png in asked["images"]]
        body = json.dumps({"rewards": [-jpeg_bytes(picture) for picture in pictures]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


@contextmanager
def served() -> Iterator[str]:
    """Yield the address of the reward while the server runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/jpeg"
        finally:
            server.shutdown()


def mean_bytes(images: Tensor) -> float:
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return statistics.mean(jpeg_bytes(picture) for picture in to_pil(levels))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot bytes against distance; each point is a student."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for contender, setting in ((ALONE, "anchor"), (BESIDE, "weight")):
        curve = [row for row in rows if row["contender"] == contender]
        label = f"{contender}; at each point the {setting}"
        axis.plot([r["jpeg_bytes"] for r in curve], [r["fd_teacher"] for r in curve], marker="o", label=label)
        for row in curve:
            place = (row["jpeg_bytes"], row["fd_teacher"])
            axis.annotate(f"{row[setting]:g}", place, (4, 4), textcoords="offset points", fontsize=7)
    for row in rows:
        if row["contender"] not in (ALONE, BESIDE) and row["fd_teacher"] is not None:
            axis.scatter(row["jpeg_bytes"], row["fd_teacher"], marker="s", color="0.4", label=row["contender"])
    axis.set(xlabel=f"bytes of a JPEG of quality {QUALITY}", ylabel="FD to the teacher")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    plt.rcParams["svg.hashsalt"] = "redif"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--align", type=float, default=48_000, help="Forward-equivalents of the alignment.")
    parser.add_argument("--updates", type=int, default=100, help="Updates that follow the reward.")
    parser.add_argument("--anchors", type=float, nargs="+", default=list(ANCHORS))
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "black_box.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/black-box.svg"))
    asked = parser.parse_args(arguments)
    teacher = Teacher.load("fashion-mnist")
    pool, _ = pairs.get(teacher, asked.pool, "train")
    held, _ = pairs.get(teacher, asked.samples, "train", seed=VALIDATION_SEED)
    target = teacher.images(held.target)
    judge = Judge(target, features.embed)
    rows: list[dict[str, Any]] = []

    def note(contender: str, images: Tensor, **more: Any) -> None:
        quality = judge.quality(images).row()
        rows.append({"contender": contender, "jpeg_bytes": mean_bytes(images), **quality, **more})
        print(json.dumps(rows[-1]), flush=True)

    note("the teacher", target)
    rows[-1]["fd_teacher"] = None  # its distance to itself
    settings = settings_of("redif", 1) | {"forward_equivalents": asked.align}
    first = DistillConfig.checked(method="redif", num_inference_steps=1, **settings)
    aligned = Trainer(teacher, first, pool).run()
    note("aligned", teacher.images(outputs(aligned.sample, held)))
    shared = {"num_inference_steps": 1, "updates": asked.updates, "batch_size": 32, "learning_rate": 5e-4}
    follow = {"warm_start": 0.0, "group_size": 16, "step_delta": 0.3, "exploration": 0.1, "exploration_rank": 40}
    hold = {name: settings[name] for name in ("group_size", "step_delta", "exploration", "exploration_rank", "huber")}
    with served() as address:
        arms: list[tuple[str, dict[str, float], dict[str, Any]]] = [
            ("regression goes on", {}, {"method": "regression"})
        ]
        arms += [(ALONE, {"anchor": a}, {"reward": address, "regression_weight": a, **follow}) for a in asked.anchors]
        for weight in asked.weights:
            reward = {"texture": 1.0, address: weight} if weight else "texture"
            arms.append((BESIDE, {"weight": weight}, {"reward": reward, "warm_start": 0.0, **hold}))
        for contender, place, chosen in arms:
            config = DistillConfig.checked(**shared, **chosen)
            trainer = Trainer(teacher, config, pool, start=aligned.network, start_table=aligned.table)
            policy = trainer.run()
            spent = {"forward_equivalents": policy.meter.forward_equivalents, "seconds": policy.meter.seconds}
            note(contender, teacher.images(outputs(policy.sample, held)), **place, **spent)
        try:
            draft = DistillConfig.checked(**shared, method="draft", reward=address, warm_start=0.0)
            Trainer(teacher, draft, pool, start=aligned.network).run()
        except InvalidRequest as error:
            refused = str(error).replace(address, "http://.../jpeg")
        else:
            raise SystemExit("draft ran on a reward without a gradient")
    print(refused)
    written = document("benchmarks/distillation/black_box", rows, threads=torch.get_num_threads())
    write_json(asked.output, written | {"draft": refused})
    plot(rows, asked.plot)


if __name__ == "__main__":
    main()
