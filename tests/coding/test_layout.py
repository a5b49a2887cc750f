"""The stripes of a group: the invariants of the layout, and losses of nodes played through with real bytes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.coding import ErasureCode, RotatingLayout
from holdfast.errors import ConfigError, MissingData

SHAPES = [(2, 1), (3, 1), (4, 1), (4, 2), (5, 3), (8, 2), (16, 4), (64, 2), (255, 7)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_block_is_in_one_stripe_and_every_node_keeps_m_parities(n: int, m: int) -> None:
    layout = RotatingLayout(n, m)
    seen: Counter[tuple[int, int]] = Counter()
    parities: Counter[int] = Counter()
    for t in range(layout.stripes):
        owners, givers = layout.parity_owners(t), layout.data_nodes(t)
        assert sorted(owners + givers) == list(range(n))
        assert layout.fragments(t) == givers + owners
        assert layout.first_owner(t) == owners[0] == t
        parities.update(owners)
        for node in range(n):
            block, column = layout.block(node, t), layout.column(node, t)
            assert (node in owners) == (block is None) == (column is None)
            if block is not None and column is not None:
                assert givers[column] == node
                assert layout.stripe_of(node, block) == t
                seen[node, block] += 1
    assert seen == {(node, block): 1 for node in range(n) for block in range(layout.k)}
    assert set(parities.values()) == {m}
    assert layout.memory_overhead == m / (n - m)


def test_the_picture_in_the_docstring_is_the_layout() -> None:
    layout = RotatingLayout(4, 1)
    picture = [[layout.block(node, t) for node in range(4)] for t in range(4)]
    assert picture == [[None, 2, 1, 0], [0, None, 2, 1], [1, 0, None, 2], [2, 1, 0, None]]


def test_two_nodes_mirror_each_other() -> None:
    layout = RotatingLayout(2, 1)
    assert (layout.k, layout.stripes, layout.memory_overhead) == (1, 2, 1.0)
    assert [layout.data_nodes(t) for t in range(2)] == [(1,), (0,)]
    data, parity = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    ErasureCode(layout.k, layout.m).encode([data], [parity])
    np.testing.assert_array_equal(parity, data)


@pytest.mark.parametrize(("n", "m"), [(1, 0), (5, 0)])
def test_without_parity_there_are_no_stripes(n: int, m: int) -> None:
    layout = RotatingLayout(n, m)
    assert (layout.k, layout.stripes, layout.memory_overhead) == (n, 0, 0.0)
    assert layout.traffic_plan().transfers == layout.repair_plan([]).repairs == ()
    with pytest.raises(MissingData, match="survives 0"):
        layout.repair_plan([0])


# -- bytes -------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.data())
def test_blocks_cover_every_byte_of_every_node_once(n: int, data: st.DataObject) -> None:
    layout = RotatingLayout(n, data.draw(st.integers(0, n - 1)))
    sizes = data.draw(st.lists(st.integers(0, 100_000), min_size=n, max_size=n))
    length = layout.block_length(sizes)
    assert length % 64 == 0
    assert layout.k * length >= max(sizes) > layout.k * (length - 64) - 1
    for size in sizes:
        spans = [layout.block_span(block, length, size) for block in range(layout.k)]
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(before[1] == after[0] for before, after in pairwise(spans))
        assert all(stop - start <= length for start, stop in spans)


@given(st.integers(2, 12), st.integers(0, 10**9))
def test_long_blocks_are_whole_lines_and_staggered(n: int, size: int) -> None:
    layout = RotatingLayout(n, 1)
    length = layout.block_length([size] * n)
    assert length % 64 == 0
    assert length * layout.k >= size
    assert length <= max(size / layout.k * 1.016, size / layout.k + 64)
    if size / layout.k > 4 << 20:
        lines = {block * length % 4096 for block in range(layout.k)}
        assert len(lines) == layout.k  # no two blocks of a stripe begin at the same line of a page
        pages = {block * length % (1 << 20) // 4096 for block in range(layout.k)}
        assert len(pages) == layout.k


def test_empty_nodes_have_empty_blocks() -> None:
    assert RotatingLayout(4, 1).block_length([0, 0, 0, 0]) == 0
    assert RotatingLayout(4, 1).block_length([0, 0, 1, 0]) == 64


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_protecting_costs_every_node_the_least_that_is_possible(n: int, m: int) -> None:
    layout = RotatingLayout(n, m)
    plan = layout.traffic_plan()
    for node in range(min(n, 64)):
        assert plan.sent(node) == plan.received(node) == n - 1  # blocks of S/(n-m): the proved floor
    assert len(plan.transfers) == n * (n - 1)
    assert all(transfer.source != transfer.target for transfer in plan.transfers)


def test_the_traffic_plan_delivers_what_each_owner_needs() -> None:
    for n, m in SHAPES[:-1]:
        layout = RotatingLayout(n, m)
        got: dict[tuple[int, int], list[object]] = {}
        for transfer in layout.traffic_plan().transfers:
            if transfer.parity is not None:  # the sender can compute it only when all blocks have come
                assert len(got[transfer.stripe, transfer.source]) == layout.k
                assert layout.parity_owners(transfer.stripe)[transfer.parity] == transfer.target
            got.setdefault((transfer.stripe, transfer.target), []).append((transfer.source, transfer.block))
        for t in range(n):
            assert got[t, layout.first_owner(t)] == [(node, layout.block(node, t)) for node in layout.data_nodes(t)]


class Group:
    """A group with real bytes: what each node holds, and what is left when some are gone."""

    def __init__(self, layout: RotatingLayout, sizes: list[int], seed: int) -> None:
        self.layout, self.sizes = layout, sizes
        self.code = ErasureCode(layout.k, layout.m)
        self.length = layout.block_length(sizes)
        generator = np.random.default_rng(seed)
        self.nodes = [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]
        self.kept: dict[tuple[int, int], np.ndarray] = {}  # (stripe, node) → the fragment it has of the stripe
        for t in range(layout.stripes):
            data = [self.block(node, t) for node in layout.data_nodes(t)]
            parity = [np.empty(self.length, np.uint8) for _ in range(layout.m)]
            self.code.encode(data, parity)
            self.kept |= {(t, node): f for node, f in zip(layout.fragments(t), data + parity, strict=True)}

    def block(self, node: int, t: int) -> np.ndarray:
        block = self.layout.block(node, t)
        assert block is not None
        start, stop = self.layout.block_span(block, self.length, self.sizes[node])
        padded = np.zeros(self.length, np.uint8)
        padded[: stop - start] = self.nodes[node][start:stop]
        return padded

    def repaired(self, lost: set[int]) -> dict[tuple[int, int], np.ndarray]:
        """What the repair plan brings back, with nothing but what the survivors have."""
        left = {place: fragment for place, fragment in self.kept.items() if place[1] not in lost}
        back = {}
        for repair in self.layout.repair_plan(lost).repairs:
            out = {fragment: np.zeros(self.length, np.uint8) for fragment in repair.rebuilds}
            self.code.reconstruct({f: left[repair.stripe, home] for f, home in repair.reads.items()}, out)
            back |= {(repair.stripe, home): out[f] for f, home in repair.rebuilds.items()}
        return back


@given(st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_any_m_lost_nodes_come_back_by_following_the_repair_plan(n: int, data: st.DataObject) -> None:
    layout = RotatingLayout(n, data.draw(st.integers(1, n - 1)))
    sizes = data.draw(st.lists(st.integers(0, 1000), min_size=n, max_size=n))
    group = Group(layout, sizes, seed=n)
    lost = data.draw(st.sets(st.integers(0, n - 1), max_size=layout.m))
    back = group.repaired(lost)
    assert back.keys() == {(t, node) for t in range(n) for node in lost}
    for place, fragment in back.items():
        np.testing.assert_array_equal(fragment, group.kept[place])


@pytest.mark.parametrize(("n", "m"), [(4, 1), (8, 2), (16, 3), (64, 2)])
def test_a_repair_is_spread_over_the_survivors(n: int, m: int) -> None:
    layout = RotatingLayout(n, m)
    for lost in [(0,), (n - 1,), *([(1, n // 2), (1, 2)] if m > 1 else [])]:
        plan = layout.repair_plan(lost)
        survivors = [node for node in range(n) if node not in lost]
        work = Counter(repair.worker for repair in plan.repairs)
        assert set(work) == set(survivors)
        assert max(work.values()) - min(work.values()) <= 1
        for node in lost:
            assert plan.received(node) == n  # its k blocks and m parities, each once
            assert plan.sent(node) == 0
        reads = layout.k - 1
        assert all(plan.received(node) == work[node] * reads for node in survivors)
        sent = [plan.sent(node) for node in survivors]
        assert max(sent) <= n + 2 * len(lost)  # about its own size; alone, the replacement would draw n per block
        assert sum(sent) == sum(plan.received(node) for node in range(n))


def test_workers_read_from_survivors_only_and_from_themselves_first() -> None:
    for lost in combinations(range(6), 2):
        for repair in RotatingLayout(6, 2).repair_plan(lost).repairs:
            assert repair.worker not in lost
            assert repair.worker in repair.reads.values()
            assert not set(repair.reads.values()) & set(lost)
            assert set(repair.rebuilds.values()) == set(lost)
            assert len(repair.reads) == 4


def test_plans_are_the_same_everywhere() -> None:
    assert RotatingLayout(8, 2).repair_plan({5, 1}) == RotatingLayout(8, 2).repair_plan([1, 5, 5])
    assert RotatingLayout(8, 2).traffic_plan() == RotatingLayout(8, 2).traffic_plan()
    assert RotatingLayout(8, 2).repair_plan([]).repairs == ()


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 1), (4, 4), (4, -1), (256, 1), (4.0, 1), (4, 1.0), (None, 0)])
def test_groups_that_cannot_be(n: Any, m: Any) -> None:
    with pytest.raises(ConfigError, match="a group needs 0 <= m < n <= 255"):
        RotatingLayout(n, m)


def test_nodes_stripes_and_blocks_that_do_not_exist() -> None:
    layout = RotatingLayout(4, 1)
    for act in (layout.parity_owners, layout.first_owner, layout.data_nodes, lambda t: layout.block(0, t)):
        for t in (-1, 4):
            with pytest.raises(ConfigError, match=r"stripe -?\d does not exist"):
                act(t)
    for node in (-1, 4):
        with pytest.raises(ConfigError, match="not among 0 … 3"):
            layout.column(node, 0)
        with pytest.raises(ConfigError, match="not among 0 … 3"):
            layout.repair_plan([node])
    for block in (-1, 3):
        with pytest.raises(ConfigError, match="not among 0 … 2"):
            layout.stripe_of(0, block)
        with pytest.raises(ConfigError, match="not among 0 … 2"):
            layout.block_span(block, 64, 100)
    for sizes in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -4]):
        with pytest.raises(ConfigError, match="the bytes of 4 nodes"):
            layout.block_length(sizes)


def test_losing_more_than_m_nodes_is_said() -> None:
    with pytest.raises(MissingData, match=r"nodes \[0, 3, 5\] of a group of 8 are lost and it survives 2"):
        RotatingLayout(8, 2).repair_plan([5, 0, 3])
