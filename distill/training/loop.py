"""The training loop: budget, optimiser, EMA, checkpoints, log. It can be read top to bottom in five minutes.

Every update draws from a generator that depends on (seed, update) alone, and a checkpoint holds everything else, so a
run that was killed and resumed gives the same bits as one that was not (budget in updates, same threads).
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.records import Postprocess
from redif_sdk.distill.compute import parallel as sharding
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.compute.lora import adapted, merged
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.context import Context
from redif_sdk.distill.measures.distances import precision_recall
from redif_sdk.distill.methods import Method, make_method
from redif_sdk.distill.methods.times import on_grid, table_at
from redif_sdk.distill.policy import Meter, StudentPolicy
from redif_sdk.distill.pool import Pairs, with_states
from redif_sdk.distill.rewards import Advantage, make_rewards
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest, TrainingDiverged, UnsupportedModel
from redif_sdk.sampling.table import StepTable

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
GRID = 10  # pictures of the student, and of the teacher, that a tracker is shown
CHECK_PAIRS = 192  # pool entries on which a run is watched
NO_RANGE = 1e3  # latents have none: nothing is clamped at it
SPARED = 8  # a pool of so many times CHECK_PAIRS keeps them from training

Progress = Callable[[float, dict[str, float]], object]


def save_state(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())


def refuse_dropout(network: nn.Module) -> None:
    """Dropout in the update would make its mean another function than the rollout's."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise TrainingDiverged(f"dropout is on in {name} (p = {module.p}); the student must train in eval mode")


@dataclass
class Trainer:
    """One run. ``folder`` (None: nothing is written) holds the checkpoint and the JSON-lines log."""

    teacher: Teacher
    config: DistillConfig
    pairs: Pairs
    folder: Path | None = None
    start: nn.Module | None = None  # a network to begin with instead of the teacher's own weights
    start_table: StepTable | None = None
    on_progress: Progress | None = None

    method: Method = field(init=False)
    context: Context = field(init=False)
    ema: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    update: int = 0
    stopped: str = ""  # why the run ended before its budget did
    sharded: bool = field(init=False, default=False)
    _last_check: dict[str, float] | None = field(init=False, default=None)
    _best: float = field(init=False, default=-math.inf)
    _stale: int = field(init=False, default=0)
    _reserved: float = field(init=False, default=0.0)  # forward-equivalents that the method spends at the end

    def __post_init__(self) -> None:
        config = self.config
        draws.init_distributed()
        draws.share(config.batch_size)
        if config.batch_size > len(self.pairs):
            raise InvalidRequest(f"batch_size {config.batch_size} is more than the pool's {len(self.pairs)} pairs")
        self.method = make_method(config.method)
        device = chosen_device(config.device)
        self.pairs = self.pairs.to(device)
        network, self.ema = (self._network().to(device) for _ in range(2))
        self.ema.requires_grad_(False)
        refuse_dropout(network)
        in_latents = config.get("reward_space") == "latents"
        plain = Postprocess(value_range=(-NO_RANGE, NO_RANGE))  # rewards are then given latents as they are
        judged = replace(self.teacher, decode=None, postprocess=plain) if in_latents else self.teacher
        rewards = make_rewards(config.get("reward", "pixel"), judged, self.pairs, config.seed)
        table = self.start_table or self.teacher.table(config.num_inference_steps)
        if table.num_inference_steps != config.num_inference_steps:
            raise InvalidRequest(
                f"the start has {table.num_inference_steps} steps, but {config.num_inference_steps} are asked for"
            )
        if table.stochastic and config.method != "consistency":
            raise UnsupportedModel(
                f"the step table {table.sampler!r} draws noise; {config.method} needs a deterministic one (eta = 0)"
            )
        policy = StudentPolicy(network, table, self.teacher.schedule, Meter(processes=draws.world()))
        advantage = Advantage(rewards, judged.images, clamped=not in_latents)
        bounds = None if self.teacher.decode is not None else self.teacher.postprocess.value_range
        self.context = Context(policy, self.teacher, self.pairs, advantage, config, bounds)
        first = self.pairs[:1]
        first_time = torch.zeros(1, device=device)
        self.context.unit = flops(network, first.noise, first_time, first.condition) or math.inf
        advantage.charge = self.context.charge
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
        network = self.teacher.make_student()
        if self.start is not None:
            network.load_state_dict(self.start.state_dict())
        if self.config.lora_rank:
            network = adapted(network, self.config.lora_rank, self.config.seed)
        return network.eval()  # dropout and label dropout off, in rollouts and updates alike

    def _whole(self, network: nn.Module) -> nn.Module:
        """The network itself, or where it is sharded a whole copy, for which every process must ask."""
        if not self.sharded:
            return network
        copy = self._network().to(self.context.device).requires_grad_(False)
        copy.load_state_dict(sharding.weights(network))
        return copy

    @property
    def meter(self) -> Meter:
        return self.context.policy.meter

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
        """Train until the budget is spent; returns the EMA student with its table."""
        spent, began = 0.0, time.monotonic()
        resumed = resume and self._load()
        log = self._open_log(resumed)
        tracker = self._open_tracker()
        if resumed:
            spent = self.meter.seconds
        else:
            self.method.prepare(self.context)
            self.meter.seconds = time.monotonic() - began
        began += self.follow()
        if not resumed:
            self._save(log)
        saved = time.monotonic()
        while True:
            finished, progress = draws.agreed(self.finished, self.progress)
            if finished:
                break
            figures = self._step(progress)
            self.meter.seconds = spent + time.monotonic() - began
            if self.on_progress:
                self.on_progress(self.progress, figures)
            late = time.monotonic() - saved >= self.config.checkpoint_seconds
            ended, keep = draws.agreed(self.finished, late)
            if self.update % self.config.log_every == 0 or ended:
                self._write_log(log, figures, tracker, bool(ended))
            if keep:
                self._save(log)
                saved = time.monotonic()
        self._save(log)
        self.stopped = self.stopped or self._cut()
        if log:
            log.close()
        if tracker:
            tracker.finish()
        table = self.context.policy.table
        student = StudentPolicy(merged(self._whole(self.ema)), table, self.teacher.schedule, self.meter, exact=True)
        self.method.finish(self.context, student)
        student.network.cpu()  # judged, saved and exported there
        return student

    def follow(self) -> float:
        """With ``segments``: the table's times move to the nearest of the teacher's own path, and the pairs get the
        states there. Returns the seconds it took, which like the pool's own are not the budget's."""
        if not self.config.get("segments"):
            return 0.0
        began, policy = time.monotonic(), self.context.policy
        if policy.table.stochastic:
            raise UnsupportedModel("segments need a deterministic step table (eta = 0); set segments to 0")
        times = on_grid([float(t) for t in policy.table.timesteps], self.teacher.grid())
        policy.table = table_at(self.teacher.schedule, times, self.teacher.prediction_type)
        self.pairs = self.context.pairs = with_states(self.teacher, self.pairs, times)
        return time.monotonic() - began

    def _step(self, progress: float) -> dict[str, float]:
        config, network = self.config, self.context.policy.network
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.update)
        spared = CHECK_PAIRS if len(self.pairs) >= SPARED * CHECK_PAIRS else 0
        drawn = spared + torch.randperm(len(self.pairs) - spared, generator=generator)[: config.batch_size]
        batch = self.pairs[drawn[draws.share(config.batch_size)]]
        rate = config.learning_rate * min(1.0, (self.update + 1) / 20) * 0.5 * (1 + math.cos(math.pi * progress))
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
        ours, new = sharding.local(self.ema.parameters()), sharding.local(network.parameters())
        torch._foreach_lerp_(ours, new, 1 - decay)
        self.update += 1
        self.meter.updates = self.update
        return figures

    # -- watching -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, network: nn.Module | None = None) -> dict[str, float]:
        """Reward, paired error, recall and contrast of the EMA student on the pool's first entries, which a large pool
        keeps from training; the meter does not count it. ``network``: the whole EMA, where it is sharded.
        """
        meter, spent = self.meter, self.meter.auxiliary_calls
        pool = self.pairs[: min(CHECK_PAIRS, len(self.pairs))]
        policy = StudentPolicy(network or self.ema, self.context.policy.table, self.teacher.schedule)
        slices = policy.table.noise_slices
        output = policy.sample(pool.slices(slices) if slices > 1 else pool.noise, pool.condition)
        advantage = self.context.advantage
        embed = next((r.embed for r, _ in advantage.rewards if hasattr(r, "embed")), lambda images: images.flatten(1))
        _, recall = precision_recall(embed(advantage.images(output)), embed(advantage.images(pool.target)))
        able = any(not getattr(reward, "local", False) for reward, _ in advantage.rewards)
        wrong = ((output - pool.target) ** 2).mean().item()
        reward = advantage.score(output, pool.target, pool.condition) if able else -wrong
        meter.auxiliary_calls = spent
        return {
            "reward": reward,
            "check_mse": wrong,
            "contrast": (output.std() / pool.target.std()).item(),  # 1: the teacher's
            "recall": recall,
        }

    def _open_tracker(self) -> Any:
        """accelerate's tracker in the run's folder, if one is asked for."""
        if self.config.tracker is None or self.folder is None or draws.rank():
            return None
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState(cpu=not torch.cuda.is_available())  # which process this is: trackers write on the first alone
        tracker = TensorBoardTracker(self.folder.name, self.folder.parent)
        tracker.start()
        flat = self.config.model_dump(mode="json", fallback=str)
        tracker.store_init_configuration({key: value for key, value in flat.items() if isinstance(value, str | float)})
        return tracker

    def _track(self, tracker: Any, row: dict[str, Any], network: nn.Module) -> None:
        """The row's numbers; with a check also a grid of the EMA student's pictures over the teacher's."""
        tracker.log({key: value for key, value in row.items() if isinstance(value, float)}, step=self.update)
        if "check_mse" not in row:
            return
        pool = self.pairs[: min(GRID, len(self.pairs))]
        policy = StudentPolicy(network, self.context.policy.table, self.teacher.schedule)
        slices = policy.table.noise_slices
        with torch.no_grad():
            output = policy.sample(pool.slices(slices) if slices > 1 else pool.noise, pool.condition)
        both = torch.cat([self.teacher.images(part).clamp(-1, 1) for part in (output, pool.target)])
        levels = ((both + 1) * 127.5).round().to(torch.uint8)
        if levels.shape[1] in (1, 3):
            grid = levels.unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
            tracker.log_images({"student over teacher": grid[None].cpu().numpy()}, step=self.update, dataformats="NHWC")

    def _write_log(self, log: TextIO | None, figures: dict[str, float], tracker: Any, ended: bool) -> None:
        checked = self.update % self.config.check_every == 0 or ended
        watched = self._whole(self.ema) if checked else self.ema
        if draws.rank():
            return  # the first process writes; the others helped to gather
        row: dict[str, Any] = {"update": self.update, "progress": round(self.progress, 6), **figures}
        if checked:
            now = self.check(watched)
            row |= now
            before = self._last_check
            if before and now["reward"] > before["reward"] and now["recall"] < before["recall"] - 0.1:
                row["warning"] = "recall falls while the reward rises: reward hacking?"
            self._last_check = now
            self._watch(now["reward"], hacked="warning" in row)
            if self.stopped:
                row["stopped"] = self.stopped
        row["budget"] = asdict(self.meter) | {"forward_equivalents": self.meter.forward_equivalents}
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
        if tracker:
            self._track(tracker, row, watched)

    def _watch(self, reward: float, *, hacked: bool) -> None:
        """Early stop: ``early_stop`` checks in a row whose reward is no better than the best, or that look hacked."""
        better = reward > self._best and not hacked
        self._stale = 0 if better else self._stale + 1
        if better:
            self._best = reward
        if self.config.early_stop and self._stale >= self.config.early_stop:
            why = "the reward rises while recall falls" if hacked else "the reward rises no more"
            self.stopped = f"{why}: {self._stale} checks in a row; the budget was not spent"

    # -- keeping --------------------------------------------------------------------------------------------------

    def _open_log(self, resumed: bool) -> TextIO | None:
        """The log, cut back to what the checkpoint knows: lines of updates that will be made again are dropped."""
        if self.folder is None or draws.rank():
            return None
        path = self.folder / LOG
        for left in self.folder.glob(f".{CHECKPOINT}.*"):  # a write that a kill cut short
            left.unlink()
        kept: list[str] = []
        if resumed and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["update"] <= self.update:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue  # the line that the kill cut short
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("w")
        log.writelines(kept)
        log.flush()
        return log

    def _save(self, log: TextIO | None) -> None:
        if self.folder is None:
            return
        network = self.context.policy.network
        if self.sharded:  # every process gathers, the first writes
            weights, ema = sharding.weights(network), sharding.weights(self.ema)
            optimizer = sharding.states(network, self.optimizer)
        else:
            weights, ema, optimizer = network.state_dict(), self.ema.state_dict(), self.optimizer.state_dict()
        if draws.rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": self._identity(),
            "network": weights,
            "ema": ema,
            "optimizer": optimizer,
            "table": json.dumps(self.context.policy.table.to_dict()),
            "method": self.method.state_dict(),
            "rewards": self.context.advantage.state_dict(),
            "update": self.update,
            "meter": asdict(self.meter),
            "last_check": self._last_check,
            "watch": (self._best, self._stale, self.stopped),
        }
        save_state(state, self.folder / CHECKPOINT)

    def _identity(self) -> str:
        """What a checkpoint must have in common with the run that resumes it."""
        settings = self.config.model_dump(mode="json", fallback=str)
        free = ("checkpoint_seconds", "reward", "tracker", "device")
        fixed = {name: value for name, value in settings.items() if name not in free}
        more = {"reward": str(self.config.get("reward")), "teacher": self.teacher.identity, "processes": draws.world()}
        return json.dumps(fixed | more)

    def _load(self) -> bool:
        """Go on from the folder's checkpoint, if there is one."""
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            return False
        state: dict[str, Any] = torch.load(
            self.folder / CHECKPOINT, map_location=self.context.device, weights_only=True
        )
        if state["config"] != self._identity():
            raise InvalidRequest(
                f"the checkpoint in {self.folder} is of a run with other settings; "
                "resume with the same ones, or remove the folder to start anew"
            )
        policy = self.context.policy
        if self.sharded:
            sharding.restore(policy.network, state["network"])
            sharding.restore(self.ema, state["ema"])
            sharding.restore_states(policy.network, self.optimizer, state["optimizer"])
        else:
            policy.network.load_state_dict(state["network"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        policy.table = StepTable.from_dict(json.loads(state["table"]))
        self.method.load_state_dict(state["method"], self.context)
        self.context.advantage.load_state_dict(state["rewards"], self.context)
        self.update = state["update"]
        for name, value in state["meter"].items():
            setattr(policy.meter, name, value)  # the meter that methods and rewards hold
        self._last_check = state["last_check"]
        self._best, self._stale, self.stopped = state["watch"]
        return True
