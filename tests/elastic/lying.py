"""A job like a user's: `lying.py STEPS`. Its second restore comes back with one bit turned."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

import holdfast
from holdfast.snapshot.recovery import SlotSource
from holdfast.snapshot.state import Held

steps = int(sys.argv[1])
honest = SlotSource.load


def lie(self: SlotSource, item: Held, rank: int) -> int:
    nbytes = honest(self, item, rank)
    if item.name == "model/weight":
        item.local.view(torch.int32)[0] ^= 1
    return nbytes


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "2":
    SlotSource.load = lie
dist.init_process_group("gloo")
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with holdfast.protect(
    {"model": model, "optim": optimizer}, redundancy=holdfast.Redundancy(nodes_per_host=2), name="lying"
) as run:
    for _ in run.steps(until=steps):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.1)
dist.destroy_process_group()
