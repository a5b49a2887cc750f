"""Every named crash point is visited by a real SIGKILL, and the run ends with the same bits all the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import holdfast
from holdfast import ckpt

CAPTURE = ["capture.begun", "capture.copied", "capture.filled"]
COMMIT = [
    "keeper.joined",
    "keeper.announced",
    "snapshot.filled",
    "snapshot.verified",
    "snapshot.exchanged",
    "snapshot.encoded",
    "keeper.committing",
    "keeper.committed",
]
ATTACH = ["keeper.attaching"]
RETURN = ["keeper.returned", "keeper.fenced"]
LEAD = ["regroup.fenced", "regroup.joined", "keeper.stopped"]
END = ["keeper.stopping"]
SPILL = ["spill.begun", "spill.written"]
ALONE = ["preempt.saved", "rescue.rebuilt"]  # visited in tests/snapshot/test_last_words.py
BEREFT = ["keeper.reattached"]  # visited in tests/snapshot/test_lifeline.py
AGAIN = ["lead.protecting"]  # visited in tests/snapshot/test_again.py
REBUILD = ["rebuild.decoded", "rebuild.checked", "rebuild.encoded"]


def schedule(job, role: str, place: int, points: list[str], nth: int = 2) -> dict[str, str]:
    """Kill at every one of `points`, each once, and leave a mark for it."""
    (job.place / "marks").mkdir(exist_ok=True)
    faults = [
        {
            "at": point,
            "role": role,
            "place": place,
            "nth": 1 if point in ("keeper.joined", "keeper.attaching") else nth,
            "once": str(job.place / "marks" / point),
        }
        for point in points
    ]
    return {"HOLDFAST_FAULTS": json.dumps(faults)}


def visited(job) -> set[str]:
    return {path.name for path in (job.place / "marks").iterdir()}


def test_a_trainer_killed_at_every_point_of_a_capture_loses_nothing(job, references):
    died = job.run("--nodes", "2", "--steps", "40", restarts=10, **schedule(job, "trainer", 1, CAPTURE))
    assert visited(job) == set(CAPTURE)
    died.assert_equals(references.of("fsdp", 2, steps=40))


@pytest.mark.timeout(450)
@pytest.mark.parametrize(
    "points",
    [
        pytest.param([*ATTACH, "snapshot.encoded"], id="two"),
        pytest.param([*ATTACH, *COMMIT], id="all", marks=pytest.mark.campaign),  # below, keepers die alone at all of them
    ],
)
def test_a_node_whose_keeper_is_killed_at_any_point_of_a_commit_loses_nothing(job, references, points):
    arguments = ("--nodes", "2", "--steps", "60", "--follow-keeper")
    died = job.run(*arguments, restarts=20, timeout_s=400, **schedule(job, "keeper", 1, points))
    assert visited(job) == set(points)
    died.assert_equals(references.of("fsdp", 2, steps=60))


EVERYWHERE = {0: [*COMMIT, *RETURN, *LEAD, *END], 1: [*COMMIT, *RETURN, *END]}
ONCE = {0: [*RETURN, *LEAD, *END], 1: COMMIT}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "points", [pytest.param(ONCE, id="once"), pytest.param(EVERYWHERE, id="on both nodes", marks=pytest.mark.campaign)]
)
def test_keepers_killed_alone_at_every_point_come_back_and_no_trainer_is_restarted(job, references, points):
    """Keepers die again and again, now one, now both at once; snapshots go on and the last step is saved."""
    (job.place / "marks").mkdir()
    faults = [
        {
            "at": point,
            "role": "keeper",
            "place": place,
            "nth": 2 if point == "keeper.joined" else 1,  # the first is part of the start
            "once": str(job.place / "marks" / f"{point}-{place}"),
        }
        for place in points
        for point in points[place]
    ]
    place = job.place / "ckpt"
    arguments = ("--nodes", "2", "--steps", "60", "--keep-up", "--checkpoints", str(place))
    died = job.run(*arguments, restarts=0, timeout_s=280, HOLDFAST_FAULTS=json.dumps(faults))
    assert visited(job) == {f"{point}-{place}" for place in points for point in points[place]}
    died.assert_equals(references.of("fsdp", 2, steps=60))
    assert all(facts.get("recovery") is None for facts in died.facts), "nobody had to restore anything"
    assert [info.step for info in ckpt.list_steps(place)] == [60]
    assert ckpt.open_checkpoint(place, 60).verify().is_whole


def test_the_coordinator_killed_while_a_checkpoint_is_written_leaves_no_half_checkpoint(job, references):
    place = job.place / "ckpt"
    arguments = ("--nodes", "2", "--steps", "40", "--follow-keeper", "--checkpoints", str(place), "--checkpoint-every", "5")
    died = job.run(*arguments, restarts=10, **schedule(job, "keeper", 0, SPILL, nth=1))
    assert visited(job) == set(SPILL)
    died.assert_equals(references.of("fsdp", 2, steps=40))
    steps = ckpt.list_steps(place)
    assert steps[-1].step == 40
    assert all(ckpt.open_checkpoint(info.path).verify().is_whole for info in steps)


def test_a_keeper_killed_while_it_rebuilds_a_lost_node_starts_over(job, references):
    """The second kill leaves data without parity, and a new start has all of it encoded anew; the third comes while training goes
    on after another loss."""
    lost = [{"step": step, "kind": "node", "ranks": [1], "committed": step - 3} for step in (6, 12)]
    env = schedule(job, "keeper", 1, REBUILD, nth=1)
    died = job.run("--nodes", "2", "--die", json.dumps(lost), restarts=10, **env)
    assert visited(job) == set(REBUILD)
    died.assert_equals(references.of("fsdp", 2))
    assert all(facts["recovery"]["step"] >= 3 for facts in died.facts)


def test_every_crash_point_of_snapshots_is_visited_here():
    named = set()
    for path in (Path(holdfast.__file__).parent / "snapshot").glob("*.py"):
        named |= set(re.findall(r'crash_point\("([^"]+)"\)', path.read_text()))
    assert named == {*CAPTURE, *ATTACH, *COMMIT, *RETURN, *LEAD, *END, *SPILL, *REBUILD, *ALONE, *AGAIN, *BEREFT}
