"""What is looked at before a run and while it lasts: is the student deterministic, does it improve, is it hacked?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.distill import pool
from redif_sdk.distill.context import Context
from redif_sdk.distill.measures.neighbours import neighbours, spread
from redif_sdk.distill.measures.spectrum import Spectrum
from redif_sdk.distill.methods.registry import METHODS
from redif_sdk.distill.methods.regression import visible_residual
from redif_sdk.distill.policy import Meter
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.advantage import Advantage
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.calling import CALL_ERRORS, differ
from redif_sdk.distill.training.standing import SURELY, Standing, energy_errors, squared_errors
from redif_sdk.errors import UnsupportedModel, first_line
from redif_sdk.sampling.table import StepTable

__all__ = ["SHOWN", "Seen", "Watch", "check", "check_call", "check_student", "held_back", "kept_apart", "sampled"]

CHECK_PAIRS = 192  # pool entries on which a run is watched, at most
FEWEST = 32  # at least
SHOWN = 16  # images that the log and a tracker are shown of a check
SHARE = 0.02  # of what the training costs
CHECK_SEED = 7_777_777  # of the noises of checks, where the pool is too small to keep some of it from training
LARGEST_FALL = 0.1  # of recall, from which on a check looks hacked
LARGEST_RATIO = 1.5  # a factor between a student's spectrum and the teacher's, from which on a check looks hacked
SMALLEST = 8  # pixels of a side that has a spectrum to speak of
HELD_BACK_FACTOR = 8  # a pool of at least so many times CHECK_PAIRS keeps them from training


@torch.no_grad()
def check_call(network: nn.Module, teacher: Teacher, device: torch.device, calls: int = 1) -> list[Tensor]:
    """The outputs of ``calls`` equal calls of a student's network on noise.

    Raises:
        UnsupportedModel: it cannot be called, its output has another shape than its input, or holds NaN.
    """
    count = min(calls, 2)
    x = torch.randn((count, *teacher.shape), generator=torch.Generator().manual_seed(0)).to(device)
    t, labels = torch.full((count,), len(teacher.schedule) / 2, device=device), teacher.labels(np.arange(count))
    condition = None if labels is None else labels.to(device)
    try:
        outputs: list[Tensor] = [network(x, t, condition) for _ in range(calls)]
    except torch.OutOfMemoryError:
        raise
    except CALL_ERRORS as error:
        raise UnsupportedModel(
            f"the student cannot be called with x {tuple(x.shape)}, t ({count},) and "
            f"{'no condition' if condition is None else 'a condition'} ({first_line(error)}); a network of your own is "
            "called as student(x, t, condition)"
        ) from error
    if outputs[0].shape != x.shape:
        raise UnsupportedModel(
            f"the student gives {tuple(outputs[0].shape)} for x {tuple(x.shape)}; its output must have the shape of x"
        )
    if not torch.isfinite(outputs[0]).all():
        raise UnsupportedModel("the student gives NaN or infinite values for noise; check its weights")
    return outputs


def check_student(network: nn.Module, teacher: Teacher, device: torch.device) -> None:
    """In evaluation mode, in which it trains, the student must give one output for one input.

    Else the mean that was rolled out and the mean that is updated are two functions, and ratios and directions are of
    neither.

    Raises:
        UnsupportedModel: as `check_call`; or two calls on equal inputs differ, e.g. by dropout that evaluation mode
            does not switch off.
    """
    if not differ(*check_call(network, teacher, device, calls=2)):
        return
    live = [name for name, part in network.named_modules() if "Dropout" in type(part).__name__ and part.training]
    where = f" (dropout is on in {', '.join(live[:3])})" if live else ""
    raise UnsupportedModel(
        f"the student gives two outputs for one input in evaluation mode{where}; switch its dropout or noise off"
    )


def held_back(pool_size: int) -> int:
    """How many of a pool's first entries are kept from training, so that checks are of unseen ones."""
    return CHECK_PAIRS if pool_size >= HELD_BACK_FACTOR * CHECK_PAIRS else 0


def check_size(context: Context) -> int:
    """On how many pairs a run is watched: so many that its checks cost `SHARE` of it, from `FEWEST` to `CHECK_PAIRS`.

    A check costs a rollout of each pair, and decoding its images where rewards see them.
    """
    config, advantage = context.config, context.advantage
    steps = config.num_inference_steps
    update = config.batch_size * (steps + 2)  # at least: forward through all steps, backward through one
    updates = config.updates or (config.forward_equivalents or 0) / update
    checks = 2 + updates // config.check_every if updates else 1
    training = (updates or config.check_every) * update
    pair = steps + 2 * advantage.decoding(context.pairs.target) / context.unit
    return min(CHECK_PAIRS, max(FEWEST, int(SHARE * training / (checks * pair))))


def checked_pairs(context: Context, pool: int) -> tuple[int, bool]:
    """On how many pairs a run on a ``pool`` of so many is watched, and whether the teacher is sampled for them."""
    size = check_size(context)
    if held_back(pool):
        return size, False
    apart = min(size, max(FEWEST // 4, pool // 4))
    calls, allowed = context.teacher.num_inference_steps * context.teacher.calls_per_step, context.config.teacher_calls
    # the start, whose outputs are the targets, is gone when a run is resumed
    if context.config.targets == "start" or (allowed is not None and allowed < (pool + apart) * calls):
        return min(size, pool), False
    return apart, True


def kept_apart(context: Context) -> tuple[Pairs, bool, float]:
    """The pairs on which a run is watched, whether they are kept from training, and the calls that they took.

    The pool's first entries, if it is large enough to keep them from training; else the teacher is sampled for up to a
    quarter as many pairs as the pool has, of noises that are neither trained nor evaluated on. Where ``teacher_calls``
    does not allow these, or the targets are the start's, the pool's first entries, which are trained on too.
    """
    pairs = context.pairs
    size, sampled = checked_pairs(context, len(pairs))
    if not sampled:
        return pairs[:size], held_back(len(pairs)) > 0, 0.0
    made, spent = pool.get(context.teacher, size, "train", seed=CHECK_SEED, device=context.device)
    return made.to(context.device), True, float(spent)


class Seen(NamedTuple):
    """The first images of a check, which are of the same noises and conditions each time: (N, C, H, W) in [-1, 1]."""

    student: Tensor
    teacher: Tensor


@torch.no_grad()
def sampled(
    context: Context, network: nn.Module, pairs: Pairs, table: StepTable | None = None
) -> tuple[Tensor, Tensor]:
    """The latents (N, C, H, W) of ``network`` on ``pairs``, and the teacher's. ``table``: None: the policy's."""
    policy = replace(context.policy, network=network, table=table or context.policy.table, meter=Meter())
    slices = policy.table.noise_slices
    return policy.sample(pairs.slices(slices) if slices > 1 else pairs.noise, pairs.condition), pairs.target


@torch.no_grad()
def check(
    context: Context,
    network: nn.Module,
    pairs: Pairs,
    update: int,
    *,
    energy: bool = False,
    table: StepTable | None = None,
) -> tuple[dict[str, float], Standing, Seen]:
    """Reward, paired error, contrast, recall and detail of ``network`` on ``pairs``, how it stands by them, and some of
    its images.

    ``contrast`` is the output's standard deviation over the teacher's. ``recall``: in a reward's features, if one has
    any, else in pixels. ``detail`` is the images' energy in fine detail over that of the teacher's, ``grid`` their
    strongest peak at the Nyquist frequencies over the teacher's (`Spectrum`), ``spread`` the distance of images of one
    condition over that of the teacher's, in recall's features, where a condition has two images; ``judge`` and
    ``judge_error`` what the setting ``judge`` says of them, and its standard error. What it costs is the meter's
    ``check_calls``, and no part of a budget.

    Args:
        update: the updates that were made so far.
        energy: the student draws noise of its own, so its outputs are compared as a set.
        table: in place of the policy's.
    """
    advantage, meter, amplitude = context.advantage, context.meter, context.amplitude
    spent, asked = meter.auxiliary_calls, meter.reward_calls
    output, target = sampled(context, network, pairs, table)
    embed = next((r.embed for r, _ in advantage.rewards if hasattr(r, "embed")), lambda images: images.flatten(1))
    images = advantage.images(output), advantage.images(target)
    features = [embed(part) for part in images]
    recall = neighbours(*features).recall
    wrong = (((output - target) / amplitude) ** 2).mean().item()
    scores = advantage.each(output, target, pairs.condition, images)
    judged = _judged(context.judge, output, target, pairs)
    rewards = None
    if advantage.steady and METHODS[context.config.method].rewarded:
        each = [score.weight * score.value.double().reshape(len(output), -1).mean(1).cpu() for score in scores]
        rewards = torch.stack(each).sum(0)
    meter.check_calls += meter.auxiliary_calls - spent + len(pairs) * context.policy.num_inference_steps
    meter.auxiliary_calls, meter.reward_calls = spent, asked
    if energy:
        errors = energy_errors(output / amplitude, target / amplitude)
    else:
        errors = squared_errors(visible_residual(output, target, context.bounds, amplitude))
    figures = {
        "reward": float(sum(s.weight * s.value.mean().item() for s in scores)) if scores else -wrong,
        "check_mse": wrong,
        "contrast": (output.std() / target.std()).item(),
        "recall": recall,
        **judged,
        **_spectra(*images),
        **_spreads(pairs.condition, *features),
    }
    return figures, Standing(update, errors, rewards), _seen(context, (output, target), images)


def _judged(judge: Advantage | None, output: Tensor, target: Tensor, pairs: Pairs) -> dict[str, float]:
    """The mean of what a judge says that nothing is trained on, and its standard error; nothing without one."""
    if judge is None:
        return {}
    scores = judge.each(output, target, pairs.condition)
    parts = [score.weight * score.value.double().reshape(len(output), -1).mean(1) for score in scores]
    each = torch.stack(parts).sum(0)
    return {"judge": float(each.mean()), "judge_error": float(each.std()) / math.sqrt(len(each))}


def _seen(context: Context, latents: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]) -> Seen:
    """The first images of a check, decoded again only where the rewards see latents."""
    if context.advantage.clamped:
        return Seen(*(part[:SHOWN].cpu() for part in images))
    return Seen(*(context.teacher.seen(part[:SHOWN]).cpu() for part in latents))


def _spreads(condition: Tensor | None, ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """The spread within a condition over that of the teacher's; nothing where no condition has two images."""
    now, wanted = spread(ours, condition), spread(theirs, condition)
    return {"spread": now / wanted} if now is not None and wanted else {}


def _spectra(images: Tensor, wanted: Tensor) -> dict[str, float]:
    """What of their power spectra is to be watched: ratios to the teacher's images; nothing where there is none."""
    if min(images.shape[-2:]) < SMALLEST:
        return {}
    ours, theirs = Spectrum.of(images), Spectrum.of(wanted)
    figures = {"detail": ours.fine_energy / theirs.fine_energy} if theirs.fine_energy > 0 else {}
    if ours.grid is not None and theirs.grid:
        figures["grid"] = ours.grid / theirs.grid
    return figures


@dataclass
class Watch:
    """Compares a run's checks: warns of reward hacking, and ends the run after ``early_stop`` idle ones (0: never).

    A check looks hacked where the reward has risen since the one before, and recall fell by more than `LARGEST_FALL`,
    or the judge is lower than at its best by more than `SURELY` standard errors, or fine detail is further than a
    factor of `LARGEST_RATIO` from the teacher's and went further, or the grid is more than `LARGEST_RATIO` times the
    teacher's and grew.
    """

    early_stop: int
    stopped: str = ""  # why the run ended before its budget did
    _last: dict[str, float] | None = field(default=None)
    _best: float = -math.inf
    _stale: int = 0
    _judged: float = -math.inf  # the best that a judge said

    def look(self, now: dict[str, float]) -> dict[str, str]:
        """What the log says of a check: ``warning`` where it looks hacked, ``stopped`` at the end.

        A check is idle if its reward is no better than the best so far, or if it looks hacked.
        """
        before, self._last = self._last, now
        rises = before is not None and now["reward"] > before["reward"]
        hacked = self._hacked(before, now) if before is not None and rises else ""
        self._judged = max(self._judged, now.get("judge", -math.inf))
        better = now["reward"] > self._best and not hacked
        self._stale = 0 if better else self._stale + 1
        if better:
            self._best = now["reward"]
        if self.early_stop and self._stale >= self.early_stop:
            why = f"the reward rises while {hacked}" if hacked else "the reward rises no more"
            self.stopped = f"{why}: {self._stale} checks in a row; the budget was not spent"
        said = {"warning": f"{hacked} while the reward rises: reward hacking?"} if hacked else {}
        return said | ({"stopped": self.stopped} if self.stopped else {})

    def _hacked(self, before: dict[str, float], now: dict[str, float]) -> str:
        """What of a check looks hacked beside the one before; empty: nothing."""
        if "judge" in now and now["judge"] < self._judged - SURELY * now["judge_error"]:
            return f"the judge falls from {self._judged:.4g} to {now['judge']:.4g}"
        if now["recall"] < before["recall"] - LARGEST_FALL:
            return "recall falls"
        detail, was = (abs(math.log(max(check.get("detail", 1.0), 1e-9))) for check in (now, before))
        if detail > max(math.log(LARGEST_RATIO), was):
            return f"fine detail goes to {now['detail']:.2g} times the teacher's"
        if now.get("grid", 1.0) > max(LARGEST_RATIO, before.get("grid", 1.0)):
            return f"a grid of pixels grows to {now['grid']:.2g} times the teacher's"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        kept = {"last": self._last, "best": self._best, "stale": self._stale, "stopped": self.stopped}
        return kept | {"judged": self._judged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._last, self._best, self._stale = state["last"], state["best"], state["stale"]
        self.stopped = state["stopped"]
        self._judged = state.get("judged", -math.inf)
