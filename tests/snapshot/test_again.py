"""A peer or a network that is away for a moment costs a snapshot some time, and neither its parity nor the ones after it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import KeeperUnreachable
from holdfast.snapshot import outbox, rounds
from holdfast.snapshot.outbox import Outbox
from tests.snapshot.nodes import Nodes
from tests.snapshot.test_keeper import Cluster, stored
from tests.snapshot.test_last_words import Processes

Wait = Callable[..., None]


@pytest.fixture
def start(shm: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def build(nodes: int, **settings: Any) -> Cluster:
        made.append(Cluster(shm, nodes, **settings))
        made[-1].enter(1)
        return made[-1]

    yield build
    for cluster in made:
        cluster.close()


def failing(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception) -> list[int]:
    """The next exchanges fail in the middle: what had been read is lost. Returns the steps whose exchange failed."""
    encode, failed = rounds.encode_stripe, []

    def away(group: Any, node: int, readers: Any, own: memoryview, forward: Any, last: Any = None) -> int:
        if len(failed) >= times:
            return encode(group, node, readers, own, forward, last)
        failed.append(group.step)
        own[:16] = b"half of a stripe"
        raise error

    monkeypatch.setattr(rounds, "encode_stripe", away)
    return failed


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "tcp"])
@pytest.mark.parametrize("parity", [1, 2])
def test_an_exchange_that_was_cut_is_repeated_and_the_captured_step_committed(
    start: Callable[..., Cluster], wait_until: Wait, monkeypatch: pytest.MonkeyPatch, parity: int, mapped: bool
) -> None:
    """The next snapshot would be a hundred steps away."""
    failed = failing(monkeypatch, 3, KeeperUnreachable("the connection was cut in the middle of a pull"))
    cluster = start(3, parity=parity, mapped=mapped, every=100)
    for rank in cluster.ranks.values():
        wait_until(lambda rank=rank: rank.link.page.target[0] == 100, "the announcement")
        rank.complete(100)
    wait_until(lambda: all(rank.link.page["committed"] == 100 for rank in cluster.ranks.values()), "a commit without a step")
    assert failed == [100, 100, 100]
    for node, rank in cluster.ranks.items():
        assert stored(cluster, node, rank, 100) == rank.bytes_at(100)
        assert cluster.ask(node, "status")["survivable_losses"] == parity
        assert rank.handled == (100, 1), "nobody has captured it once more"


def test_a_rank_that_is_still_capturing_while_others_try_again_is_waited_for(
    start: Callable[..., Cluster], wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failing(monkeypatch, 1, OSError("no route to host"))
    cluster = start(4, parity=1, every=10, group_size=2)
    group = cluster.keepers[0].members.group_nodes
    assert len(group) == 2
    early = [cluster.ranks[node] for node in group]
    late = [cluster.ranks[node] for node in cluster.keepers if node not in group]
    for rank in early:
        wait_until(lambda rank=rank: rank.link.page.target[0] == 10, "the announcement")
        rank.complete(10)
    wait_until(lambda: cluster.keepers[late[0].rank].rounds.present.number == 2, "the second attempt")
    for rank in late:
        rank.complete(10)
    wait_until(lambda: all(rank.link.page["committed"] == 10 for rank in cluster.ranks.values()), "a commit")
    assert failed == [10]
    for node, rank in cluster.ranks.items():
        assert stored(cluster, node, rank, 10) == rank.bytes_at(10)


def test_connections_that_were_cut_while_nobody_spoke_cost_no_message(start: Callable[..., Cluster]) -> None:
    """As a firewall does with those that are idle for long."""
    cluster = start(3, parity=1, mapped=False)
    for _ in range(3):
        committed = cluster.train(until_committed=cluster.step + 1)
        for keeper in cluster.keepers.values():
            for box in keeper.members._outboxes.values():
                if box._connection is not None:
                    with suppress(OSError):
                        box._connection._sock.shutdown(socket.SHUT_RDWR)
    assert cluster.train(until_committed=committed + 2) >= committed + 2


def test_a_peer_that_cannot_be_reached_for_a_while_hears_all_of_it_later(
    start: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start(3, parity=1, mapped=False)
    committed = cluster.train(until_committed=1)
    reach, until = outbox.reach, time.monotonic() + 0.5

    def away(member: Any) -> Any:
        if time.monotonic() < until:
            raise KeeperUnreachable("no route to host")
        return reach(member)

    monkeypatch.setattr(outbox, "reach", away)
    for keeper in cluster.keepers.values():
        for box in keeper.members._outboxes.values():
            if box._connection is not None:
                box._connection.close()
    assert cluster.train(until_committed=committed + 3) >= committed + 3
    assert time.monotonic() > until


@pytest.mark.parametrize(("count", "m"), [(3, 1), (4, 2)])
def test_what_arrives_twice_counts_once(
    shm: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch, count: int, m: int
) -> None:
    """A message whose answer was lost is sent again. Parity that follows changes would suffer from a change that is added twice."""
    once = Outbox._deliver_once

    def twice(self: Outbox, verb: str, **fields: Any) -> None:
        once(self, verb, **fields)
        once(self, verb, **fields)

    monkeypatch.setattr(Outbox, "_deliver_once", twice)
    group = Nodes(shm, count, m, mapped=False)
    try:
        group.enter()
        for step in range(6):
            group.change(step % count, 1000 * step, 100)
            group.commit(wait_until)
    finally:
        group.close()


FAILING_HOST = """
import sys
from pathlib import Path
from holdfast.errors import KeeperUnreachable
from holdfast.snapshot import host, rounds

encode, mark = rounds.encode_stripe, Path({mark!r})

def cut(group, *rest):
    if group.step >= 3 and not mark.exists():
        mark.touch()
        raise KeeperUnreachable("cut")
    return encode(group, *rest)

rounds.encode_stripe = cut
sys.exit(host.main(sys.argv[1:]))
"""


@pytest.mark.campaign
def test_a_coordinator_killed_before_the_second_attempt_leaves_a_step_that_is_encoded_when_it_is_back(
    shm: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, mark = shm / "killed", shm / "cut"
    monkeypatch.setattr("tests.snapshot.test_last_words.HOST", FAILING_HOST.format(mark=str(mark)))
    cluster = Processes(shm, 2, [{"at": "lead.protecting", "role": "keeper", "place": 0, "once": str(killed)}])
    try:
        step = 0
        while not mark.exists():
            if all(rank.link.page.target[0] > step for rank in cluster.ranks):
                step += 1
                for rank in cluster.ranks:
                    rank.complete(step)
            time.sleep(0.002)
        assert cluster.running[0].wait(60) < 0
        assert killed.exists()
        cluster.running[0] = cluster.start(0)
        wait_until(lambda: all(rank.link.committed_step == step for rank in cluster.ranks), "the parity of the captured step")
        for node in range(2):
            assert cluster.ask(node, "status")["survivable_losses"] == 1  # type: ignore[index]
    finally:
        cluster.close()
