"""A small DDP job over a data set, for the tests: its steps are the same for any number of ranks, but for rounding."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import holdfast


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(50, 6, generator=generator), torch.randn(50, 1, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--die", type=int, default=0, help="rank 1 kills itself at this step, once something newer than 3 is safe"
    )
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = holdfast.loader(samples(), global_batch=8, micro_batch=2, seed=11, num_workers=args.workers)
    state = {"model": model, "optim": optimizer, "data": loader}
    with holdfast.protect(state, checkpoints=str(args.out / "run"), name="d") as run:
        for _ in run.steps(until=args.steps):
            for batch in loader.step():
                inputs, targets = batch.data
                with nullcontext() if batch.is_last else model.no_sync():
                    loss = (model(inputs) - targets).square().mean()
                    (loss * batch.scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.05)
    torch.save(model.module.state_dict(), args.out / f"state-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
