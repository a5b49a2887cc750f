"""A keeper that lives and says nothing is ended, and another one takes over its memory; where that is gone, it begins without."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import HoldfastError
from holdfast.snapshot import cluster, lifeline
from holdfast.snapshot.birth import ENDPOINT, holds_lock, is_alive
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.lifeline import Lifeline
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.view import View
from tests.snapshot.test_keeper import Rank, wait_until

HOW = {"kind": "process", "ray_address": None, "bind": "127.0.0.1"}


@pytest.fixture
def place(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The memory of a node whose keeper runs in a process of its own."""
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0)
    monkeypatch.setattr(cluster, "SILENCE_S", 1.0)
    monkeypatch.setattr(lifeline, "PATIENCE_S", 1.0)
    monkeypatch.setattr(lifeline, "ASKED_EVERY_S", 0.1)
    cluster.ensure_keepers("job", [0], shm, **HOW)
    place = cluster.node_memory(shm, "job", 0)
    first = Endpoint.read(place).pid
    yield place
    if holds_lock(first, place):  # where the test has failed
        os.kill(first, signal.SIGKILL)
    cluster.down(memory=shm)


def test_a_start_ends_a_keeper_that_hangs_and_its_successor_has_the_slots(place: Path, shm: Path) -> None:
    rank = Rank(place, 0, 5000)
    rank.link.close()
    slots = {path.name: path.stat().st_ino for path in place.glob("slot-*")}
    assert slots
    hung = Endpoint.read(place).pid
    os.kill(hung, signal.SIGSTOP)
    cluster.ensure_keepers("job", [0], shm, **HOW)
    wait_until(lambda: Endpoint.read(place).pid != hung, "the address of another keeper")
    wait_until(lambda: not is_alive(hung), "the end of the keeper that hung")
    assert {path.name: path.stat().st_ino for path in place.glob("slot-*")} == slots


def test_a_start_waits_for_a_keeper_that_is_only_slow(place: Path, shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Endpoint.read(place).pid
    monkeypatch.setattr(cluster, "SILENCE_S", 60.0)
    os.kill(slow, signal.SIGSTOP)
    waking = subprocess.Popen(["/bin/sh", "-c", f"sleep 3; kill -CONT {slow}"])
    cluster.ensure_keepers("job", [0], shm, **HOW)
    waking.wait()
    assert Endpoint.read(place).pid == slow
    assert is_alive(slow)


def test_trainers_notice_that_their_keeper_hangs(place: Path, shm: Path) -> None:
    rank = Rank(place, 0, 5000)
    hung = Endpoint.read(place).pid
    eye = Lifeline(rank.link, partial(cluster.revive_keeper, "job", 0, shm, **HOW))
    try:
        os.kill(hung, signal.SIGSTOP)
        wait_until(lambda: Endpoint.read(place).pid != hung, "another keeper")
        wait_until(lambda: not is_alive(hung), "the end of the keeper that hung")
        assert not eye.is_lost
        assert rank.link.page.is_current()
    finally:
        eye.close()
        rank.link.close()


def test_a_keeper_that_was_told_to_end_is_not_brought_back(place: Path) -> None:
    rank = Rank(place, 0, 5000)
    eye = Lifeline(rank.link, lambda: pytest.fail("nobody is to bring it back"))
    try:
        cluster.ask_once(place, "shutdown")
        wait_until(lambda: eye.is_lost, "the word that it is gone for good")
        wait_until(lambda: not place.exists(), "its memory given back")
    finally:
        eye.close()
        rank.link.close()


def test_trainers_do_not_bring_back_what_holdfast_down_has_ended(place: Path, shm: Path) -> None:
    rank = Rank(place, 0, 5000)
    eye = Lifeline(rank.link, lambda: pytest.fail("nobody is to bring it back"))
    try:
        cluster.down(memory=shm)
        wait_until(lambda: eye.is_lost, "the word that it is gone for good")
    finally:
        eye.close()
        rank.link.close()


def test_a_process_that_only_has_a_dead_keepers_number_is_left_alone(place: Path) -> None:
    keeper = Endpoint.read(place).pid
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not holds_lock(keeper, place), "the end of the keeper")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        fields = json.loads((place / ENDPOINT).read_text())
        (place / ENDPOINT).write_text(json.dumps({**fields, "pid": other.pid}))
        assert not cluster._comes_to(0, place)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# -- memory that is gone while the trainers live ---------------------------------------------------------------------------


class Trainer(Rank):
    """A rank with a lifeline, whose captures may fail as those of a real trainer may."""

    def __init__(self, place: Path, rank: int, shm: Path) -> None:
        super().__init__(place, rank, 3000 + 777 * rank)
        self.eye = Lifeline(self.link, partial(cluster.revive_keeper, "job", place_of(place), shm, **HOW))

    def complete(self, step: int) -> None:
        with suppress(HoldfastError):
            super().complete(step)

    def close(self) -> None:
        self.eye.close()
        self.link.close()


def place_of(place: Path) -> int:
    return int(place.name.removeprefix("node-"))


class Job:
    """Keepers in processes of their own and trainers in small, with a parity between them."""

    def __init__(self, shm: Path, ranks_of: dict[int, tuple[int, ...]], parity: int, every: int) -> None:
        self.shm, self.step = shm, 0
        cluster.ensure_keepers("job", list(ranks_of), shm, **HOW)
        self.places = {node: cluster.node_memory(shm, "job", node) for node in ranks_of}
        self.ranks = {rank: Trainer(self.places[node], rank, shm) for node, ranks in ranks_of.items() for rank in ranks}
        self.node_of = {rank: node for node, ranks in ranks_of.items() for rank in ranks}
        members = tuple(replace(Endpoint.read(self.places[node]).member, ranks=ranks) for node, ranks in ranks_of.items())
        view = View("job", 1, len(self.ranks), members, parity, 8, every, 0, None, 0, 1, True, True)
        for node in ranks_of:
            self.ask(node, "join", view=view.to_json())
        self.ask(0, "begin")
        wait_until(lambda: all(rank.eye._view for rank in self.ranks.values()), "trainers that know who is a member")

    def ask(self, node: int, verb: str, **fields: Any) -> Any:
        return cluster.ask_once(self.places[node], verb, **fields)

    def train(self, *, until_committed: int) -> int:
        def is_committed() -> bool:
            self.step += 1
            for rank in self.ranks.values():
                rank.complete(self.step)
            time.sleep(0.01)
            return min(rank.link.committed_step for rank in self.ranks.values()) >= until_committed

        wait_until(is_committed, f"a commit at {until_committed} or later")
        return min(rank.link.committed_step for rank in self.ranks.values())

    def jump(self, step: int) -> int:
        """Go on right before this step, which is the one that was announced."""
        wait_until(lambda: all(rank.link.page.target[0] == step for rank in self.ranks.values()), f"the order of {step}")
        self.step = step - 1
        return self.train(until_committed=step)

    def lose(self, node: int) -> None:
        os.kill(Endpoint.read(self.places[node]).pid, signal.SIGKILL)
        shutil.rmtree(self.places[node], ignore_errors=True)

    def is_back(self, *nodes: int, before: int) -> bool:
        """These nodes are in a later epoch, with their parity."""
        with suppress(HoldfastError):
            return all(
                (health := self.ask(node, "health"))["epoch"] > before and health["parity"] and health["committed"]
                for node in nodes
            )
        return False

    def check(self) -> None:
        """What is committed everywhere is what was captured, and one more node may be lost."""
        for rank, trainer in self.ranks.items():
            node = self.node_of[rank]
            slots = [Slot.open(path) for path in self.places[node].glob(f"slot-{rank}-?")]
            held = {slot.header.step: slot for slot in slots if slot.header.state is SlotState.COMMITTED}
            newest = held[max(held)]
            assert bytes(newest.body[: trainer.nbytes]) == trainer.bytes_at(newest.header.step)
            for slot in slots:
                slot.close()

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.close()
        cluster.down(memory=self.shm)


@pytest.fixture
def start(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def build(*ranks: tuple[int, ...], parity: int = 1, every: int = 1) -> Job:
        made.append(Job(shm, dict(enumerate(ranks)), parity, every))
        return made[-1]

    yield build
    for job in made:
        job.close()


def test_a_node_whose_memory_went_with_its_keeper_is_rebuilt_and_its_living_trainers_go_on(
    start: Callable[..., Job],
) -> None:
    """The next snapshot would be a thousand steps away; two trainers share the node."""
    job = start((0,), (1, 2), (3,), every=1000)
    committed = job.jump(1000)
    epoch = job.ask(1, "status")["epoch"]
    job.lose(1)
    wait_until(lambda: job.is_back(0, 1, 2, before=epoch), "the node with its bytes and its parity")
    assert all(rank.link.committed_step == committed for rank in job.ranks.values()), "nothing was lost by it"
    job.check()
    for node in job.places:
        wait_until(lambda node=node: job.ask(node, "status")["survivable_losses"] == 1, f"another look of node {node}")
    (status,) = cluster.status("job", memory=job.shm)
    assert [node.node for node in status.nodes if node.bereft] == [1]
    assert status.nodes[1].bereft is not None
    assert status.nodes[1].bereft["step"] == committed
    assert job.jump(2000) == 2000
    job.check()


@pytest.mark.campaign
def test_without_parity_what_was_lost_is_replaced_by_the_next_step(start: Callable[..., Job]) -> None:
    job = start((0,), (1,), parity=0, every=1000)
    committed = job.jump(1000)
    job.lose(0)
    wait_until(lambda: job.ranks[1].link.committed_step == 0, "the word that nothing is committed any more")
    assert job.train(until_committed=committed + 1) <= job.step
    job.check()


@pytest.mark.campaign
def test_the_coordinators_memory_and_another_nodes_lost_at_once_and_again_come_back(start: Callable[..., Job]) -> None:
    """Their keepers are found at the addresses of those before them, else none could tell the other where it is."""
    job = start((0,), (1,), (2,), (3,), parity=2)
    for lost in ((0, 1), (2, 0), (1, 3)):
        committed = job.train(until_committed=job.step + 3)
        epoch = job.ask(2 if 2 not in lost else 1, "status")["epoch"]
        for node in lost:
            job.lose(node)
        wait_until(lambda: job.is_back(*job.places, before=epoch), "all nodes")  # noqa: B023
        assert all(rank.link.committed_step >= committed for rank in job.ranks.values())
        job.check()
    job.train(until_committed=job.step + 3)
    job.check()


@pytest.mark.campaign
def test_a_living_keeper_whose_memory_is_removed_ends_and_another_takes_its_place(start: Callable[..., Job]) -> None:
    job = start((0,), (1,))
    committed = job.train(until_committed=2)
    epoch, robbed = job.ask(1, "status")["epoch"], Endpoint.read(job.places[1]).pid
    shutil.rmtree(job.places[1])
    wait_until(lambda: not is_alive(robbed), "the end of the keeper that was robbed")
    wait_until(lambda: job.is_back(0, 1, before=epoch), "the node")
    assert job.train(until_committed=committed + 2) >= committed + 2
    job.check()


@pytest.mark.campaign
def test_a_keeper_killed_while_trainers_come_back_to_it_is_followed_by_another(
    start: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "killed"
    fault = {"at": "keeper.reattached", "role": "keeper", "place": 1, "once": str(mark)}
    monkeypatch.setenv("HOLDFAST_FAULTS", json.dumps([fault]))
    job = start((0,), (1, 2))
    committed = job.train(until_committed=2)
    epoch = job.ask(1, "status")["epoch"]
    job.lose(1)
    wait_until(lambda: job.is_back(0, 1, before=epoch), "the node")
    assert mark.exists()
    assert job.train(until_committed=committed + 2) >= committed + 2
    job.check()
