"""A rebuilt node has its bytes first and its parity after them, and nobody is told otherwise in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ClusterError, KeeperUnreachable
from holdfast.snapshot import exchange, reprotect
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.plan import RestorePlan, Survey, plan_restore
from holdfast.snapshot.slots import Slot, SlotState
from tests.snapshot.nodes import Nodes

Wait = Callable[..., None]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PIECE_NBYTES", 3000)


@pytest.fixture
def nodes(shm: Path) -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def make(count: int, m: int, *, mapped: bool = False) -> Nodes:
        made.append(Nodes(shm, count, m, mapped=mapped))
        made[-1].enter()
        return made[-1]

    yield make
    for group in made:
        group.close()


def committed(group: Nodes, wait_until: Wait) -> Nodes:
    for _ in range(2):
        group.commit(wait_until)
    return group


def lose(group: Nodes, *lost: int) -> None:
    """Their keepers go with all their memory, and empty ones come in their place."""
    for node in lost:
        group.links.pop(node).close()
        group.keepers[node].close()
        group.keepers[node] = Keeper("job", node, group.place(node), mapped=group.mapped)


def surveys(group: Nodes, without: int = -1) -> list[Survey]:
    return [Survey.from_json(group.ask(node, "survey")) for node in group.keepers if node != without]


def rebuild(group: Nodes) -> RestorePlan:
    plan, reasons = plan_restore(surveys(group))
    assert plan is not None, reasons
    for item in plan.rebuilds:
        told = [group.keepers[node].member.to_json() for node in sorted({*item.survivors, *item.with_parity})]
        whole = {"with_data": list(item.survivors), "with_parity": list(item.with_parity)}
        answer = group.ask(item.host, "rebuild", group=item.group.to_json(), lost=item.lost, survivors=told, **whole)
        assert answer["nbytes"] > 0
    return plan


@contextmanager
def busy(keeper: Keeper) -> Iterator[None]:
    """The keeper's worker has something else to do."""
    until = threading.Event()
    keeper.rounds.put(lambda: bool(until.wait()) and None)
    try:
        yield
    finally:
        until.set()


def has_parity(group: Nodes, node: int) -> bool:
    return bool(group.ask(node, "health")["parity"])


def assert_data(group: Nodes, node: int, index: int) -> None:
    slot = Slot.open(group.place(node) / slot_name(node, index))
    assert slot.header.state is SlotState.COMMITTED
    assert bytes(slot.body[: slot.header.payload_nbytes]) == group.data[node].tobytes()
    slot.close()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("count", "m", "lost"), [(2, 1, (1,)), (3, 1, (2,)), (4, 2, (1, 2)), (5, 2, (0, 3))])
def test_parity_made_behind_training_is_the_one_that_was_lost(
    nodes: Callable[..., Nodes], wait_until: Wait, count: int, m: int, lost: tuple[int, ...], mapped: bool
) -> None:
    group = committed(nodes(count, m, mapped=mapped), wait_until)
    index = group.index
    lose(group, *lost)
    assert rebuild(group).protected
    for node in lost:
        assert_data(group, node, index)
    group.enter(index=index)
    for node in lost:
        wait_until(lambda node=node: has_parity(group, node), f"parity on node {node}")
    group.assert_parity(index)
    committed(group, wait_until)


def test_until_a_node_has_its_parity_its_group_says_that_nobody_may_be_lost(
    nodes: Callable[..., Nodes], wait_until: Wait
) -> None:
    group = committed(nodes(3, 1), wait_until)
    assert group.ask(2, "status")["survivable_losses"] == 1
    index = group.index
    lose(group, 2)
    rebuild(group)
    with busy(group.keepers[2]):
        group.enter(index=index)
        assert not has_parity(group, 2)
        assert group.ask(2, "status")["survivable_losses"] == 0
        group.keepers[0].watch.look_round()
        assert group.ask(0, "status")["survivable_losses"] == 0
        plan, reasons = plan_restore(surveys(group, without=1))
        assert plan is None, "a stripe of node 1 has its parity on node 2, which has none"
        assert "stripe 2 has 1 of the 2 blocks it needs" in reasons[0]
        again, _ = plan_restore(surveys(group, without=2))
        assert again is not None, "the others' parity is what it was"
        assert again.step == group.step
    wait_until(lambda: has_parity(group, 2), "parity on node 2")
    assert group.ask(2, "status")["survivable_losses"] == 1
    plan, _ = plan_restore(surveys(group, without=1))
    assert plan is not None


def test_a_keeper_that_dies_between_data_and_parity_leaves_a_step_that_is_encoded_anew(
    nodes: Callable[..., Nodes], wait_until: Wait
) -> None:
    group = committed(nodes(3, 1), wait_until)
    index = group.index
    lose(group, 2)
    rebuild(group)
    group.keepers[2].close(free=False)
    group.keepers[2] = Keeper("job", 2, group.place(2), mapped=False)
    plan, _ = plan_restore(surveys(group))
    assert plan is not None
    assert (plan.step, plan.rebuilds, plan.protected) == (group.step, (), False)
    group.enter(index=index, protected=plan.protected)
    wait_until(lambda: all(has_parity(group, node) for node in group.keepers), "parity everywhere")
    group.assert_parity(index)


def test_a_survivor_that_rots_meanwhile_is_not_encoded_and_the_next_snapshot_is(
    nodes: Callable[..., Nodes], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reprotect, "PAUSE_S", (0.01, 0.01))
    monkeypatch.setattr(reprotect, "TRIES", 3)
    group = committed(nodes(3, 1), wait_until)
    index = group.index
    lose(group, 2)
    rebuild(group)
    body = group.keepers[0].slots[slot_name(0, index)].body
    body[: len(body)] = bytes(len(body))
    group.enter(index=index)
    wait_until(lambda: "protects nobody until the next snapshot" in caplog.text, "the reason")
    assert f"{slot_name(0, index)} of node 0 rotted" in caplog.text
    assert caplog.text.count("protects nobody and tries again") == 2
    assert not has_parity(group, 2)
    group.commit(wait_until)
    assert has_parity(group, 2)


def test_parity_that_fails_behind_training_is_made_when_the_peer_is_there_again(
    nodes: Callable[..., Nodes], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No newer snapshot comes to the rescue: nobody captures one."""
    monkeypatch.setattr(reprotect, "PAUSE_S", (0.01, 0.05))
    group = committed(nodes(3, 1), wait_until)
    index, encode, failures = group.index, reprotect.encode_row, []

    def away(*args: Any) -> Iterator[tuple[int, memoryview]]:
        for piece in encode(*args):
            yield piece
            if len(failures) < 3:
                failures.append(piece)
                raise KeeperUnreachable("the connection was cut in the middle of a block")

    monkeypatch.setattr(reprotect, "encode_row", away)
    lose(group, 2)
    rebuild(group)
    group.enter(index=index)
    wait_until(lambda: has_parity(group, 2), "parity on node 2")
    assert len(failures) == 3
    assert caplog.text.count("protects nobody and tries again") == 3
    group.assert_parity(index)
    group.keepers[0].watch.look_round()
    assert group.ask(0, "status")["survivable_losses"] == 1
    committed(group, wait_until)


def test_parity_that_a_newer_commit_has_brought_is_not_tried_again(
    nodes: Callable[..., Nodes], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reprotect, "PAUSE_S", (1.0, 1.0))
    group = committed(nodes(3, 1), wait_until)
    index, encode, asked = group.index, reprotect.encode_row, []

    def away(*args: Any) -> Iterator[tuple[int, memoryview]]:
        asked.append(args)
        raise KeeperUnreachable("away")
        yield from encode(*args)

    monkeypatch.setattr(reprotect, "encode_row", away)
    lose(group, 2)
    rebuild(group)
    group.enter(index=index)
    wait_until(lambda: "protects nobody and tries again in 1.0 s" in caplog.text, "the first failure")
    committed(group, wait_until)
    time.sleep(1.2)
    assert len(asked) == 1
    group.assert_parity(group.index)


def test_a_peer_that_dies_meanwhile_leaves_the_node_without_parity_and_says_so(
    nodes: Callable[..., Nodes], wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    group = committed(nodes(3, 1), wait_until)
    index = group.index
    lose(group, 2)
    rebuild(group)
    with busy(group.keepers[2]):
        group.enter(index=index)
        group.links.pop(1).close()
        group.keepers[1].close()
    wait_until(lambda: "protects nobody and tries again" in caplog.text, "the reason")
    assert not has_parity(group, 2)
    plan, reasons = plan_restore(surveys(group, without=1))
    assert plan is None
    assert "its parity covers 1" in reasons[0]
    group.keepers.pop(1)


def test_parity_of_a_slot_that_a_newer_snapshot_was_given_is_not_sealed(
    nodes: Callable[..., Nodes], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = committed(nodes(3, 1), wait_until)
    index, encode, pieces = group.index, reprotect.encode_row, []

    def interrupted(*args: Any) -> Iterator[tuple[int, memoryview]]:
        for piece in encode(*args):
            yield piece
            pieces.append(piece)
            if len(pieces) == 1:
                group.keepers[2].slots.void(parity_name(index), 9)

    monkeypatch.setattr(reprotect, "encode_row", interrupted)
    lose(group, 2)
    rebuild(group)
    group.enter(index=index)
    wait_until(lambda: "its slot was given to a newer snapshot" in caplog.text, "the reason")
    assert len(pieces) == 1
    assert group.keepers[2].slots[parity_name(index)].header.state is SlotState.FILLING
    group.commit(wait_until)


@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_damaged_on_its_way_is_noticed_and_made_once_more(
    nodes: Callable[..., Nodes], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    group = committed(nodes(3, 1, mapped=mapped), wait_until)
    write, written = Slot.write, []

    def damaging(slot: Slot, offset: int, data: memoryview) -> None:
        written.append(offset)
        write(slot, offset, memoryview(bytes(len(data))) if len(written) == 1 else data)

    lose(group, 2)
    monkeypatch.setattr(Slot, "write", damaging)
    rebuild(group)
    assert len(written) % 2 == 0, "all of it was made twice"
    assert_data(group, 2, group.index)
    assert not list(group.place(2).glob("*.new"))


def test_pieces_of_a_share_are_given_in_their_order_only(nodes: Callable[..., Nodes], wait_until: Wait) -> None:
    group = committed(nodes(3, 1), wait_until)
    plan, _ = plan_restore(surveys(group, without=2))
    assert plan is not None
    (item,) = plan.rebuilds
    task = {
        "group": item.group.to_json(),
        "lost": 2,
        "survivors": [group.keepers[node].member.to_json() for node in (0, 1)],
        "with_data": [0, 1],
        "with_parity": [0, 1],
    }
    connection = group.keepers[0].connection(group.keepers[0].member)
    connection.ask("share", task=task)
    with pytest.raises(ClusterError, match="3000 of stripe 0 is not the next"):
        connection.ask("decode", stripe=0, offset=3000)
    connection.ask("decode", stripe=0, offset=0)
    connection.ask("decode", stripe=1, offset=0)
    connection.ask("decode", stripe=1, offset=3000)
    connection.close()
