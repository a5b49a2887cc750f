"""Peers that are slow, stale, of another run, or no keepers at all: nothing they do changes what is committed."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.elastic.faults.impostor import noise, serve
from holdfast.errors import HoldfastError, KeeperUnreachable, OutOfSharedMemory, StaleEpoch
from holdfast.events import arm
from holdfast.snapshot.exchange import slot_name
from holdfast.snapshot.plan import plan_restore
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.wire import Connection
from tests.snapshot.test_keeper import Cluster, Rank


@pytest.fixture
def start(shm: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def build(nodes: int, **settings: Any) -> Cluster:
        made.append(Cluster(settings.pop("place", shm), nodes, mapped=False, **settings))
        made[-1].enter(1)
        return made[-1]

    yield build
    for cluster in made:
        cluster.close()
    arm(None)


def go_on(cluster: Cluster, *, steps: int) -> None:
    """Train on, whatever becomes of the snapshots."""
    for _ in range(steps):
        cluster.step += 1
        for rank in cluster.ranks.values():
            rank.complete(cluster.step)
        time.sleep(0.005)


def committed_bytes(cluster: Cluster, rank: int) -> dict[int, bytes]:
    """What is committed of a rank, by step."""
    slots = [cluster.keepers[cluster_node(cluster, rank)].slots[slot_name(rank, index)] for index in (0, 1)]
    whole = [slot for slot in slots if slot.header.state is SlotState.COMMITTED]
    return {slot.header.step: bytes(slot.body[: slot.header.payload_nbytes]) for slot in whole}


def cluster_node(cluster: Cluster, rank: int) -> int:
    return next(node for node, ranks in cluster.ranks_of.items() if rank in ranks)


def replace_by_impostor(cluster: Cluster, node: int) -> socket.socket:
    """The keeper is gone, and somebody answers noise at its port."""
    keeper = cluster.keepers.pop(node)
    cluster.ranks.pop(cluster.ranks_of[node][0]).link.close()
    keeper.close()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((keeper.member.address, keeper.member.port))
    listener.listen(16)

    def answer() -> None:
        try:
            serve(listener, random.Random(3))
        except OSError:
            return  # closed by the test

    threading.Thread(target=answer, daemon=True).start()
    return listener


@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_peer_that_answers_garbage_costs_snapshots_and_nothing_else(start: Callable[..., Cluster], node: int) -> None:
    """Node 0 leads the commit."""
    cluster = start(3, parity=1)
    newest = cluster.train(until_committed=2)
    listener = replace_by_impostor(cluster, node)
    go_on(cluster, steps=60)
    for other, keeper in cluster.keepers.items():
        assert cluster.ask(other, "ping") == {}
        assert keeper.watch.drill() is None
        keeper.watch.look_round()
        assert keeper.watch.survivable_losses() == 0
        rank = cluster.ranks[other]
        held = committed_bytes(cluster, other)
        assert held
        assert all(data == rank.bytes_at(step) for step, data in held.items())
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    assert plan.step >= newest
    listener.close()


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_an_unreachable_keeper_to_whoever_asks(seed: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    source = random.Random(seed)

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1 << 16)
            peer.sendall(noise(source))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        # Words that are an answer by chance are as good as any: the next question finds that nobody is there.
        with pytest.raises(KeeperUnreachable):
            Connection(listener.getsockname(), "token", timeout_s=10).ask("health")
    finally:
        thread.join()
        listener.close()


def test_while_keepers_stand_still_training_goes_on(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=1)
    newest = cluster.train(until_committed=2)
    released = threading.Event()

    def handler(name: str) -> None:
        if name == "snapshot.exchanged":
            released.wait(60)

    arm(handler)
    go_on(cluster, steps=50)
    assert not released.is_set()
    assert all(rank.link.page["committed"] <= newest + 1 for rank in cluster.ranks.values())
    released.set()
    late = cluster.train(until_committed=cluster.step + 1)
    for node in cluster.keepers:
        assert committed_bytes(cluster, node)[late] == cluster.ranks[node].bytes_at(late)


def test_a_message_of_an_older_epoch_is_refused_and_changes_nothing(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    newest = cluster.train(until_committed=2)
    view = cluster.view(2, committed=newest, index=0)
    for node in cluster.keepers:
        cluster.ask(node, "join", view=view.to_json())
    before = {node: committed_bytes(cluster, node) for node in cluster.keepers}
    stale = {"epoch_of_sender": 1, "step": newest + 1, "index": 1}
    for verb, fields in {"announce": {"round": 9}, "commit": {}, "protect": {"round": 9}}.items():
        with pytest.raises(StaleEpoch, match="came from epoch 1: its sender was replaced"):
            cluster.ask(0, verb, **stale, **fields)
    with pytest.raises(StaleEpoch, match="already in epoch 2"):
        cluster.ask(0, "join", view=cluster.view(1).to_json())
    assert {node: committed_bytes(cluster, node) for node in cluster.keepers} == before


def test_two_jobs_on_one_machine_do_not_see_each_other(start: Callable[..., Cluster], shm: Path) -> None:
    (shm / "other").mkdir()
    one, other = start(2, parity=1), start(2, parity=1, place=shm / "other")
    one.train(until_committed=3)
    other.train(until_committed=5)
    with pytest.raises(HoldfastError, match="this keeper belongs to another run"):
        Connection((one.keepers[0].member.address, one.keepers[0].member.port), other.keepers[0].token)
    for node in list(one.keepers):
        one.keepers.pop(node).close()
    for rank in one.ranks.values():
        rank.link.close()
    one.ranks.clear()
    newest = other.train(until_committed=other.step + 1)
    for node in other.keepers:
        assert committed_bytes(other, node)[newest] == other.ranks[node].bytes_at(newest)
    assert not list((shm / "job").glob("*"))


def test_a_full_memory_is_said_before_training_and_harms_no_other_rank(start: Callable[..., Cluster], shm: Path) -> None:
    """posix_fallocate says at once what a sparse file would say as SIGBUS in step 40,000."""
    cluster = start(2, parity=1)
    newest = cluster.train(until_committed=2)
    with pytest.raises(
        OutOfSharedMemory, match=r"MiB are free.*--ipc=host or a larger --shm-size; or give protect\(memory_dir=…\)"
    ):
        Rank(cluster.places[0], 7, 1 << 45)
    assert not list(cluster.places[0].glob("*.new"))
    assert cluster.train(until_committed=newest + 1) > newest
