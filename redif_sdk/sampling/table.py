"""The step table: K rows of coefficients, which are all that a sampler is.

:mod:`redif_sdk.sampling.loop` runs a network by a table. A table's rows come from :mod:`redif_sdk.sampling.samplers`,
or, for a diffusers scheduler, from :mod:`redif_sdk.sampling.from_diffusers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.errors import InvalidRequest, ManifestError
from redif_sdk.sampling import samplers
from redif_sdk.sampling.coefficients import PREDICTION_TYPES, to_float32
from redif_sdk.sampling.from_diffusers import read_scheduler
from redif_sdk.sampling.noise_schedule import NoiseSchedule, Preconditioning, karras_sigmas

__all__ = [
    "COLUMNS",
    "MAX_ROWS",
    "PREDICTION_TYPES",
    "NoiseSchedule",
    "StepTable",
    "karras_sigmas",
]

COLUMNS = ("t", "p", "q", "r", "s", "c")
MAX_ROWS = 1000
LONGEST_NAME = 100
_LARGEST = float(np.finfo(np.float32).max)
_KEYS = ("sampler", "prediction_type", "init_scale", "columns", "rows")

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StepTable:
    """K network calls and the arithmetic between them.

    Row k is (t, p, q, r, s, c). With the network's output f = network(x, t, condition) and z ~ N(0, I)::

        x0 = p x + q f               the clean-image estimate   (:meth:`clean`)
        x' = r x0 + s x + c z        the next state             (:meth:`advance`)

    x is held in the coordinates that the network takes, so (alpha, sigma) of a row include any input scaling, and it
    starts as ``init_scale`` times standard normal noise. t is exactly what the network is fed.

    ``rows`` is a read-only float32 array (K, 6); ``init_scale`` is rounded to float32 too, so that every reader of the
    table computes the same. Tables are equal when all four fields are.

    Raises:
        InvalidRequest: A wrong shape, values that are not finite, no row or more than ``MAX_ROWS``, or an unknown
            prediction type.
    """

    rows: NDArray[np.float32]
    prediction_type: str
    sampler: str = "custom"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        rows = np.array(to_float32(self.rows), order="C")
        init_scale = float(to_float32(self.init_scale))
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS) or not 1 <= rows.shape[0] <= MAX_ROWS:
            raise InvalidRequest(
                f"a step table has shape {rows.shape}; "
                f"give (K, {len(COLUMNS)}) with 1 <= K <= {MAX_ROWS} and the columns {', '.join(COLUMNS)}"
            )
        if not np.isfinite(rows).all() or not math.isfinite(init_scale):
            raise InvalidRequest("a step table holds NaN or infinite values; check its noise levels")
        if self.prediction_type not in PREDICTION_TYPES:
            raise InvalidRequest(
                f"prediction type {self.prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}"
            )
        if not self.sampler.isprintable() or len(self.sampler) > LONGEST_NAME:
            raise InvalidRequest(f"a step table's sampler is {self.sampler!r:.100}; give a short printable name")
        rows.setflags(write=False)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "init_scale", init_scale)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepTable) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        # + 0.0 makes -0.0 and 0.0 the same bytes
        return self.rows.shape, (self.rows + 0.0).tobytes(), self.prediction_type, self.sampler, self.init_scale

    @property
    def num_inference_steps(self) -> int:
        """K, the number of network calls."""
        return int(self.rows.shape[0])

    @property
    def timesteps(self) -> NDArray[np.float32]:
        """The times that the network is fed, float32 (K,)."""
        return self.rows[:, 0]

    @cached_property
    def scale(self) -> NDArray[np.float32]:
        """`init_scale` as an array, float32 ()."""
        return np.asarray(self.init_scale, dtype=np.float32)

    @cached_property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool(np.any(self.rows[:, 5] != 0.0))

    @cached_property
    def noise_slices(self) -> int:
        """Slices of noise that sampling takes: one for the start; where any step adds noise, one more for each step."""
        return self.num_inference_steps + 1 if self.stochastic else 1

    def start(self, noise: Any) -> Any:
        """The state that the first step starts from: init_scale times ``noise``, a numpy array or torch tensor."""
        return noise * self.init_scale

    def clean(self, k: int, x: Any, f: Any) -> Any:
        """Step k's clean-image estimate x0 = p x + q f, of numpy arrays or torch tensors of one shape."""
        _, p, q, _, _, _ = self._row(k)
        return p * x + q * f

    def advance(self, k: int, x: Any, x0: Any, z: Any = None) -> Any:
        """Step k's next state x' = r x0 + s x + c z. Raises InvalidRequest if c is not 0 and ``z`` is None."""
        _, _, _, r, s, c = self._row(k)
        mean = r * x0 + s * x
        if c == 0.0:
            return mean
        if z is None:
            raise InvalidRequest(f"step {k} of the {self.sampler} table adds noise (c = {c:g}); give z")
        return mean + c * z

    def with_gain(self, gain: float) -> StepTable:
        """The table whose output is ``gain`` times this one's: the last step's r, s and c are scaled."""
        rows = self.rows.copy()
        rows[-1, 3:] *= gain
        return StepTable(rows, self.prediction_type, self.sampler, self.init_scale)

    def _row(self, k: int) -> list[float]:
        if not 0 <= k < self.num_inference_steps:
            raise InvalidRequest(f"the table has steps 0 to {self.num_inference_steps - 1}, not {k}")
        return [float(value) for value in self.rows[k]]

    # ------------------------------------------------------------------ builders

    @classmethod
    def build(
        cls,
        *,
        t: ArrayLike,
        alphas: ArrayLike,
        sigmas: ArrayLike,
        next_alphas: ArrayLike,
        next_sigmas: ArrayLike,
        noise: ArrayLike = 0.0,
        prediction_type: str,
        init_scale: float = 1.0,
        sampler: str = "custom",
        c_skip: ArrayLike | None = None,
        c_out: ArrayLike | None = None,
        c_in: ArrayLike | None = None,
    ) -> StepTable:
        """The table that goes from each (alpha, sigma) to (alpha', sigma') with sampler noise c.

        Computed in float64 by :func:`redif_sdk.sampling.coefficients.update_rows`, stored in float32. All arrays have
        shape (K,) or are scalars.

        Args:
            t: The times that the network is fed.
            alphas: The signal levels at which the steps start.
            sigmas: The noise levels at which they start.
            next_alphas: The signal levels at which they end.
            next_sigmas: The noise levels at which they end.
            noise: c, in [0, sigma'].
            prediction_type: One of ``PREDICTION_TYPES``.
            init_scale: The start is this times standard normal noise.
            sampler: A name.
            c_skip: EDM's preconditioning, like ``c_out`` and ``c_in``; for the prediction type edm only.
            c_out: See ``c_skip``.
            c_in: See ``c_skip``.

        Raises:
            InvalidRequest: Levels that contradict each other or the prediction type.
            UnsupportedModel: The clean image does not follow from the network's output at a level.
        """
        fields = samplers.table_fields(
            t=t,
            alphas=alphas,
            sigmas=sigmas,
            next_alphas=next_alphas,
            next_sigmas=next_sigmas,
            noise=noise,
            prediction_type=prediction_type,
            init_scale=init_scale,
            sampler=sampler,
            c_skip=c_skip,
            c_out=c_out,
            c_in=c_in,
        )
        return cls(*fields)

    @classmethod
    def ddim(
        cls,
        schedule: NoiseSchedule,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        prediction_type: str,
        eta: float = 0.0,
        spacing: str = "trailing",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
    ) -> StepTable:
        """DDIM on a discrete schedule, on diffusers' grid or at custom (learnt) times.

        With ``num_inference_steps`` = K: DDIMScheduler's K times (``spacing``, ``steps_offset``) and its own rule for
        the previous step, t - T // K, which is not always the next step's time. With ``timesteps`` (falling integers):
        each step ends at the next time. Time 0 is followed by (alpha', sigma') = (1, 0), or the
        schedule's first level with ``set_alpha_to_one=False``. ``eta`` 0 is deterministic, 1 is DDPM's noise.
        """
        fields = samplers.ddim(
            schedule,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            prediction_type=prediction_type,
            eta=eta,
            spacing=spacing,
            steps_offset=steps_offset,
            set_alpha_to_one=set_alpha_to_one,
        )
        return cls(*fields)

    @classmethod
    def consistency(cls, schedule: NoiseSchedule, timesteps: Sequence[int], *, prediction_type: str) -> StepTable:
        """Consistency multistep sampling: all steps but the last forget the state and add fresh noise, c = sigma'."""
        return cls(*samplers.consistency(schedule, timesteps, prediction_type=prediction_type))

    @classmethod
    def flow_euler(
        cls,
        *,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        shift: float = 1.0,
        time_scale: float = 1000.0,
        eta: float = 0.0,
    ) -> StepTable:
        """Euler's method for flow models, f = noise - data, x = (1 - sigma) x0 + sigma noise.

        ``sigmas`` (default linspace(1, 1/K, K)) are shifted, sigma <- shift sigma / (1 + (shift - 1) sigma), and the
        network is fed t = sigma * time_scale: 1000 for SD3, 1 for Flux, whose resolution-dependent exponential shift
        by mu is shift = exp(mu). ``eta`` > 0 adds c = sigma' sin(eta pi / 2), which keeps the marginals.
        """
        fields = samplers.flow_euler(
            num_inference_steps=num_inference_steps, sigmas=sigmas, shift=shift, time_scale=time_scale, eta=eta
        )
        return cls(*fields)

    @classmethod
    def euler(
        cls,
        sigmas: Sequence[float] | Floats,
        *,
        prediction_type: str,
        timesteps: Sequence[float] | Floats,
        eta: float = 0.0,
        final_sigma: float = 0.0,
        init_scale: float | None = None,
    ) -> StepTable:
        """Euler's method on variance-exploding noise levels, for networks that take x / sqrt(sigma^2 + 1).

        ``sigmas`` (K, falling, without the final one) are the noise levels and ``timesteps`` (K,) what the network is
        fed. A row's alpha is c_in = 1 / sqrt(sigma^2 + 1) and its sigma c_in * sigma. The last step ends at
        ``final_sigma`` in unscaled coordinates. ``eta`` 1 is the ancestral sampler. ``init_scale`` defaults to the
        first sigma, i.e. a start of sigma_max * noise.
        """
        fields = samplers.euler(
            sigmas,
            prediction_type=prediction_type,
            timesteps=timesteps,
            eta=eta,
            final_sigma=final_sigma,
            init_scale=init_scale,
        )
        return cls(*fields)

    @classmethod
    def edm(
        cls,
        sigmas: Sequence[float] | Floats,
        *,
        sigma_data: float = 0.5,
        eta: float = 0.0,
        v_prediction: bool = False,
        init_scale: float | None = None,
    ) -> StepTable:
        """Euler's method for EDM's raw network F with its preconditioning (Table 1 of EDM); t = ln(sigma) / 4.

        ``sigmas`` (K, falling, without the final 0), e.g. :func:`karras_sigmas`. ``eta`` 1 is the ancestral sampler.
        ``v_prediction``: F has the other sign. ``init_scale`` defaults to the first sigma, i.e. a start of
        sigma_max * noise.
        """
        fields = samplers.edm(sigmas, sigma_data=sigma_data, eta=eta, v_prediction=v_prediction, init_scale=init_scale)
        return cls(*fields)

    @classmethod
    def edm_euler(cls, preconditioning: Preconditioning, num_inference_steps: int, eta: float = 0.0) -> StepTable:
        """EDMEulerScheduler's table: :meth:`edm` on EDM's own K levels, from sqrt(sigma_max^2 + 1) times noise."""
        return cls(*samplers.edm_euler(preconditioning, num_inference_steps, eta))

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float = 0.0,
    ) -> StepTable:
        """The table of a diffusers scheduler object, or of a ``scheduler_config.json`` read into a dict.

        :func:`redif_sdk.sampling.from_diffusers.read_scheduler` describes the arguments and lists the schedulers.

        Raises:
            UnsupportedModel: The scheduler is not a step table, or has an unsupported option.
            InvalidRequest: Times or a number of steps that the scheduler does not have.
        """
        fields = read_scheduler(scheduler, num_inference_steps=num_inference_steps, timesteps=timesteps, eta=eta)
        return cls(*fields)

    # ------------------------------------------------------------------ serialisation

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-safe values. Floats are exact: :meth:`from_dict` restores the same bits."""
        return {
            "sampler": self.sampler,
            "prediction_type": self.prediction_type,
            "init_scale": self.init_scale,
            "columns": list(COLUMNS),
            "rows": self.rows.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepTable:
        """The table of :meth:`to_dict`'s result. Raises ManifestError for anything else."""
        if not isinstance(data, Mapping) or set(data) != set(_KEYS):
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ManifestError(f"a step table has the fields {found!s:.200}; it must have exactly {sorted(_KEYS)}")
        if data["columns"] != list(COLUMNS):
            raise ManifestError(f"a step table has the columns {data['columns']!r:.100}; it must have {list(COLUMNS)}")
        rows, init_scale = data["rows"], data["init_scale"]
        if not all(isinstance(data[key], str) for key in ("sampler", "prediction_type")):
            raise ManifestError("a step table's sampler and prediction_type must be strings")
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
            raise ManifestError(f"a step table must have a list of 1 to {MAX_ROWS} rows")
        for row in rows:
            if not isinstance(row, list) or len(row) != len(COLUMNS) or not all(map(_is_number, row)):
                raise ManifestError(f"a step table's row is {row!r:.100}; it must be {len(COLUMNS)} finite numbers")
        if not _is_number(init_scale):
            raise ManifestError(f"a step table's init_scale is {init_scale!r:.100}; it must be a finite number")
        try:
            return cls(to_float32(rows), data["prediction_type"], data["sampler"], float(init_scale))
        except InvalidRequest as error:
            raise ManifestError(f"a step table cannot be read: {error}") from error


def _is_number(value: object) -> bool:
    """Whether float32 can hold it. A comparison, since NaN fails it and a huge JSON integer has no float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
