"""The training loop: budget, optimiser, moving average. It reads top to bottom in five minutes.

What a run leaves on disk is in `checkpoint`, what it writes down in `log`, how it is watched in `check`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redif_sdk.distill.compute import parallel as sharding
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.compute.lora import apart, load_trained, merged, twin
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods import Method, make_method
from redif_sdk.distill.methods.times import on_grid, table_at
from redif_sdk.distill.policy import Meter, StudentPolicy
from redif_sdk.distill.pool import Pairs, with_states
from redif_sdk.distill.rewards import Advantage, make_rewards, name_of
from redif_sdk.distill.rewards.advantage import decoder
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.large import network_to_train, sized
from redif_sdk.distill.teachers.value_range import say_what_is_cut
from redif_sdk.distill.training import checkpoint
from redif_sdk.distill.training.check import Watch, check_student, held_back
from redif_sdk.distill.training.log import RunLog
from redif_sdk.distill.training.observer import Observer
from redif_sdk.distill.training.report import try_to_report
from redif_sdk.distill.training.standing import Verdict
from redif_sdk.errors import InvalidRequest, TrainingDiverged, UnsupportedModel
from redif_sdk.sampling.table import StepTable

__all__ = ["OnProgress", "Trainer"]

WARM_UP = 20  # updates in which the learning rate rises

OnProgress = Callable[[float, dict[str, float]], object]


@dataclass
class Trainer:
    """One run.

    Attributes:
        folder: of the checkpoint and the log; None: nothing is written.
        start, start_table: a network and a table to begin with, in place of the teacher's own.
        on_progress: called after each update with the share of the run that is done, and figures.
        verdict: of a run that has ended, how it stands to its untrained start.
    """

    teacher: Teacher
    config: DistillConfig
    pairs: Pairs
    folder: Path | None = None
    start: nn.Module | None = None
    start_table: StepTable | None = None
    on_progress: OnProgress | None = None

    method: Method = field(init=False)
    context: Context = field(init=False)
    ema: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    watch: Watch = field(init=False)
    observer: Observer = field(init=False)
    verdict: Verdict | None = field(init=False, default=None)
    update: int = 0
    sharded: bool = field(init=False, default=False)
    _reserved: float = field(init=False, default=0.0)  # forward-equivalents that the method spends at the end

    def __post_init__(self) -> None:
        self.config, self.teacher = config, _ = sized(self.config, self.teacher)
        draws.init_distributed()
        draws.share(config.batch_size)
        if config.batch_size > len(self.pairs):
            raise InvalidRequest(f"batch_size {config.batch_size} is more than the pool's {len(self.pairs)} pairs")
        self.method, self.watch = make_method(config.method), Watch(config.early_stop)
        device = chosen_device(config.device)
        self.pairs = self.pairs.to(device)
        self.teacher = self.teacher.ranged_by(self.pairs.target)
        say_what_is_cut(self.teacher, self.pairs.target)
        network = self._network().to(device)
        self.ema = twin(network)
        check_student(network, self.teacher, device)
        self.context = self._context(network)
        self.observer = Observer(self.context, self.method)
        self._reserved = self.method.reserve(self.context)
        if config.forward_equivalents and config.forward_equivalents <= self._reserved:
            raise InvalidRequest(
                f"forward_equivalents {config.forward_equivalents:g} would all go to the calibration, which takes "
                f"{self._reserved:.0f}; allow more, or set calibration to 0"
            )
        self.sharded = config.shard and draws.world() > 1
        if self.sharded:
            sharding.refuse(config.method, config.get("kl", 0.0))
            for part in (network, self.ema):
                sharding.shard(part, device)
        self.optimizer = torch.optim.AdamW(
            [weight for weight in network.parameters() if weight.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _network(self) -> nn.Module:
        try:
            network = network_to_train(self.teacher, self.config, self.start)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidRequest(f"the start is another network than the student ({reason})") from error
        return network.eval()  # dropout and label dropout off, in rollouts and updates alike

    def _context(self, network: nn.Module) -> Context:
        """What the method sees: the policy at its first table, the rewards on what they judge, and the costs' unit."""
        config, teacher = self.config, self.teacher
        table = self.start_table or teacher.table(config.num_inference_steps)
        if table.num_inference_steps != config.num_inference_steps:
            raise InvalidRequest(
                f"the start has {table.num_inference_steps} steps, but num_inference_steps is "
                f"{config.num_inference_steps}; give them the same number"
            )
        if table.stochastic and config.method != "consistency":
            raise UnsupportedModel(
                f"the step table {table.sampler!r} draws noise; {config.method} needs a deterministic one (eta = 0)"
            )
        in_latents = config.get("reward_space") == "latents"
        judged = teacher.as_latents() if in_latents else teacher
        rewards = make_rewards(config.get("reward", "pixel"), judged, self.pairs, config.seed)
        paired = [name_of(reward) for reward, _ in rewards if getattr(reward, "paired", False)]
        if paired and config.get("group_noise") == "different":
            raise InvalidRequest(
                f"group_noise is different, but the reward {paired[0]} compares with the teacher's image of one noise; "
                "use group_noise same, or a reward that sees the prompt"
            )
        if paired and config.targets == "start":
            raise InvalidRequest(
                f"targets is start, but the reward {paired[0]} compares with the teacher's image; use one that sees "
                "the prompt or the image alone, or targets teacher"
            )
        advantage = Advantage(rewards, decoder(judged, config.precision), clamped=not in_latents, teacher=judged)
        meter = Meter(processes=draws.world())
        policy = StudentPolicy(network, table, teacher.schedule, meter, precision=config.precision)
        bounds = None if teacher.decode is not None else teacher.postprocess.value_range
        context = Context(policy, teacher, self.pairs, advantage, config, bounds)
        first = self.pairs[:1]
        time_of_first = torch.zeros(1, device=first.noise.device)
        context.unit = flops(network, first.noise, time_of_first, first.condition) or math.inf
        advantage.charge, advantage.count = context.charge, context.count_judged
        if (asked := config.get("judge")) is not None:
            others = make_rewards(asked, teacher, self.pairs, config.seed)
            context.judge = Advantage(others, decoder(teacher, config.precision), teacher=teacher)
            context.judge.charge, context.judge.count = context.charge, context.count_judged
        return context

    def _whole(self, network: nn.Module) -> nn.Module:
        """The network itself, or where it is sharded a whole copy, for which every process must call."""
        if not self.sharded:
            return network
        copy = self._network().to(self.context.device).requires_grad_(False)
        copy.load_state_dict(sharding.weights(network))
        return copy

    # -- budget ---------------------------------------------------------------------------------------------------

    @property
    def meter(self) -> Meter:
        """What the run has spent so far."""
        return self.context.meter

    @property
    def stopped(self) -> str:
        """Why the run ended before its budget did; empty where it did not."""
        return self.watch.stopped

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """The shares of the budgets of work (updates, forward-equivalents) and of seconds that are spent; None where
        there is no such budget."""
        config, work = self.config, []
        if config.updates:
            work.append(self.update / config.updates)
        if config.forward_equivalents:
            whole = config.forward_equivalents - self._reserved
            work.append(self.meter.forward_equivalents / whole)
        return (
            max(work) if work else None,
            self.meter.seconds / config.seconds if config.seconds else None,
        )

    @property
    def finished(self) -> bool:
        """Whether a budget is spent, or the run was stopped."""
        return bool(self.stopped) or any(share is not None and share >= 1 for share in self.shares)

    @property
    def progress(self) -> float:
        """The share of the run that is done: what phases and learning rate follow.

        Where there is a budget of work, the clock has no part in it: a slow machine takes the path of a fast one.
        """
        work, seconds = self.shares
        return min(1.0, (seconds or 0.0) if work is None else work)

    def _cut(self) -> str:
        """Why the run has to be called cut: seconds ended it before its budget of work did. Empty: they did not."""
        work, seconds = self.shares
        if work is None or work >= 1 or seconds is None or seconds < 1:
            return ""
        done = f"{self.update} of {self.config.updates} updates" if self.config.updates else f"{work:.0%} of its budget"
        return f"the clock cut the run at {done}, after {self.meter.seconds:.0f} s; allow it more time"

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> StudentPolicy:
        """Train until the budget is spent; returns the EMA student, on the CPU, with its table.

        Args:
            resume: go on from the folder's checkpoint, if there is one.

        Raises:
            InvalidRequest: another run is writing to the folder, or its checkpoint is of other settings.
            TrainingDiverged: a loss, a gradient or a reward is not finite, or says nothing.
        """
        with checkpoint.run_lock(self.folder):
            self.observer.prepare()
            began = time.monotonic()
            resumed = resume and self._restore()
            with closing(RunLog(self.folder, self.config, self.update if resumed else None)) as log:
                if not resumed:
                    self.method.prepare(self.context)
                    self.meter.seconds = time.monotonic() - began
                began += self._begin(log)
                spent = self.meter.seconds if resumed else 0.0
                began += self.follow()
                if not resumed:
                    self.save()
                self._train(log, began - spent)
                self.save()
                self.watch.stopped = self.stopped or self._cut()
            student = self._end()
            if not draws.rank():
                try_to_report(self.folder)
            student.network.cpu()  # judged, saved and exported there
            return student

    def _train(self, log: RunLog, began: float) -> None:
        """Updates until the budget is spent. Processes agree on what depends on a clock."""
        saved = time.monotonic()
        while True:
            finished, progress = draws.agreed(self.finished, self.progress)
            if finished:
                return
            figures = self.step(progress)
            self.meter.seconds = time.monotonic() - began
            if self.on_progress:
                self.on_progress(self.progress, figures)
            due = time.monotonic() - saved >= self.config.checkpoint_seconds
            ended, keep = draws.agreed(self.finished, due)
            if self.update % self.config.log_every == 0 or ended:
                self._report(log, figures, ended=bool(ended))
            if keep:
                self.save()
                saved = time.monotonic()

    def step(self, progress: float) -> dict[str, float]:
        """One update at ``progress`` in [0, 1): a batch, the method's losses, the moving average. Figures for the log.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite.
        """
        config, network = self.config, self.context.policy.network
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.update)
        first = held_back(len(self.pairs))
        drawn = first + torch.randperm(len(self.pairs) - first, generator=generator)[: config.batch_size]
        batch = self.pairs[drawn[draws.share(config.batch_size)]]
        cycle = self.method.cycle(self.context, progress)
        rate = config.learning_rate * min(1.0, (self.update + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * cycle))
        figures: dict[str, float] = {}
        for loss, figures in self.method.losses(self.context, batch, progress, generator):
            if not math.isfinite(value := draws.mean(loss).item()):
                raise TrainingDiverged(f"the loss is {value} at update {self.update}; lower the learning rate")
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            loss.backward()
            draws.average_gradients(network.parameters())
            norm = sharding.total(torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip))
            if not torch.isfinite(norm):
                raise TrainingDiverged(f"the gradient is not finite at update {self.update}; lower the learning rate")
            self.optimizer.step()
            figures = draws.averaged(figures) | {"loss": value, "grad_norm": norm.item()}
        decay = min(config.ema_decay, (1 + self.update) / (10 + self.update))
        slow, fast = (sharding.local(weights) for weights in apart(self.ema, network))
        torch._foreach_lerp_(slow, fast, 1 - decay)
        self.update += 1
        self.meter.updates = self.update
        return figures

    def follow(self) -> float:
        """With ``segments``: the table's times move to the nearest of the teacher's own path, and the pairs get the
        states there. Returns the seconds it took, which like the pool's own are not the budget's."""
        if not self.config.get("segments"):
            return 0.0
        began = time.monotonic()
        self.pairs = self.context.pairs = with_states(self.teacher, self.pairs, self.move_to_path())
        return time.monotonic() - began

    def move_to_path(self) -> list[float]:
        """The table's times move to the nearest of the teacher's own path; returns them."""
        policy = self.context.policy
        if policy.table.stochastic:
            raise UnsupportedModel("segments need a deterministic step table (eta = 0); set segments to 0")
        times = on_grid([float(t) for t in policy.table.timesteps], self.teacher.grid())
        policy.table = table_at(self.teacher.schedule, times, self.teacher.prediction_type)
        return times

    def check(self) -> dict[str, float]:
        """How the EMA student stands (`redif_sdk.distill.training.check.check`)."""
        return self.observer.look(self.ema, self.update)[0]

    def _begin(self, log: RunLog) -> float:
        """The check of the untrained student, which a resumed run knows. Of a sharded EMA all processes call.

        Returns the seconds that it took, which are not the budget's: a run of a few would else make no update.
        """
        began = time.monotonic()
        (known,) = draws.agreed(self.observer.keeper.start is not None)
        if not known:
            network = self._network().to(self.context.device) if self.update else self._whole(self.ema)
            if not draws.rank():
                figures = self.observer.begin(network)
                if not self.update:
                    log.write({"update": 0, "progress": 0.0, **figures, **self.context.advantage.unjudged()})
                    self._show(log)
        return time.monotonic() - began

    def _end(self) -> StudentPolicy:
        """The student of the weights that the run keeps, finished by the method, and the `verdict`."""
        seen = self.observer.keeper.end
        (due,) = draws.agreed(seen is None or seen.update != self.update)
        whole = self._whole(self.ema)
        if due and not draws.rank():
            self.observer.note(whole, self.update)
        kept, weights, table = draws.from_first(lambda: self.observer.chosen(self.update))
        if table is not None:
            whole = self._network().to(self.context.device).requires_grad_(False)
            if weights is not None:
                load_trained(whole, weights)
        table = table or self.context.policy.table
        student = StudentPolicy(merged(whole), table, self.teacher.schedule, self.meter, exact=True)
        if kept:  # an untrained student stays as it is
            self.observer.finish(student, kept, lambda: self.method.finish(self.context, student))
        self.verdict = draws.from_first(lambda: self.observer.verdict(kept))
        return student

    def _report(self, log: RunLog, figures: dict[str, float], *, ended: bool) -> None:
        """A row of the log, every ``check_every`` updates with a check. Where the EMA is sharded all processes call."""
        checked = self.update % self.config.check_every == 0 or ended
        network = self._whole(self.ema) if checked else self.ema
        if draws.rank():
            return
        row: dict[str, Any] = {"update": self.update, "progress": round(self.progress, 6), **figures}
        row |= self.context.advantage.unjudged()
        if checked:
            now = self.observer.note(network, self.update)
            row |= now | self.watch.look(now)
            row |= {"checks": self.observer.keeper.record()} if ended else {}
        row["budget"] = asdict(self.meter) | {"forward_equivalents": self.meter.forward_equivalents}
        log.write(row)
        if checked:
            self._show(log)

    def _show(self, log: RunLog) -> None:
        """To the log the images of the last check, which are of the same noises and conditions each time."""
        seen = self.observer.seen
        assert seen is not None
        if not self.update:
            log.about(self.teacher, self.config, self.observer.captions(len(seen.student)))
        log.show(seen.student, seen.teacher, self.update)

    # -- resuming -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint. Where weights are sharded every process must call, and the first writes."""
        if self.folder is None:
            return
        network = self.context.policy.network
        weights = checkpoint.weights_of(network, self.ema, self.optimizer, sharded=self.sharded)
        if draws.rank():
            return
        state = {
            "config": checkpoint.identity(self.config, self.teacher),
            **weights,
            "table": json.dumps(self.context.policy.table.to_dict()),
            "method": self.method.state_dict(),
            "rewards": self.context.advantage.state_dict(),
            "update": self.update,
            "meter": asdict(self.meter),
            "watch": self.watch.state_dict(),
            "keeper": self.observer.keeper.state_dict(),
        }
        checkpoint.write(self.folder, state)

    def _restore(self) -> bool:
        """Go on from the folder's checkpoint; False where there is none."""
        state = checkpoint.read(self.folder, checkpoint.identity(self.config, self.teacher), self.context.device)
        if state is None:
            return False
        policy = self.context.policy
        checkpoint.restore_weights(state, policy.network, self.ema, self.optimizer, sharded=self.sharded)
        policy.table = StepTable.from_dict(json.loads(state["table"]))
        self.method.load_state_dict(state["method"], self.context)
        self.context.advantage.load_state_dict(state["rewards"], self.context)
        self.update = state["update"]
        for name, value in state["meter"].items():
            setattr(policy.meter, name, value)  # the meter that methods and rewards hold
        self.watch.load_state_dict(state["watch"])
        if "keeper" in state:
            self.observer.keeper.load_state_dict(state["keeper"])
        return True
