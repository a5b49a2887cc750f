"""Checksums of a run of bytes, one CRC32C per 32 KiB block.

Small blocks keep slice reads honest and cheap at once: whoever reads 1 MiB from the middle checks every byte and reads at most
6 % more. The CRC of the whole run follows from those of its blocks without touching the bytes again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from holdfast.coding import crc32c_blocks, crc32c_combine

BLOCK_NBYTES = 32 << 10

SPAN_BLOCKS = 16
"""So many blocks are checked by one call: a call costs as much as a block, and the CRC of 16 follows from their 16 CRCs."""

Crcs = np.ndarray[Any, np.dtype[np.uint32]]


def block_crcs(view: memoryview) -> Crcs:
    """CRC32C of every block of `view`; the last block may be shorter."""
    return crc32c_blocks(view, BLOCK_NBYTES)


class BlockSums:
    """What the blocks of a run, and spans of them, have to sum to."""

    def __init__(self, blocks: Crcs) -> None:
        self.blocks = blocks
        self._spans = _joined(blocks[: len(blocks) // SPAN_BLOCKS * SPAN_BLOCKS].reshape(-1, SPAN_BLOCKS))

    def wrong(self, data: memoryview, start: int) -> list[tuple[int, int]]:
        """Blocks of the run that are not in `data`, which begins with the block at byte `start`: (number, CRC found instead)."""
        first, whole = start // BLOCK_NBYTES, len(data) // BLOCK_NBYTES
        low = -(-first // SPAN_BLOCKS)
        high = max(low, (first + whole) // SPAN_BLOCKS)
        if low == high:
            return self._wrong_blocks(data, first)
        begin, end = (span * SPAN_BLOCKS * BLOCK_NBYTES - start for span in (low, high))
        if (crc32c_blocks(data[begin:end], SPAN_BLOCKS * BLOCK_NBYTES) != self._spans[low:high]).any():
            return self._wrong_blocks(data, first)
        return self._wrong_blocks(data[:begin], first) + self._wrong_blocks(data[end:], high * SPAN_BLOCKS)

    def _wrong_blocks(self, data: memoryview, first: int) -> list[tuple[int, int]]:
        found = block_crcs(data)
        wrong = np.flatnonzero(found != self.blocks[first : first + len(found)])
        return [(first + index, int(found[index])) for index in wrong.tolist()]


def combine(crcs: Crcs, nbytes: int) -> int:
    """CRC32C of the `nbytes` whose blocks have these CRCs."""
    if len(crcs) == 0:
        return 0
    whole, rest = divmod(nbytes, BLOCK_NBYTES)
    total = int(_joined(crcs[:whole])) if whole else 0
    return crc32c_combine(total, int(crcs[-1]), rest) if rest else total


def _joined(crcs: Crcs) -> Crcs:
    """CRC32C of the whole blocks along the last axis, one behind the other."""
    # Pairs are joined level by level. Zeros in front change nothing: 0 is the CRC of no bytes at all.
    length = BLOCK_NBYTES
    while crcs.shape[-1] > 1:
        if crcs.shape[-1] % 2:
            crcs = np.concatenate([np.zeros((*crcs.shape[:-1], 1), np.uint32), crcs], axis=-1)
        crcs, length = _shift(crcs[..., 0::2], length) ^ crcs[..., 1::2], 2 * length
    joined: Crcs = crcs[..., 0]
    return joined


def _shift(crcs: Crcs, nbytes: int) -> Crcs:
    """What each CRC becomes when `nbytes` zero bytes follow; linear over bits, hence four table look-ups."""
    tables = _shift_tables(nbytes)
    shifted: Crcs = tables[0][crcs & 0xFF]
    for lane in range(1, 4):
        shifted = shifted ^ tables[lane][(crcs >> np.uint32(8 * lane)) & 0xFF]
    return shifted


@lru_cache(maxsize=64)
def _shift_tables(nbytes: int) -> Crcs:
    tables = np.zeros((4, 256), np.uint32)
    for bit in range(32):
        lane, inside = divmod(bit, 8)
        has_bit = np.arange(256) >> inside & 1 == 1
        tables[lane, has_bit] ^= np.uint32(crc32c_combine(1 << bit, 0, nbytes))
    return tables
