"""Every parallel layout that torch has, under protect: killed, restored bit for bit, and cut anew for another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_layouts.py")

LAYOUTS = [("ep=2", 2)]
MORE_LAYOUTS = [
    ("pp=2", 2),
    ("pp=2,dp=2", 4),
    ("pp=2,fsdp=2", 4),
    ("fsdp=2,tp=2", 4),
    ("hsdp=2,fsdp=2", 4),
    ("tp=2", 2),
    ("pp=4", 4),
]

CHANGES = [("pp=2", 2, "fsdp=2", 2, "own keeper")]
CUTS = [
    ("pp=2", 2, "fsdp=3", 3),
    ("pp=4", 4, "pp=2", 2),
    ("ep=4", 4, "ep=2", 2),
    ("ep=2", 2, "ep=4", 4),
    ("pp=2,fsdp=2", 4, "fsdp=2", 2),
    ("fsdp=2,tp=2", 4, "pp=2", 2),
    ("pp=2", 2, "fsdp=2,tp=2", 4),
]
MORE_CHANGES = [(*cut, source) for cut in CUTS for source in ("own keeper", "universal checkpoint")]


def campaign(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.campaign) for case in cases]


def dies(kind: str, *ranks: int, committed: int) -> list[str]:
    return ["--die", json.dumps([{"step": committed, "kind": kind, "ranks": ranks, "committed": committed}])]


@pytest.mark.campaign
@pytest.mark.parametrize(("mesh", "ranks"), LAYOUTS)
def test_a_node_lost_with_its_memory_is_rebuilt_under_any_layout(job, mesh, ranks):
    shape = ("--mesh", mesh, "--steps", "12")
    reference = job.run(*shape, "--bare", ranks=ranks, script=SCRIPT)
    died = job.run(*shape, "--nodes", str(ranks), *dies("node", 1, committed=4), ranks=ranks, script=SCRIPT)
    died.assert_equals(reference)
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}


@pytest.mark.parametrize(("mesh", "ranks"), campaign([("pp=2", 2), ("pp=2,dp=2", 4), ("ep=2", 2), ("fsdp=2,tp=2", 4)]))
def test_a_rank_is_replaced_in_place_under_any_layout(job, mesh, ranks):
    """The schedule of a pipeline in the survivors has run before, that of the spare has not."""
    shape = ("--mesh", mesh, "--steps", "30")
    reference = job.run(*shape, "--bare", ranks=ranks, script=SCRIPT)
    once = ("--in-place", "--nodes", str(ranks), "--pace", "0.2", *dies("trainer", 1, committed=20))
    died = job.run(*shape, *once, ranks=ranks, spares="ready", restarts=0, script=SCRIPT)
    died.assert_equals(reference)
    assert "a spare takes over" in died.log
    assert [facts["recovery"]["rung"] for facts in died.facts] == ["own keeper"] * ranks


@pytest.mark.parametrize(("before", "ranks", "after", "others", "source"), [*CHANGES, *campaign(MORE_CHANGES)])
def test_a_layout_is_cut_into_another_from_memory_and_from_a_checkpoint(job, before, ranks, after, others, source):
    """What ranks held together before is what they hold together afterwards: parameters, optimizer state, learning rate."""
    kept = ("--checkpoints", str(job.place / "ckpt"), "--checkpoint-every", "2")
    first = ("--mesh", before, "--nodes", str(ranks), *kept)
    failed = job.run(*first, *dies("exception", 0, committed=4), ranks=ranks, restarts=0, ok=False, script=SCRIPT)
    assert failed.code != 0
    if source == "universal checkpoint":
        job.lose_memory()
    changed = job.run(
        "--mesh", after, "--nodes", str(others), *kept, "--halt", "0", ranks=others, out=failed.out, script=SCRIPT
    )
    restored = changed.facts[0]["recovery"]
    assert restored["rung"] == source
    assert restored["step"] >= 2
    bare = job.run("--mesh", before, "--bare", "--halt", str(restored["step"]), ranks=ranks, script=SCRIPT)
    expected, found = together(bare.states), together(changed.states)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert changed.facts[0]["lr"] == bare.facts[0]["lr"]


def together(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state of all ranks; stages and experts are on some of them only."""
    return {name: tensor for state in states for name, tensor in state.items()}
