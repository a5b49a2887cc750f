"""Scrubbing: damage is seen, placed where the code allows it, and never blamed on a healthy fragment within its limits."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.coding import DamagedChunk, ErasureCode
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    Fragments = Callable[[ErasureCode, int], list[np.ndarray]]


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (4, 2), (8, 4), (3, 5)])
def test_healthy_fragments_are_clean(k: int, m: int, backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(k, m, backend)
    fragments = dict(enumerate(fragments_of(code, 1000)))
    report = code.scrub(fragments, chunk_size=300)
    assert report.is_clean
    assert report.is_located
    assert str(report) == "clean: 1000 bytes per fragment agree"
    assert not code.syndromes(fragments).any()


@pytest.mark.parametrize(("k", "m"), [(1, 2), (4, 2), (8, 2), (4, 3), (8, 4), (252, 3)])
def test_one_damaged_fragment_is_named_with_its_chunks(k: int, m: int, backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(k, m, backend)
    fragments = fragments_of(code, 1000)
    for bad in {0, k // 2, k - 1, k, k + m - 1}:
        damaged = [f.copy() for f in fragments]
        damaged[bad][250] ^= 1
        damaged[bad][700:950] ^= 255
        report = code.scrub(dict(enumerate(damaged)), chunk_size=200)
        assert report.damaged == (
            DamagedChunk(200, 200, 1, (bad,)),
            DamagedChunk(600, 200, 100, (bad,)),
            DamagedChunk(800, 200, 150, (bad,)),
        )
        assert report.fragments == (bad,)
        assert f"bytes [200, 400): 1 wrong, fragment {bad}" in str(report)


def test_what_is_named_can_be_rebuilt(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 1000)
    damaged = [f.copy() for f in fragments]
    damaged[3][500:510] = 0
    damaged[5][0:3] ^= 9
    for chunk in code.scrub(dict(enumerate(damaged)), chunk_size=100).damaged:
        piece = slice(chunk.offset, chunk.offset + chunk.length)
        healthy = {j: f[piece] for j, f in enumerate(damaged) if j not in chunk.fragments}
        code.reconstruct(healthy, {j: damaged[j][piece] for j in chunk.fragments})
    assert all(np.array_equal(a, b) for a, b in zip(damaged, fragments, strict=True))


def test_one_parity_sees_damage_and_cannot_place_it(backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(4, 1, backend)
    fragments = fragments_of(code, 100)
    fragments[2][40] ^= 128
    report = code.scrub(dict(enumerate(fragments)))
    assert report.damaged == (DamagedChunk(0, 100, 1, ()),)
    assert not report.is_clean
    assert not report.is_located
    assert "cannot tell which fragment" in str(report)


def test_different_fragments_may_be_damaged_in_different_columns(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 100)
    fragments[1][10:20] ^= 5
    fragments[4][50:60] ^= 6
    assert code.scrub(dict(enumerate(fragments))).damaged == (DamagedChunk(0, 100, 20, (1, 4)),)


@pytest.mark.parametrize("bad", list(combinations(range(10), 2)))
def test_two_fragments_damaged_in_the_same_columns_are_named_by_four_parities(
    bad: tuple[int, int], fragments_of: Fragments
) -> None:
    code = ErasureCode(6, 4)
    fragments = fragments_of(code, 100)
    for j in bad:
        fragments[j][30:45] ^= np.arange(1, 16, dtype=np.uint8) * (j + 1)
    assert code.scrub(dict(enumerate(fragments))).damaged == (DamagedChunk(0, 100, 15, bad),)


def test_more_fragments_than_can_be_rebuilt_are_not_named(fragments_of: Fragments) -> None:
    """Every column names its culprit, but the chunk as a whole has three; in smaller chunks each can be rebuilt."""
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 90)
    for j in (0, 2, 5):
        fragments[j][j * 10] ^= 3
    assert code.scrub(dict(enumerate(fragments))).damaged == (DamagedChunk(0, 90, 3, ()),)
    assert [chunk.fragments for chunk in code.scrub(dict(enumerate(fragments)), chunk_size=10).damaged] == [(0,), (2,), (5,)]


def test_more_damage_than_can_be_placed_is_reported_as_such(fragments_of: Fragments) -> None:
    """Two fragments against two parities: single columns may look like one other fragment, many of them do not."""
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 500)
    fragments[0][:] = 0
    fragments[2][:] = 0
    report = code.scrub(dict(enumerate(fragments)))
    assert [chunk.fragments for chunk in report.damaged] == [()]
    assert not report.is_located


@given(st.integers(1, 12), st.integers(1, 8), st.data())
@settings(max_examples=80, deadline=None)
def test_lost_fragments_leave_the_rest_checkable(k: int, m: int, data: st.DataObject) -> None:
    """With s = n - lost - k spare fragments, one bad one is seen from s = 1 on and named from s = 2 on."""
    code, length = ErasureCode(k, m), 60
    fragments = list(np.random.default_rng(k * m).integers(0, 256, (k + m, length), dtype=np.uint8))
    code.encode(fragments[:k], fragments[k:])
    lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m - 1))
    here = {j: fragments[j] for j in range(k + m) if j not in lost}
    assert code.scrub(here).is_clean
    bad = data.draw(st.sampled_from(sorted(here)))
    here[bad] = here[bad].copy()
    here[bad][data.draw(st.integers(0, length - 1))] ^= data.draw(st.integers(1, 255))
    (chunk,) = code.scrub(here).damaged
    assert chunk.columns == 1
    assert chunk.fragments == ((bad,) if len(here) - k >= 2 else ())


def test_one_spare_fragment_never_blames_anyone(fragments_of: Fragments) -> None:
    """The decoder for single columns gives a name here too, and mostly a wrong one."""
    code = ErasureCode(9, 3)
    fragments = fragments_of(code, 10)
    for bad in (0, 5, 10):
        for error in range(1, 256, 11):
            here = {j: f for j, f in enumerate(fragments) if j not in (1, 11)}
            here[bad] = here[bad].copy()
            here[bad][3] ^= error
            assert code.scrub(here).damaged == (DamagedChunk(0, 10, 1, ()),)


def test_threads_and_chunks_find_the_same(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 10_000)
    fragments[3][[5, 4000, 9999]] ^= 1
    one = code.scrub(dict(enumerate(fragments)), chunk_size=1000)
    many = code.scrub(dict(enumerate(fragments)), chunk_size=1000, threads=4)
    assert one == many
    assert [chunk.offset for chunk in one.damaged] == [0, 4000, 9000]


def test_syndromes_of_a_piece_are_a_piece_of_the_syndromes(backend: str, fragments_of: Fragments) -> None:
    code = ErasureCode(4, 3, backend)
    fragments = fragments_of(code, 400)
    fragments[1][100:300] ^= 77
    whole = code.syndromes(dict(enumerate(fragments)))
    assert whole.shape == (3, 400)
    assert set(np.flatnonzero(whole.any(axis=0))) == set(range(100, 300))
    np.testing.assert_array_equal(code.syndromes(dict(enumerate(fragments)), 50, 100), whole[:, 50:150])
    np.testing.assert_array_equal(code.syndromes(dict(enumerate(fragments)), 350), whole[:, 350:])


def test_the_order_of_the_mapping_does_not_matter(fragments_of: Fragments) -> None:
    code = ErasureCode(3, 2)
    fragments = fragments_of(code, 50)
    fragments[0][9] ^= 1
    for order in ([4, 0, 2, 1, 3], [1, 3, 0, 4, 2]):
        assert code.scrub({j: fragments[j] for j in order}).fragments == (0,)


def test_k_fragments_have_nothing_to_disagree_about(fragments_of: Fragments) -> None:
    code = ErasureCode(4, 2)
    fragments = fragments_of(code, 50)
    with pytest.raises(ConfigError, match="give at least 5"):
        code.scrub(dict(enumerate(fragments[:4])))
    with pytest.raises(ConfigError, match="give at least 4"):
        ErasureCode(3, 0).scrub(dict(enumerate(fragments[:3])))
