"""Every private name of torch that recovery stands on is still there. A failure here means: read _torch_private.py first."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from holdfast.elastic._torch_private import PIPELINE_FLAGS, begin_pipelines_anew


@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B])
def test_a_schedule_agrees_on_shapes_again_after_it_was_begun_anew(kind) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stage = PipelineStage(nn.Linear(3, 3), 0, 1, torch.device("cpu"))
        single = issubclass(kind, PipelineScheduleSingle)
        assert single or issubclass(kind, PipelineScheduleMulti)
        schedule = kind(stage if single else [stage], n_microbatches=1, loss_fn=nn.functional.mse_loss)
        batch = torch.ones(2, 3)
        schedule.step(batch, target=batch)
        flags = [flag for flag in PIPELINE_FLAGS if getattr(schedule, flag, False)]
        assert len(flags) == 2
        begin_pipelines_anew()
        assert not any(getattr(schedule, flag) for flag in flags)
        schedule.step(batch, target=batch)
        assert all(getattr(schedule, flag) for flag in flags)
    finally:
        dist.destroy_process_group()
