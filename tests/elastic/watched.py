"""Three ranks that train well, then with a slow one, a loss that jumps, one that is stopped, one that is stuck and one with a
flipped bit: `watched.py OUT`.

Each stage lasts until its trouble has been said, the first one for 60 steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import holdfast
from holdfast.elastic.session import Run

STAGES = ("well", "slow", "jump", "stop", "sleep", "flip")
out = Path(sys.argv[1])


def stuck_in_my_own_code() -> None:
    while not told("sleep"):
        time.sleep(0.02)


def told(stage: str) -> bool:
    return (out / f"told-{stage}").exists()


def work(seconds: float) -> None:
    """Processor time of this thread; what other processes take is not counted."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def trouble(stage: str, rank: int, is_first: bool) -> None:
    work(0.012 if stage == "slow" and rank == 1 else 0.003)
    if is_first and stage == "stop" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if is_first and stage == "sleep" and rank == 2:
        stuck_in_my_own_code()


def train(run: Run, model: Any, optimizer: Any, rank: int) -> None:
    now, since = 0, 0
    for step in run.steps(until=5000):
        trouble(STAGES[now], rank, step == since)
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.note_loss(1e4 if STAGES[now] == "jump" and step == since and rank == 2 else 1.0)
        if STAGES[now] == "flip" and step == since and rank == 1:
            with torch.no_grad():
                model.module.weight.view(torch.int32)[2, 3] ^= 1 << 9
        # All go on together, by a collective of the job's own, which holdfast has no part in.
        enough = torch.tensor(float(step > 60 if STAGES[now] == "well" else told(STAGES[now])))
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if enough > 0:
            now, since = now + 1, step + 1
        if now == len(STAGES):
            return


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    others = dist.new_group([0, 2])
    if rank != 1:
        dist.barrier(others)  # nobody waits in this group from here on
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    said: list[Any] = []

    def hear(event: holdfast.Event) -> None:
        if event.name == "detector.verdict":
            said.append(dict(event.fields))
            hang = "stop" if event.fields["guilty"] == (1,) else "sleep"
            stage = {"straggler": "slow", "loss": "jump", "hang": hang, "silent corruption": "flip"}[event.fields["trouble"]]
            (out / f"told-{stage}").touch()
            if stage == "stop":
                os.kill(int((out / "pid-1").read_text()), signal.SIGCONT)

    holdfast.subscribe(hear)
    dist.barrier()
    torch.manual_seed(rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with holdfast.protect({"model": model, "optim": optimizer}, name="w", diagnose=1.0) as run:
        train(run, model, optimizer, rank)
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
