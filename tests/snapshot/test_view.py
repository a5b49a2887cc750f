"""Membership and records: plain values that survive JSON, and groups that leave no node alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.coding.groups import group_sizes
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, RankRecord, View, effective_parity, groups, stride

numbers = st.integers(0, 2**50)
rank_records = st.builds(RankRecord, numbers, numbers, numbers, numbers, numbers)
node_records = st.builds(NodeRecord, numbers, st.lists(rank_records, max_size=3).map(tuple))
group_records = st.builds(
    GroupRecord, numbers, numbers, st.integers(0, 1), numbers, st.integers(0, 3), st.lists(node_records, max_size=4).map(tuple)
)
members = st.builds(
    Member, numbers, st.text(), st.text(), numbers, st.text(), st.text(), st.lists(numbers, max_size=4).map(tuple)
)
views = st.builds(
    View,
    job=st.text(),
    epoch=numbers,
    world=numbers,
    members=st.lists(members, min_size=1, max_size=3).map(tuple),
    parity=numbers,
    group_size=numbers,
    every=numbers,
    checkpoint_every=numbers,
    checkpoints=st.none() | st.text(),
    committed=numbers,
    index=st.integers(0, 1),
    protected=st.booleans(),
    in_memory=st.booleans(),
    guests=st.lists(members, max_size=2).map(tuple),
)


@given(st.one_of(rank_records, node_records, group_records, members, views))
def test_records_come_back_from_json_equal_and_hashable(record: View | GroupRecord | Member) -> None:
    found = type(record).from_json(json.loads(json.dumps(record.to_json())))
    assert found == record
    assert hash(found) == hash(record)


def cluster(count: int, domains: tuple[str, ...] = ("",)) -> list[Member]:
    return [Member(node, "h", "a", 1, "t", "/m", (), domains[node % len(domains)]) for node in range(count)]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True).map(sorted), st.integers(1, 9), st.integers(0, 4))
def test_every_node_is_in_one_group_and_leftovers_join_the_last(nodes: list[int], size: int, parity: int) -> None:
    found = groups([Member(node, "h", "a", 1, "t", "/m", ()) for node in nodes], size, parity)
    assert sorted(node for group in found for node in group.nodes) == nodes
    assert tuple(len(group.nodes) for group in found) == group_sizes(len(nodes), size)
    assert all(group.layout.m == effective_parity(parity, len(group.nodes)) for group in found if size > parity)


@pytest.mark.parametrize(
    ("count", "size", "lengths"),
    [(1, 4, [1]), (2, 4, [2]), (3, 4, [3]), (4, 4, [4]), (7, 4, [7]), (8, 4, [4, 4]), (9, 4, [4, 5]), (3, 1, [1, 1, 1])],
)
def test_groups_of_known_clusters(count: int, size: int, lengths: list[int]) -> None:
    assert [len(group.nodes) for group in groups(cluster(count), size, 1)] == lengths


def test_no_group_has_two_nodes_of_a_rack_where_racks_suffice() -> None:
    members = cluster(8, ("rack-a", "rack-a", "rack-b", "rack-b", "rack-c", "rack-c", "rack-d", "rack-d"))
    found = groups(members, 4, 1)
    for group in found:
        assert len({members[node].domain for node in group.nodes}) == 4
        assert group.survives_domain


def test_a_rack_with_more_nodes_than_a_group_may_lose_is_known() -> None:
    (group,) = groups(cluster(4, ("rack-a", "rack-a", "rack-a", "rack-b")), 4, 1)
    assert (group.crowding, group.survives_domain) == (3, False)


@given(st.integers(0, 5), st.integers(1, 9))
def test_a_group_keeps_at_least_one_node_of_data(parity: int, members: int) -> None:
    found = effective_parity(parity, members)
    assert 0 <= found <= parity
    assert found < members
    assert found in (parity, members - 1)


@given(group_records.filter(lambda group: len(group.records) > group.parity))
def test_a_node_fits_into_its_blocks(group: GroupRecord) -> None:
    for record in group.records:
        assert record.nbytes == sum(stride(rank) for rank in record.ranks)
        assert record.nbytes <= group.block_nbytes * group.layout.k
    assert group.block_nbytes % 64 == 0


def test_a_view_knows_its_coordinator_its_members_and_their_groups() -> None:
    members = tuple(Member(node, "h", "a", 1, "t", "m", (node,)) for node in (3, 5, 7, 9, 11))
    view = View("job", 1, 5, members, 1, 2, 1, 0, None, 0, 1, True, False)
    assert view.coordinator == 3
    assert view.member(7) is members[2]
    assert view.group_of(3) == (3, 7, 11)
    assert view.group_of(9) == (5, 9)
