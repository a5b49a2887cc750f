"""Membership by its tables: what each state does with each event, and what it refuses."""

from __future__ import annotations

import pytest

from holdfast.elastic.membership import (
    Accept,
    Accepted,
    Beat,
    Decided,
    Entered,
    Follow,
    Grant,
    Install,
    Join,
    Lead,
    Message,
    Node,
    Prepare,
    Promise,
    ProtocolError,
    Refuse,
    Role,
    Send,
    Standing,
    Stopped,
    Tick,
    Timing,
    first_view,
    next_view,
)
from holdfast.errors import ConfigError

TIMING = Timing()
VIEW = first_view(range(7), TIMING)


def node(me: int, now_s: float = 0.0) -> Node:
    return Node(me, TIMING, VIEW, VIEW.electors, now_s)


def of(sender: int, body, epoch: int = 1) -> Message:
    return Message(sender, epoch, body)


def sent(actions) -> list[tuple[int, type]]:
    return [(action.to, type(action.message.body)) for action in actions if isinstance(action, Send)]


def run(nodes: dict[int, Node], actions, now_s: float, *, drop=()) -> list:
    """Deliver everything at once until nobody has anything to say; what was not a message is returned."""
    told, queue = [], list(actions)
    while queue:
        action = queue.pop(0)
        if not isinstance(action, Send):
            told.append(action)
        elif action.to in nodes and action.to not in drop and action.message.sender not in drop:
            queue += nodes[action.to].feed(action.message, now_s)
    return told


def test_the_first_view_is_led_by_the_lowest_member():
    assert (VIEW.leader, VIEW.electors, VIEW.majority) == (0, (0, 1, 2, 3, 4), 3)


def test_electors_that_are_left_out_are_replaced():
    view = next_view(VIEW, 1, without=[0, 3], joining=[9], electors=5)
    assert view.members == {1, 2, 4, 5, 6, 9}
    assert view.electors == (1, 2, 4, 5, 6)
    assert view.epoch == 2


def test_a_member_writes_only_while_its_lease_runs():
    nodes = {me: node(me) for me in range(7)}
    assert not nodes[5].may_write(0.0)
    run(nodes, nodes[0].feed(Tick(), 0.0), 0.0)
    run(nodes, nodes[5].feed(Tick(), 0.1), 0.1)
    assert nodes[5].may_write(0.2)
    assert not nodes[5].may_write(0.1 + TIMING.lease_s)


def test_a_leader_that_no_majority_follows_grants_nothing():
    nodes = {me: node(me) for me in range(7)}
    run(nodes, nodes[0].feed(Tick(), 0.0), 0.0, drop=(1, 2, 3))
    run(nodes, nodes[5].feed(Tick(), 0.1), 0.1)
    assert not nodes[5].may_write(0.11)


def test_a_silent_member_is_left_out_once_its_lease_has_run_out():
    nodes = {me: node(me) for me in range(7)}
    now_s, decided = 0.0, []
    while not decided and now_s < 10:
        for me in (0, 1, 2, 3, 4, 5):
            decided += [
                item for item in run(nodes, nodes[me].feed(Tick(), now_s), now_s, drop=(6,)) if isinstance(item, Decided)
            ]
        now_s += 0.1
    assert decided[0].view.members == set(range(6))
    assert now_s > TIMING.silent_s
    assert not nodes[6].may_write(now_s)
    assert {nodes[me].epoch for me in range(6)} == {2}
    assert nodes[6].epoch == 1


def test_another_elector_takes_over_from_a_dead_leader():
    nodes = {me: node(me) for me in range(1, 7)}
    now_s, told = 0.0, []
    while not told and now_s < 10:
        for me in range(1, 7):
            told += run(nodes, nodes[me].feed(Tick(), now_s), now_s)
        now_s += 0.1
    assert told[0] == Decided(next_view(VIEW, 1, without=[0], electors=5))
    assert nodes[1].role is Role.LEADING


def test_a_zombie_is_told_and_stops():
    zombie, other = node(6), node(5)
    newer = next_view(VIEW, 0, without=[6], electors=5)
    other.feed(of(0, Install(newer), 2), 1.0)
    (answer,) = other.feed(of(6, Beat(0.0)), 1.0)
    assert zombie.feed(answer.message, 1.0) == [Stopped(newer)]
    assert zombie.standing is Standing.REMOVED
    assert zombie.feed(of(0, Grant(1.0, 5.0), 2), 1.0) == [] or not zombie.may_write(1.0)
    zombie.rejoin(1.0)
    assert sent(zombie.feed(Tick(), 1.0)) == [(zombie._known[zombie._turn % 5], Join)]


def test_an_older_view_is_not_gone_back_to():
    member = node(5)
    member.feed(of(0, Install(next_view(VIEW, 0, without=[6], electors=5)), 2), 1.0)
    assert member.feed(of(1, Install(VIEW), 1), 2.0) == []
    assert member.epoch == 2


def test_an_elector_promises_no_other_while_it_follows_the_leader():
    elector = node(2)
    elector.feed(of(0, Lead(0.0)), 0.0)
    assert sent(elector.feed(of(1, Prepare((1, 1))), 0.5)) == [(1, Refuse)]
    assert sent(elector.feed(of(0, Prepare((1, 0))), 0.5)) == [(0, Promise)]
    later = TIMING.outlasts(TIMING.lease_s) + 0.01
    assert sent(elector.feed(of(1, Prepare((2, 1))), later)) == [(1, Promise)]


def test_what_may_have_been_decided_is_proposed_again():
    """An elector has accepted a view from a proposer that died: the next one has to propose the same."""
    nodes = {me: node(me) for me in range(1, 7)}
    old = next_view(VIEW, 0, without=[6], electors=5)
    nodes[2].feed(of(0, Prepare((1, 0))), 0.1)
    nodes[2].feed(of(0, Accept((1, 0), old)), 0.1)
    now_s, told = 5.0, []
    while not told and now_s < 20:
        for me in (2, 3, 4):
            told += run(nodes, nodes[me].feed(Tick(), now_s), now_s, drop=(1,))
        now_s += 0.1
    assert told[0] == Decided(old)


def test_an_elector_accepts_nothing_below_its_promise():
    elector = node(2)
    elector.feed(of(1, Prepare((5, 1))), 9.0)
    assert sent(elector.feed(of(3, Accept((4, 3), VIEW)), 9.0)) == [(3, Refuse)]
    assert sent(elector.feed(of(1, Accept((5, 1), VIEW)), 9.0)) == [(1, Accepted)]


def test_a_newcomer_is_let_in_by_the_leader_and_sent_to_it_by_the_others():
    nodes = {me: node(me) for me in range(7)} | {9: Node(9, TIMING, None, VIEW.electors, 0.0)}
    assert sent(nodes[3].feed(Message(9, 0, Join()), 0.0)) == [(9, Install)]
    nodes[0].feed(Message(9, 0, Join()), 0.0)
    told = run(nodes, nodes[0].feed(Tick(), 0.2), 0.2)
    assert Entered(next_view(VIEW, 0, joining=[9], electors=5)) in told
    assert nodes[9].standing is Standing.MEMBER


@pytest.mark.parametrize("body", [Promise((1, 5), None), Accepted((1, 5)), Follow(0.0), Refuse((1, 5))])
def test_an_answer_that_nobody_asked_for_is_an_error(body):
    with pytest.raises(ProtocolError, match="is not expected while following"):
        node(5).feed(of(0, body), 0.0)


def test_a_member_cannot_rejoin():
    with pytest.raises(ProtocolError, match="a process that is member cannot rejoin"):
        node(5).rejoin(0.0)


@pytest.mark.parametrize("wrong", [{"beat_s": 0.6}, {"silent_s": 0.5}, {"takeover_s": 1.0}, {"electors": 0}, {"drift": 0.5}])
def test_timings_that_cannot_be_safe_are_refused(wrong):
    with pytest.raises(ConfigError, match="need"):
        Timing(**wrong)
