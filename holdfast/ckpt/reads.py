"""Which bytes to read for which boxes: pure, so that a plan can be counted and printed before the disk moves.

A wanted box is matched with the stored runs. Where both sides are contiguous the bytes go straight to their destination;
elsewhere a few MiB are read, checked and cut in memory (data sieving), because thousands of short reads lose to one long one.
Every read starts and ends at a checksum block, and no byte of a run is read twice for neighbouring wishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from holdfast.arrays import ITEMSIZE, Box
from holdfast.ckpt.blocks import BLOCK_NBYTES
from holdfast.ckpt.manifest import StoredRun
from holdfast.ckpt.strips import flat_offset, is_contiguous

READ_NBYTES = 4 << 20
"""One read: beyond this larger is not faster (measured with the page cache warm), and it bounds the memory of a sieve."""

SIEVE_GAP_NBYTES = 4 * BLOCK_NBYTES
"""Gaps up to this size are read and thrown away rather than jumped over."""


@dataclass(frozen=True, slots=True)
class Want:
    """A box of an array, to be laid row-major into buffer number `target`."""

    array: str
    dtype: str
    box: Box
    target: int


@dataclass(frozen=True, slots=True)
class DirectRead:
    """Bytes [start, stop) of a run go to byte `at` of a buffer."""

    run: StoredRun
    start: int
    stop: int
    target: int
    at: int


@dataclass(frozen=True, slots=True)
class SieveRead:
    """Bytes [start, stop) of a run are read once, and boxes are cut out of them; all of a compressed run, once."""

    run: StoredRun
    start: int
    stop: int
    cuts: tuple[tuple[Want, Box], ...]


Read = DirectRead | SieveRead


def plan_reads(wants: Iterable[Want], runs_of: Callable[[str], Sequence[StoredRun]]) -> list[Read]:
    """The reads that fill every wanted box, in the order in which their bytes lie on the disk."""
    direct: list[Read] = []
    sieved: dict[tuple[str, int], list[SieveRead]] = {}
    for want in wants:
        if not want.box.size:
            continue
        for run in runs_of(want.array):
            common = want.box.intersect(run.box) if run.box.shape else run.box
            if common is None:
                continue
            if run.is_packed:
                whole = SieveRead(run, 0, run.nbytes, ((want, common),))
                sieved.setdefault((run.run.file, run.run.byte_offset), []).append(whole)
            elif _goes_straight(run, want, common):
                direct += _direct(run, want, common)
            else:
                sieved.setdefault((run.run.file, run.run.byte_offset), []).extend(_sieve(run, want, common))
    reads = direct + [read for group in sieved.values() for read in _merge(group)]
    return sorted(reads, key=lambda read: (read.run.run.file, read.run.run.byte_offset + read.start))


def nbytes_read(reads: Iterable[Read]) -> int:
    """What the disk will be asked for, checksum blocks included."""
    return sum(stop - start for start, stop in (aligned(read) for read in reads))


def aligned(read: Read) -> tuple[int, int]:
    """The read widened to whole checksum blocks of its run."""
    start = read.start // BLOCK_NBYTES * BLOCK_NBYTES
    return start, min(-(-read.stop // BLOCK_NBYTES) * BLOCK_NBYTES, read.run.nbytes)


def _goes_straight(run: StoredRun, want: Want, common: Box) -> bool:
    return (
        common.size * ITEMSIZE[want.dtype] >= BLOCK_NBYTES
        and is_contiguous(common, run.run.held)
        and is_contiguous(common, want.box)
    )


def _direct(run: StoredRun, want: Want, common: Box) -> list[Read]:
    itemsize = ITEMSIZE[want.dtype]
    start, at = flat_offset(common, run.run.held) * itemsize, flat_offset(common, want.box) * itemsize
    stop = start + common.size * itemsize
    # Cut at block boundaries, so that no block is read for two neighbours.
    cuts = [start, *range((start // READ_NBYTES + 1) * READ_NBYTES, stop, READ_NBYTES), stop]
    return [DirectRead(run, a, b, want.target, at + a - start) for a, b in pairwise(cuts)]


def _sieve(run: StoredRun, want: Want, common: Box) -> list[SieveRead]:
    itemsize = ITEMSIZE[want.dtype]
    reads = []
    for part in _split(common, run.run.held, itemsize):
        start, stop = _span(part, run.run.held, itemsize)
        reads.append(SieveRead(run, start, stop, ((want, part),)))
    return reads


def _split(part: Box, within: Box, itemsize: int) -> list[Box]:
    """Cut a box so that each piece spans at most one read and skips over wide gaps."""
    dim = next((dim for dim, extent in enumerate(part.shape) if extent > 1), None)
    if dim is None:
        return [part]
    first = _along(part, dim, 0, 1)
    start, stop = _span(first, within, itemsize)
    stride = math.prod(within.shape[dim + 1 :]) * itemsize
    if stride - (stop - start) > SIEVE_GAP_NBYTES or len(_split(first, within, itemsize)) > 1:
        slices = (_along(part, dim, index, index + 1) for index in range(part.shape[dim]))
        return [piece for one in slices for piece in _split(one, within, itemsize)]
    count = max(1, (READ_NBYTES - (stop - start)) // stride + 1)
    return [_along(part, dim, low, min(low + count, part.shape[dim])) for low in range(0, part.shape[dim], count)]


def _along(part: Box, dim: int, low: int, high: int) -> Box:
    offset = (*part.offset[:dim], part.offset[dim] + low, *part.offset[dim + 1 :])
    return Box(offset, (*part.shape[:dim], high - low, *part.shape[dim + 1 :]))


def _span(part: Box, within: Box, itemsize: int) -> tuple[int, int]:
    """First byte of the first element and end of the last one, in a row-major buffer of `within`."""
    last = Box(tuple(end - 1 for end in part.end), (1,) * len(part.shape))
    return flat_offset(part, within) * itemsize, (flat_offset(last, within) + 1) * itemsize


def _merge(reads: list[SieveRead]) -> list[SieveRead]:
    """Neighbouring sieves of one run become one read, as long as it stays small and the gap between them narrow."""
    merged: list[SieveRead] = []
    for read in sorted(reads, key=lambda read: (read.start, read.stop)):
        last = merged[-1] if merged else None
        near = last is not None and read.start <= aligned(last)[1] + SIEVE_GAP_NBYTES // 4
        if last is not None and near and (read.run.is_packed or max(read.stop, last.stop) - last.start <= READ_NBYTES):
            merged[-1] = SieveRead(last.run, last.start, max(last.stop, read.stop), last.cuts + read.cuts)
        else:
            merged.append(read)
    return merged
