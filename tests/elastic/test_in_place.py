"""Recovery in place: survivors keep their processes and objects, a spare takes the dead rank's place, every bit stays the same."""

from __future__ import annotations

import json

import pytest

STEPS = 40
"""So many that keepers have committed something in time, also where others use the cores."""


def deaths(*entries: dict[str, object]) -> list[str]:
    return ["--in-place", "--steps", str(STEPS), "--die", json.dumps(entries)]


def assert_only_replaced(died, *ranks: int) -> None:
    """The processes of `ranks` were replaced, and those of all others have done every step since the first."""
    fresh = {rank for rank, facts in enumerate(died.facts) if "1" not in facts["losses"]}
    assert fresh == set(ranks)


MORE = [pytest.param(layout, ranks, marks=pytest.mark.campaign) for layout, ranks in (("ddp", 4), ("fsdp", 2))]


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), *MORE])
def test_a_trainer_killed_in_backward_is_replaced_in_place(job, references, layout, ranks):
    entry = {"step": 12, "kind": "backward", "ranks": [1], "committed": 3}
    died = job.run("--layout", layout, "--nodes", "2", *deaths(entry), ranks=ranks, restarts=0, spares="ready")
    died.assert_equals(references.of(layout, ranks, STEPS))
    assert_only_replaced(died, 1)
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"own keeper"}


def test_a_node_lost_with_its_memory_is_rebuilt_in_place(job, references):
    entry = {"step": 8, "kind": "node", "ranks": [1], "committed": 3}
    died = job.run("--nodes", "3", *deaths(entry), ranks=3, restarts=0, spares="import")
    died.assert_equals(references.of("fsdp", 3, STEPS))
    assert_only_replaced(died, 1)
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}


def test_deaths_one_after_the_other_and_without_spares_are_recovered_in_place(job, references):
    first = {"step": 5, "kind": "trainer", "ranks": [0], "committed": 3}
    second = {"step": 9, "kind": "trainer", "ranks": [1], "committed": 7}
    died = job.run("--nodes", "2", *deaths(first, second), restarts=0, spares="none")
    died.assert_equals(references.of("fsdp", 2, STEPS))
    assert_only_replaced(died, 0, 1)


@pytest.mark.campaign
@pytest.mark.timeout(240)
@pytest.mark.parametrize("spares", ["ready", "none"])
def test_a_trainer_of_another_host_is_replaced_in_place(job, references, spares):
    """Two agents with two ranks each; those of the second reach the board and each other over TCP."""
    entry = {"step": 8, "kind": "trainer", "ranks": [3], "committed": 3}
    died = job.run("--layout", "ddp", "--pace", "0.3", *deaths(entry), ranks=2, agents=2, restarts=0, spares=spares)
    died.assert_equals(references.of("ddp", 4, STEPS))
    assert_only_replaced(died, 3)
    assert {facts["recovery"]["rung"] for facts in died.facts} == {"own keeper"}
