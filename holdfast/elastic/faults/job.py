"""The small job that rehearsals break: deterministic, sharded or replicated, with everything that a restore can get wrong.

Dropout draws random numbers, BatchNorm has buffers that forward changes, the scheduler and the cursor are plain objects.
Started by torchrun, or alone as one process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import holdfast
from holdfast.elastic.session import Run

Also = Callable[[int, Run, nn.Module], None]
"""Something more to do with a step: its number, the run and the model."""


def nothing(step: int, run: Run, model: nn.Module) -> None: ...


class Cursor:
    """Where the job is in its data; a plain object with a state."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def build(layout: str) -> nn.Module:
    torch.manual_seed(7)
    norm: nn.Module = nn.BatchNorm1d(24) if layout != "fsdp" else nn.LayerNorm(24)
    model = nn.Sequential(nn.Linear(10, 24), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 7), nn.Linear(7, 3))
    if layout == "fsdp":
        for part in (model[0], model[4]):
            fully_shard(part)
        fully_shard(model)
    return DistributedDataParallel(model) if layout == "ddp" else model


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", default="fsdp", choices=("fsdp", "ddp", "plain"))
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--halt", type=int, help="train no step after this one, and end as if it were the last")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bare", action="store_true", help="train without protection")
    parser.add_argument("--checkpoints")
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--snapshot-every", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--name", default="t")
    parser.add_argument("--in-place", action="store_true", help="`with step:` around the body")
    parser.add_argument("--pace", type=float, default=0.05, help="seconds of other work in every step")
    return parser


def train(args: argparse.Namespace, in_step: Also = nothing, after_step: Also = nothing) -> None:
    """Train to the end, and leave final state and facts of every rank in `args.out`."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    model = build(args.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    cursor = Cursor()
    torch.manual_seed(100 + rank)
    losses: dict[int, str] = {}

    def step_body(step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        batch = torch.randn(8, 10, generator=generator)
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        cursor.seen += len(batch)
        losses[step] = loss.item().hex()
        time.sleep(args.pace)

    recovery = None
    last = args.steps if args.halt is None else args.halt
    if args.bare:
        for step in range(1, last + 1):
            step_body(step)
    else:
        with holdfast.protect(
            {"model": model, "optim": optimizer, "sched": scheduler, "data": cursor},
            checkpoints=args.checkpoints,
            checkpoint_every=args.checkpoint_every,
            snapshot_every=args.snapshot_every,
            redundancy=holdfast.Redundancy(parity=args.parity, nodes_per_host=args.nodes),
            name=args.name,
        ) as run:
            for step in run.steps(until=last):
                with step if args.in_place else nullcontext():
                    step_body(step)
                    in_step(step, run, model)
                after_step(step, run, model)
            recovery = run.recovery
    facts: dict[str, Any] = {"seen": cursor.seen, "lr": scheduler.get_last_lr(), "losses": losses}
    if recovery is not None:
        facts["recovery"] = {"kind": recovery.kind, "rung": recovery.rung, "step": recovery.step, "notes": list(recovery.notes)}
    torch.save(state_of(model, optimizer), args.out / f"state-{rank}.pt")
    (args.out / f"facts-{rank}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.destroy_process_group()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, whole."""
    found = {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}
    for place, param in enumerate(model.parameters()):
        for key, value in optimizer.state[param].items():
            found[f"{place}.{key}"] = whole(value).clone()
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    train(arguments().parse_args())
