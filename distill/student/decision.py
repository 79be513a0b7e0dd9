"""Whether a teacher can be distilled, imported and exported: decided before any work, and by one function for all.

A teacher's parts are looked at when it is made (`Teacher.from_diffusers`, by `redif_sdk.models.portable`), so that all
commands say the same of them. Here it is called once, and a run is rehearsed without the teacher's samples.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.config import DistillConfig, check_range
from redif_sdk.distill.methods.times import on_grid, table_at
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.registry import FITTED, weighted
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.calling import check_deterministic
from redif_sdk.distill.teachers.large import check_memory
from redif_sdk.distill.training.check import check_call, check_student
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import inner_of
from redif_sdk.models.portable import check_library_network, check_own_network, is_library_network

_log = logging.getLogger(__name__)

__all__ = ["check_run", "check_teacher", "pool_size"]

#: Methods that compare outputs at times of a noise schedule, which EDM's networks are not fed.
_BY_TIMES = ("consistency", "progressive", "dmd", "dmd2", "cdm", "sgmd")


def check_teacher(teacher: Teacher, device: torch.device | str = "cpu") -> nn.Module:
    """Whether ``teacher`` can be imported, and its students saved and exported. The network is called once.

    Returns:
        A student's network, on ``device``.

    Raises:
        UnsupportedModel: it could not be exported, cannot be called, or gives NaN.
    """
    network = teacher.frozen_student().eval()
    inner = inner_of(network)
    if is_library_network(inner):
        check_library_network(inner, teacher.network_folder or "the student")
    else:
        if teacher.pipeline is not None:
            raise UnsupportedModel(
                f"the student is a {type(inner).__name__}, and a {type(teacher.pipeline).__name__} is saved with a "
                "network of diffusers; give one of these, or make the teacher with Teacher.from_callable"
            )
        check_own_network(inner, "the student")
    network = network.to(device)
    check_call(network, teacher, torch.device(device))
    return network


def check_run(
    teacher: Teacher, config: DistillConfig, start: nn.Module | None = None, *, pairs: int | None = None
) -> None:
    """Whether a run of ``config`` can be made, as far as that is known before the pool is sampled.

    Args:
        start: a network to begin with.
        pairs: the size of the pool, where it is there already; None: as the settings say.

    Raises:
        UnsupportedModel, InvalidRequest: the teacher, the student, the settings or the start do not allow it.
        RedifError: the teacher gives NaN, or two outputs for one input.
    """
    if teacher.inpainting:
        raise UnsupportedModel(
            f"{teacher.name} is an inpainting model, which is not distilled: a teacher takes noise and a condition "
            "alone; redif import makes a student of it as it is"
        )
    if teacher.own is not None and (remark := teacher.own.remark()):
        _log.warning("%s", remark)
    if teacher.guidance_range is not None:
        check_range(*teacher.guidance_range, config.method)
    device = chosen_device(config.device)
    count = pool_size(teacher, config) if pairs is None else pairs
    if config.batch_size > count:
        raise InvalidRequest(f"batch_size {config.batch_size} is more than the pool's {count} pairs")
    table = teacher.table(config.num_inference_steps)
    if teacher.schedule.edm is not None and config.method in _BY_TIMES:
        raise UnsupportedModel(
            f"{teacher.name} is fed EDM's noise levels, not times of a schedule; use redif, regression, draft or grpo"
        )
    if teacher.schedule.edm is not None and config.get("schedule_updates") and config.num_inference_steps > 1:
        raise UnsupportedModel("learnt times need a discrete noise schedule; set schedule_updates to 0")
    if config.get("segments"):
        times = on_grid([float(t) for t in table.timesteps], teacher.grid())
        table_at(teacher.schedule, times, teacher.prediction_type)
    check_memory(config, teacher)
    network = check_teacher(teacher, device)
    check_deterministic(teacher, device)
    check_student(network, teacher, device)
    del network  # it is made again, twice
    Trainer(teacher, _rehearsal(config), _no_pairs(teacher, count), start=start)


def _rehearsal(config: DistillConfig) -> DistillConfig:
    """``config`` without the rewards that are fitted to the pool."""
    spec = config.get("reward")
    if spec is None:
        return config
    weights = dict(weighted(spec))
    kept = {reward: weight for reward, weight in weights.items() if reward not in FITTED}
    return config.replaced(reward=kept or _brightness)


def _brightness(batch: Batch) -> Tensor:
    """In the place of a reward that needs the pool."""
    return batch.images.mean((1, 2, 3))


def _no_pairs(teacher: Teacher, count: int) -> Pairs:
    """As many pairs as a pool has, all of one grey: they take the memory of one."""
    grey = 0.0 if teacher.decode is not None else sum(teacher.postprocess.value_range) / 2
    nothing = torch.full((1, *teacher.shape), grey).expand(count, *teacher.shape)
    condition = None if teacher.num_conditions == 0 else torch.arange(count) % teacher.num_conditions
    return Pairs(nothing, nothing, condition)


def pool_size(teacher: Teacher, config: DistillConfig) -> int:
    """The pool that the budget of teacher calls allows."""
    if config.teacher_calls is None:
        return config.pool_size
    calls = teacher.num_inference_steps * teacher.calls_per_step
    allowed = min(config.pool_size, config.teacher_calls // calls)
    if allowed < config.batch_size:
        raise InvalidRequest(
            f"{config.teacher_calls} teacher calls make {allowed} pairs at {calls} calls each, "
            f"fewer than one batch of {config.batch_size}; allow more calls or lower batch_size"
        )
    return allowed
