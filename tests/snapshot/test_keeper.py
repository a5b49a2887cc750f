"""Keepers with real slots and sockets, driven by trainers in small: what they commit is protected, what they refuse is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.arrays import Fragment, FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import ClusterError, ConfigError, CorruptData, HoldfastError, KeeperUnreachable, StaleEpoch
from holdfast.snapshot import birth
from holdfast.snapshot.client import Endpoint, Link, connect
from holdfast.snapshot.coordinator import Phase
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.plan import Survey, plan_restore
from holdfast.snapshot.regroup import make_whole
from holdfast.snapshot.repair import Task, workers
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.view import Member, View

PATIENCE_S = 60


def wait_until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.002)


class Rank:
    """A trainer in small: one array whose bytes are a function of rank and step, captured when the keeper asks for it."""

    def __init__(self, memory: Path, rank: int, nbytes: int, launch: str = "l") -> None:
        self.rank, self.nbytes = rank, nbytes
        self.link = Link(memory, rank, launch, nbytes)
        self.handled = (0, 0)
        row = Fragment(f"model/w{rank}", "uint8", (nbytes,), (0,), (nbytes,), rank, 0, nbytes)
        self.table = FragmentTable.from_rows([row])

    def bytes_at(self, step: int) -> bytes:
        return np.random.default_rng([self.rank, step]).integers(0, 256, self.nbytes, np.uint8).tobytes()

    def complete(self, step: int) -> None:
        page = self.link.page
        page["completed"] = step
        target, index, order = page.target
        if (target, order) == self.handled or not 0 < target <= step:
            return
        self.handled = target, order
        if target < step:
            self.link.give_up(target, "passed")
            return
        self.link.body(index, self.nbytes)[: self.nbytes] = self.bytes_at(step)
        self.link.filled(step, index, self.nbytes, f"layout-{self.nbytes}", self.table, {"step": str(step)})


class Cluster:
    """Keepers in threads of this process, one rank or more on each, in one epoch."""

    def __init__(
        self, shm: Path, nodes: int, *, parity: int, ranks_each: int = 1, mapped: bool = True, **settings: Any
    ) -> None:
        self.shm, self.parity = shm, parity
        self.places = {node: shm / "job" / f"node-{node}" for node in range(nodes)}
        self.keepers = {node: Keeper("job", node, place, mapped=mapped) for node, place in self.places.items()}
        self.ranks_of = {node: tuple(range(node * ranks_each, (node + 1) * ranks_each)) for node in range(nodes)}
        self.settings = {"every": 1, "checkpoint_every": 0, "checkpoints": None, **settings}
        self.ranks: dict[int, Rank] = {}
        self.step = 0

    def enter(self, epoch: int, **fields: Any) -> None:
        """All ranks attach, all keepers join, the coordinator begins."""
        for node, ranks in self.ranks_of.items():
            for rank in ranks:
                self.ranks[rank] = Rank(self.places[node], rank, 3000 + 777 * rank)
        view = self.view(epoch, **fields)
        for node in self.keepers:
            self.ask(node, "join", view=view.to_json())
        self.ask(view.coordinator, "begin")

    def view(self, epoch: int, **fields: Any) -> View:
        members = tuple(replace(self.keepers[node].member, ranks=ranks) for node, ranks in self.ranks_of.items())
        world = sum(map(len, self.ranks_of.values()))
        known = {"committed": 0, "index": 1, "protected": True, "in_memory": True, "group_size": 8, **self.settings, **fields}
        return View(job="job", epoch=epoch, world=world, members=members, parity=self.parity, **known)

    def ask(self, node: int, verb: str, payload: bytes = b"", **fields: Any) -> Any:
        connection = connect(self.places[node])
        try:
            return connection.ask(verb, payload, **fields)
        finally:
            connection.close()

    def train(self, *, until_committed: int) -> int:
        """Step until every rank sees a commit at or after this step; returns the committed step."""

        def is_committed() -> bool:
            self.step += 1
            for rank in self.ranks.values():
                rank.complete(self.step)
            time.sleep(0.01)
            return min(rank.link.page["committed"] for rank in self.ranks.values()) >= until_committed

        wait_until(is_committed, f"a commit at {until_committed} or later")
        return min(rank.link.page["committed"] for rank in self.ranks.values())

    def surveys(self) -> list[Survey]:
        return [Survey.from_json(self.ask(node, "survey")) for node in self.keepers]

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.link.close()
        for keeper in self.keepers.values():
            keeper.close()


@pytest.fixture
def start(shm: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def build(nodes: int, **settings: Any) -> Cluster:
        made.append(Cluster(shm, nodes, **settings))
        return made[-1]

    yield build
    for cluster in made:
        cluster.close()


def stored(cluster: Cluster, node: int, rank: Rank, step: int) -> bytes:
    """The rank's bytes in the committed slot, checked as a reader would."""
    for path in cluster.places[node].glob(f"slot-{rank.rank}-?"):
        slot = Slot.open(path)
        if (slot.header.step, slot.header.state) == (step, SlotState.COMMITTED):
            data = bytes(slot.body[: rank.nbytes])
            (row,) = slot.meta().table
            assert row.crc32c == crc32c(data)
            assert slot.meta().objects == {"step": str(step)}
            slot.close()
            return data
        slot.close()
    raise AssertionError(f"rank {rank.rank} has no committed slot of step {step}")


# -- the way of a snapshot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "tcp"])
@pytest.mark.parametrize("parity", [0, 1, 2, 3])
def test_steps_are_captured_protected_and_committed(start: Callable[..., Cluster], parity: int, mapped: bool) -> None:
    cluster = start(4, parity=parity, ranks_each=2 if parity == 1 else 1, mapped=mapped)
    cluster.enter(1)
    first = cluster.train(until_committed=1)
    cluster.train(until_committed=first + 3)
    last = quiet(cluster)
    for node, ranks in cluster.ranks_of.items():
        for rank in ranks:
            assert stored(cluster, node, cluster.ranks[rank], last) == cluster.ranks[rank].bytes_at(last)
        assert cluster.ask(node, "status")["survivable_losses"] == parity
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    assert plan.step >= last


def quiet(cluster: Cluster) -> int:
    """Wait until nothing moves before the ranks do: a step ahead of them is announced. Returns the committed step."""
    coordinator = cluster.keepers[0].lead.coordinator
    assert coordinator is not None

    def is_ahead() -> bool:
        for rank in cluster.ranks.values():
            rank.complete(cluster.step)
        return coordinator.phase is Phase.FILLING and coordinator.step > cluster.step

    wait_until(is_ahead, "a target ahead of all ranks")
    for node in cluster.keepers:
        wait_until(lambda node=node: cluster.ask(node, "status")["committed_step"] == coordinator.committed, f"node {node}")
    return coordinator.committed


@pytest.mark.parametrize("parity", [1, 2])
def test_lost_nodes_are_rebuilt_by_the_keepers_that_took_their_place(start: Callable[..., Cluster], parity: int) -> None:
    cluster = start(4, parity=parity)
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    lost = [1, 2][:parity]
    for node in lost:
        cluster.keepers[node].close()
        assert not cluster.places[node].exists()
        cluster.keepers[node] = Keeper("job", node, cluster.places[node])
    surveys = cluster.surveys()
    plan, _ = plan_restore(surveys)
    assert plan is not None
    assert plan.step >= step
    assert sorted(rebuild.lost for rebuild in plan.rebuilds) == lost
    members = {survey.member.node: survey.member for survey in surveys}
    for rebuild in plan.rebuilds:
        cluster.ask(
            rebuild.host,
            "rebuild",
            group=rebuild.group.to_json(),
            lost=rebuild.lost,
            survivors=[members[node].to_json() for node in sorted({*rebuild.survivors, *rebuild.with_parity})],
            with_data=list(rebuild.survivors),
            with_parity=list(rebuild.with_parity),
        )
    for node in lost:
        assert stored(cluster, node, cluster.ranks[node], plan.step) == cluster.ranks[node].bytes_at(plan.step)
    again, _ = plan_restore(cluster.surveys())
    assert again is not None
    assert (again.step, again.rebuilds) == (plan.step, ())
    # And the run goes on from there in a new epoch, with the parity whole again.
    for rank in cluster.ranks.values():
        rank.link.close()
    cluster.step = again.step
    cluster.enter(2, committed=again.step, index=again.index, protected=again.protected)
    assert cluster.train(until_committed=again.step + 2) >= again.step + 2


def test_a_survivor_whose_memory_is_damaged_cannot_pass_off_wrong_bytes(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    plan, _ = plan_restore([survey for survey in cluster.surveys() if survey.member.node != 1])
    assert plan is not None
    (rebuild,) = plan.rebuilds
    victim = cluster.keepers[0].slots[slot_name(0, plan.index)]
    victim.body[: victim.header.body_nbytes] = bytes(victim.header.body_nbytes)
    cluster.keepers[1].close()
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    survivors = [cluster.keepers[node].member.to_json() for node in (0, 2)]
    answer = cluster.ask(
        1, "rebuild", group=rebuild.group.to_json(), lost=1, survivors=survivors, with_data=[0, 2], with_parity=[0, 2]
    )
    assert answer["damaged"] == {"0": [slot_name(0, plan.index)]}
    assert not [slot for slot in cluster.keepers[1].slots.values() if slot.header.rank == 1]
    assert not list(cluster.places[1].glob("*.new"))


def test_rotten_parity_is_named_before_anything_is_rebuilt_from_it(start: Callable[..., Cluster]) -> None:
    """With two parities the rest is enough, once it is known whom not to believe."""
    cluster = start(4, parity=2)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    rotten = cluster.keepers[2].slots[parity_name(plan.index)]
    rotten.body[5] ^= 1
    assert cluster.ask(2, "check", epoch=plan.epoch, step=plan.step, index=plan.index)["damaged"] == [parity_name(plan.index)]
    cluster.keepers[1].close()
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    surveys = cluster.surveys()
    members = {survey.member.node: survey.member for survey in surveys}
    healed, notes = make_whole(surveys, members)
    assert healed is not None
    assert healed.step == plan.step
    assert any(f"{parity_name(plan.index)} of node 2 rotted" in note for note in notes)
    assert stored(cluster, 1, cluster.ranks[1], plan.step) == cluster.ranks[1].bytes_at(plan.step)
    for node in (0, 1, 3):
        assert cluster.ask(node, "check", epoch=plan.epoch, step=plan.step, index=plan.index)["damaged"] == []


@pytest.mark.parametrize(("nodes", "parity", "lost"), [(3, 1, (1,)), (4, 2, (0, 2)), (5, 2, (1, 4))])
def test_over_a_network_survivors_decode_for_the_lost_and_send_only_what_was_lost(
    start: Callable[..., Cluster], nodes: int, parity: int, lost: tuple[int, ...]
) -> None:
    cluster = start(nodes, parity=parity, mapped=False)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    before = {node: contents(cluster.keepers[node]) for node in lost}
    for node in lost:
        cluster.keepers[node].close()
        cluster.keepers[node] = Keeper("job", node, cluster.places[node], mapped=False)
    surveys = cluster.surveys()
    members = {survey.member.node: survey.member for survey in surveys}
    plan, _ = plan_restore(surveys)
    assert plan is not None
    for item in plan.rebuilds:
        survivors = tuple(members[node] for node in sorted({*item.survivors, *item.with_parity}))
        task = Task(item.group, item.lost, survivors, frozenset(item.survivors), frozenset(item.with_parity))
        shares = workers(task, members[item.host], mapped=False)
        assert {member.node for member in shares.values()} == set(range(nodes)) - set(lost), "everybody who is left works"
        assert workers(task, members[item.host], mapped=True) == {}, "on one host everything can be mapped"
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    whole, notes = make_whole(surveys, members)
    assert notes == []
    assert whole is not None
    for rank in cluster.ranks.values():
        rank.link.close()
    cluster.enter(2, committed=whole.step, index=whole.index, protected=whole.protected)
    for node in lost:
        wait_until(lambda node=node: cluster.ask(node, "health")["parity"], f"the parity of node {node}")
        assert (
            contents(cluster.keepers[node]).items()
            >= {name: data for name, data in before[node].items() if name.endswith(f"-{whole.index}")}.items()
        )


def contents(keeper: Keeper) -> dict[str, bytes]:
    """Every committed slot's bytes by name: data and parity, without the meta of parity, which tells of its own sealing."""
    return {
        name: bytes(slot.body[: slot.header.body_nbytes if slot.header.rank >= 0 else slot.header.payload_nbytes])
        for name, slot in keeper.slots.items()
        if slot.header.state >= SlotState.ENCODED
    }


def test_a_record_that_comes_before_the_announcement_is_kept(start: Callable[..., Cluster]) -> None:
    """Node 1 hears of a round late; its peers are verified already."""
    cluster = start(2, parity=1)
    cluster.enter(1)
    late = cluster.keepers[1]
    wait_until(lambda: late.rounds.present is not None, "the first announcement")
    assert late.rounds.present is not None
    number = late.rounds.present.number
    record = {"node": 0, "ranks": [{"rank": 0, "payload_nbytes": 1, "meta_nbytes": 1, "meta_crc32c": 1, "body_nbytes": 1}]}
    cluster.ask(1, "verified", round=number + 5, record=record)
    assert late.rounds.groups[number + 5][0].node == 0
    cluster.ask(1, "verified", round=0, record=record)
    assert 0 not in late.rounds.groups


def test_a_snapshot_that_outgrows_its_slot_gets_a_larger_one(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=1)
    big = Rank.__new__(Rank)
    rank = cluster.ranks[0]
    nbytes = 3 << 20
    big.__dict__.update(rank.__dict__, nbytes=nbytes)
    big.table = FragmentTable.from_rows([Fragment("model/w0", "uint8", (nbytes,), (0,), (nbytes,), 0, 0, nbytes)])
    cluster.ranks[0] = big
    before = cluster.step
    cluster.train(until_committed=before + 4)
    step = quiet(cluster)
    assert stored(cluster, 0, big, step) == big.bytes_at(step)


def test_a_rank_that_passed_its_target_costs_one_round_and_no_more(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.ranks[0].link.page["completed"] = 50
    cluster.step = 50
    assert cluster.train(until_committed=51) >= 51
    assert cluster.ask(0, "status")["given_up"] >= 1


# -- who is refused ------------------------------------------------------------------------------------------------------


def test_a_message_of_an_older_epoch_is_refused(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(4)
    with pytest.raises(StaleEpoch, match="is in epoch 4, 'announce' came from epoch 3"):
        cluster.ask(1, "announce", step=1, index=0, round=1, epoch_of_sender=3)
    for epoch in (3, 4):
        with pytest.raises(StaleEpoch, match=f"already in epoch 4; epoch {epoch} comes too late"):
            cluster.ask(1, "join", view=cluster.view(epoch).to_json())


def test_a_second_run_of_the_name_is_refused_while_the_first_is_alive(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    cluster.enter(1)
    with pytest.raises(ConfigError, match=rf"another run named 'job' is alive \(its rank 0 is pid {os.getpid()}\)"):
        Link(cluster.places[0], 0, "another launch", 100)
    Link(cluster.places[0], 0, "l", 100).close()  # the same launch, restarted


def test_the_rank_of_a_dead_run_can_be_taken_over(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cluster.ask(0, "attach", rank=0, pid=gone.pid, launch="first", body_nbytes=100)
    assert "control" in cluster.ask(0, "attach", rank=0, pid=os.getpid(), launch="second", body_nbytes=100)


def test_slots_of_a_dead_trainer_serve_the_next_and_those_of_a_living_one_never(start: Callable[..., Cluster]) -> None:
    """Who is alive may have them mapped; taking new memory for one that is dead would hold its successor up."""
    cluster = start(1, parity=0)
    place = cluster.places[0]

    def attach(pid: int, nbytes: int = 1 << 20) -> list[int]:
        cluster.ask(0, "attach", rank=0, pid=pid, launch="l", body_nbytes=nbytes)
        return [(place / f"slot-0-{index}").stat().st_ino for index in (0, 1)]

    gone = subprocess.Popen([sys.executable, "-c", ""])
    first = attach(gone.pid)
    gone.wait()
    assert attach(os.getpid()) == first
    assert attach(os.getpid(), (1 << 20) + 1000) == first, "a little more than before has room in what was taken to spare"
    second = attach(os.getppid())
    assert not {*second} & {*first}, "this process is alive"
    assert not {*attach(os.getppid(), 3 << 20)} & {*second}, "much more has no room"


def begin_without_memory(cluster: Cluster, node: int) -> None:
    """The node's keeper is gone with all that it held, and another one is there."""
    cluster.keepers[node].close()
    cluster.keepers[node] = Keeper("job", node, cluster.places[node])


def test_a_trainer_that_lives_on_takes_a_place_with_a_keeper_that_begins_without_memory(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1, every=1000)
    cluster.enter(1)
    rank, view = cluster.ranks[1], cluster.view(1).to_json()
    wait_until(lambda: rank.link.page.target[0] == 1000, "the announcement")
    step, index, order = rank.link.page.target
    rank.link.page["completed"] = 77
    rank.link.body(index, rank.nbytes)[: rank.nbytes] = rank.bytes_at(step)
    begin_without_memory(cluster, 1)
    assert not rank.link.page.is_current()
    with pytest.raises(KeeperUnreachable, match="has not heard of rank 1 yet"):
        rank.link.give_up(step, "busy")
    rank.link.reattach(view)
    assert rank.link.page.is_current()
    assert (rank.link.page["completed"], rank.link.page.target) == (77, (step, index, order)), "it is where it was"
    with pytest.raises(StaleEpoch, match=rf"slot-1-{index} was replaced while step {step} was captured"):
        rank.link.filled(step, index, rank.nbytes, "l", rank.table, {})
    wait_until(lambda: all(keeper.members.epoch > 1 for keeper in cluster.keepers.values()), "a new epoch on every node")
    cluster.step = 77
    assert cluster.train(until_committed=1) < 100, "nothing was committed, and what comes next is, whatever the interval"


def test_only_a_trainer_of_the_lost_membership_gets_a_place_with_its_new_keeper(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    view = cluster.view(1)
    with pytest.raises(StaleEpoch, match="the keeper of node 1 is in epoch 1 already"):
        cluster.ranks[1].link.reattach(view.to_json())
    begin_without_memory(cluster, 1)
    others = replace(view, members=tuple(member for member in view.members if member.node != 1))
    with pytest.raises(StaleEpoch, match="node 1 was no member of epoch 1"):
        cluster.ranks[1].link.reattach(others.to_json())
    successor = Rank(cluster.places[1], 1, 3777)
    with pytest.raises(StaleEpoch, match="another process has taken the place of rank 1"):
        cluster.ranks[1].link.reattach(view.to_json())
    assert successor.link.page.is_current()
    successor.link.close()


def test_an_answer_that_was_lost_costs_no_place(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    cluster.enter(1)
    view = cluster.view(1).to_json()
    begin_without_memory(cluster, 0)
    fields = {"rank": 0, "pid": os.getpid(), "launch": "l", "attachment": "a", "body_nbytes": 100, "words": {}, "view": view}
    first = cluster.ask(0, "reattach", **fields)
    wait_until(lambda: cluster.keepers[0].members.epoch > 1, "the new epoch")
    assert cluster.ask(0, "reattach", **fields) == first


def test_a_second_keeper_of_the_same_memory_is_refused(start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start(1, parity=0)
    monkeypatch.setattr(birth, "LOCK_PATIENCE_S", 0.0)
    with pytest.raises(ConfigError, match="a keeper already serves"):
        Keeper("job", 0, cluster.places[0])
    assert cluster.ask(0, "ping") == {}


def test_a_memory_whose_path_is_too_long_for_a_socket_is_said(shm: Path) -> None:
    with pytest.raises(ConfigError, match="107 characters"):
        Keeper("job", 0, shm / ("x" * 100))


def test_a_damaged_piece_of_parity_is_refused(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=2)
    cluster.enter(1)
    fields = {"step": 1, "index": 0, "round": 1, "row": 1, "offset": 0, "block_nbytes": 64}
    with pytest.raises(CorruptData, match="parity row 1 of step 1 at 0: the piece arrived damaged"):
        cluster.ask(1, "parity", b"x" * 64, crc=crc32c(b"y" * 64), **fields)


def test_a_piece_of_parity_of_a_round_that_is_over_is_ignored(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=2)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    before = {name: bytes(slot.body[:64]) for name, slot in cluster.keepers[1].slots.items() if name.startswith("parity")}
    cluster.ask(1, "parity", b"x" * 64, crc=crc32c(b"x" * 64), step=1, index=0, round=0, row=1, offset=0, block_nbytes=64)
    assert {name: bytes(cluster.keepers[1].slots[name].body[:64]) for name in before} == before


def test_what_no_keeper_knows_is_answered_with_words(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    with pytest.raises(ClusterError, match="does not know the verb 'dance'"):
        cluster.ask(0, "dance")
    with pytest.raises(ClusterError, match="could not answer 'announce'"):
        cluster.ask(0, "announce", surprise=1)
    with pytest.raises(HoldfastError, match="has joined no epoch yet"):
        cluster.ask(0, "begin")
    assert cluster.ask(0, "ping") == {}


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 10), (0, 1 << 40), (1 << 40, 1), (0, -5)])
def test_bytes_outside_of_a_slot_are_not_given(start: Callable[..., Cluster], offset: int, nbytes: int) -> None:
    cluster = start(1, parity=0)
    cluster.enter(1)
    slot = cluster.keepers[0].slots[slot_name(0, 0)]
    wait_until(lambda: slot.header.state is SlotState.FILLING, "the first announcement")
    with pytest.raises(HoldfastError, match="were asked for"):
        cluster.ask(0, "range", name=slot_name(0, 0), epoch=1, step=0, offset=offset, nbytes=nbytes)


# -- the end -------------------------------------------------------------------------------------------------------------


def finish(cluster: Cluster, *, keep: bool) -> None:
    for rank in cluster.ranks.values():
        rank.link.page["completed"] = cluster.step
        rank.link.finishing(cluster.step, keep)

    def stopped() -> bool:
        for rank in cluster.ranks.values():
            rank.complete(cluster.step)
        return all(rank.link.page["stopped"] == rank.link.page["epoch"] for rank in cluster.ranks.values())

    wait_until(stopped, "the end of the run")


def test_an_ended_run_gives_all_memory_back(start: Callable[..., Cluster], shm: Path) -> None:
    cluster = start(3, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=1)
    finish(cluster, keep=False)
    for keeper in cluster.keepers.values():
        keeper.wait()
    assert not (shm / "job").exists()
    with pytest.raises(KeeperUnreachable):
        connect(cluster.places[0])


def test_the_last_step_is_committed_and_written_before_the_end(start: Callable[..., Cluster], shm: Path) -> None:
    cluster = start(3, parity=1, checkpoint_every=1000, checkpoints=str(shm / "ckpt"))
    cluster.enter(1)
    cluster.train(until_committed=1)
    finish(cluster, keep=True)
    for keeper in cluster.keepers.values():
        keeper.wait()
    assert [path.name for path in (shm / "ckpt").glob("step-*")] == [f"step-{cluster.step:08d}"]


def test_a_last_step_that_was_given_up_before_is_captured_again(start: Callable[..., Cluster], shm: Path) -> None:
    """The ranks have answered the announcement of this very step already; the run must not wait for ever."""
    cluster = start(2, parity=1, checkpoint_every=1000, checkpoints=str(shm / "ckpt"))
    cluster.enter(1)
    cluster.train(until_committed=1)
    target = [0]

    def all_ordered() -> bool:
        orders = [rank.link.page.target for rank in cluster.ranks.values()]
        handled = [rank.handled for rank in cluster.ranks.values()]
        target[0] = orders[0][0]
        return len(set(orders)) == 1 and all((step, n) != done for (step, _, n), done in zip(orders, handled, strict=True))

    wait_until(all_ordered, "a fresh target on both nodes")
    cluster.step = target[0]
    cluster.ranks[0].complete(cluster.step)
    busy = cluster.ranks[1]
    busy.link.page["completed"] = cluster.step
    busy.handled = busy.link.page.target[0], busy.link.page.target[2]
    busy.link.give_up(cluster.step, "busy")
    finish(cluster, keep=True)
    assert [path.name for path in (shm / "ckpt").glob("step-*")] == [f"step-{cluster.step:08d}"]


# -- keepers die, too ------------------------------------------------------------------------------------------------------


class HostedKeeper:
    """A keeper in a process of its own, as `holdfast up` has it without Ray."""

    def __init__(self, place: Path) -> None:
        self.place = place
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "holdfast.snapshot.host", "job", "0", str(place)],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(self.answers, "an answer of the keeper")

    def answers(self) -> bool:
        assert self.process.poll() is None, "the keeper ended"
        try:
            if Endpoint.read(self.place).pid != self.process.pid:
                return False
            connect(self.place).close()
        except KeeperUnreachable:
            return False
        return True

    def ask(self, verb: str, **fields: Any) -> Any:
        connection = connect(self.place)
        try:
            return connection.ask(verb, **fields)
        finally:
            connection.close()

    def end(self, how: signal.Signals = signal.SIGKILL) -> str:
        self.process.send_signal(how)
        return self.process.communicate(timeout=60)[1]


def commit_one(keeper: HostedKeeper) -> tuple[Rank, int]:
    rank = Rank(keeper.place, 0, 5000)
    member = Member.from_json({**Endpoint.read(keeper.place).member.to_json(), "ranks": (0,)})
    view = View("job", 1, 1, (member,), 1, 8, 1, 0, None, 0, 1, True, True)
    keeper.ask("join", view=view.to_json())
    keeper.ask("begin")
    step = [0]

    def committed() -> bool:
        step[0] += 1
        rank.complete(step[0])
        time.sleep(0.01)
        return rank.link.page["committed"] >= 2

    wait_until(committed, "a commit")
    return rank, rank.link.page["committed"]


def test_a_restarted_keeper_adopts_what_is_whole_and_drops_what_is_damaged(shm: Path) -> None:
    place = shm / "job" / "node-0"
    first = HostedKeeper(place)
    rank, committed = commit_one(first)
    rank.link.close()
    first.end()
    held = {path.name: Slot.open(path).header for path in place.glob("slot-*")}
    assert {header.step for header in held.values() if header.state is SlotState.COMMITTED} >= {committed}
    second = HostedKeeper(place)
    found = {slot["index"]: (slot["state"], slot["step"]) for slot in second.ask("survey")["slots"]}
    assert found == {header.index: (header.state, header.step) for header in held.values()}
    newest = max(held.values(), key=lambda header: (header.state is SlotState.COMMITTED, header.step))
    token = Endpoint.read(place).member.token
    second.end()
    slot = Slot.open(place / slot_name(0, newest.index), writable=True)
    slot.body[-(-slot.header.payload_nbytes // 64) * 64 + 30] ^= 1  # within its meta
    slot.close()
    third = HostedKeeper(place)
    assert newest.index not in {slot["index"] for slot in third.ask("survey")["slots"]}
    assert not (place / slot_name(0, newest.index)).exists()
    assert Endpoint.read(place).member.token == token, "peers find the keeper that took its place"
    assert "is not adopted" in third.end(signal.SIGTERM)
    assert third.process.returncode == 0
    assert not place.exists(), "asked to end, a keeper gives its memory back"


def test_a_keeper_that_cannot_serve_says_why_and_ends(shm: Path) -> None:
    place = shm / ("x" * 100)
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.snapshot.host", "job", "0", str(place)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "ConfigError" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_address_that_a_keeper_leaves_is_for_its_user_only(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    for name in ("keeper.json", "keeper.sock", "keeper.lock"):
        assert (cluster.places[0] / name).stat().st_mode & 0o077 == 0, name
    assert cluster.places[0].stat().st_mode & 0o077 == 0
    assert json.loads((cluster.places[0] / "keeper.json").read_text())["token"] == cluster.keepers[0].token


def test_without_a_keeper_there_is_no_link(shm: Path) -> None:
    with pytest.raises(KeeperUnreachable, match="no keeper has left its address"):
        Link(shm / "nobody", 0, "l", 10)


def test_parity_slots_are_named_apart_from_ranks() -> None:
    assert {slot_name(0, 0), slot_name(0, 1), parity_name(0), parity_name(1)} == {
        "slot-0-0",
        "slot-0-1",
        "parity-0",
        "parity-1",
    }
