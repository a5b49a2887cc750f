"""What a restart decides from the survivors' words, compared with trying everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.snapshot.plan import Distrusted, RestorePlan, SlotFound, Survey, lies_as, plan_restore, was_ever_safe
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, RankRecord, View, effective_parity, groups

V, E, C = SlotState.VERIFIED, SlotState.ENCODED, SlotState.COMMITTED


def member(node: int) -> Member:
    return Member(node, "h", "127.0.0.1", 1, "t", f"/m/{node}", ())


def slot(rank: int, step: int, state: SlotState = C, *, epoch: int = 1, index: int | None = None, world: int = 4) -> SlotFound:
    return SlotFound(rank, step % 2 if index is None else index, epoch, step, world, state)


def group(
    step: int, nodes: tuple[int, ...], parity: int, *, epoch: int = 1, ranks_each: int = 1, world: int = 4
) -> GroupRecord:
    records = tuple(
        NodeRecord(node, tuple(RankRecord(node * ranks_each + i, 10, 0, 0, 10) for i in range(ranks_each))) for node in nodes
    )
    return GroupRecord(epoch, step, step % 2, world, effective_parity(parity, len(nodes)), records)


def survey(node: int, slots: list[SlotFound], kept: list[GroupRecord] | None = None) -> Survey:
    return Survey(member(node), 1, tuple(slots), tuple(kept or []))


def cluster(nodes: int, parity: int, steps: dict[int, SlotState], *, without: tuple[int, ...] = ()) -> list[Survey]:
    """One group in which every node but those `without` holds every step, with parity from ENCODED on."""
    members = tuple(range(nodes))
    return [
        survey(
            node,
            [slot(node, step, state, world=nodes) for step, state in steps.items()],
            [group(step, members, parity, world=nodes) for step, state in steps.items() if state >= E and parity],
        )
        for node in members
        if node not in without
    ]


# -- single stories ------------------------------------------------------------------------------------------------------


def test_before_the_first_parity_nothing_was_safe_and_after_it_every_survivor_knows() -> None:
    assert not was_ever_safe([survey(0, [slot(0, 1, V)]), survey(1, [slot(1, 1, SlotState.FILLING)]), survey(2, [])])
    assert was_ever_safe(cluster(3, 1, {1: E}, without=(0,)))
    assert was_ever_safe([survey(0, []), survey(1, [slot(1, 1, C), slot(1, 2, V)])])  # without parity, where one node is alone


def test_nothing_found_is_no_plan_and_no_complaint() -> None:
    assert plan_restore([]) == (None, [])
    assert plan_restore([survey(0, []), survey(1, [slot(1, 0, SlotState.EMPTY), slot(1, 4, SlotState.FILLING)])]) == (None, [])


def test_the_newest_whole_step_is_taken_even_before_it_was_committed() -> None:
    plan, reasons = plan_restore(cluster(4, 1, {5: C, 6: V}))
    assert plan is not None
    assert (plan.step, plan.index, plan.protected, reasons) == (6, 0, False, [])
    assert plan.holders == {0: 0, 1: 1, 2: 2, 3: 3}
    assert plan.rebuilds == ()


def test_a_step_that_one_rank_lacks_gives_way_to_the_older_one_and_names_the_rank() -> None:
    surveys = cluster(4, 1, {5: C, 6: V})
    surveys[2] = survey(2, [slot(2, 5, world=4), slot(2, 6, SlotState.FILLING)], [group(5, (0, 1, 2, 3), 1)])
    plan, reasons = plan_restore(surveys)
    assert plan is not None
    assert plan.step == 5
    assert plan.protected
    assert reasons == ["step 6 is not complete: rank 2 had not captured it, or lost it before it had parity"]


def test_a_lost_node_is_rebuilt_on_another_keeper() -> None:
    plan, _ = plan_restore(cluster(4, 1, {5: C}, without=(2,)))
    assert plan is not None
    (rebuild,) = plan.rebuilds
    assert (rebuild.lost, rebuild.survivors, rebuild.with_parity) == (2, (0, 1, 3), (0, 1, 3))
    assert rebuild.host in (0, 1, 3)
    assert plan.holders == {0: 0, 1: 1, 3: 3, 2: rebuild.host}


def test_a_lost_node_whose_keeper_is_back_is_rebuilt_at_home() -> None:
    surveys = [*cluster(4, 1, {5: C}, without=(2,)), survey(2, [])]
    plan, _ = plan_restore(surveys)
    assert plan is not None
    assert [(rebuild.lost, rebuild.host) for rebuild in plan.rebuilds] == [(2, 2)]


def test_more_losses_than_parity_are_named_with_the_stripe() -> None:
    plan, reasons = plan_restore(cluster(4, 1, {4: C, 5: C}, without=(1, 2)))
    assert plan is None
    assert len(reasons) == 2
    assert reasons[0].startswith("step 5: nodes [1, 2] of a group of 4 are lost, and its parity covers 1; stripe ")


def test_a_damaged_node_is_rebuilt_from_the_others() -> None:
    plan, _ = plan_restore(cluster(4, 1, {5: C}), frozenset({(3, 5)}))
    assert plan is not None
    assert plan.step == 5
    assert [(rebuild.lost, rebuild.host, rebuild.survivors) for rebuild in plan.rebuilds] == [(3, 3, (0, 1, 2))]
    assert 3 not in plan.rebuilds[0].with_parity


def test_a_node_alone_that_is_damaged_falls_back_to_its_older_slot() -> None:
    plan, reasons = plan_restore(cluster(1, 1, {4: C, 5: C}), frozenset({(0, 5)}))
    assert plan is not None
    assert plan.step == 4
    assert len(reasons) == 1
    assert "step 5" in reasons[0]
    assert plan_restore(cluster(1, 1, {5: C}), frozenset({(0, 5)}))[0] is None


def view_of(*ranks: tuple[int, ...], parity: int = 1) -> View:
    """Nodes 0 … with these ranks each, on hosts of their own."""
    members = tuple(Member(node, f"h{node}", "127.0.0.1", 1, "t", f"/m/{node}", held) for node, held in enumerate(ranks))
    world = sum(map(len, ranks))
    return View("job", 2, world, members, parity, 8, 100, 0, None, 5, 1, True, True)


def test_a_step_lies_as_it_would_be_captured_only_where_ranks_nodes_and_groups_are_the_same() -> None:
    plan, _ = plan_restore(cluster(4, 1, {5: C}))
    assert plan is not None
    assert lies_as(plan, view_of((0,), (1,), (2,), (3,)))
    assert not lies_as(plan, view_of((0,), (1,), (2,))), "a rank less"
    assert not lies_as(plan, view_of((0,), (1,), (2,), (3,), (4,))), "a rank more"
    assert not lies_as(plan, view_of((0,), (1,), (2, 3))), "the same ranks on fewer nodes"
    assert not lies_as(plan, view_of((0,), (1,), (2,), (3,), parity=2)), "another parity was asked for"
    rebuilt, _ = plan_restore(cluster(4, 1, {5: C}, without=(2,)))
    assert rebuilt is not None
    assert not lies_as(rebuilt, view_of((0,), (1,), (2,), (3,))), "rank 2 is with another node now"
    verified, _ = plan_restore(cluster(4, 1, {5: V}))
    assert verified is not None
    assert lies_as(verified, view_of((0,), (1,), (2,), (3,))), "it is protected as it lies"
    alone, _ = plan_restore(cluster(1, 1, {5: C}))
    assert alone is not None
    assert lies_as(alone, view_of((0,)))


def test_ranks_that_were_rebuilt_elsewhere_are_found_there() -> None:
    """Node 1 was lost once and lives on with node 0. Node 1's keeper is back and empty: it is no source of those bytes."""
    kept = group(5, (0, 1, 2), 1, world=3)
    surveys = [
        survey(0, [slot(0, 5, world=3), slot(1, 5, world=3)], [kept]),
        survey(1, []),
        survey(2, [slot(2, 5, world=3)], [kept]),
    ]
    plan, _ = plan_restore(surveys)
    assert plan is not None
    assert plan.rebuilds == ()
    assert plan.holders == {0: 0, 1: 0, 2: 2}
    assert plan.protected, "node 1 cannot encode bytes that it does not have, and waiting for it would never end"
    surveys[2] = survey(2, [], [kept])
    plan, reasons = plan_restore(surveys)
    assert plan is None, "node 2 lost its bytes, and node 1's place in the layout is empty"
    assert "step 5" in reasons[0]


@pytest.mark.parametrize(("away", "host"), [(0, 2), (2, 0)])
def test_a_rank_that_is_there_twice_is_read_at_home(away: int, host: int) -> None:
    """A node's bytes were rebuilt elsewhere while it was away; it is back, with its memory."""
    surveys = cluster(3, 1, {5: C})
    slots = [*surveys[host].slots, slot(away, 5, world=3)]
    surveys[host] = replace(surveys[host], slots=tuple(slots))
    plan, _ = plan_restore(surveys)
    assert plan is not None
    assert plan.holders == {0: 0, 1: 1, 2: 2}
    assert plan.ranks_on(host) == [host]
    assert plan.rebuilds == ()


def test_a_step_whose_parity_is_partly_lost_gets_it_anew() -> None:
    surveys = cluster(3, 1, {5: C})
    surveys[1] = survey(1, [slot(1, 5, world=3)])
    plan, _ = plan_restore(surveys)
    assert plan is not None
    assert plan.rebuilds == ()
    assert not plan.protected, "node 1 lost its parity, so the step does not survive a loss any more"


def test_steps_of_two_epochs_are_not_mixed() -> None:
    surveys = [
        survey(0, [slot(0, 6, V, epoch=1, world=2), slot(0, 5, C, epoch=2, world=2)]),
        survey(1, [slot(1, 6, V, epoch=2, world=2), slot(1, 5, C, epoch=2, world=2)]),
    ]
    plan, reasons = plan_restore(surveys)
    assert plan is not None
    assert (plan.step, plan.epoch) == (5, 2)
    assert len(reasons) == 2


# -- against brute force -------------------------------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """A history of nodes that have filled and protected some steps, and what is lost of it."""
    nodes = draw(st.integers(1, 6))
    ranks_each = draw(st.integers(1, 2))
    parity, size = draw(st.integers(0, 3)), draw(st.integers(2, 4))
    steps = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=2)))
    reached: dict[tuple[int, int], SlotState] = {}
    for place, step in enumerate(steps):
        everywhere = place < len(steps) - 1  # of two steps, only the newer can be unfinished
        for node in range(nodes):
            reached[node, step] = C if everywhere else draw(st.sampled_from([SlotState.FILLING, V, E, C, C, C]))
    # Parity exists on a node only when all of its group had been verified.
    members = [group.nodes for group in groups([member(node) for node in range(nodes)], size, parity)]
    for step in steps:
        for team in members:
            if any(reached[node, step] < V for node in team):
                for node in team:
                    reached[node, step] = min(reached[node, step], V)
    lost = draw(st.sets(st.integers(0, nodes - 1)))
    bad = draw(st.sets(st.tuples(st.integers(0, nodes - 1), st.sampled_from(steps)), max_size=3))
    no_slots = draw(st.sets(st.tuples(st.integers(0, nodes - 1), st.sampled_from(steps)), max_size=2))
    no_parity = draw(st.sets(st.tuples(st.integers(0, nodes - 1), st.sampled_from(steps)), max_size=2))
    return {
        "nodes": nodes,
        "ranks_each": ranks_each,
        "parity": parity,
        "members": members,
        "steps": steps,
        "reached": reached,
        "lost": lost,
        "bad": frozenset(bad),
        "no_slots": no_slots,
        "no_parity": no_parity,
    }


def surveys_of(world: dict[str, Any]) -> tuple[list[Survey], Distrusted]:
    surveys = []
    total = world["nodes"] * world["ranks_each"]
    for node in range(world["nodes"]):
        if node in world["lost"]:
            continue
        slots, kept = [], []
        for step in world["steps"]:
            state = world["reached"][node, step]
            if (node, step) not in world["no_slots"]:
                each = world["ranks_each"]
                slots += [slot(rank, step, state, world=total) for rank in range(node * each, (node + 1) * each)]
            team = next(team for team in world["members"] if node in team)
            if state >= E and effective_parity(world["parity"], len(team)) and (node, step) not in world["no_parity"]:
                kept.append(group(step, team, world["parity"], ranks_each=world["ranks_each"], world=total))
        surveys.append(survey(node, slots, kept))
    return surveys, world["bad"]


def recoverable(world: dict[str, Any], step: int) -> bool:
    """By trying: in every group, each lost node's data stripe must have k fragments among what trusted nodes hold."""
    for team in world["members"]:
        m = effective_parity(world["parity"], len(team))
        k = len(team) - m

        def trusted(node: int) -> bool:
            return node not in world["lost"] and (node, step) not in world["bad"]

        def has_data(node: int, step: int = step) -> bool:
            return trusted(node) and world["reached"][node, step] >= V and (node, step) not in world["no_slots"]

        def has_parity(node: int, step: int = step, m: int = m) -> bool:
            return trusted(node) and world["reached"][node, step] >= E and (node, step) not in world["no_parity"] and m > 0

        gone = [node for node in team if not has_data(node)]
        if gone and not any(has_parity(node) for node in team):
            return False
        for stripe in range(len(team)):
            owners = [team[(stripe + row) % len(team)] for row in range(m)]
            data = [node for node in team if node not in owners]
            have = sum(map(has_data, data)) + sum(map(has_parity, owners))
            if any(node in gone for node in data) and have < k:
                return False
    return True


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_the_newest_step_that_can_be_had_is_the_one_that_is_planned(world: dict[str, Any]) -> None:
    surveys, distrusted = surveys_of(world)
    plan, reasons = plan_restore(surveys, distrusted)
    possible = [step for step in world["steps"] if recoverable(world, step)] if surveys else []
    assert (plan.step if plan else None) == (possible[-1] if possible else None)
    newer = [step for step in world["steps"] if plan is None or step > plan.step]
    for reason in reasons:
        assert any(f"step {step}" in reason for step in newer), reason
    if plan is not None:
        check_plan(plan, world, distrusted)


def check_plan(plan: RestorePlan, world: dict[str, Any], distrusted: Distrusted) -> None:
    """It can be carried out: every source holds what is read from it, every rank has a holder, and hosts are alive."""
    alive = set(range(world["nodes"])) - world["lost"]
    assert plan.world == world["nodes"] * world["ranks_each"]
    assert set(plan.holders) == set(range(plan.world))
    assert set(plan.holders.values()) <= alive
    rebuilt = {rebuild.lost for rebuild in plan.rebuilds}
    for rank, node in plan.holders.items():
        home = rank // world["ranks_each"]
        if home not in rebuilt:
            assert node == home
            assert (home, plan.step) not in distrusted | world["no_slots"]
    for rebuild in plan.rebuilds:
        assert rebuild.host in alive
        assert rebuild.lost not in rebuild.survivors
        assert rebuild.host == rebuild.lost or rebuild.lost not in alive
        for node in rebuild.survivors:
            assert (node, plan.step) not in distrusted | world["no_slots"]
            assert world["reached"][node, plan.step] >= V
        for node in rebuild.with_parity:
            assert (node, plan.step) not in distrusted | world["no_parity"]
            assert world["reached"][node, plan.step] >= E
        check_blocks(rebuild)


def check_blocks(rebuild: Any) -> None:
    record = rebuild.group
    place = {found.node: position for position, found in enumerate(record.records)}
    for block in range(record.layout.k):
        stripe = record.layout.stripe_of(place[rebuild.lost], block)
        owners = [record.records[position].node for position in record.layout.parity_owners(stripe)]
        data = [node for node in rebuild.survivors if node in place and node not in owners]
        parity = [node for node in rebuild.with_parity if node in owners]
        assert len(data) + len(parity) >= record.layout.k


def test_any_m_nodes_of_a_group_may_be_lost() -> None:
    for nodes in range(2, 7):
        for parity in range(1, min(nodes, 4)):
            for lost in combinations(range(nodes), parity):
                plan, _ = plan_restore(cluster(nodes, parity, {5: C}, without=lost))
                assert plan is not None
                assert [rebuild.lost for rebuild in plan.rebuilds] == list(lost)
