"""The conditions of the images that an export records: classes in turn, or the student's example prompts or arrays.

Prompts are tokenised by `redif_sdk.tokenizer`, as in deployment, and encoded by the text encoders in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redif_sdk.artifact.examples import example_conditions
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import GUIDANCE_SCALE, MASK_LATENTS, MASKED_LATENTS, Manifest
from redif_sdk.errors import ExportError
from redif_sdk.inputs.guiding import own_nulls
from redif_sdk.models.families import TextEncoders
from redif_sdk.runtimes.guided import NULL
from redif_sdk.sampling.noise import noise as draw

__all__ = ["ExampleConditions"]

#: The scale of recorded images of a student that is not guided unless a call asks for it.
EXAMPLE_SCALE = 2.0
#: Of the noise that stands for the masked images of recorded images.
EXAMPLE_SEED = 2


class ExampleConditions:
    """The conditions of a student's recorded images.

    Args:
        student: The student's folder.
        encoders: The text encoders of a text-to-image student, else None.
        manifest: In place of the folder's own.

    Raises:
        IntegrityError: A tokenizer was altered.
        ManifestError: A tokenizer's file is not a tokenizer.
    """

    def __init__(
        self, student: StudentFolder, encoders: TextEncoders | None = None, manifest: Manifest | None = None
    ) -> None:
        self._manifest = manifest or student.manifest
        self._student = student
        self._encoders = encoders
        self._encoded: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._tokenize: Any = None
        if student.manifest.text is not None:
            from redif_sdk.tokenizer import PromptTokenizer  # a package that other students need not load

            self._tokenize = PromptTokenizer(student)

    def of(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What these images are conditioned on, by name, each (B, ...); empty for an unconditional student.

        With guidance at run time, the scale and the null conditions too (`redif_sdk.runtimes.guided`). `size` is the
        latents' (height, width), of which an inpainting student's mask and masked image are; None: the student's own.
        """
        found: dict[str, Tensor] = {}
        if self._manifest.text is not None:
            found = self.encode(self.prompts(indices))
        elif self._manifest.arrays is not None:
            arrays = example_conditions(self._student, indices)
            found = {name: torch.from_numpy(value) for name, value in arrays.items()}
        elif (classes := self._manifest.classes) is not None:
            found = {"class_labels": torch.tensor([index % classes.num_classes for index in indices])}
        return found | self._painting(indices, size) | self._guidance(indices)

    def _painting(self, indices: Sequence[int], size: tuple[int, int] | None) -> dict[str, Tensor]:
        """What an inpainting student paints: the right half, all, and the lower half of noise, in turn."""
        latents = self._manifest.latents
        if not self._manifest.network.inpainting:
            return {}
        height, width = size or (latents.height, latents.width)
        masks = np.ones((len(indices), 1, height, width), np.float32)
        for mask, index in zip(masks[:, 0], indices, strict=True):
            if index % 3 != 1:
                mask[: height // 2 if index % 3 else height, : width if index % 3 else width // 2] = 0
        noise = draw([(EXAMPLE_SEED, index) for index in indices], (latents.channels, height, width))[0]
        return {MASK_LATENTS: torch.from_numpy(masks), MASKED_LATENTS: torch.from_numpy(noise * (1 - masks))}

    def _guidance(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What guides these images: the student's own scale, every third one unguided, or with another embedded scale.

        Where its own scale is 1, the others have `EXAMPLE_SCALE`. Of a range of scales its own, the least and the
        largest, in turn.
        """
        manifest = self._manifest
        if (kind := manifest.guidance_at_run_time) is None:
            return {}
        own = manifest.default_guidance
        usual = own if own != 1 or kind == "embedded" else EXAMPLE_SCALE
        other = own + 1 if kind == "embedded" else 1.0
        scales = (usual, *(manifest.network.guidance_range or (usual, other)))
        found = {GUIDANCE_SCALE: torch.tensor([float(scales[index % 3]) for index in indices])}
        if kind == "classifier-free":
            nulls = own_nulls(manifest, lambda prompts: {n: value.numpy() for n, value in self.encode(prompts).items()})
            rows = {NULL + name: torch.from_numpy(value) for name, value in nulls.items()}
            found |= {name: value.expand(len(indices), *value.shape[1:]) for name, value in rows.items()}
        return found

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these images: the student's example prompts, in turn."""
        assert self._manifest.text is not None
        examples = self._manifest.text.examples
        return [examples[index % len(examples)] for index in indices]

    def tokens(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The text encoder's inputs by name, each (B, length) int64."""
        tokens: dict[str, NDArray[np.int64]] = self._tokenize(prompts)
        return tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encoded prompts by name, each float32 (B, ...). The same prompts are encoded once.

        Raises:
            ExportError: A tensor has another shape than in the manifest.
        """
        key = tuple(prompts)
        if key not in self._encoded:
            assert self._encoders is not None
            inputs = [torch.from_numpy(value) for value in self.tokens(prompts).values()]
            outputs = [value.float() for value in self._encoders(*inputs)]
            self._encoded[key] = dict(zip(self._encoders.names, outputs, strict=True))
            self._check(self._encoded[key], len(prompts))
        return self._encoded[key]

    def _check(self, encoded: Mapping[str, Tensor], batch: int) -> None:
        assert self._manifest.text is not None
        for spec in self._manifest.text.tensors:
            shape, said = tuple(encoded[spec.name].shape), (batch, *spec.shape[1:])
            if shape != said:
                raise ExportError(
                    f"the text encoders of {self._manifest.name} make {spec.name} of shape {shape}, and its manifest "
                    f"says {said}; import the pipeline again"
                )
