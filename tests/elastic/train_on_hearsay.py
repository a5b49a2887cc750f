"""A job whose ranks ask each other for things before protect(), and train on what they hear.

What a rank says is new every time it starts, as a seed is that a script draws. Its first words are the same in every job.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import holdfast


def start_number(out: Path, rank: int) -> int:
    """How many processes have started as this rank before."""
    with (out / f"starts-{rank}").open("a") as file:
        file.write("x")
        return file.tell() - 1


def ask_around(said: int, rank: int, world: int) -> list[Any]:
    """Everything by which ranks tell each other things; returns what this one has heard."""
    seed, everybody, mine = torch.tensor([said]), [None] * world, [None]
    dist.broadcast(seed, src=0)
    dist.all_gather_object(everybody, {"rank": rank, "said": "x" * said})
    told = [f"{'run' * said}-{said}", said] if rank == 0 else [None, None]
    dist.broadcast_object_list(told, src=0)
    dist.scatter_object_list(mine, [f"{said} for {other}" for other in range(world)] if rank == 0 else None, src=0)
    total = torch.tensor([float(said)])
    work = dist.all_reduce(total, group=dist.new_group(list(range(world))), async_op=True)
    work.wait()
    parts = [torch.zeros(2, dtype=torch.int64) for _ in range(world)] if rank == 1 else None
    dist.gather(torch.tensor([said, rank]), parts, dst=1)
    dist.barrier()
    return [seed.item(), everybody, told, mine, total.item(), [part.tolist() for part in parts or []]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--die", default="[]", help="JSON: [[step, rank], …]; a process dies once something is committed")
    parser.add_argument("--stray", action="store_true", help="ask for more from the second start on")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    start = start_number(args.out, rank)
    heard = ask_around(10 * start + rank + 1, rank, world)
    if args.stray and start:
        dist.all_reduce(torch.ones(1))
    deaths = json.loads(args.die)
    seed = heard[0] + int(heard[4])
    torch.manual_seed(rank)  # other weights on every rank: DDP takes those of rank 0
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    redundancy = holdfast.Redundancy(parity=1, nodes_per_host=2)
    with holdfast.protect({"model": model, "optim": optimizer}, name="h", redundancy=redundancy) as run:
        for step in run.steps(until=30):
            with step:
                batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * seed + 10 * step + rank))
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.05 if run.committed_step >= 2 or not deaths else 0.5)  # keepers have time where it matters
                for number, (at, victim) in enumerate(deaths):
                    mark = args.out / f"died-{number}"
                    if victim == rank and step >= at and run.committed_step >= 2 and not mark.exists():
                        mark.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
    state = {**model.module.state_dict(), **{f"moment-{i}": s["exp_avg"] for i, s in optimizer.state_dict()["state"].items()}}
    torch.save(state, args.out / f"state-{rank}.pt")
    (args.out / f"facts-{rank}.json").write_text(json.dumps({"heard": heard, "starts": start}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
