"""What keepers do when somebody is missing, late, replaced or told to go, with real slots and sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zarr

from holdfast import ckpt, events
from holdfast.errors import StaleEpoch
from holdfast.snapshot import coordinator as coordinator_module
from holdfast.snapshot import rescue, spill
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.exchange import slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.plan import lies_as, plan_restore
from holdfast.snapshot.regroup import make_whole
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.view import Member, groups
from tests.snapshot.test_keeper import Cluster, HostedKeeper, Rank, finish, quiet, stored, wait_until


@pytest.fixture
def start(shm: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def build(nodes: int, **settings: Any) -> Cluster:
        made.append(Cluster(shm, nodes, **settings))
        return made[-1]

    yield build
    events.arm(None)
    for cluster in made:
        cluster.close()


def restart(cluster: Cluster, node: int, **settings: Any) -> None:
    """The keeper's process ends and another takes over what is in memory."""
    cluster.keepers[node].close(free=False)
    cluster.keepers[node] = Keeper("job", node, cluster.places[node], **settings)


def steps_of(place: Path) -> list[int]:
    return [info.step for info in ckpt.list_steps(place)] if place.is_dir() else []


# -- a keeper that dies alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [(1,), (0,), (0, 1, 2)], ids=["a member", "the coordinator's", "all of them"])
def test_a_keeper_that_died_alone_is_taken_into_a_new_epoch_and_commits_go_on(
    start: Callable[..., Cluster], dead: tuple[int, ...]
) -> None:
    cluster = start(3, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    step = quiet(cluster)
    for node in dead:
        restart(cluster, node)
    wait_until(lambda: all(keeper.members.epoch > 1 for keeper in cluster.keepers.values()), "a new epoch on every node")
    assert cluster.ranks[0].link.committed_step == step, "nothing that was committed is lost by it"
    again = cluster.train(until_committed=step + 2)
    again = quiet(cluster)
    for node, rank in cluster.ranks.items():
        assert stored(cluster, node, rank, again) == rank.bytes_at(again)
        assert cluster.ask(node, "status")["survivable_losses"] == 1


def test_a_run_that_ends_while_a_keeper_is_away_ends_everywhere_when_it_is_back(start: Callable[..., Cluster]) -> None:
    cluster = start(3, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    cluster.keepers[2].close(free=False)
    for rank in cluster.ranks.values():
        rank.link.finishing(cluster.step, False)
    assert not any(rank.link.is_over() for rank in cluster.ranks.values())
    cluster.keepers[2] = Keeper("job", 2, cluster.places[2])
    wait_until(lambda: all(rank.link.is_over() for rank in cluster.ranks.values()), "the end on every node")
    for keeper in cluster.keepers.values():
        keeper.wait()
    assert not any(place.exists() for place in cluster.places.values())


def test_keepers_do_not_regroup_around_a_new_start_of_the_run(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    step = quiet(cluster)
    early = Rank(cluster.places[0], 0, 3000)  # a new start has reached node 0, and not yet joined
    cluster.keepers[1].close(free=False)
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    wait_until(lambda: cluster.keepers[0].regroup._thread is None and cluster.keepers[1].members.is_adrift, "the refusal")
    assert cluster.keepers[1].members.view is None
    for rank in (early, *cluster.ranks.values()):
        rank.link.close()
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    cluster.enter(max(survey.epoch for survey in cluster.surveys()) + 1, committed=plan.step, index=plan.index)
    assert cluster.train(until_committed=step + 2) >= step + 2


# -- another layout -------------------------------------------------------------------------------------------------------


def into_fewer_nodes(cluster: Cluster) -> int:
    """The last node is lost and the run goes on with a rank less, from what the others hold; returns the restored step."""
    cluster.train(until_committed=2)
    quiet(cluster)
    gone = max(cluster.keepers)
    for rank in cluster.ranks.values():
        rank.link.close()
    cluster.keepers.pop(gone).close()
    cluster.ranks.pop(gone)
    cluster.ranks_of.pop(gone)
    surveys = cluster.surveys()
    plan, notes = make_whole(surveys, {survey.member.node: survey.member for survey in surveys})
    assert plan is not None, notes
    assert not lies_as(plan, cluster.view(2))
    cluster.settings["every"], cluster.step = 1000, plan.step
    cluster.enter(2, committed=plan.step, index=plan.index, cut_anew=True)
    return plan.step


def test_after_a_change_of_world_the_first_step_is_captured_and_protected_whatever_the_interval(
    start: Callable[..., Cluster],
) -> None:
    cluster = start(4, parity=1)
    cluster.enter(1)
    restored = into_fewer_nodes(cluster)
    for node in cluster.keepers:
        assert cluster.ask(node, "status")["survivable_losses"] == 0, "the old group has lost a node and protects no other"
    first = cluster.train(until_committed=restored + 1)
    assert first <= restored + 3
    assert quiet(cluster) == first
    for node, rank in cluster.ranks.items():
        assert cluster.ask(node, "status")["survivable_losses"] == 1
        assert stored(cluster, node, rank, first) == rank.bytes_at(first)
        assert rank.link.page.target[0] == 1000, "and from there on as often as was asked for"
    cluster.keepers[1].close()
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    surveys = cluster.surveys()
    plan, notes = make_whole(surveys, {survey.member.node: survey.member for survey in surveys})
    assert plan is not None, notes
    assert plan.step == first
    assert stored(cluster, 1, cluster.ranks[1], first) == cluster.ranks[1].bytes_at(first)


def test_keepers_that_regroup_before_the_first_step_of_another_layout_do_not_take_the_old_one_for_it(
    start: Callable[..., Cluster],
) -> None:
    cluster = start(3, parity=1)
    cluster.enter(1)
    restored = into_fewer_nodes(cluster)
    restart(cluster, 1)
    wait_until(lambda: all(keeper.members.epoch > 2 for keeper in cluster.keepers.values()), "a new epoch on every node")
    assert cluster.ranks[0].link.committed_step == restored
    assert cluster.ask(0, "status")["survivable_losses"] == 0
    first = cluster.train(until_committed=restored + 1)
    assert first <= restored + 4
    for node in cluster.keepers:
        assert cluster.ask(node, "status")["survivable_losses"] == 1


# -- who was replaced ----------------------------------------------------------------------------------------------------

ZOMBIE = """
import sys, time
from pathlib import Path
from holdfast.errors import StaleEpoch
from tests.snapshot.test_keeper import Rank

rank = Rank(Path(sys.argv[1]), 0, 3000)
while rank.link.page.target == (0, 0, 0):
    time.sleep(0.01)
step, index, _ = rank.link.page.target
body = rank.link.body(index, rank.nbytes)
body[:100] = b"z" * 100
print("half way", flush=True)
sys.stdin.readline()                      # stopped, replaced, and woken up about here
body[: rank.nbytes] = b"z" * rank.nbytes
for what in (lambda: rank.link.filled(step, index, rank.nbytes, "l", rank.table, {}), lambda: rank.link.give_up(step, "busy"),
             lambda: rank.link.body(index, rank.nbytes), lambda: rank.link.body(1 - index, rank.nbytes),
             lambda: rank.link.body(index, 1 << 22), lambda: rank.link.finishing(step, True)):
    try:
        what()
        print("let in", flush=True)
    except StaleEpoch:
        print("refused", flush=True)
"""


def test_a_trainer_that_was_stopped_replaced_and_woken_up_writes_nowhere_and_commits_nothing(
    start: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start(2, parity=1)
    root = Path(__file__).parents[2]
    zombie = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, str(cluster.places[0])],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert zombie.stdout is not None
        assert zombie.stdin is not None
        wait_until(lambda: 0 in cluster.keepers[0].trainers.pages, "the zombie's attachment")
        cluster.ranks[1] = Rank(cluster.places[1], 1, 3777)
        view = cluster.view(1)
        for node in cluster.keepers:
            cluster.ask(node, "join", view=view.to_json())
        cluster.ask(0, "begin")
        assert zombie.stdout.readline() == "half way\n"
        zombie.send_signal(signal.SIGSTOP)
        cluster.ranks.pop(1).link.close()
        cluster.enter(2)
        cluster.train(until_committed=3)
        step = quiet(cluster)
        before = {slot.path.name: slot.header for slot in cluster.keepers[0].slots.values()}
        zombie.send_signal(signal.SIGCONT)
        zombie.stdin.write("\n")
        zombie.stdin.flush()
        said = zombie.stdout.read().split("\n")[:-1]
        assert said == ["refused", "refused", *said[2:4], "refused", "refused"]
        assert {slot.path.name: slot.header for slot in cluster.keepers[0].slots.values()} == before
        assert stored(cluster, 0, cluster.ranks[0], step) == cluster.ranks[0].bytes_at(step)
        assert said[2:4] == ["refused", "refused"], "it may not map the slots of its successor"
        again = cluster.train(until_committed=step + 2)
        again = quiet(cluster)
        assert stored(cluster, 0, cluster.ranks[0], again) == cluster.ranks[0].bytes_at(again)
    finally:
        zombie.kill()
        zombie.communicate()


def test_a_slot_that_is_in_use_is_never_given_away_for_a_larger_one(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=0)
    cluster.enter(1)
    cluster.train(until_committed=2)
    step = quiet(cluster)
    rank = cluster.ranks[0]
    committed = next(slot for slot in cluster.keepers[0].slots.values() if slot.header.state is SlotState.COMMITTED)
    with pytest.raises(StaleEpoch, match=rf"holds step {committed.header.step} \(COMMITTED\) and is not being filled"):
        rank.link.ask("reserve", index=committed.header.index, body_nbytes=1 << 20, **rank.link._who)
    assert stored(cluster, 0, rank, step) == rank.bytes_at(step)


# -- checkpoints that fail -----------------------------------------------------------------------------------------------


def test_a_last_checkpoint_that_cannot_be_written_keeps_the_memory_and_is_not_called_saved(
    start: Callable[..., Cluster], shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "SPILL_TRIES", 1)
    place = shm / "ckpt"
    cluster = start(2, parity=1, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=1)
    place.write_text("a file where the checkpoints should go")
    finish(cluster, keep=True)
    for node, rank in cluster.ranks.items():
        assert rank.link.page["unsaved"] == 1
        assert f"checkpoint of step {cluster.step} could not be written" in rank.link.ask("ending")["problem"]
        assert stored(cluster, node, rank, cluster.step) == rank.bytes_at(cluster.step)
    # The cause is cleared and the run starts again: it has nothing to do but to save.
    place.unlink()
    for rank in cluster.ranks.values():
        rank.link.close()
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    assert plan.step == cluster.step
    cluster.enter(2, committed=plan.step, index=plan.index)
    finish(cluster, keep=True)
    for keeper in cluster.keepers.values():
        keeper.wait()
    assert steps_of(place) == [cluster.step]
    assert not any(memory.exists() for memory in cluster.places.values())


def test_a_checkpoint_that_failed_is_written_soon_after(start: Callable[..., Cluster], shm: Path) -> None:
    place = shm / "ckpt"
    place.write_text("a file where the checkpoints should go")
    cluster = start(2, parity=1, checkpoint_every=5, checkpoints=str(place))
    cluster.enter(1)
    failed = []
    unsubscribe = events.subscribe(lambda event: failed.append(event) if event.name == "checkpoint.failed" else None)
    try:
        step = cluster.train(until_committed=5)
        wait_until(lambda: bool(failed), "the failure")
    finally:
        unsubscribe()
    place.unlink()
    while not steps_of(place):
        step = cluster.train(until_committed=step + 1)
    assert steps_of(place)[0] < 15 + step


def test_a_checkpoint_that_outlives_its_epoch_is_dropped_and_leaves_nothing(
    start: Callable[..., Cluster], shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = shm / "ckpt"
    reached, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "spill.written" and not reached.is_set():
            reached.set()
            go_on.wait(60)

    cluster = start(2, parity=1, checkpoint_every=3, checkpoints=str(place))
    cluster.enter(1)
    events.arm(hold)
    cluster.train(until_committed=3)
    wait_until(reached.is_set, "a checkpoint that is being written")
    step = cluster.ranks[0].link.committed_step  # the next one may have to wait for the slot that is being written
    for rank in cluster.ranks.values():
        rank.link.close()
    plan, _ = plan_restore(cluster.surveys())
    assert plan is not None
    cluster.enter(2, committed=plan.step, index=plan.index, protected=plan.protected)
    go_on.set()
    wait_until(lambda: "is dropped, its epoch 1 is over" in caplog.text, "the word that it is dropped")
    cluster.train(until_committed=step + 3)
    wait_until(lambda: bool(steps_of(place)), "a checkpoint of the new epoch")
    for info in ckpt.list_steps(place):
        assert ckpt.open_checkpoint(info.path).verify().is_whole
    finish(cluster, keep=True)
    assert {path.name for path in place.iterdir() if path.is_dir()} == {f"step-{found:08d}" for found in steps_of(place)}


# -- told to go, or gone -------------------------------------------------------------------------------------------------


def test_a_keeper_that_is_told_to_end_has_the_newest_snapshot_written_first(start: Callable[..., Cluster], shm: Path) -> None:
    place = shm / "ckpt"
    cluster = start(2, parity=1, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    cluster.keepers[1].preempt.told_to_end()
    cluster.keepers[1].wait()
    assert steps_of(place) == [step]
    assert ckpt.open_checkpoint(place, step).verify().is_whole
    assert not cluster.places[1].exists(), "it is saved, and the memory is given back"


def test_a_keeper_that_can_save_nothing_leaves_its_memory_to_the_next_start(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    cluster.keepers[1].preempt.told_to_end()
    cluster.keepers[1].wait()
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    assert stored(cluster, 1, cluster.ranks[1], step) == cluster.ranks[1].bytes_at(step)


def test_a_trainer_that_ends_because_another_died_waits_for_no_checkpoint(start: Callable[..., Cluster], shm: Path) -> None:
    place = shm / "ckpt"
    cluster = start(2, parity=1, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=3)
    quiet(cluster)
    cluster.ranks[0].link._connection.close()  # as the kernel does for a process that was killed
    wait_until(lambda: bool(cluster.keepers[1].preempt._died), "the word of the death")
    connection = cluster.ranks[1].link
    assert connection.ask("terminated", grace_s=60.0, **connection._who) == {"saved": False}
    assert steps_of(place) == []


def test_a_trainer_that_ends_because_a_node_is_lost_waits_for_no_checkpoint(start: Callable[..., Cluster], shm: Path) -> None:
    cluster = start(3, parity=1, checkpoint_every=1000, checkpoints=str(shm / "ckpt"))
    cluster.enter(1)
    cluster.train(until_committed=3)
    quiet(cluster)
    cluster.keepers[2].close()  # with its memory, and whatever it had to say
    link = cluster.ranks[0].link
    assert link.ask("terminated", grace_s=600.0, **link._who) == {"saved": False}
    other = cluster.ranks[1].link
    wait_until(lambda: bool(cluster.keepers[1].preempt._died), "the word of the death")
    assert other.ask("terminated", grace_s=600.0, **other._who) == {"saved": False}


@pytest.mark.parametrize("told", [0, 1])
def test_a_keeper_that_is_told_to_end_after_a_node_was_lost_does_not_wait_for_that(
    start: Callable[..., Cluster], shm: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    monkeypatch.setattr(rescue, "PATIENCE_S", 600.0)
    place = shm / "ckpt"
    cluster = start(3, parity=1, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    cluster.keepers[2].close()
    cluster.keepers[told].preempt.told_to_end()
    cluster.keepers[told].wait()
    assert steps_of(place) == [step]
    assert ckpt.open_checkpoint(place, step).verify().is_whole
    assert not cluster.places[told].exists(), "it is saved, and the memory is given back"


@pytest.mark.parametrize(("nodes", "parity", "lost"), [(3, 1, (2,)), (3, 1, (0,)), (4, 2, (1, 3))])
def test_what_another_loss_would_take_is_written_by_those_who_are_left(
    start: Callable[..., Cluster], shm: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, parity: int, lost: tuple[int, ...]
) -> None:
    monkeypatch.setattr(rescue, "PING_S", 0.05)
    monkeypatch.setattr(rescue, "PATIENCE_S", 0.3)
    place = shm / "ckpt"
    cluster = start(nodes, parity=parity, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    for node in lost:
        cluster.keepers[node].close()  # with its memory
    wait_until(lambda: steps_of(place) == [step], "the checkpoint of the survivors")
    found = ckpt.open_checkpoint(place, step)
    assert found.verify().is_whole
    for rank in cluster.ranks.values():
        stored_array = zarr.open_array(found.path / f"model/w{rank.rank}", mode="r")[:]
        assert stored_array.tobytes() == rank.bytes_at(step)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_node_that_comes_back_after_its_bytes_were_rebuilt_elsewhere_is_written_once(
    start: Callable[..., Cluster], shm: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    monkeypatch.setattr(rescue, "PING_S", 0.05)
    monkeypatch.setattr(rescue, "PATIENCE_S", 0.3)
    place, again = shm / "ckpt", shm / "again"
    cluster = start(3, parity=1, checkpoint_every=1000, checkpoints=str(place))
    cluster.enter(1)
    cluster.train(until_committed=3)
    step = quiet(cluster)
    index = next(slot.index for survey in cluster.surveys() for slot in survey.slots if slot.step == step)
    cluster.keepers[lost].close(free=False)
    wait_until(lambda: steps_of(place) == [step], "the checkpoint of the survivors")
    cluster.keepers[lost] = Keeper("job", lost, cluster.places[lost])
    wait_until(lambda: all(keeper.members.epoch > 1 for keeper in cluster.keepers.values()), "a new epoch on every node")
    found = [slot.rank for survey in cluster.surveys() for slot in survey.slots if slot.step == step]
    assert sorted(found) == sorted([0, 1, 2, lost]), "the rank is there twice"
    view = replace(cluster.keepers[0].members.current(), checkpoints=str(again))
    _, nbytes = spill.write_checkpoint(view, step, index)
    assert nbytes == sum(len(rank.bytes_at(step)) for rank in cluster.ranks.values())
    assert ckpt.open_checkpoint(again, step).verify().is_whole
    assert cluster.train(until_committed=step + 2) >= step + 2


@pytest.mark.parametrize(("parity", "lost"), [(1, 0), (1, 1), (2, 1), (2, 2)])
def test_only_when_nothing_more_may_be_lost_is_there_a_rescue(parity: int, lost: int) -> None:
    (group,) = groups([Member(node, f"h{node}", "a", 1, "t", "/m", ()) for node in range(4)], 8, parity)
    assert rescue.is_endangered(group, set(range(lost))) == (lost == parity)


# -- groups --------------------------------------------------------------------------------------------------------------


def lose(cluster: Cluster, nodes: tuple[int, ...], **settings: Any) -> None:
    for node in nodes:
        cluster.keepers[node].close()
        cluster.keepers[node] = Keeper("job", node, cluster.places[node], **settings)


def recover(cluster: Cluster, epoch: int) -> int:
    """As a new start of the run does: rebuild, enter an epoch, go on."""
    surveys = cluster.surveys()
    plan, notes = make_whole(surveys, {survey.member.node: survey.member for survey in surveys})
    assert plan is not None, notes
    for node, rank in cluster.ranks.items():
        assert stored(cluster, node, rank, plan.step) == rank.bytes_at(plan.step)
        rank.link.close()
    cluster.step = plan.step
    again, _ = plan_restore(cluster.surveys())
    assert again is not None
    assert again.rebuilds == ()
    cluster.enter(epoch, committed=again.step, index=again.index, protected=again.protected)
    return plan.step


@pytest.mark.parametrize(
    ("nodes", "parity", "first", "second"), [(5, 1, (0, 1), (3, 4)), (5, 2, (1, 2), (0, 4)), (2, 1, (0,), (1,))]
)
def test_uneven_groups_lose_nodes_twice_and_protection_resumes_in_between(
    start: Callable[..., Cluster], nodes: int, parity: int, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    """With parity 1 the five nodes form groups of two and three, and one node of each is lost; two nodes mirror each other."""
    cluster = start(nodes, parity=parity, group_size=2 if parity == 1 else 8)
    for node in cluster.keepers:
        cluster.ranks_of[node] = (node,)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    lose(cluster, first)
    step = recover(cluster, 2)
    cluster.train(until_committed=step + 2)
    quiet(cluster)
    lose(cluster, second)
    recover(cluster, 3)


def test_a_rack_that_dies_whole_is_rebuilt_from_the_others(start: Callable[..., Cluster]) -> None:
    cluster = start(4, parity=1, group_size=2)
    racks = ["a", "a", "b", "b"]
    for node, keeper in cluster.keepers.items():
        keeper.member = replace(keeper.member, domain=racks[node])
    assert [group.nodes for group in cluster.view(1).groups()] == [(0, 2), (1, 3)]
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    lose(cluster, (0, 1))
    recover(cluster, 2)


def test_a_keeper_says_in_which_failure_domain_it_is(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DOMAIN", "rack-7")
    keeper = HostedKeeper(shm / "job" / "node-0")
    try:
        assert Endpoint.read(keeper.place).member.domain == "rack-7"
    finally:
        keeper.end()


def test_one_node_alone_survives_its_trainers_and_says_that_it_survives_nothing_else(start: Callable[..., Cluster]) -> None:
    cluster = start(1, parity=2)
    cluster.enter(1)
    cluster.train(until_committed=2)
    quiet(cluster)
    assert cluster.ask(0, "status")["survivable_losses"] == 0
    assert slot_name(0, 0) in cluster.keepers[0].slots
    assert not any(name.startswith("parity") for name in cluster.keepers[0].slots)


def test_what_a_keeper_wrote_down_and_cannot_be_read_only_costs_the_return(start: Callable[..., Cluster]) -> None:
    cluster = start(2, parity=1)
    cluster.enter(1)
    cluster.train(until_committed=2)
    step = quiet(cluster)
    cluster.keepers[1].close(free=False)
    (cluster.places[1] / "membership.json").write_text("{")
    cluster.keepers[1] = Keeper("job", 1, cluster.places[1])
    assert not cluster.keepers[1].members.is_adrift
    assert stored(cluster, 1, cluster.ranks[1], step) == cluster.ranks[1].bytes_at(step)
