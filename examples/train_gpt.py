"""Train a byte-level GPT with FSDP2, protected by holdfast.

    torchrun --nproc-per-node 4 --max-restarts 3 examples/train_gpt.py
    torchrun --nproc-per-node 4 --max-restarts 3 -m holdfast.elastic.run examples/train_gpt.py   # replaces single ranks in place
    torchrun --nproc-per-node 4 examples/train_gpt.py --bare            # the same training without holdfast
    torchrun --nproc-per-node 2 examples/train_gpt.py --resume DIR      # from `holdfast restore --format torch --mesh dp=2`

Kill a rank while it trains: torchrun starts the ranks again, and they go on from the newest committed step. With
`-m holdfast.elastic.run`, the other ranks keep their processes, and a spare takes the dead one's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from stdlib_text import Loader, stdlib_text
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import holdfast


def main() -> None:
    args = parse_args()
    device = start_ranks()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)  # every rank builds the same model and keeps its shard of it
    config = GPTConfig(layers=args.layers, width=args.width, heads=args.heads, context=args.context, dropout=args.dropout)
    model = GPT(config).to(device)
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, WarmupCosine(warmup=max(1, args.steps // 10), steps=args.steps))
    loader = Loader(stdlib_text(), seed=args.seed, batch=args.batch, context=args.context, rank=rank, world_size=world_size)
    torch.manual_seed(args.seed + 1 + rank)  # from here on the ranks' dropout differs

    log = Log(args.log_file if rank == 0 else None)
    start = load_restored(args.resume, model, optimizer, scheduler, loader) if args.resume else 0

    def train(steps: Iterable[int], run: Any = None) -> None:
        log.start(run)
        began = time.perf_counter()
        for step in steps:
            with step if run else nullcontext():  # when another rank dies in here, this one goes on from the step restored
                tokens, targets = (part.to(device) for part in loader.next_batch())
                loss = model(tokens, targets)
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                mean_loss = average(loss)
                ended = time.perf_counter()
                log.step(step, mean_loss, ended - began, run)
                began = ended

    if args.bare:
        train(range(start + 1, args.steps + 1))
    else:
        with holdfast.protect(
            {"model": model, "optim": optimizer, "sched": scheduler, "data": loader},
            checkpoints=args.checkpoints,
            redundancy=holdfast.Redundancy(parity=args.parity, nodes_per_host=args.nodes),
            snapshot_every=args.snapshot_every,
            checkpoint_every=args.checkpoint_every,
            name=args.name,
        ) as run:
            train(run.steps(until=args.steps), run)

    if args.out:
        save_local_state(args.out / f"rank-{rank:05d}.pt", args.steps, model, optimizer)
    dist.destroy_process_group()


def start_ranks() -> torch.device:
    """Join the ranks that torchrun started (or be the only one), with NCCL where each has a GPU and gloo elsewhere."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    has_gpu = torch.cuda.device_count() >= local_world
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if has_gpu:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    return torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """The learning rate's factor: a linear warm-up, then half a cosine down to a tenth. A pure function of the step."""

    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 0.55 + 0.45 * math.cos(math.pi * progress)


def average(loss: Tensor) -> float:
    """The mean over all ranks; also the point where the ranks wait for each other, so step times are true."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


# -- the log -----------------------------------------------------------------------------------------------------------


class Log:
    """One JSON line per start and per step, in a file and, shortly, on the terminal. Silent on ranks above 0."""

    def __init__(self, path: Path | None) -> None:
        self._quiet = dist.get_rank() != 0
        self._file = path.open("a", buffering=1) if path else None

    def start(self, run: Any) -> None:
        recovery = dataclasses.asdict(run.recovery) if run is not None and run.recovery is not None else None
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._write({"event": "start", "pid": os.getpid(), "restarts": restarts, "recovery": recovery})
        if recovery and not self._quiet:
            print(f"recovered step {recovery['step']} by {recovery['rung']} in {recovery['seconds']:.2f} s", flush=True)

    def step(self, step: int, loss: float, step_s: float, run: Any) -> None:
        stall_s = run.stats.stall_s if run is not None else 0.0
        self._write({"event": "step", "step": step, "loss": loss, "loss_hex": loss.hex(), "step_s": step_s, "stall_s": stall_s})
        if not self._quiet:
            print(f"step {step:5d}   loss {loss:.4f}   {1000 * step_s:6.0f} ms", flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps({"time_s": time.time(), **line}) + "\n")


# -- state in files ----------------------------------------------------------------------------------------------------


def save_local_state(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """This rank's shards of parameters and optimizer state as plain tensors, under the names `holdfast restore` uses."""
    arrays: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        arrays[f"model/{name}"] = local(parameter)
        for key, value in optimizer.state[parameter].items():
            arrays[f"optim/{name}/{key}"] = local(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "arrays": arrays}, path)


def load_restored(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, loader: Loader
) -> int:
    """Continue from the files that `holdfast restore --format torch` wrote for this number of ranks; returns their step."""
    path = folder / f"rank-{dist.get_rank():05d}.pt"
    restored = torch.load(path, weights_only=True)
    step, arrays = int(restored["step"]), restored["arrays"]
    if len(list(folder.glob("rank-*.pt"))) != dist.get_world_size():
        raise SystemExit(f"{folder} was not restored for {dist.get_world_size()} ranks; run holdfast restore --mesh dp=…")
    for name, parameter in model.named_parameters():
        local(parameter).copy_(arrays[f"model/{name}"])
        optimizer.state[parameter] = {
            "step": arrays[f"optim/{name}/step"],
            **{key: shard_like(parameter, arrays[f"optim/{name}/{key}"]) for key in ("exp_avg", "exp_avg_sq")},
        }
    loader.samples_used = step * loader.batch
    scheduler.last_epoch = step
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = lr
    return step


def shard_like(parameter: Tensor, shard: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    shard = shard.to(parameter.device)
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


# -- the command line --------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shape = parser.add_argument, GPTConfig()
    add("--steps", type=int, default=200, help="train until this step")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="samples per step, over all ranks")
    add("--context", type=int, default=shape.context, help="bytes per sample")
    add("--layers", type=int, default=shape.layers)
    add("--width", type=int, default=shape.width)
    add("--heads", type=int, default=shape.heads)
    add("--dropout", type=float, default=shape.dropout)
    add("--lr", type=float, default=1e-3)
    add("--log-file", type=Path, help="append one JSON line per step and per start to this file")
    add("--out", type=Path, help="save every rank's final parameters and optimizer state in this folder")
    add("--resume", type=Path, metavar="DIR", help="continue from files written by `holdfast restore --format torch`")
    add("--bare", action="store_true", help="train without holdfast")
    add("--checkpoints", default=None, help="folder or URI for universal checkpoints")
    add("--checkpoint-every", type=int, default=100, help="steps between universal checkpoints")
    add("--snapshot-every", type=int, default=1, help="steps between snapshots in memory")
    add("--parity", type=int, default=1, help="nodes that may be lost, memory and all")
    add("--nodes", type=int, default=1, help="treat this machine as so many nodes")
    add("--name", default="train-gpt", help="names the job, so that a restart finds its snapshots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
