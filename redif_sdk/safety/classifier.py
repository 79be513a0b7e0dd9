"""The filter itself: images to the classifier's input, its scores, and what becomes of flagged images."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from redif_sdk.errors import IntegrityError, InvalidRequest, RuntimeUnavailable, UnsafeContent, first_line
from redif_sdk.images import to_pil
from redif_sdk.safety.spec import FilterSpec, found_beside

__all__ = ["SafetyFilter", "filtered"]

Pixels = NDArray[np.uint8]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class SafetyFilter:
    """A classifier that is asked about every image. Safe to use from several threads and in forked processes.

    Attributes:
        spec: what it takes and what its numbers mean.
        model: its ONNX file.
        sha256: of that file.
    """

    def __init__(self, model: Path, spec: FilterSpec, *, device: str = "cpu", num_threads: int | None = None) -> None:
        self.model, self.spec = model, spec
        self._device, self._num_threads = device, num_threads
        data = self._read()
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._lock = Lock()
        self._sessions: dict[int, Any] = {os.getpid(): self._session(data)}
        self._check()

    @classmethod
    def load(
        cls, source: str | Path, *, device: str = "cpu", num_threads: int | None = None, **spec: Any
    ) -> SafetyFilter:
        """Load a classifier, and try it on black images.

        Args:
            source: An ONNX file, or the JSON file that describes it; see `found_beside`.
            device: "cpu", "cuda[:N]", "dml[:N]" or "coreml".
            num_threads: CPU threads; None: all that the process may use.
            spec: Fields of `FilterSpec`; they go over the JSON file's.

        Raises:
            InvalidRequest: A file cannot be read, a field is wrong, or the classifier does not fit its description.
            RuntimeUnavailable: ONNX Runtime cannot load or run it here.
        """
        model, fields = found_beside(Path(source))
        fields |= spec
        if not fields:
            beside = Path(source).with_suffix(".json")
            raise InvalidRequest(
                f"what the safety filter {source} takes is not known; describe it in {beside.name} beside it, or by "
                f"arguments (size, classes, ...)"
            )
        where = f"the safety filter {source}"
        return cls(model.absolute(), FilterSpec.of(fields, where), device=device, num_threads=num_threads)

    @classmethod
    def of(cls, given: str | Path | SafetyFilter | None) -> SafetyFilter | None:
        """`given`, loaded where it is the name of a file."""
        return given if given is None or isinstance(given, SafetyFilter) else cls.load(given)

    def __repr__(self) -> str:
        return f"<SafetyFilter {self.model.name}: above {self.spec.threshold:g}, {self.spec.action}>"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_sessions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock(), _sessions={})

    def scores(self, images: Pixels) -> NDArray[np.float64]:
        """The score of each image, uint8 (B, H, W, C). Raises RuntimeUnavailable if the classifier fails."""
        from redif_sdk.runtimes.onnxruntime import ENGINE_ERRORS

        session, spec = self._loaded(), self.spec
        taken, name = _input_of(session, spec)
        size = 1 if taken.shape and taken.shape[0] == 1 else spec.batch
        parts = []
        for first in range(0, len(images), size):
            batch = np.stack([self._prepared(image) for image in to_pil(images[first : first + size])])
            try:
                (out,) = session.run([name], {taken.name: batch.astype(_DTYPES[taken.type])})
            except ENGINE_ERRORS as error:
                raise RuntimeUnavailable(f"the safety filter {self.model} failed: {first_line(error)}") from error
            parts.append(self._score(np.asarray(out, np.float64).reshape(len(batch), -1)))
        return np.concatenate(parts) if parts else np.empty(0)

    def flags(self, images: Pixels) -> NDArray[np.bool_]:
        """Whether each image's score is above the threshold; a score that is NaN counts as above."""
        return ~(self.scores(images) <= self.spec.threshold)

    def _score(self, out: NDArray[np.float64]) -> NDArray[np.float64]:
        if max(self.spec.classes) >= out.shape[1]:
            raise InvalidRequest(
                f"the safety filter {self.model.name} has {out.shape[1]} outputs an image; classes names "
                f"{max(self.spec.classes)}, and they are counted from 0"
            )
        if self.spec.activation == "softmax":
            powers = np.exp(out - out.max(axis=1, keepdims=True))
            out = powers / powers.sum(axis=1, keepdims=True)
        elif self.spec.activation == "sigmoid":
            out = 1 / (1 + np.exp(-out))
        total: NDArray[np.float64] = out[:, list(self.spec.classes)].sum(axis=1)
        return total

    def _prepared(self, image: Image.Image) -> NDArray[Any]:
        """One image as the classifier takes it."""
        spec = self.spec
        height, width = spec.resize or spec.size
        image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        if spec.jpeg_quality is not None:
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=spec.jpeg_quality)
            image = Image.open(buffer)
        top, left = (height - spec.size[0]) // 2, (width - spec.size[1]) // 2
        image = image.crop((left, top, left + spec.size[1], top + spec.size[0]))
        values: NDArray[Any] = np.asarray(image, np.float32)
        values = values[:, :, ::-1] if spec.channels == "BGR" else values
        if spec.white != 255:
            values = values * np.float32(spec.white / 255)
        values = (values - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
        return values if spec.layout == "NHWC" else values.transpose(2, 0, 1)

    def _check(self) -> None:
        """Raise InvalidRequest if the classifier does not take what the spec says, by running it on black images."""
        taken, _ = _input_of(self._loaded(), self.spec)
        if taken.type not in _DTYPES:
            raise InvalidRequest(
                f"the safety filter {self.model.name} takes {taken.type}; it must take floats or uint8"
            )
        height, width = self.spec.size
        wanted = [3, height, width] if self.spec.layout == "NCHW" else [height, width, 3]
        fixed = [(a, b) for a, b in zip(taken.shape[1:], wanted, strict=False) if isinstance(a, int) and a != b]
        if len(taken.shape) != 4 or fixed:
            raise InvalidRequest(
                f"the safety filter {self.model.name} takes {taken.shape}, and size and layout say [batch, "
                f"{', '.join(map(str, wanted))}]; correct them"
            )
        self.scores(np.zeros((2, height, width, 3), np.uint8))

    def _read(self) -> bytes:
        try:
            return self.model.read_bytes()
        except OSError as error:
            reason = error.strerror or "it cannot be read"
            raise InvalidRequest(
                f"the safety filter {self.model} cannot be read: {reason}; give an ONNX file"
            ) from error

    def _loaded(self) -> Any:
        """This process's session: the threads of a parent's do not outlive a fork."""
        with self._lock:
            if os.getpid() not in self._sessions:
                data = self._read()
                if hashlib.sha256(data).hexdigest() != self.sha256:
                    raise IntegrityError(
                        f"the safety filter {self.model} was changed since it was loaded; load it again"
                    )
                self._sessions[os.getpid()] = self._session(data)
            return self._sessions[os.getpid()]

    def _session(self, data: bytes) -> Any:
        from redif_sdk.runtimes.onnxruntime import session_of

        try:
            return session_of(data, device=self._device, num_threads=self._num_threads)
        except RuntimeUnavailable as error:
            raise RuntimeUnavailable(f"the safety filter {self.model} cannot be loaded: {error}") from error


def _input_of(session: Any, spec: FilterSpec) -> tuple[Any, str]:
    """(the input, the name of the output) that are used. Raises InvalidRequest."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    named = [one for one in inputs if spec.input in (None, one.name)]
    if len(named) != 1 or len(inputs) != 1:
        raise InvalidRequest(f"a safety filter must have one input; it has {', '.join(one.name for one in inputs)}")
    found = [one.name for one in outputs if spec.output in (None, one.name)]
    if not found:
        names = ", ".join(one.name for one in outputs)
        raise InvalidRequest(f"the safety filter has no output {spec.output!r:.60}; it has {names}")
    return named[0], found[0]


def filtered(safety: SafetyFilter | None, images: NDArray[Any]) -> tuple[NDArray[Any], list[bool] | None]:
    """Images, uint8 (B, H, W, C), with flagged ones black, and which ones are flagged; None without a filter.

    Raises:
        UnsafeContent: An image is flagged, and the filter's action is "raise".
        RuntimeUnavailable: The classifier failed; no image is returned unchecked.
    """
    if safety is None:
        return images, None
    flags = safety.flags(images)
    if flags.any():
        if safety.spec.action == "raise":
            raise UnsafeContent([int(place) for place in np.flatnonzero(flags)], len(images))
        images = images.copy()
        images[flags] = 0
        images[flags, :, :, 3:] = 255  # where there is alpha
    return images, flags.tolist()
