"""A small residual network under every parallel layout that torch has, protected; what each rank holds is left for the test.

`--mesh pp=2,dp=2` (pp: pipeline, dp: DDP, fsdp: FSDP2, tp: tensor parallel, ep: experts dealt to the ranks of a DDP) cuts it.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from train import Deaths

import holdfast
from holdfast.elastic.faults.job import arguments, whole

LAYERS, WIDTH, INNER, EXPERTS, ROWS = 6, 12, 20, 4, 8


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        torch.manual_seed(layer)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Experts(nn.Module):
    """Every rank holds some experts under their global numbers; rows travel to the expert of their place and back."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.group = mesh.get_group("ep") if mesh else None
        ranks, rank = (mesh["ep"].size(), mesh.get_local_rank("ep")) if mesh else (1, 0)
        self.ranks, mine = ranks, range(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        self.experts = nn.ModuleDict()
        for expert in mine:
            torch.manual_seed(100 + expert)
            self.experts[str(expert)] = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if self.group is None else self._exchanged(x)
        parts = rows.view(self.ranks, len(self.experts), -1, WIDTH).unbind(1)
        rows = torch.stack([expert(part) for expert, part in zip(self.experts.values(), parts, strict=True)], 1).flatten(0, 2)
        return x + (rows if self.group is None else self._exchanged(rows))

    def _exchanged(self, rows: torch.Tensor) -> torch.Tensor:
        return all_to_all_single_autograd(rows.contiguous(), None, None, self.group)


class Net(nn.Module):
    """Those of the layers that belong to a stage, under the names that they have in the whole."""

    def __init__(self, layers: range, ep: DeviceMesh | None, *, with_experts: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): Block(layer) for layer in layers})
        self.moe = Experts(ep) if with_experts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers.values():
            x = block(x)
        return x if self.moe is None else self.moe(x)


def build(mesh: DeviceMesh) -> tuple[nn.Module, range]:
    axes = mesh.mesh_dim_names or ()
    stages, stage = (mesh["pp"].size(), mesh.get_local_rank("pp")) if "pp" in axes else (1, 0)
    layers = range(stage * LAYERS // stages, (stage + 1) * LAYERS // stages)
    net = Net(layers, mesh if "ep" in axes else None, with_experts="ep" in axes)
    if "tp" in axes:
        for block in net.layers.values():
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if "fsdp" in axes:
        shards = mesh["hsdp", "fsdp"] if "hsdp" in axes else mesh["fsdp"]
        for block in net.layers.values():
            fully_shard(block, mesh=shards)
        fully_shard(net, mesh=shards)
    if "ep" in axes:
        own = [name for name, _ in net.named_parameters() if name.startswith("moe.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, own)
        return DistributedDataParallel(net, process_group=mesh.get_group("ep")), layers
    return (DistributedDataParallel(net, process_group=mesh.get_group("dp")) if "dp" in axes else net), layers


def main() -> None:
    parser = arguments()
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--die", default="[]")
    parser.add_argument("--stage", action="store_true", help="a lost stage may be substituted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    axes = {name: int(extent) for name, extent in (part.split("=") for part in args.mesh.split(","))}
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model, layers = build(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    die_if_due = Deaths(args.die, args.out, args.name)
    share = next((mesh.get_local_rank(axis) for axis in ("dp", "fsdp", "ep") if axis in axes), 0)
    schedule = None
    if "pp" in axes:
        where = mesh.get_local_rank("pp")
        stage = PipelineStage(model, where, axes["pp"], torch.device("cpu"), group=mesh.get_group("pp"))
        # With DDP inside, torch 2.13 fails at the second micro-batch, where the reducer is asked to rebuild its buckets.
        schedule = ScheduleGPipe(stage, n_microbatches=1 if "dp" in axes else 2, loss_fn=loss_of)

    def step_body(step: int) -> None:
        batch = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 * step + share))
        if schedule is None:
            loss_of(model(batch), batch).backward()
        elif layers.start == 0:
            schedule.step(batch)
        elif layers.stop == LAYERS:
            schedule.step(target=batch)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    last, recovery = args.steps if args.halt is None else args.halt, None
    if args.bare:
        for step in range(1, last + 1):
            step_body(step)
    else:
        with holdfast.protect(
            {"model": model, "optim": optimizer, "sched": scheduler},
            checkpoints=args.checkpoints,
            checkpoint_every=args.checkpoint_every,
            redundancy=holdfast.Redundancy(parity=args.parity, nodes_per_host=args.nodes),
            name=args.name,
            stage=holdfast.Stage(mesh.get_local_rank("pp"), axes["pp"]) if args.stage else None,
        ) as run:
            for step in run.steps(until=last):
                with step if args.in_place else nullcontext():
                    step_body(step)
                    die_if_due(step, run, model)
                time.sleep(args.pace)
            recovery = run.recovery
    facts = {"seen": 0, "lr": [group["lr"] for group in optimizer.param_groups], "losses": {"0": 0}}
    if recovery is not None:
        facts["recovery"] = {"kind": recovery.kind, "rung": recovery.rung, "step": recovery.step, "notes": list(recovery.notes)}
    torch.save(state_of(model, optimizer), args.out / f"state-{rank}.pt")
    (args.out / f"facts-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What this rank answers for, whole and under the names that it has in every layout."""
    found: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param.detach()).clone()
        found |= {f"{name}/{key}": whole(value).clone() for key, value in optimizer.state[param].items()}
    return found


def loss_of(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return (output - batch.sin()).square().mean()


if __name__ == "__main__":
    main()
