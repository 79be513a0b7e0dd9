"""Class agreement and distance to real images of the shipped teacher, for several guidance scales.

``python benchmarks/guidance.py`` (Debian's ``dataset-fashion-mnist``; about ten minutes on two cores). Its noises are
used neither for training nor for evaluating a student, and its distances are to real *training* images, so that the
scale is not chosen on the test images.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from redif_sdk.distill import pool as pairs
from redif_sdk.distill.evaluation import datasets as data
from redif_sdk.distill.measures.distances import Statistics, frechet_distance
from redif_sdk.distill.measures.features import embed
from redif_sdk.distill.teachers.base import Teacher
from zoo.publish_teacher import classify, train_classifier

NAME, SAMPLES, STEPS, SEED, REAL = "fashion-mnist", 1000, 25, 3, 6000
SCALES = (1.0, 1.5, 2.0, 3.0)


def main() -> None:
    train, test = data.load(NAME, "train"), data.load(NAME, "test")
    classifier, accuracy = train_classifier(train, test, seed=11)
    print(f"the classifier is right on {100 * accuracy:.1f} % of the real test set")
    real = Statistics.of(embed(torch.tensor(train.images[:REAL]).float() / 127.5 - 1))
    print("| guidance scale | requested class seen | FD to real |\n|---|---|---|")
    for scale in SCALES:
        teacher = replace(Teacher.load(NAME).guided(scale), num_inference_steps=STEPS)
        made = pairs.compute(teacher, SAMPLES, "train", seed=SEED)
        images = teacher.images(made.target).clamp(-1, 1)
        seen = float((classify(classifier, images) == made.condition).float().mean())
        print(
            f"| {scale:g} | {100 * seen:.1f} % | {frechet_distance(Statistics.of(embed(images)), real):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
