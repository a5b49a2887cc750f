"""What the test of the rendezvous starts under torchrun: all ranks add up ones, again and again, and note when they do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

out, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
with (out / f"attempt-{os.getpid()}").open("w", buffering=1) as notes:
    for step in range(steps):
        total = torch.ones(1)
        dist.all_reduce(total)
        notes.write(f"{rank} {world} {step} {time.time()}\n")
        assert int(total) == world
        time.sleep(0.05)
dist.destroy_process_group()
