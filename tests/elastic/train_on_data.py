"""A small job over a data set, for the tests: its steps are the same for any number of ranks, but for rounding."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import holdfast
from holdfast.elastic.faults.job import state_of


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(50, 6, generator=generator), torch.randn(50, 1, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--layout", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--in-place", action="store_true", help="`with step:` around the body")
    parser.add_argument("--bare", action="store_true", help="train without protection")
    parser.add_argument("--pace", type=float, default=0.05, help="seconds of other work in every step")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    model = build(args.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = holdfast.loader(samples(), global_batch=8, micro_batch=2, seed=11, num_workers=args.workers)

    def step_body() -> None:
        for batch in loader.step():
            inputs, targets = batch.data
            with nullcontext() if batch.is_last or args.layout == "fsdp" else model.no_sync():
                loss = (model(inputs) - targets).square().mean()
                (loss * batch.scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(args.pace)

    if args.bare:
        for _ in range(args.steps):
            step_body()
    else:
        with holdfast.protect(
            {"model": model, "optim": optimizer, "data": loader},
            checkpoints=str(args.out / "run"),
            checkpoint_every=args.checkpoint_every,
            redundancy=holdfast.Redundancy(nodes_per_host=args.nodes),
            name="d",
        ) as run:
            for step in run.steps(until=args.steps):
                with step if args.in_place else nullcontext():
                    step_body()
    own = model.module if args.layout == "ddp" else model
    torch.save(state_of(own, optimizer), args.out / f"state-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def build(layout: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    return DistributedDataParallel(model) if layout == "ddp" else fully_shard(model)


if __name__ == "__main__":
    main()
