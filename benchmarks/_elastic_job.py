"""The training job that benchmarks/elastic.py breaks: linear layers with about 64 MB of state on every rank.

FSDP2's model has 250 MB, and gathering all of it over gloo would take longer than any recovery: its layers are experts, and a step
uses two of twenty.

Every rank writes what it did and when to a file of its own; rank 1 of the first attempt kills itself, or its whole node.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from holdfast.elastic.restore import Recovery
    from holdfast.elastic.session import Run

WIDTH, LAYERS = 1024, 5  # 5.2 M parameters, 63 MB with AdamW's two moments
KILL_AT, AFTERWARDS = 8, 4


class Model(nn.Module):
    """Linear layers: all of them in every step, or as experts, two of which a step uses once the first has used all."""

    def __init__(self, layers: int, *, experts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers)), experts

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        count = len(self.layers)
        for number in (step % count, (step + 1) % count) if self.experts and step > 1 else range(count):
            x = self.layers[number](x)
        return x


def build(layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(Model(LAYERS, experts=False))
    model = Model(LAYERS * dist.get_world_size(), experts=True)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", choices=("ddp", "fsdp"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fault", choices=("worker", "node"), required=True)
    parser.add_argument("--bare", action="store_true", help="torch alone: a restart begins at step 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    log = (args.out / f"rank-{rank}").open("a", buffering=1)

    def note(what: str, **more: object) -> None:
        log.write(json.dumps({"what": what, "at": time.time(), "pid": os.getpid(), **more}) + "\n")

    note("begun")
    dist.init_process_group("gloo")
    dist.barrier()
    note("group")
    model = build(args.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    note("built")

    def body(step: int) -> None:
        batch = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step * 64 + rank))
        model(batch, step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if args.bare:
        for step in range(1, KILL_AT + 1 + AFTERWARDS):
            body(step)
            note("step", step=step)
            if rank == 1 and step == KILL_AT and _first(args.out):
                note("kill")
                os.kill(os.getpid(), signal.SIGKILL)
        return

    import holdfast  # here, so that torch alone is measured alone
    from holdfast.environment import Berth

    berth = Berth.read()
    if berth is not None and berth.role != "trainer":
        (args.out / f"spare-{rank}").touch()
    redundancy = holdfast.Redundancy(parity=1, nodes_per_host=4)
    with holdfast.protect({"model": model, "optim": optimizer}, redundancy=redundancy, name="bench") as run:
        seen = run.recovery
        if seen is not None:
            note("restored", recovery=_told(seen))
        for step in run.steps(until=10_000):
            with nullcontext() if berth is None else step:
                body(step)
                ripe = step >= KILL_AT and run.committed_step >= 3
                if rank == 1 and ripe and (berth is None or _spares_wait(args.out)) and _first(args.out):
                    note("kill")
                    _end(args.fault, run)
            if run.recovery is not seen:
                seen = run.recovery
                note("restored", recovery=_told(seen))
            if not step.is_undone:
                note("step", step=int(step))
            if seen is not None and not step.is_undone and step >= seen.step + AFTERWARDS:
                sys.exit()


def _told(recovery: Recovery) -> dict[str, object]:
    return {"rung": recovery.rung, "step": recovery.step, "seconds": recovery.seconds, "phases": dict(recovery.phases or {})}


def _first(out: Path) -> bool:
    if (out / "fault").exists():
        return False
    (out / "fault").touch()
    return True


def _spares_wait(out: Path) -> bool:
    """The spares of all ranks have run this script up to `protect`: nothing but training competes for the cores."""
    return len(list(out.glob("spare-*"))) == dist.get_world_size()


def _end(fault: str, run: Run) -> None:
    """A trainer dies, or its node: keeper, memory and trainer."""
    if fault == "node":
        from holdfast.snapshot.client import Endpoint

        memory = run._running().link.memory
        os.kill(Endpoint.read(memory).pid, signal.SIGKILL)
        shutil.rmtree(memory)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
