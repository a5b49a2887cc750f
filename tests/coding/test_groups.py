"""Groups from failure-domain labels: everyone in one group, and no two of a rack together where that can be helped."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.coding import RotatingLayout, form_groups
from holdfast.coding.groups import group_sizes
from holdfast.errors import ConfigError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 10), st.data())
def test_everyone_is_in_one_group_and_the_last_takes_the_leftovers(labels: list[int], size: int, data: st.DataObject) -> None:
    parity = data.draw(st.integers(0, size - 1))
    groups = form_groups(labels, size, parity)
    assert sorted(node for group in groups for node in group.nodes) == list(range(len(labels)))
    assert all(len(group.nodes) == size for group in groups[:-1])
    assert len(groups[-1].nodes) < 2 * size
    assert len(groups[-1].nodes) >= size or len(groups) == 1
    for group in groups:
        assert group.nodes == tuple(sorted(group.nodes))
        assert group.layout == RotatingLayout(len(group.nodes), min(parity, len(group.nodes) - 1))
        assert group.crowding == max(Counter(labels[node] for node in group.nodes).values())
        assert group.survives_domain == (group.crowding <= group.layout.m)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.integers(1, 12))
@settings(max_examples=300)
def test_domains_are_spread_as_evenly_as_numbers_allow(domain_sizes: list[int], size: int) -> None:
    """A domain of c nodes over g groups puts at least ceil(c/g) into one of them, and never has to put more into any."""
    labels = [name for name, count in enumerate(domain_sizes) for _ in range(count)]
    groups = form_groups(labels, size, 0)
    if len(labels) % size == 0:  # groups of one size: then the bound is reached
        for name, count in enumerate(domain_sizes):
            assert max(sum(labels[node] == name for node in group.nodes) for group in groups) == -(-count // len(groups))


@given(st.data())
@settings(max_examples=200)
def test_a_grouping_without_shared_domains_is_found_if_there_is_one(data: st.DataObject) -> None:
    """Made backwards: groups of different domains first, then their nodes in random order."""
    size, nodes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    sizes = group_sizes(nodes, size)
    names = range(max(sizes) + data.draw(st.integers(0, 4)))
    labels = [name for n in sizes for name in data.draw(st.permutations(names))[:n]]
    groups = form_groups(data.draw(st.permutations(labels)), size, 0)
    assert {group.crowding for group in groups} == {1}


def test_racks_of_four_in_groups_of_eight_are_never_met_twice() -> None:
    labels = [f"rack {node // 4}" for node in range(64)]
    groups = form_groups(labels, 8, 1)
    assert len(groups) == 8
    assert all(group.crowding == 1 and group.survives_domain for group in groups)


def test_a_rack_that_fills_a_group_is_admitted_to() -> None:
    (group,) = form_groups(["a", "a", "a", "b"], 4, 2)
    assert group.crowding == 3
    assert not group.survives_domain


def test_leftovers_of_one_rack_do_not_pile_up_in_the_last_group() -> None:
    labels = [f"rack {node % 10}" for node in range(19)]
    first, last = form_groups(labels, 8, 1)
    assert (len(first.nodes), len(last.nodes)) == (8, 11)
    assert first.crowding == 1
    assert last.crowding == 2  # eleven nodes of ten racks


def test_a_larger_last_group_draws_no_pair_of_a_domain() -> None:
    labels = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8]
    assert [(len(group.nodes), group.crowding) for group in form_groups(labels, 5, 1)] == [(5, 1), (9, 1)]


def test_small_clusters() -> None:
    (alone,) = form_groups(["x"], 8, 2)
    assert (alone.nodes, alone.layout) == ((0,), RotatingLayout(1, 0))
    assert not alone.survives_domain
    (mirror,) = form_groups(["x", "y"], 8, 1)
    assert mirror.layout == RotatingLayout(2, 1)
    (pair,) = form_groups(["x", "y"], 8, 3)
    assert pair.layout == RotatingLayout(2, 1)


def test_the_answer_does_not_depend_on_what_labels_are() -> None:
    by_number = form_groups([3, 1, 3, 2, 1, 2], 3, 1)
    by_name = form_groups(["c", "a", "c", "b", "a", "b"], 3, 1)
    mixed = form_groups([None, ("a", 1), None, "b", ("a", 1), "b"], 3, 1)
    assert by_number == by_name == mixed


@pytest.mark.parametrize(
    ("labels", "size", "parity"), [([], 4, 1), ([1, 2], 0, 0), ([1, 2], 4, 4), ([1, 2], 4, -1), ([1], 1, 1)]
)
def test_groups_that_cannot_be(labels: list[int], size: int, parity: int) -> None:
    with pytest.raises(ConfigError):
        form_groups(labels, size, parity)
