"""Every layout into every other, with real process groups: `python -m holdfast.ckpt.matrix [--json] [--ranks 4]`.

A small model with Adam's state is saved under DDP, FSDP2, TP, FSDP2×TP and PP×FSDP2 through torch.distributed.checkpoint, and
each checkpoint is loaded under each of these layouts by 1, 2, 3 and 4 processes. A cell is equal when every parameter and every
piece of optimizer state, put together again, has the bytes that were saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from holdfast.ckpt.dcp import UniversalReader, UniversalWriter

logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it would like another mesh, which is not the question

LAYERS = 4
HIDDEN, INNER, VOCABULARY = 20, 44, 53
"""Extents that divide by 2 and 4 and not by 3, and a prime one, so that uneven cuts occur."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A name and the sizes of its axes for some number of ranks."""

    name: str
    pp: int = 1
    fsdp: int = 1
    tp: int = 1
    ddp: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.fsdp * self.tp * self.ddp


def layouts(ranks: int) -> list[Layout]:
    """The layouts that make sense for a number of ranks."""
    found = [Layout(f"DDP{ranks}", ddp=ranks), Layout(f"FSDP{ranks}", fsdp=ranks), Layout(f"TP{ranks}", tp=ranks)]
    if ranks % 2 == 0:
        half = ranks // 2
        found += [Layout(f"FSDP{half}×TP2", fsdp=half, tp=2), Layout(f"PP2×FSDP{half}", pp=2, fsdp=half)]
    return found


# -- the state ---------------------------------------------------------------------------------------------------------


def parameters() -> Iterator[tuple[str, tuple[int, ...], int | None, int]]:
    """(name, shape, the dimension tensor parallelism cuts, layer) of every parameter; layer -1 is the embedding."""
    yield "tok_embeddings.weight", (VOCABULARY, HIDDEN), 0, -1
    for layer in range(LAYERS):
        for name, shape, dim in (
            ("wq.weight", (HIDDEN, HIDDEN), 0),
            ("wo.weight", (HIDDEN, HIDDEN), 1),
            ("w1.weight", (INNER, HIDDEN), 0),
            ("w2.weight", (HIDDEN, INNER), 1),
            ("norm.weight", (HIDDEN,), None),
        ):
            yield f"layers.{layer}.{name}", shape, dim, layer
    yield "output.weight", (VOCABULARY, HIDDEN), 0, LAYERS - 1


def value(seed: int, key: str, shape: Sequence[int]) -> torch.Tensor:
    """The same numbers for the same name on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(map(ord, key)) * 31 + len(key))
    return torch.randn(tuple(shape), generator=generator)


def state(layout: Layout, seed: int) -> dict[str, Any]:
    """A state dict as `get_state_dict` gives it, laid out over the ranks."""
    rank = dist.get_rank()
    grid = torch.arange(layout.ranks).reshape(layout.pp, layout.ddp * layout.fsdp, layout.tp)
    stage = rank // (layout.ranks // layout.pp)
    mesh = DeviceMesh("cpu", grid, mesh_dim_names=("pp", "fsdp", "tp"))["fsdp", "tp"]
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for name, shape, dim, layer in parameters():
        if max(layer, 0) * layout.pp // LAYERS != stage:
            continue
        place = partial(_placed, mesh=mesh, layout=layout, dim=dim)
        model[name] = place(value(seed, name, shape))
        optimizer[name] = {
            "step": torch.tensor(float(seed)),
            "exp_avg": place(value(seed, name + "/exp_avg", shape)),
            "exp_avg_sq": place(value(seed, name + "/exp_avg_sq", shape).square()),
        }
    groups = [{"lr": 0.1 * seed, "betas": (0.9, 0.95), "params": [name for name, *_ in parameters()]}]
    return {"model": model, "optim": {"state": optimizer, "param_groups": groups}}


def _placed(full: torch.Tensor, mesh: DeviceMesh, layout: Layout, dim: int | None) -> torch.Tensor:
    if layout.ddp > 1:
        return full
    rows: Placement = Shard(0) if layout.fsdp > 1 else Replicate()
    columns: Placement = Shard(dim) if dim is not None and layout.tp > 1 else Replicate()
    return distribute_tensor(full, mesh, (rows, columns), src_data_rank=None)


def is_equal(found: dict[str, Any], seed: int) -> bool:
    """Whether every tensor, put together from all ranks, has the saved bytes, and the groups the saved values."""
    same = [found["optim"]["param_groups"][0]["lr"] == 0.1 * seed]
    for name, shape, *_ in parameters():
        if name not in found["model"]:
            continue
        kept = found["optim"]["state"][name]
        same += [
            _same(found["model"][name], value(seed, name, shape)),
            _same(kept["exp_avg"], value(seed, name + "/exp_avg", shape)),
            _same(kept["exp_avg_sq"], value(seed, name + "/exp_avg_sq", shape).square()),
            _same(kept["step"], torch.tensor(float(seed))),
        ]
    everybody = torch.tensor([all(same)], dtype=torch.int32)
    dist.all_reduce(everybody, dist.ReduceOp.MIN)
    return bool(everybody.item())


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    return torch.equal(whole, expected)


# -- the processes -----------------------------------------------------------------------------------------------------


def _world(ranks: int, work: Callable[[], Any], directory: Path) -> Any:
    """Run `work` on `ranks` processes with a process group of their own; returns what rank 0 returned."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    rendezvous = tempfile.mktemp(dir=directory)

    def child(rank: int) -> None:
        code = 1
        try:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
            outcome = work()
            dist.barrier()
            if rank == 0:
                results.put(outcome)
            code = 0
        except Exception:
            traceback.print_exc()
        os._exit(code)  # a fork has nothing of its parent's to tidy up, and gloo's threads may not want to end

    children = [context.Process(target=child, args=(rank,)) for rank in range(ranks)]
    for process in children:
        process.start()
    wait_for: dict[Any, Any] = {process.sentinel: process for process in children}
    while wait_for:
        for sentinel in connection.wait(list(wait_for)):
            process = wait_for.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in children:
                    other.kill()
                raise SystemExit(f"a process in a world of {ranks} failed; what it said stands above")
    return results.get()


def _save(directory: Path, saved: Sequence[Layout]) -> None:
    for seed, layout in enumerate(saved, 1):
        save(state(layout, seed), storage_writer=UniversalWriter(directory / layout.name, step=seed))


def _load(directory: Path, saved: Sequence[Layout], loaded: Sequence[Layout]) -> list[dict[str, Any]]:
    cells = []
    for seed, source in enumerate(saved, 1):
        for target in loaded:
            found = state(target, seed=99)
            load(found, storage_reader=UniversalReader(directory / source.name))
            cells.append({"saved": source.name, "loaded": target.name, "ranks": target.ranks, "equal": is_equal(found, seed)})
    return cells


def run(ranks: int = 4) -> list[dict[str, Any]]:
    """All cells: saved by `ranks` processes, loaded by 1 … `ranks`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="holdfast-matrix-") as place:
        directory, saved = Path(place), layouts(ranks)
        _world(ranks, partial(_save, directory, saved), directory)
        worlds = (_world(count, partial(_load, directory, saved, layouts(count)), directory) for count in range(1, ranks + 1))
        return [cell for cells in worlds for cell in cells]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m holdfast.ckpt.matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="processes that save (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    cells = run(arguments.ranks)
    if arguments.json:
        print(json.dumps({"cells": cells}, indent=1, ensure_ascii=False))
    else:
        for cell in cells:
            print(
                f"{cell['saved']:>12} → {cell['loaded']:<12} {cell['ranks']} ranks  {'equal' if cell['equal'] else 'DIFFERENT'}"
            )
    wrong = sum(not cell["equal"] for cell in cells)
    print(f"{len(cells)} cells, {wrong} different", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
