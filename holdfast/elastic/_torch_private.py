"""The private names of torch that this package uses, in one place. Seen working with torch 2.13; a test fails where one is gone."""

from __future__ import annotations

import gc
import sys
from types import FunctionType

import torch.distributed as dist


def collectives_entered(group: dist.ProcessGroup) -> int:
    """How many collectives this rank has entered in `group`, those of DDP's and FSDP's C++ parts included; gloo and NCCL count."""
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]  # torch's stubs lack it


def groups_of_this_rank() -> list[tuple[str, dist.ProcessGroup, tuple[int, ...]]]:
    """The process groups of two or more ranks that this one is in, each with a name and its global ranks, in order."""
    if not dist.is_initialized():
        return []
    world, me = dist.distributed_c10d._world, dist.get_rank()
    found = list(world.pg_group_ranks.items())
    return [
        (f"{group.group_desc} ({world.pg_names.get(group, '')[:8]})", group, tuple(sorted(ranks)))
        for group, ranks in found
        if isinstance(group, dist.ProcessGroup) and len(ranks) > 1 and me in ranks
    ]


def let_go_of_groups() -> None:
    """Have torch's functions look for the default group when they are called, as where they were imported before it was made.

    `torch.distributed.nn.functional` names it as a default argument, so imported later it holds it for ever: then
    `destroy_process_group` leaves gloo's threads running, and one that is still busy when Python ends aborts a finished process.
    """
    module = sys.modules.get("torch.distributed.nn.functional")
    for function in vars(module).values() if module is not None else ():
        if isinstance(function, FunctionType) and function.__defaults__:
            function.__defaults__ = tuple(
                None if isinstance(value, dist.ProcessGroup) else value for value in function.__defaults__
            )


PIPELINE_FLAGS = (
    "_stage_forward_initialized",
    "_stage_backward_initialized",
    "_stages_forward_initialized",
    "_stages_backward_initialized",
)


def begin_pipelines_anew() -> None:
    """Have every pipeline schedule agree on shapes with its neighbours again, as it did in its first step.

    A spare's schedule has never run. It would send and await shapes where the others send activations, and gloo ends a process
    that receives a message of another length.
    """
    module = sys.modules.get("torch.distributed.pipelining.schedules")
    if module is None:
        return
    for schedule in [found for found in gc.get_objects() if issubclass(type(found), module._PipelineSchedule)]:
        for flag in PIPELINE_FLAGS:
            if hasattr(schedule, flag):
                setattr(schedule, flag, False)
        schedule._internal_losses.clear()
