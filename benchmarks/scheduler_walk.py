"""Every scheduler class of diffusers with its options: equal to diffusers' own loop, or refused by an error of ours.

``python -m benchmarks.scheduler_walk --write docs/schedulers.md`` runs the whole walk and writes that page's table.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.teachers.known_schedulers import KNOWN, full_config, make_scheduler, noise_process
from redif_sdk.distill.teachers.own_scheduler import OwnScheduler, run_table
from redif_sdk.errors import RedifError

MARK = "<!-- table: python -m benchmarks.scheduler_walk --write docs/schedulers.md -->"
LEVEL = 2.0 / 255  # of [-1, 1]
TARGET_STEPS, TABLE_STEPS = 6, 4
ALPHABET = {
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "clip_sample": [True, False],
    "thresholding": [True],
    "rescale_betas_zero_snr": [True],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "set_alpha_to_one": [True, False],
    "steps_offset": [1],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "lambda_min_clipped": [-5.1],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "skip_prk_steps": [True, False],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "sigma_min": [0.05],
    "sigma_max": [20.0],
    "sigma_data": [1.0],
    "sigma_schedule": ["exponential"],
    "rho": [5.0],
    "shift": [3.0],
    "flow_shift": [3.0],
    "shift_terminal": [0.1],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "predict_x0": [False],
    "disable_corrector": [[0, 1]],
    "original_inference_steps": [20],
    "timestep_scaling": [2.0],
    "num_train_timesteps": [100],
    "trained_betas": [[0.001 * (1 + k / 50) for k in range(200)]],
}


@dataclass(frozen=True)
class Verdict:
    """Of one class with one option: ``equal``, ``refused`` or ``different``, and why, or by how many levels of 255."""

    word: str
    detail: str = ""


def classes() -> list[str]:
    """Every scheduler class of the installed diffusers, those that need another package included."""
    import diffusers.schedulers as found

    names = [name for name in dir(found) if name.endswith("Scheduler")]
    return sorted(name for name in names if isinstance(getattr(found, name), type))


def options(name: str) -> list[dict[str, Any]]:
    """The defaults of a class, and each of its options with each of its values."""
    import diffusers

    if name not in KNOWN:
        return [{}]
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    found: list[dict[str, Any]] = [{}]
    found += [{key: value} for key, values in ALPHABET.items() if key in taken for value in values]
    if "use_flow_sigmas" in taken:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        found += [
            flow,
            flow | {"flow_shift": 3.0},
            flow | {"final_sigmas_type": "sigma_min"},
            flow | {"solver_order": 1},
        ]
    if "solver_order" in taken:
        first = {"solver_order": 1, "lower_order_final": True}
        sigmas = [key for key in ALPHABET if key.startswith("use_") and key in taken]
        found += [first | {key: True} for key in sigmas] + [first | {"timestep_spacing": "trailing"}]
    if "rescale_betas_zero_snr" in taken:
        zero = {"rescale_betas_zero_snr": True}
        found += [zero | {"timestep_spacing": spacing} for spacing in ALPHABET["timestep_spacing"]]
        found += [zero | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}]
    return found


def _network(x: Tensor, t: Tensor) -> Tensor:
    phase = (t.double() * 0.37).sin().to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(0.7 * x + 0.5 * phase) + 0.3 * phase


@cache
def _noise() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def theirs(scheduler: Any, steps: int, seed: int | None = None) -> Tensor:
    """The loop of diffusers' pipelines, as they write it; with ``seed``, step k's noise has the seed ``seed + k``."""
    own = copy.deepcopy(scheduler)
    with warnings.catch_warnings():  # of numpy, about diffusers
        warnings.simplefilter("ignore")
        own.set_timesteps(steps)
    x = _noise() * float(getattr(own, "init_noise_sigma", 1.0))
    more = {"eta": 0.0} if "eta" in inspect.signature(own.step).parameters else {}
    for k, t in enumerate(own.timesteps):
        given = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        f = _network(given, torch.as_tensor(t, dtype=torch.float32).expand(len(x)))
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            torch.manual_seed((seed or 0) + k)
            x = own.step(f, t, x, **more).prev_sample
    return x


def _images(latents: Tensor) -> Tensor:
    return latents.clamp(-1, 1)


def _own(name: str, config: dict[str, Any]) -> OwnScheduler:
    scheduler = make_scheduler({"_class_name": name, **config})
    schedule, kind, shift = noise_process(full_config(scheduler))
    return OwnScheduler(scheduler, schedule, kind, shift=shift)


def _compare(ours: Tensor, wanted: Tensor) -> Verdict:
    away = float((_images(ours) - _images(wanted)).abs().max()) / LEVEL
    return Verdict("equal") if away <= 1 else Verdict("different", f"{away:.1f} levels")


@torch.no_grad()
def target(name: str, config: dict[str, Any]) -> Verdict:
    """Whether targets are diffusers' own; ``no noise``: the scheduler draws some, and targets are made without."""
    try:
        own = _own(name, config)
        own.checked_schedule(TARGET_STEPS, 3)
        made = own.deterministic()
        if made is None:
            return Verdict("no noise", "DDIM on the trailing grid")
        ours = own.run(_network, _noise(), TARGET_STEPS, scheduler=made)
    except RedifError as error:
        return Verdict("refused", str(error))
    found = _compare(ours, theirs(made, TARGET_STEPS))
    if made is own.scheduler or found.word != "equal":
        return found
    return Verdict("no noise", type(made).__name__)


@torch.no_grad()
def imported(name: str, config: dict[str, Any]) -> Verdict:
    """Whether the table is diffusers' own loop; ``unclipped``: it is without the clipping that is switched on."""
    try:
        own = _own(name, config)
        table = own.table(TABLE_STEPS)
    except RedifError as error:
        return Verdict("refused", str(error))
    ours, plain = run_table(table, _network, _noise(), seed=3), own.scheduler
    if own.clips:
        plain = type(plain).from_config(plain.config, **dict.fromkeys(own.clips, False))
    found = _compare(ours, theirs(plain, TABLE_STEPS, seed=3))
    return Verdict("unclipped", ", ".join(own.clips)) if found.word == "equal" and own.clips else found


def walk(names: list[str] | None = None, *, short: bool = False) -> Iterator[tuple[str, str, Verdict, Verdict]]:
    """(class, option, targets, import) of every class with every option; ``short``: with its defaults alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in classes() if names is None else names:
            for config in [{}] if short else options(name):
                yield name, words(config), target(name, config), imported(name, config)


def words(config: dict[str, Any]) -> str:
    """An option as the page has it."""
    short = {key: "[...]" if isinstance(value, list) else value for key, value in config.items()}
    return ", ".join(f"{key}={value}" for key, value in short.items()) or "defaults"


def _rows(name: str) -> list[str]:
    return [f"| `{name}` | {option} | {one.word} | {other.word} |" for _, option, one, other in walk([name])]


def table(jobs: int = 1) -> str:
    """The page's table: each option of the known classes, and the others in one line."""
    rows = ["| class | option | targets | import |", "|---|---|---|---|"]
    with multiprocessing.Pool(jobs) as pool:
        rows += [row for found in pool.map(_rows, sorted(KNOWN), chunksize=1) for row in found]
    refused = ", ".join(f"`{name}`" for name in classes() if name not in KNOWN)
    return "\n".join([*rows, "", f"Refused by name: {refused}."])


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table of this page")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    asked = parser.parse_args()
    found = table(asked.jobs)
    if asked.write is None:
        print(found)
        return
    head = asked.write.read_text().partition(MARK)[0]
    asked.write.write_text(f"{head}{MARK}\n\n{found}\n")


if __name__ == "__main__":
    main()
