"""A pipeline that loses a stage with everything that held it, and goes on without a checkpoint (CheckFree+).

    torchrun --nproc-per-node 4 examples/train_stages.py [--lose 1] [--at 120] [--how substitute|random]

Every rank is one stage: a residual block. Activations and gradients travel by send and receive, and every second micro-batch runs
with the first and the last two stages swapped. At step --at the stage --lose forgets its weights and its optimizer state, as a
replaced node would have none. It is put together from its neighbours; with --how random it begins as at the start, to compare.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist
from torch import nn

from holdfast.elastic.stages import LossGuard, begin_anew, exchange, grad_norm, plan_substitution, stage_order

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


def run_micro_batch(stage: Block, mine: int, stages: int, step: int, micro: int) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lose", type=int, default=1, help="the stage that is lost")
    parser.add_argument("--at", type=int, default=120, help="the step before which it is lost")
    parser.add_argument("--how", choices=("substitute", "random"), default="substitute")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine, stages = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(mine)
    stage = Block()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3)
    losses: list[float] = []
    norm, guard = 0.0, None
    for step in range(args.steps):
        if step == args.at:
            lose(args, stage, optimizer, mine, stages, norm)
            guard = LossGuard(losses[-10:], tolerance=0.2, patience=args.steps - step)
        losses.append(together(sum(run_micro_batch(stage, mine, stages, step, micro) for micro in range(MICRO_BATCHES))))
        norm = grad_norm(stage)
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.look(losses[-1])
    if mine == 0:
        before, after = losses[args.at - 1], losses[args.at]
        told = {"how": args.how, "before": before, "after": after, "end": losses[-1], "guard": guard.finding if guard else None}
        print(json.dumps(told))
    dist.destroy_process_group()


def lose(args: argparse.Namespace, stage: Block, optimizer: torch.optim.Optimizer, mine: int, stages: int, norm: float) -> None:
    """The lost stage is an empty one in the place of a dead rank; the others have their gradient norms of the last step."""
    norms = [torch.zeros(1) for _ in range(stages)]
    dist.all_gather(norms, torch.tensor([norm]))
    if mine == args.lose:
        torch.manual_seed(99)
        stage.load_state_dict(Block().state_dict())
        optimizer.state.clear()
    if args.how == "substitute":
        others = {number: float(value) for number, value in enumerate(norms) if number != args.lose}
        recipe = plan_substitution(args.lose, stages, others)
        if exchange(stage, recipe, mine, list(range(stages))):
            begin_anew(optimizer, stage)
            print(recipe)


if __name__ == "__main__":
    main()
