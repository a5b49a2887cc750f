"""A pipeline that loses a stage with everything that held it, and goes on without a checkpoint (CheckFree+).

    torchrun --nproc-per-node 4 --max-restarts 1 examples/train_stages.py [--lose 1] [--at 120]

Every rank is one stage: a residual block, on a node of its own and without parity. Activations and gradients travel by send and
receive, and every second micro-batch runs with the first and the last two stages swapped. After step --at the stage --lose dies
with its keeper and its memory. All ranks start again, and the lost stage is put together from its neighbours.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal

import torch
import torch.distributed as dist
from torch import nn

import holdfast
from holdfast.elastic.session import Run
from holdfast.elastic.stages import stage_order
from holdfast.environment import Environment
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.cluster import node_memory

WIDTH, MICRO_BATCHES, MICRO_BATCH = 24, 4, 32


class Block(nn.Module):
    """One stage: x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, equal on every rank: a smooth function of the inputs."""
    inputs = torch.randn(MICRO_BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 * step + micro))
    return inputs, torch.sin(2 * inputs) + 0.5 * inputs.roll(1, dims=1)


def run_micro_batch(stage: nn.Module, mine: int, stages: int, step: int, micro: int) -> float:
    """Forward and backward of one micro-batch through all stages; the loss on the rank that ends it, else zero."""
    order = stage_order(stages, micro)
    place = order.index(mine)
    inputs, targets = batch(step, micro)
    if place:
        dist.recv(inputs, src=order[place - 1])
        inputs.requires_grad_()
    output = stage(inputs)
    if place + 1 == stages:
        loss = (output - targets).square().mean() / MICRO_BATCHES
        loss.backward()
    else:
        dist.send(output.detach(), dst=order[place + 1])
        gradient = torch.empty_like(output)
        dist.recv(gradient, src=order[place + 1])
        output.backward(gradient)
    if place:
        dist.send(inputs.grad, dst=order[place - 1])
    return float(loss.detach()) if place + 1 == stages else 0.0


def together(value: float) -> float:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return float(total)


def lose_node(run: Run, node: int) -> None:
    """The machine is gone: the keeper, what it held, and this process."""
    memory = node_memory(Environment.read().memory, run.name, node)
    os.kill(Endpoint.read(memory).pid, signal.SIGKILL)
    shutil.rmtree(memory)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lose", type=int, default=1, help="the stage that is lost")
    parser.add_argument("--at", type=int, default=120, help="the step after which it is lost")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine, stages = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if mine == 0 else logging.WARNING, format="%(name)s: %(message)s")
    torch.manual_seed(mine)
    stage = Block()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3)
    with holdfast.protect(
        {"model": nn.ModuleDict({str(mine): stage}), "optim": optimizer},  # every stage has names of its own
        redundancy=holdfast.Redundancy(parity=0, nodes_per_host=stages),
        stage=holdfast.Stage(mine, stages),
    ) as run:
        losses = []
        for step in run.steps(until=args.steps):
            losses.append(together(sum(run_micro_batch(stage, mine, stages, step, micro) for micro in range(MICRO_BATCHES))))
            optimizer.step()
            optimizer.zero_grad()
            run.note_loss(losses[-1])
            if step >= args.at and mine == args.lose and run.recovery is None and run.committed_step:
                lose_node(run, mine)
    if mine == 0 and run.recovery is not None:
        told = {"from": run.recovery.rung, "step": run.recovery.step, "first_loss": losses[0], "last_loss": losses[-1]}
        print(json.dumps({**told, "notes": run.recovery.notes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
