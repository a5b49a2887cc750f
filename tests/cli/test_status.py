"""What `holdfast status` says of a run: where it is, what it survives now, and what was watched; as text, JSON and gauges."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.cli.status import prometheus, text_of
from holdfast.snapshot.cluster import JobStatus, NodeStatus, node_memory, status
from holdfast.snapshot.interval import Intervals
from tests.snapshot.test_keeper import Cluster

NODE = NodeStatus(
    node=0,
    pid=77,
    alive=True,
    memory="/m",
    nbytes=3 << 20,
    epoch=2,
    committed_step=41,
    committed_age_s=2.5,
    checkpoint_step=40,
    survivable_losses=1,
    ranks={0: 11, 1: 12},
    step=43,
    world=4,
    skipped=3,
    dropped=1,
    parity=1,
    group=(0, 1),
    last_scrub={"time_s": 990.0, "nbytes": 1 << 20, "rotten": 2, "repaired": 2},
    last_drill={"time_s": 880.0, "agrees": True},
)
DEAD = NodeStatus(1, 0, False, "/m", 1 << 20, 0, 0, None, 0, 0, {})


def job(*nodes: NodeStatus, losses: int) -> JobStatus:
    return JobStatus(
        name="run",
        epoch=2,
        world=4,
        step=43,
        committed_step=41,
        checkpoint_step=40,
        survivable_losses=losses,
        nodes=list(nodes),
    )


def test_a_healthy_run_in_words() -> None:
    lines = text_of(job(NODE, losses=1), now_s=1000.0).splitlines()
    assert lines[:5] == [
        "run: 4 ranks at step 43, epoch 2",
        "1 node may be lost now without losing step 41",
        "step 41 is committed, 2.5 s ago, 2 steps behind; checkpoint of step 40",
        "last scrub 10.0 s ago: 1.0 MiB read, 2 regions rotten, 2 repaired",
        "last drill 2 min ago: rebuilt blocks agree",
    ]
    assert lines[-1].split() == ["0", "77", "41", "2.5", "s", "3.0", "MiB", "3", "1", "0", "0", "(11),", "1", "(12)"]


def test_how_often_a_run_saves_and_who_holds_it_up_are_said_with_reasons() -> None:
    known = {"exchange_s": 0.04, "step_s": 0.5, "checkpoint_s": 3.0, "mtbf_s": 7200.0}
    often = Intervals(snapshot_every=1, checkpoint_every=400, stall_s=0.001, **known)
    verdicts = tuple(
        {"time_s": 900.0 + rank, "trouble": "hang", "guilty": [rank], "confidence": 0.9, "evidence": ["it does not come"]}
        for rank in (1, 3)
    )
    found = dataclasses.replace(job(NODE, losses=1), intervals=often, verdicts=verdicts)
    lines = text_of(found, now_s=1000.0).splitlines()
    assert lines[3] == str(often)
    assert lines[4] == "97.0 s ago (1 verdict before): hang: rank 3 (90% sure); it does not come"
    assert 'holdfast_verdicts{run="run"} 2' in prometheus([found], 1000.0)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([NODE, DEAD], "no node may be lost now: the keeper of node 1 is gone; trainers may die, and go on from step 41"),
        ([dataclasses.replace(NODE, damaged=1)], "no node may be lost now: damaged memory could not be repaired"),
        ([NODE], "no node may be lost now: there is no parity to rebuild it from"),
    ],
)
def test_why_nothing_more_may_be_lost_is_said(nodes: list[NodeStatus], words: str) -> None:
    assert words in text_of(job(*nodes, losses=0), now_s=1000.0)


@pytest.mark.parametrize(
    ("world", "words"), [(4, "a new one is in its place"), (0, "a new one waits to be taken into the run")]
)
def test_a_node_that_lost_its_memory_under_living_trainers_is_named(world: int, words: str) -> None:
    bereft = dataclasses.replace(NODE, world=world, bereft={"time_s": 940.0, "step": 30})
    lines = text_of(job(bereft, losses=1), now_s=1000.0).splitlines()
    assert f"node 0 lost its keeper and all that it held 60.0 s ago, after step 30; {words}" in lines


def test_a_drill_that_disagrees_is_not_to_be_overlooked() -> None:
    node = dataclasses.replace(NODE, last_drill={"time_s": 999.0, "agrees": False})
    assert "last drill 1.0 s ago: NO, a rebuilt block is not what is there" in text_of(job(node, losses=1), now_s=1000.0)


def test_gauges_carry_their_run_and_node() -> None:
    lines = prometheus([job(NODE, DEAD, losses=1)], now_s=1000.0)
    assert 'holdfast_survivable_losses{run="run"} 1' in lines
    assert 'holdfast_snapshots_skipped{run="run",node="0"} 3' in lines
    assert 'holdfast_drill_age_seconds{run="run",node="0"} 120' in lines
    assert [line for line in lines if 'node="1"' in line] == ['holdfast_keeper_up{run="run",node="1"} 0']


# -- real keepers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A run of three nodes where `holdfast status` looks for it."""
    place = Path(tempfile.mkdtemp(prefix="hfs-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    monkeypatch.setenv("HOLDFAST_MEMORY", str(place))
    monkeypatch.setenv("HOLDFAST_RUNTIME", str(tmp_path))
    home = node_memory(place, "job", 0).parent
    found = Cluster(home.parent, 3, parity=1)
    found.enter(1)
    found.train(until_committed=3)
    yield found
    found.close()
    shutil.rmtree(place, ignore_errors=True)


def test_the_gauge_falls_when_a_keeper_dies_before_its_peers_have_missed_it(cluster: Cluster) -> None:
    (before,) = status("job")
    assert (before.survivable_losses, before.world) == (1, 3)
    assert before.committed_step >= 3
    assert before.step == max(rank.link.page["completed"] for rank in cluster.ranks.values())
    keeper = cluster.keepers[2]
    keeper._server.close()  # it hangs up and leaves its memory, as a killed one does
    (after,) = status("job")
    assert [node.alive for node in after.nodes] == [True, True, False]
    assert after.survivable_losses == 0


def test_what_was_watched_reaches_the_command_line(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for keeper in cluster.keepers.values():
        keeper.watch.scrub()
    assert main(["status", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert [node["last_scrub"]["rotten"] for node in run["nodes"]] == [0, 0, 0]
    assert main(["status", "job", "--prometheus"]) == 0
    assert 'holdfast_scrub_rotten{run="job",node="2"} 0' in capsys.readouterr().out


def test_watching_on_a_terminal_ends_cleanly_with_ctrl_c(cluster: Cluster) -> None:
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "holdfast.cli", "status", "--watch"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while b"may be lost now" not in seen:
        seen += os.read(mine, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while True:
            seen += os.read(mine, 4096)
    except OSError:
        pass  # the terminal is closed
    os.close(mine)
    assert process.wait(60) == 130
    assert seen.rstrip().endswith(b"interrupted")
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is back
    assert b"Traceback" not in seen
