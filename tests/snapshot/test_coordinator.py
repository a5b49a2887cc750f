"""The commit protocol against a plain model of nodes: whatever order messages take, one complete committed step always exists."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.snapshot.coordinator import (
    ENCODE_TRIES,
    LAST_TRIES,
    SPILL_TRIES,
    UNPROTECTED,
    Acknowledged,
    Announce,
    Begin,
    Commit,
    Coordinator,
    Encoded,
    Finishing,
    GivenUp,
    Hurry,
    Phase,
    Protect,
    ProtocolError,
    Spill,
    SpillEnded,
    Stop,
)


@dataclass
class Slot:
    """What a node's slot holds in the model: a step, how far it has come, for which round, and whether that one has still to
    exchange parity."""

    step: int = 0
    state: str = "empty"
    round: int = 0
    is_due: bool = False


@dataclass
class Node:
    number: int
    slots: list[Slot] = field(default_factory=lambda: [Slot(), Slot()])
    progress: int = 0
    order: tuple[int, int, int] | None = None
    handled: bool = True
    inbox: deque[Any] = field(default_factory=deque)
    outbox: deque[Any] = field(default_factory=deque)
    finished: bool = False


class Cluster:
    """Nodes that speak to a Coordinator through queues: in order for each node, in any order between nodes.

    It stops at once when the coordinator breaks a promise.
    """

    def __init__(
        self,
        count: int,
        *,
        every: int,
        checkpoint_every: int,
        keep: bool,
        restored: int = 0,
        protected: bool = True,
        overdue: bool = False,
    ) -> None:
        self.nodes = [Node(number) for number in range(count)]
        self.keep, self.every, self.checkpoint_every = keep, every, checkpoint_every
        self.coordinator = Coordinator(
            range(count),
            every=every,
            checkpoint_every=checkpoint_every,
            committed=restored,
            index=0 if restored else 1,
            protected=protected,
            overdue=overdue,
        )
        self.overdue = overdue
        self.committed, self.spilling, self.spilled, self.stopped = restored if protected else 0, None, [], False
        self.saved, self.spill_failures = False, 0
        for node in self.nodes:
            node.progress = restored
            if restored:
                node.slots[0].step, node.slots[0].state = restored, "committed" if protected else "whole"
                if not protected and restored > 1:
                    node.slots[1].step, node.slots[1].state = restored - 1, "committed"

    # -- the coordinator's word --

    def feed(self, event: Any) -> None:
        for action in self.coordinator.feed(event):
            self.act(action)

    def act(self, action: Any) -> None:
        assert not self.stopped, f"{action} after the end"
        match action:
            case Announce(step, index, _) | Protect(step, index, _):
                assert self.spilling is None or self.spilling[1] != index, "a slot that is being written out is refilled"
                if isinstance(action, Announce):
                    self.check_announcement(step, index)
                self.broadcast(action)
            case Commit(step, index):
                for node in self.nodes:
                    slot = node.slots[index]
                    assert (slot.step, slot.state) == (step, "encoded"), f"commit of {step} while node {node.number} has {slot}"
                assert step > self.committed or (self.overdue and step == self.committed), "committed steps only grow"
                self.committed, self.overdue = step, False
                self.broadcast(action)
            case Spill(step, index, delay_s):
                assert self.spilling is None
                assert delay_s in (0, 1, 2, 4)
                assert self.spill_failures < 1000, "a checkpoint that always fails is tried for ever"
                assert all((n.slots[index].step, n.slots[index].state) == (step, "committed") for n in self.nodes)
                self.spilling = (step, index)
            case Stop(saved):
                self.stopped, self.saved = True, saved

    def check_announcement(self, step: int, index: int) -> None:
        assert step > 0
        last = step == self.coordinator.committed + 1 or all(node.finished for node in self.nodes)
        assert step % self.every == 0 or last or self.overdue
        if self.overdue and self.coordinator.lead == 1:
            assert step <= max(node.progress for node in self.nodes) + 1, "what nothing protects is captured at once"
        newest = max((slot.step for node in self.nodes for slot in node.slots if slot.state == "committed"), default=0)
        for node in self.nodes:
            slot = node.slots[index]
            if slot.state == "committed":
                assert slot.step < newest, f"the newest committed step {newest} is emptied"
                other = node.slots[1 - index]
                assert (other.step, other.state) == (newest, "committed"), "the other slot is not committed on every node"

    def broadcast(self, action: Any) -> None:
        for node in self.nodes:
            node.inbox.append(action)

    # -- what nodes do --

    def hear(self, node: Node) -> None:
        match action := node.inbox.popleft():
            case Announce(step, index, number):
                node.slots[index] = Slot(0, "filling", number)
                node.order, node.handled = (step, index, number), False
            case Protect(step, index, number):
                slot = node.slots[index]
                slot.round = number
                if slot.state == "filling":
                    assert node.order is not None
                    assert node.order[:2] == (step, index), "nobody was told to capture what is to be protected"
                    node.order = (step, index, number)
                else:
                    assert slot.step == step
                    assert slot.state in ("whole", "encoded")
                    slot.state, slot.is_due = "whole", True
            case Commit(step, index):
                assert (node.slots[index].step, node.slots[index].state) == (step, "encoded"), (
                    f"{action} finds {node.slots[index]}"
                )
                node.slots[index].state = "committed"
                node.outbox.append(Acknowledged(node.number, step, node.progress))

    def answer(self, node: Node, *, able: bool) -> None:
        """What a node does about an order that its loop has come to."""
        assert node.order is not None
        step, index, number = node.order
        node.handled = True
        if node.progress > step:
            node.outbox.append(GivenUp(node.number, step, node.progress, "passed", number))
        elif not able:
            node.outbox.append(GivenUp(node.number, step, node.progress, "busy", number))
        elif node.slots[index].round == number:
            node.slots[index] = Slot(step, "whole", number, is_due=True)

    def due(self, node: Node) -> Slot | None:
        return next((slot for slot in node.slots if slot.is_due), None)

    def exchange(self, node: Node, *, works: bool) -> None:
        """A node whose bytes are whole makes its parity, or cannot."""
        slot = self.due(node)
        assert slot is not None
        slot.is_due = False
        if works:
            slot.state = "encoded"
            node.outbox.append(Encoded(node.number, slot.step, node.progress, slot.round))
        else:
            node.outbox.append(GivenUp(node.number, slot.step, node.progress, UNPROTECTED, slot.round))

    def can_answer(self, node: Node) -> bool:
        return node.order is not None and not node.handled and node.progress >= node.order[0]

    def finish(self, node: Node) -> None:
        node.finished = True
        node.outbox.append(Finishing(node.number, node.progress, self.keep))

    def end_spill(self, *, ok: bool = True) -> None:
        assert self.spilling is not None
        step, index = self.spilling
        assert all((n.slots[index].step, n.slots[index].state) == (step, "committed") for n in self.nodes)
        if ok:
            self.spilled.append(step)
        self.spill_failures += not ok
        self.spilling = None
        self.feed(SpillEnded(index, ok))


class Protocol(RuleBasedStateMachine):
    """Any order of events, well-behaved or not, keeps the promises that `Cluster.act` checks."""

    def __init__(self) -> None:
        super().__init__()
        self.ending: int | None = None
        self.newest = 0

    @initialize(
        count=st.integers(1, 4),
        every=st.integers(1, 3),
        checkpoint_every=st.sampled_from([0, 1, 2, 5]),
        keep=st.booleans(),
        restored=st.sampled_from([0, 0, 4, 7]),
        protected=st.booleans(),
        overdue=st.booleans(),
    )
    def start(
        self, count: int, every: int, checkpoint_every: int, keep: bool, restored: int, protected: bool, overdue: bool
    ) -> None:
        self.cluster = Cluster(
            count,
            every=every,
            checkpoint_every=checkpoint_every,
            keep=keep,
            restored=restored,
            protected=protected or not restored or overdue,
            overdue=overdue and restored > 0,
        )
        self.cluster.feed(Begin())

    @rule(data=st.data())
    def a_node_trains_on(self, data: st.DataObject) -> None:
        able = [
            node for node in self.cluster.nodes if not node.finished and (self.ending is None or node.progress < self.ending)
        ]
        if able:
            data.draw(st.sampled_from(able)).progress += 1

    @rule(data=st.data())
    def a_message_reaches_a_node(self, data: st.DataObject) -> None:
        able = [node for node in self.cluster.nodes if node.inbox]
        if able:
            self.cluster.hear(data.draw(st.sampled_from(able)))

    @rule(data=st.data())
    def a_message_reaches_the_coordinator(self, data: st.DataObject) -> None:
        able = [node for node in self.cluster.nodes if node.outbox]
        if able:
            self.cluster.feed(data.draw(st.sampled_from(able)).outbox.popleft())

    @rule(data=st.data(), works=st.sampled_from([True, True, True, False]))
    def a_node_comes_to_its_target(self, data: st.DataObject, works: bool) -> None:
        able = [node for node in self.cluster.nodes if self.cluster.can_answer(node)]
        if able:
            self.cluster.answer(data.draw(st.sampled_from(able)), able=works)

    @rule(data=st.data(), works=st.sampled_from([True, True, True, False]))
    def a_node_exchanges_parity(self, data: st.DataObject, works: bool) -> None:
        able = [node for node in self.cluster.nodes if self.cluster.due(node)]
        if able:
            self.cluster.exchange(data.draw(st.sampled_from(able)), works=works)

    @precondition(lambda self: self.cluster.spilling is not None)
    @rule(ok=st.booleans())
    def a_checkpoint_is_written_or_fails(self, ok: bool) -> None:
        # One that fails for good has tests of its own; here every run is to end with its last step saved.
        self.cluster.end_spill(ok=ok or self.cluster.coordinator._spill_failures == SPILL_TRIES - 1)

    @rule()
    def memory_is_in_danger(self) -> None:
        self.cluster.feed(Hurry())

    @precondition(lambda self: self.ending is None)
    @rule()
    def the_loop_nears_its_end(self) -> None:
        self.ending = max(node.progress for node in self.cluster.nodes)

    @precondition(lambda self: self.ending is not None)
    @rule(data=st.data())
    def a_node_finishes(self, data: st.DataObject) -> None:
        able = [node for node in self.cluster.nodes if not node.finished and node.progress == self.ending]
        if able:
            self.cluster.finish(data.draw(st.sampled_from(able)))

    @invariant()
    def committed_steps_only_grow(self) -> None:
        if hasattr(self, "cluster"):
            assert self.cluster.coordinator.committed >= self.newest
            self.newest = self.cluster.coordinator.committed

    @invariant()
    def the_newest_committed_step_is_whole_on_every_node(self) -> None:
        if hasattr(self, "cluster") and self.cluster.committed:
            for node in self.cluster.nodes:
                assert any(
                    slot.step == self.cluster.committed and slot.state in ("encoded", "committed") for slot in node.slots
                )

    def teardown(self) -> None:
        """Left to well-behaved nodes, every run gets to its end, whatever has happened before."""
        if hasattr(self, "cluster"):
            run_to_the_end(self.cluster, random.Random(0), ending=self.ending)


def run_to_the_end(
    cluster: Cluster,
    chance: random.Random,
    *,
    ending: int | None,
    refusals: float = 0.0,
    cuts: float = 0.0,
    full_disk: bool = False,
) -> None:
    """Play until Stop: nodes train up to `ending` and finish, every message arrives at some time."""
    ending = max(node.progress for node in cluster.nodes) + 5 if ending is None else ending
    for _ in range(20_000):
        if cluster.stopped:
            break
        moves: list[Any] = []
        for node in cluster.nodes:
            if node.inbox:
                moves.append(lambda node=node: cluster.hear(node))
            if node.outbox:
                moves.append(lambda node=node: cluster.feed(node.outbox.popleft()))
            if cluster.due(node):
                moves.append(lambda node=node: cluster.exchange(node, works=chance.random() >= cuts))
            if cluster.can_answer(node):
                moves.append(lambda node=node: cluster.answer(node, able=chance.random() >= refusals))
            elif node.progress < ending:
                moves.append(lambda node=node: setattr(node, "progress", node.progress + 1))
            elif not node.finished:
                moves.append(lambda node=node: cluster.finish(node))
        if cluster.spilling is not None:
            moves.append(lambda: cluster.end_spill(ok=not full_disk))
        assert moves, f"nothing can happen any more and the run has not ended: {cluster.coordinator.__dict__}"
        chance.choice(moves)()
    assert cluster.stopped, f"the run never ends: {cluster.coordinator.__dict__}"
    if cluster.keep and ending > 0:
        assert cluster.committed == ending, "the last step was to be kept"
        if cluster.checkpoint_every:
            assert cluster.saved == (cluster.coordinator._spilled == ending) == (not full_disk)
            assert full_disk or cluster.spilled[-1:] == [ending]
    # Whatever is still on its way must not upset a coordinator that has stopped.
    while any(node.inbox or node.outbox for node in cluster.nodes):
        for node in cluster.nodes:
            if node.inbox:
                cluster.hear(node)
            if node.outbox:
                cluster.feed(node.outbox.popleft())


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 5),
    every=st.integers(1, 5),
    checkpoint_every=st.sampled_from([0, 1, 3, 10]),
    keep=st.booleans(),
    steps=st.integers(1, 60),
    refusals=st.sampled_from([0.0, 0.1, 0.4]),
    cuts=st.sampled_from([0.0, 0.1]),
    full_disk=st.booleans(),
)
def test_a_run_of_well_behaved_nodes_gets_on_and_ends(
    seed: int,
    count: int,
    every: int,
    checkpoint_every: int,
    keep: bool,
    steps: int,
    refusals: float,
    cuts: float,
    full_disk: bool,
) -> None:
    cluster = Cluster(count, every=every, checkpoint_every=checkpoint_every, keep=keep)
    cluster.feed(Begin())
    run_to_the_end(cluster, random.Random(seed), ending=steps, refusals=refusals, cuts=cuts, full_disk=full_disk)


# -- single stories ------------------------------------------------------------------------------------------------------


def began(nodes: int = 2, **settings: Any) -> Coordinator:
    made = Coordinator(range(nodes), **{"every": 1, "checkpoint_every": 0, **settings})
    made.feed(Begin())
    return made


def test_a_step_is_committed_when_all_have_encoded_it_and_the_next_when_all_have_acknowledged() -> None:
    coordinator = Coordinator(range(2), every=1, checkpoint_every=0)
    assert coordinator.feed(Begin()) == [Announce(1, 0, 1)]
    assert coordinator.feed(Encoded(0, 1, 1, 1)) == []
    assert coordinator.feed(Encoded(1, 1, 2, 1)) == [Commit(1, 0)]
    assert coordinator.feed(Acknowledged(1, 1, 2)) == []
    assert coordinator.committed == 0
    assert coordinator.feed(Acknowledged(0, 1, 1)) == [Announce(3, 1, 2)]
    assert coordinator.committed == 1


def test_a_rank_that_has_passed_the_target_makes_the_next_one_lie_further_ahead() -> None:
    coordinator = began()
    assert coordinator.feed(GivenUp(0, 1, 10, "passed", 1)) == [Announce(12, 0, 2)]
    assert coordinator.feed(GivenUp(1, 1, 11, "passed", 1)) == [], "of the same round, told twice"
    assert coordinator.feed(GivenUp(1, 12, 20, "passed", 2)) == [Announce(24, 0, 3)]
    assert coordinator.given_up == 2


def test_only_steps_that_were_asked_for_are_snapshotted() -> None:
    coordinator = began(every=10)
    assert (coordinator.step, coordinator.phase) == (10, Phase.FILLING)
    assert coordinator.feed(GivenUp(0, 10, 11, "busy", 1)) == [Announce(20, 0, 2)]


def test_what_was_encoded_for_an_earlier_announcement_of_the_step_does_not_count() -> None:
    coordinator = began(every=10, checkpoint_every=10)
    coordinator.feed(GivenUp(1, 10, 10, "busy", 1))
    coordinator.feed(Finishing(0, 10, True))
    assert coordinator.feed(Finishing(1, 10, True)) == [Announce(10, 0, 3)]
    assert coordinator.feed(Encoded(0, 10, 10, 1)) == [], "node 0 has emptied that slot since"
    assert coordinator.feed(Encoded(1, 10, 10, 3)) == []
    assert coordinator.phase is Phase.FILLING
    assert coordinator.feed(Encoded(0, 10, 10, 3)) == [Commit(10, 0)]


def test_a_restored_step_without_parity_is_protected_before_anything_else() -> None:
    coordinator = Coordinator(range(2), every=1, checkpoint_every=0, committed=7, index=0, protected=False)
    assert coordinator.feed(Begin()) == [Protect(7, 0, 1)]
    coordinator.feed(Encoded(0, 7, 7, 1))
    assert coordinator.feed(Encoded(1, 7, 7, 1)) == [Commit(7, 0)]
    coordinator.feed(Acknowledged(0, 7, 7))
    assert coordinator.feed(Acknowledged(1, 7, 7)) == [Announce(8, 1, 2)]


def cut(coordinator: Coordinator, progress: int = 0, node: int = 0) -> list[Any]:
    """The exchange of the present round fails on a node."""
    return coordinator.feed(GivenUp(node, coordinator.step, progress, UNPROTECTED, coordinator.round))


def test_parity_that_could_not_be_had_is_tried_again_with_pauses_and_without_a_new_capture() -> None:
    coordinator = began(every=100)
    assert cut(coordinator, 100) == [Protect(100, 0, 2)]
    assert coordinator.feed(GivenUp(1, 100, 100, UNPROTECTED, 1)) == [], "of the attempt before"
    assert coordinator.feed(Encoded(1, 100, 100, 1)) == [], "that one is over"
    pauses = []
    for number in range(3, ENCODE_TRIES + 2):
        (again,) = cut(coordinator, 110)
        pauses.append(again.delay_s)
        assert again == Protect(100, 0, number, again.delay_s)
    assert pauses == [1, 2, 4, 8, 16]
    assert cut(coordinator, 110) == [Announce(200, 0, ENCODE_TRIES + 2)], "it is no passing trouble"
    assert cut(coordinator, 200) == [Protect(200, 0, ENCODE_TRIES + 3)], "and the next step has all its attempts"


def test_an_attempt_that_works_commits_the_step() -> None:
    coordinator = began(every=100)
    cut(coordinator, 101)
    coordinator.feed(Encoded(0, 100, 103, 2))
    assert coordinator.feed(Encoded(1, 100, 103, 2)) == [Commit(100, 0)]


def test_where_a_newer_step_is_due_parity_is_not_tried_again() -> None:
    coordinator = began()
    assert cut(coordinator, progress=2) == [Announce(3, 0, 2)]
    assert cut(coordinator, progress=3) == [Protect(3, 0, 3)], "a step that takes long is as good as one of many"


def test_a_rank_that_cannot_deliver_is_heard_in_every_attempt() -> None:
    """It answered the announcement, and will not answer once more."""
    coordinator = began(every=100)
    cut(coordinator, 99)
    assert coordinator.feed(GivenUp(1, 100, 101, "passed", 1)) == [Announce(200, 0, 3)]
    assert coordinator.feed(GivenUp(1, 100, 101, "passed", 2)) == []


def test_the_parity_of_a_restored_step_is_insisted_on_though_a_newer_one_is_due() -> None:
    coordinator = Coordinator(range(2), every=1, checkpoint_every=0, committed=7, index=0, protected=False)
    coordinator.feed(Begin())
    for number in range(ENCODE_TRIES):
        (again,) = cut(coordinator, progress=10 + number)
        assert (again.step, again.index) == (7, 0)
    assert cut(coordinator, progress=50) == [Announce(51, 0, ENCODE_TRIES + 2)]


def test_a_run_that_ends_does_not_wait_for_the_parity_of_an_older_step() -> None:
    coordinator = began(nodes=1, every=10)
    cut(coordinator, 10)
    assert coordinator.feed(Finishing(0, 12, True)) == [Announce(12, 0, 3)]
    assert cut(coordinator, 12) == [Protect(12, 0, 4)], "the last step is worth every attempt"
    coordinator = began(nodes=1, every=10)
    cut(coordinator, 10)
    assert coordinator.feed(Finishing(0, 12, False)) == [Stop()]
    coordinator = began(nodes=1, every=10)
    coordinator.feed(Finishing(0, 10, True))
    for _ in range(ENCODE_TRIES):
        assert isinstance(cut(coordinator, 10)[0], Protect)
    for _ in range(LAST_TRIES - 1):
        assert isinstance(cut(coordinator, 10)[0], Announce)
    assert cut(coordinator, 10) == [Stop()], "nobody has asked for checkpoints"


def test_what_was_restored_into_another_layout_is_captured_with_the_first_completed_step() -> None:
    coordinator = Coordinator(range(2), every=100, checkpoint_every=5, committed=40, index=0, overdue=True)
    assert coordinator.feed(Begin()) == [Announce(41, 1, 1)], "nothing is written from slots of another layout"
    assert coordinator.feed(GivenUp(0, 41, 42, "passed", 1)) == [Announce(44, 1, 2)], "still as soon as may be"
    coordinator.feed(Encoded(0, 44, 44, 2))
    coordinator.feed(Encoded(1, 44, 44, 2))
    coordinator.feed(Acknowledged(0, 44, 44))
    assert coordinator.feed(Acknowledged(1, 44, 44)) == [Spill(44, 1), Announce(100, 0, 3)]


def test_a_run_that_ends_where_it_was_restored_into_another_layout_keeps_that_step() -> None:
    coordinator = Coordinator(range(1), every=100, checkpoint_every=5, committed=40, index=0, overdue=True)
    coordinator.feed(Finishing(0, 40, True))
    assert coordinator.feed(Begin()) == [Announce(40, 1, 1)]
    assert coordinator.feed(Encoded(0, 40, 40, 1)) == [Commit(40, 1)]
    assert coordinator.feed(Acknowledged(0, 40, 40)) == [Spill(40, 1)]
    assert coordinator.feed(SpillEnded(1)) == [Stop()]


def test_a_node_that_ends_at_another_step_does_not_keep_the_run_from_ending() -> None:
    coordinator = began(checkpoint_every=5)
    coordinator.feed(Finishing(0, 10, True))
    coordinator.feed(Finishing(1, 12, True))
    actions = coordinator.feed(GivenUp(1, 1, 12, "passed", 1))
    assert actions == [Stop(saved=False)], "step 12 can never be captured by node 0"


def test_a_last_step_that_always_fails_does_not_keep_the_run_from_ending() -> None:
    coordinator = began(nodes=1, checkpoint_every=5)
    coordinator.feed(GivenUp(0, 1, 3, "passed", 1))
    actions = coordinator.feed(Finishing(0, 3, True))
    for _ in range(LAST_TRIES):
        assert actions == [Announce(3, 0, coordinator.round)]
        assert coordinator.feed(GivenUp(0, 3, 3, "busy", coordinator.round)) == [Announce(3, 0, coordinator.round)]
        actions = coordinator.feed(GivenUp(0, 3, 3, "failed", coordinator.round))
    assert actions == [Stop(saved=False)]


def test_a_run_without_a_step_stops_at_once() -> None:
    coordinator = began(checkpoint_every=5)
    coordinator.feed(Finishing(0, 0, True))
    assert coordinator.feed(Finishing(1, 0, True)) == [Stop()]


def commit(coordinator: Coordinator, step: int) -> list[Any]:
    """One node fills, encodes and acknowledges what was announced; it has to be `step`."""
    assert coordinator.step == step
    assert coordinator.feed(Encoded(0, step, step, coordinator.round)) == [Commit(step, 1 - coordinator.index)]
    return coordinator.feed(Acknowledged(0, step, step))


def test_a_checkpoint_that_failed_is_tried_again_at_the_next_commit_and_then_less_and_less_often() -> None:
    coordinator = began(nodes=1, checkpoint_every=2)
    tried = []
    for step in range(1, 40):
        for action in commit(coordinator, step):
            if isinstance(action, Spill):
                tried.append(step)
                coordinator.feed(SpillEnded(action.index, ok=False))
    assert tried[:6] == [2, 3, 5, 9, 17, 33]


def test_a_checkpoint_that_failed_does_not_count_as_written() -> None:
    coordinator = began(nodes=1, checkpoint_every=2)
    commit(coordinator, 1)
    assert Spill(2, 1) in commit(coordinator, 2)
    coordinator.feed(SpillEnded(1, ok=False))
    assert Spill(3, 0) in commit(coordinator, 3)
    coordinator.feed(SpillEnded(0))
    assert not [action for action in commit(coordinator, 4) if isinstance(action, Spill) and action.step < 4]


def test_a_last_checkpoint_that_fails_is_tried_with_pauses_and_then_the_run_is_not_called_saved() -> None:
    coordinator = began(nodes=1, checkpoint_every=100)
    commit(coordinator, 1)
    coordinator.feed(GivenUp(0, 2, 1, "busy", coordinator.round))
    assert coordinator.feed(Finishing(0, 1, True)) == [Spill(1, 0)] or coordinator._spilling == (1, 0)
    pauses = []
    actions = coordinator.feed(SpillEnded(0, ok=False))
    while isinstance(actions[0], Spill):
        pauses.append(actions[0].delay_s)
        actions = coordinator.feed(SpillEnded(0, ok=False))
    assert pauses == [1, 2, 4]
    assert actions == [Stop(saved=False)]


def test_memory_in_danger_is_written_at_once_and_once() -> None:
    coordinator = began(nodes=1, checkpoint_every=1000)
    assert coordinator.feed(Hurry()) == [], "nothing is committed yet"
    commit(coordinator, 1)
    assert coordinator.feed(Hurry()) == [Spill(1, 0)]
    assert coordinator.feed(Hurry()) == [], "it is being written"
    coordinator.feed(SpillEnded(0))
    assert [action for action in commit(coordinator, 2) if isinstance(action, Spill)] == []


def test_a_step_that_is_about_to_be_committed_is_what_is_written_in_a_hurry() -> None:
    coordinator = began(nodes=1, checkpoint_every=1000)
    commit(coordinator, 1)
    coordinator.feed(Encoded(0, 2, 2, coordinator.round))
    assert coordinator.feed(Hurry()) == [Spill(1, 0)]
    coordinator.feed(SpillEnded(0))
    assert Spill(2, 1) in coordinator.feed(Acknowledged(0, 2, 2))


def test_an_epoch_goes_on_where_its_ranks_are_and_remembers_what_is_written() -> None:
    coordinator = Coordinator(range(1), every=1, checkpoint_every=10, committed=12, index=0, spilled=10)
    assert coordinator.feed(GivenUp(0, 11, 40, "passed", 0)) == []
    assert coordinator.feed(Begin(44)) == [Announce(45, 1, 1)]


def test_a_restored_step_whose_checkpoint_is_missing_is_written_first() -> None:
    coordinator = Coordinator(range(1), every=1, checkpoint_every=10, committed=12, index=0)
    assert coordinator.feed(Begin()) == [Spill(12, 0), Announce(13, 1, 1)]


UNEXPECTED = [
    (Coordinator(range(1), every=1, checkpoint_every=0), Encoded(0, 1, 1, 1)),
    (Coordinator(range(1), every=1, checkpoint_every=0), Acknowledged(0, 1, 1)),
    (Coordinator(range(1), every=1, checkpoint_every=0), SpillEnded(0)),
    (began(), Begin()),
]


@pytest.mark.parametrize(("coordinator", "event"), UNEXPECTED)
def test_an_event_that_the_state_does_not_expect_is_refused(coordinator: Coordinator, event: Any) -> None:
    before = dict(vars(coordinator))
    with pytest.raises(ProtocolError, match="is not expected while"):
        coordinator.feed(event)
    assert vars(coordinator) == before
