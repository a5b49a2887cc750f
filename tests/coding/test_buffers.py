"""Buffers made for coding: aligned, apart from each other, and never at the same place in a page."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from holdfast.coding import ErasureCode, staggered
from holdfast.coding.buffers import region, staggered_length


@pytest.mark.parametrize("nbytes", [0, 1, 64, 1000, 1 << 20, (1 << 20) + 1, 20800, 65536])
@pytest.mark.parametrize("count", [0, 1, 2, 10, 60])
def test_staggered_buffers_share_nothing_and_begin_at_different_lines(count: int, nbytes: int) -> None:
    buffers = staggered(count, nbytes)
    assert [buffer.size for buffer in buffers] == [nbytes] * count
    starts = [region(buffer).address for buffer in buffers]
    assert all(start % 64 == 0 for start in starts)
    assert len({start % 4096 for start in starts}) == count
    assert all(b - a >= nbytes for a, b in pairwise(starts))
    assert nbytes <= staggered_length(nbytes) < nbytes + 65536


def test_staggered_buffers_can_be_coded() -> None:
    buffers = staggered(6, 1000)
    for j, buffer in enumerate(buffers):
        buffer[:] = j
    ErasureCode(4, 2).encode(buffers[:4], buffers[4:])
    np.testing.assert_array_equal(np.bitwise_xor.reduce(np.stack(buffers)), 0)
