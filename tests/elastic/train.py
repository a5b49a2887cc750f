"""A small training job for the tests: deterministic, sharded or replicated, with everything that a restore can get wrong.

Dropout draws random numbers, BatchNorm has buffers that forward changes, the scheduler and the cursor are plain objects.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import holdfast
from holdfast.environment import home
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.cluster import node_memory


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
    norm = nn.BatchNorm1d(24) if layout != "fsdp" else nn.LayerNorm(24)
    model = nn.Sequential(nn.Linear(10, 24), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 7), nn.Linear(7, 3))
    if layout == "fsdp":
        for part in (model[0], model[4]):
            fully_shard(part)
        fully_shard(model)
    return DistributedDataParallel(model) if layout == "ddp" else model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}
    for place, param in enumerate(model.parameters()):
        for key, value in optimizer.state[param].items():
            found[f"{place}.{key}"] = whole(value).clone()
    return found


def die(death: dict[str, Any], name: str, memory: Path) -> None:
    """What the schedule of the test asks for: this process, its keeper alone, or whole nodes with keepers and memory."""
    if death["kind"] == "keeper":
        os.kill(Endpoint.read(node_memory(memory, name, death["ranks"][0])).pid, signal.SIGKILL)
        return
    if death["kind"] == "exception":
        raise RuntimeError("the test asked for an exception")
    if death["kind"] == "node":
        places = [node_memory(memory, name, rank) for rank in death["ranks"]]  # one rank for each node
        for place in places:
            os.kill(Endpoint.read(place).pid, signal.SIGKILL)
        for place in places:
            shutil.rmtree(place)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="fsdp", choices=("fsdp", "ddp", "plain"))
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--checkpoints")
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--name", default="t")
    parser.add_argument("--die", default="[]", help='JSON: [{"step": 5, "kind": "node", "ranks": [1], "committed": 3}]')
    parser.add_argument("--pace", type=float, default=0.05, help="seconds of other work in every step")
    parser.add_argument("--follow-keeper", action="store_true", help="die when the node's keeper does, as a node would")
    parser.add_argument("--halt", type=int, help="train no step after this one, and end as if it were the last")
    parser.add_argument("--keep-up", action="store_true", help="wait for the keepers where they have ordered nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    model = build(args.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    cursor = Cursor()
    torch.manual_seed(100 + rank)
    deaths = json.loads(args.die)
    memory = Path(os.environ.get("HOLDFAST_MEMORY", "/dev/shm"))
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
    if args.bare:
        for step in range(1, (args.steps if args.halt is None else args.halt) + 1):
            step_body(step)
    else:
        redundancy = holdfast.Redundancy(parity=args.parity, nodes_per_host=args.nodes)
        objects = {"model": model, "optim": optimizer, "sched": scheduler, "data": cursor}
        with holdfast.protect(
            objects,
            checkpoints=args.checkpoints,
            checkpoint_every=args.checkpoint_every,
            redundancy=redundancy,
            name=args.name,
        ) as run:
            recovery = run.recovery
            marks = args.out / "deaths"
            marks.mkdir(parents=True, exist_ok=True)
            for step in run.steps(until=args.steps):
                if args.halt is not None and step > args.halt:
                    break
                step_body(step)
                for number, death in enumerate(deaths):
                    mark = marks / str(number)
                    ripe = step >= death["step"] and run.committed_step >= death["committed"]
                    if rank == death["ranks"][0] and ripe and not mark.exists():
                        mark.touch()
                        die(death, args.name, memory)
                if args.keep_up:
                    wait_for_keepers(run, step)
                if args.follow_keeper and not _alive(keeper_pid(memory, args.name, run)):
                    os.kill(os.getpid(), signal.SIGKILL)

    found = state_of(model, optimizer)
    facts = {"seen": cursor.seen, "lr": scheduler.get_last_lr(), "losses": losses}
    if recovery is not None:
        facts["recovery"] = {"kind": recovery.kind, "rung": recovery.rung, "step": recovery.step, "notes": list(recovery.notes)}
    torch.save(found, args.out / f"state-{rank}.pt")
    (args.out / f"facts-{rank}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_keepers(run: holdfast.elastic.session.Run, step: int) -> None:
    """Return once this step or a later one is ordered; snapshots that have stopped for good end the run."""
    page = run._running().link.page
    deadline = time.monotonic() + 90
    while page.target[0] < step and run.committed_step < step:
        if time.monotonic() > deadline:
            raise RuntimeError(f"step {step} is done and nothing from there on is ordered; committed is {run.committed_step}")
        time.sleep(0.01)


_pids: dict[str, int] = {}


def keeper_pid(memory: Path, name: str, run: holdfast.elastic.session.Run) -> int:
    """The keeper of this rank's node, as it was when this process started."""
    assert home(memory)
    place = str(run._running().link.memory)
    if place not in _pids:
        _pids[place] = Endpoint.read(Path(place)).pid
    return _pids[place]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
