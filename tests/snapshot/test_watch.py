"""The keeper's watch, on real keepers: rot is mended from parity, drills are honest, and the gauge counts what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from holdfast.environment import watch_every_s
from holdfast.errors import ConfigError, HoldfastError
from holdfast.events import Event, subscribe
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.scrub import Scrubber
from holdfast.snapshot.slots import HEADER_NBYTES, Slot, SlotState, aligned
from holdfast.snapshot.watch import Health, survivable_losses
from tests.snapshot.test_keeper import Cluster, wait_until


@pytest.fixture
def start(shm: Path) -> Iterator[Callable[..., Cluster]]:
    """A cluster that has committed a step, and stands still: the next one is ordered, and nobody captures it."""
    made: list[Cluster] = []

    def build(nodes: int, **settings: Any) -> Cluster:
        cluster = Cluster(shm, nodes, **settings)
        made.append(cluster)
        cluster.enter(1)
        cluster.train(until_committed=2)
        wait_until(lambda: stands_still(cluster), "the last commit and the next order to reach everybody")
        return cluster

    yield build
    for cluster in made:
        cluster.close()


@pytest.fixture
def events() -> Iterator[list[Event]]:
    found: list[Event] = []
    end = subscribe(found.append)
    yield found
    end()


def stands_still(cluster: Cluster) -> bool:
    for rank in cluster.ranks.values():
        rank.complete(cluster.step)  # answers an order that it has already passed
    headers = [slot.header for keeper in cluster.keepers.values() for slot in keeper.slots.values()]
    whole = {(header.step, header.index) for header in headers if header.state is SlotState.COMMITTED}
    waiting = all(rank.link.page.target[0] > rank.link.page["completed"] for rank in cluster.ranks.values())
    others = {header.state for header in headers if header.index not in {index for _, index in whole}}
    return waiting and len(whole) == 1 and others == {SlotState.FILLING}


def committed(cluster: Cluster, node: int, rank: int | None = None) -> Slot:
    """The newest committed slot of a rank of the node."""
    rank = cluster.ranks_of[node][0] if rank is None else rank
    slots = [cluster.keepers[node].slots[slot_name(rank, index)] for index in (0, 1)]
    return max((s for s in slots if s.header.state is SlotState.COMMITTED), key=lambda s: s.header.step)


def parity_beside(cluster: Cluster, node: int, slot: Slot) -> Slot:
    return cluster.keepers[node].slots[parity_name(slot.header.index)]


def flip(slot: Slot, offset: int, bit: int = 3) -> None:
    """As a stray write would: through the file, past the keeper."""
    with slot.path.open("r+b") as file:
        file.seek(HEADER_NBYTES + offset)
        (byte,) = file.read(1)
        file.seek(HEADER_NBYTES + offset)
        file.write(bytes([byte ^ 1 << bit]))


def contents(slot: Slot) -> bytes:
    return slot.path.read_bytes()[HEADER_NBYTES : HEADER_NBYTES + slot.header.body_nbytes]


# -- scrubbing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("place", ["first byte", "last byte", "meta", "parity", "last of parity"])
def test_a_flipped_bit_is_put_right_from_parity(start: Callable[..., Cluster], place: str, mapped: bool) -> None:
    cluster = start(3, parity=1, ranks_each=2, mapped=mapped)
    slot = committed(cluster, 1, rank=3)
    if "parity" in place:
        slot = parity_beside(cluster, 1, slot)
    nbytes = slot.header.payload_nbytes
    offset = {"meta": aligned(nbytes) + 70, "last byte": nbytes - 1, "last of parity": nbytes - 1}.get(place, 0)
    good = contents(slot)
    flip(slot, offset)
    assert contents(slot) != good
    done = cluster.keepers[1].watch.scrub()
    assert [(rot.slot, rot.problem) for rot in done.rot] == [(slot.path.name, "")]
    assert contents(slot) == good
    assert cluster.keepers[1].watch.scrub().rot == []


def test_a_scrub_of_sound_memory_reads_all_of_it_and_changes_nothing(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=1)
    slots = [slot for slot in cluster.keepers[0].slots.values() if slot.header.state is SlotState.COMMITTED]
    before = [slot.path.read_bytes() for slot in slots]
    done = cluster.keepers[0].watch.scrub()
    payloads = sum(slot.header.payload_nbytes + slot.header.meta_nbytes for slot in slots)
    assert (done.rot, done.slots, done.left, done.nbytes) == ([], len(slots), 0, payloads)
    assert [slot.path.read_bytes() for slot in slots] == before


def test_a_torn_header_is_written_anew(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    slot = committed(cluster, 0)
    with slot.path.open("r+b") as file:
        file.write(bytes(HEADER_NBYTES))
    with pytest.raises(HoldfastError, match="neither header is whole"):
        Slot.open(slot.path)
    done = cluster.keepers[0].watch.scrub()
    assert [(rot.region, rot.problem) for rot in done.rot] == [("header", "")]
    assert Slot.open(slot.path).header.step == slot.header.step


def test_with_two_parities_rot_is_mended_although_a_survivor_has_rotted_too(start: Callable[..., Cluster]) -> None:
    cluster = start(5, parity=2)
    mine, other = committed(cluster, 0), committed(cluster, 1)
    good = contents(mine)
    flip(mine, 10)
    for offset in range(0, other.header.payload_nbytes, 64):
        flip(other, offset)
    (rot,) = cluster.keepers[0].watch.scrub().rot
    assert not rot.problem
    assert contents(mine) == good


def test_what_cannot_be_repaired_is_said_and_lowers_the_gauge_and_is_left_as_it_is(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=1)
    keeper, mine = cluster.keepers[0], committed(cluster, 0)
    for spoiled in (committed(cluster, 1), parity_beside(cluster, 1, committed(cluster, 1))):
        for offset in range(0, spoiled.header.payload_nbytes, 2):
            flip(spoiled, offset)
    for offset in range(mine.header.payload_nbytes):
        flip(mine, offset)
    rotten = contents(mine)
    assert keeper.watch.survivable_losses() == 1
    (rot,) = keeper.watch.scrub().rot
    assert "no set of survivors" in rot.problem
    assert contents(mine) == rotten
    assert keeper.watch.survivable_losses() == 0
    for other in (1, 2):  # the peers hear of it
        cluster.keepers[other].watch.look_round()
        assert cluster.keepers[other].watch.survivable_losses() == 0
    newest = mine.header.step
    cluster.train(until_committed=newest + 2)  # both slots have been filled anew
    keeper.watch.scrub()
    assert keeper.watch.survivable_losses() == 1


def test_a_slot_that_goes_on_to_the_next_step_while_it_is_read_is_no_rot(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    keeper, slot = cluster.keepers[0], committed(cluster, 0)

    def pace(nbytes: int) -> None:
        if nbytes == slot.header.payload_nbytes:
            flip(slot, 0)
            slot.update(state=SlotState.FILLING)

    done = Scrubber(keeper.slots, keeper.watch._readers, pace).scrub()
    assert done.rot == []
    assert done.left == 1


def test_the_watch_runs_by_itself(shm: Path, start: Callable[..., Cluster], events: list[Event]) -> None:
    cluster = start(3, parity=1)
    slot = committed(cluster, 2)
    good = contents(slot)
    flip(slot, 5)
    watch = cluster.keepers[2].watch
    watch.start(every_s=0.05)
    wait_until(lambda: contents(slot) == good, "the scrub to repair it")
    wait_until(lambda: watch.status()["last_drill"] is not None, "a drill")
    assert {"scrub.done", "scrub.rot", "drill.done"} <= {event.name for event in events}


# -- drills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("nodes", "parity"), [(2, 1), (3, 1), (5, 2)])
def test_a_drill_rebuilds_every_kind_of_block(start: Callable[..., Cluster], nodes: int, parity: int, mapped: bool) -> None:
    cluster = start(nodes, parity=parity, mapped=mapped)
    watch = cluster.keepers[1].watch
    for seed in range(12):
        watch._random = Random(seed)
        done = watch.drill()
        assert done is not None
        assert done.agrees
        assert done.step == committed(cluster, 1).header.step


def test_a_drill_sees_that_a_survivor_would_rebuild_something_else(start: Callable[..., Cluster], events: list[Event]) -> None:
    cluster = start(3, parity=1)
    slot = committed(cluster, 1)
    good = contents(slot)
    for offset in range(0, slot.header.payload_nbytes, 16):
        flip(slot, offset)
    watch = cluster.keepers[0].watch
    found = [done.agrees for done in (watch.drill() for _ in range(20)) if done is not None]
    assert False in found
    assert cluster.keepers[1].watch.scrub().repaired == 1
    assert contents(slot) == good
    assert all(done.agrees for done in (watch.drill() for _ in range(20)) if done is not None)


def test_a_drill_without_a_peer_to_ask_comes_to_nothing(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.keepers.pop(0).close()
    assert cluster.keepers[1].watch.drill() is None


# -- the gauge -----------------------------------------------------------------------------------------------------------


def test_the_gauge_follows_keepers_that_go_away(start: Callable[..., Cluster], events: list[Event]) -> None:
    cluster = start(4, parity=2)
    watch = cluster.keepers[3].watch
    watch.look_round()
    assert watch.survivable_losses() == 2
    for node, left in ((1, 1), (2, 0), (0, 0)):
        cluster.keepers.pop(node).close()
        watch.look_round()
        assert watch.survivable_losses() == left
    heard = [event.fields["losses"] for event in events if event.name == "snapshot.survivable_losses"]
    assert heard == [2, 1, 0]


def test_a_node_counts_while_it_is_in_the_epoch_has_committed_and_is_sound(start: Callable[..., Cluster]) -> None:
    view = start(3, parity=2).view(epoch=7)
    well = Health(epoch=7, committed=4, damaged=0)
    assert survivable_losses(view, 0, {0: well}) == 2
    assert survivable_losses(view, 0, {0: well, 1: well, 2: well}) == 2
    for ill in (None, Health(6, 4, 0), Health(7, 0, 0), Health(7, 4, 1)):
        assert survivable_losses(view, 0, {0: well, 1: ill}) == 1
    assert survivable_losses(view, 0, {0: None, 1: None, 2: None}) == 0
    assert survivable_losses(None, 0, {}) == 0


# -- how often ---------------------------------------------------------------------------------------------------------


def test_the_environment_says_how_often_memory_is_scrubbed() -> None:
    assert watch_every_s({}) == 60
    assert watch_every_s({"HOLDFAST_SCRUB_EVERY_S": "2.5"}) == 2.5
    assert watch_every_s({"HOLDFAST_SCRUB_EVERY_S": "0"}) == 0


@pytest.mark.parametrize("text", ["often", "-1", "inf", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"HOLDFAST_SCRUB_EVERY_S='{text}'; seconds are needed, or 0 for never"):
        watch_every_s({"HOLDFAST_SCRUB_EVERY_S": text})
