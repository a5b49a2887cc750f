"""How the bytes of one array lie in its files: a pure function of the array and of the boxes its writers hold.

An array is cut into *strips* across its trailing dimensions, and a strip lists its rows in order. When every writer holds
whole rows (or any flat range of them) there is one strip and the file is the array's own row-major bytes. When writers hold
columns, a strip is as wide as one writer's part. Either way a writer's box is one contiguous range of bytes: nobody has to read
before writing, nobody shares a lock, and the order stays one that Zarr's shard index can describe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Shape

MAX_CHUNK_NBYTES = 8 << 20
GOOD_CHUNK_NBYTES = 4 << 20
MIN_CHUNK_NBYTES = 1 << 20
"""Zarr's inner chunks: small enough to read a slice, large enough that the index stays below 0.01 % of the data."""

MAX_SHARD_NBYTES = 4 << 30
"""Larger arrays are split into several files along the first dimension."""

FILES_PER_BOX = 4
"""A grid of files much finer than the fragments is no grid of the fragments."""


@dataclass(frozen=True, slots=True)
class Run:
    """A box whose bytes lie side by side in one file, in row-major order.

    `held` is the box that the bytes are laid out as: larger than `box` only where the last strip of an uneven cut is padded to
    the width of the others. Padding is zero.
    """

    box: Box
    file: str
    byte_offset: int
    held: Box


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """The files of one array: `strip` is its extents past the first dimension, `chunk` Zarr's inner chunk.

    With `split` every strip has files of its own. `level` is zstd's, for an array whose chunks are compressed.
    `head_nbytes` stand in front of the data of a file that is a safetensors file too (`dual.py`).
    """

    spec: ArraySpec
    strip: Shape
    chunk: Shape
    shard_rows: int
    split: bool = False
    level: int | None = None
    head_nbytes: int = 0

    @property
    def rows(self) -> int:
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of one strip."""
        return math.prod(self.strip) * ITEMSIZE[self.spec.dtype]

    @property
    def strip_grid(self) -> Shape:
        return tuple(-(-extent // max(1, width)) for extent, width in zip(self.spec.shape[1:], self.strip, strict=True))

    @property
    def is_plain(self) -> bool:
        """One chunk holds everything: the file is that chunk, without an index."""
        return self.chunk == self.spec.shape or self.spec.nbytes == 0

    @property
    def is_packed(self) -> bool:
        """Chunks are compressed: where one begins follows from no formula."""
        return self.level is not None

    @property
    def file_grid(self) -> Shape:
        """Files along every dimension."""
        if not self.spec.shape:
            return ()
        return (-(-self.rows // self.shard_rows), *(self.strip_grid if self.split else (1,) * len(self.strip)))

    @property
    def shards(self) -> int:
        return math.prod(self.file_grid) if self.spec.nbytes else 0

    def file(self, shard: int) -> str:
        """The shard's path inside the checkpoint, by Zarr's default chunk keys."""
        return "/".join([self.spec.name, "c", *map(str, unflat_index(shard, self.file_grid))])

    def shard_box(self, shard: int) -> Box:
        """The part of the array that a shard's file holds."""
        if not self.spec.shape:
            return Box((), ())
        extents = (self.shard_rows, *(self.strip if self.split else self.spec.shape[1:]))
        offset = tuple(at * extent for at, extent in zip(unflat_index(shard, self.file_grid), extents, strict=True))
        ends = (min(at + extent, whole) for at, extent, whole in zip(offset, extents, self.spec.shape, strict=True))
        return Box(offset, tuple(end - at for at, end in zip(offset, ends, strict=True)))

    def shard_of(self, box: Box) -> int:
        """The shard in which a box begins."""
        if not box.shape:
            return 0
        strip = (at // width for at, width in zip(box.offset[1:], self.strip, strict=True))
        where = strip if self.split else (0 for _ in self.strip)
        return flat_index([box.offset[0] // self.shard_rows, *where], self.file_grid)

    def stored_rows(self, shard: int) -> int:
        """Rows that each strip of the shard takes in its file: the last chunk is as tall as the others, a hole in the file."""
        rows = self.shard_box(shard).shape[0] if self.spec.shape else 1
        tall = self.chunk[0] if self.chunk else 1
        return -(-rows // tall) * tall

    def data_nbytes(self, shard: int) -> int:
        """Where the data of a shard ends and its index begins."""
        return self.head_nbytes + self.stored_rows(shard) * self.row_nbytes * (1 if self.split else math.prod(self.strip_grid))

    def chunk_box(self, chunk: Sequence[int]) -> Box:
        """Zarr's inner chunk at this place of the array's chunk grid, padding included."""
        return Box(tuple(at * extent for at, extent in zip(chunk, self.chunk, strict=True)), self.chunk)

    def chunks(self, box: Box) -> Iterator[Box]:
        """The inner chunks that `box` touches, in the order of Zarr's grid."""
        for where in product(*map(_touched, box.offset, box.end, self.chunk)):
            yield self.chunk_box(where)

    def runs(self, box: Box) -> list[Run]:
        """The contiguous byte ranges that hold `box`, in the order of the box's own bytes where that is possible."""
        if not box.size:
            return []
        if not self.spec.shape:
            return [Run(box, self.file(0), 0, box)]
        first, last = box.offset[0] // self.shard_rows, (box.end[0] - 1) // self.shard_rows
        return [run for row in range(first, last + 1) for run in self._runs_in_rows(box, row)]

    def _runs_in_rows(self, box: Box, row: int) -> Iterator[Run]:
        for where in product(*map(_touched, box.offset[1:], box.end[1:], self.strip)):
            shard = flat_index((row, *(where if self.split else (0,) * len(where))), self.file_grid)
            rows, strip_nbytes = self.shard_box(shard), self.stored_rows(shard) * self.row_nbytes
            corner = tuple(index * width for index, width in zip(where, self.strip, strict=True))
            strip = Box((rows.offset[0], *corner), (rows.shape[0], *self.strip))
            base = self.head_nbytes + (0 if self.split else flat_index(where, self.strip_grid) * strip_nbytes)
            common = box.intersect(strip)
            assert common is not None
            for held in contiguous_parts(self._padded(common, strip), strip):
                part = held.intersect(common)
                if part is not None:  # None where a strip is padded in two dimensions
                    yield Run(part, self.file(shard), base + flat_offset(held, strip) * ITEMSIZE[self.spec.dtype], held)

    def _padded(self, box: Box, strip: Box) -> Box:
        """`box` with the padding that follows it: a writer of the array's last columns fills the strip."""
        edges = zip(box.end[1:], strip.end[1:], self.spec.shape[1:], strict=True)
        end = (box.end[0], *(wide if edge == extent else edge for edge, wide, extent in edges))
        return Box(box.offset, tuple(stop - start for start, stop in zip(box.offset, end, strict=True)))


def choose_layout(spec: ArraySpec, boxes: Iterable[Box]) -> ArrayLayout:
    """The layout in which each of `boxes` is one byte range wherever a regular grid allows it."""
    strip = _strip(spec, boxes)
    if not spec.nbytes or not spec.shape:
        return ArrayLayout(
            spec, strip, tuple(max(1, extent) for extent in spec.shape), max(1, spec.shape[0] if spec.shape else 1)
        )
    chunk = _chunk(spec.shape[0], strip, ITEMSIZE[spec.dtype])
    tall, row_nbytes = chunk[0], spec.nbytes // spec.shape[0]
    rows = -(-spec.shape[0] // tall) * tall
    if rows * row_nbytes > MAX_SHARD_NBYTES:
        rows = tall * max(1, MAX_SHARD_NBYTES // (tall * row_nbytes))
    return ArrayLayout(spec, strip, chunk, rows)


def choose_split_layout(spec: ArraySpec, boxes: Sequence[Box], level: int | None = None) -> ArrayLayout | None:
    """The layout in which each of `boxes` is one file or several; None where the boxes form no regular grid.

    A box that is compressed has to be cut at its own edges; arrays that are small, or in one piece, are no trouble at all.
    """
    if not spec.nbytes or not spec.shape:
        return replace(choose_layout(spec, boxes), level=level)
    steps = [_step(extent, boxes, dim) for dim, extent in enumerate(spec.shape)]
    files = math.prod(-(-extent // step) for extent, step in zip(spec.shape, steps, strict=True))
    if files > FILES_PER_BOX * len(boxes):
        return None
    rows, strip = steps[0], tuple(steps[1:])
    if files == 1:
        chunk = _chunk(rows, strip, ITEMSIZE[spec.dtype])
        return ArrayLayout(spec, strip, chunk, -(-rows // chunk[0]) * chunk[0], level=level)
    chunk = _chunk_within(rows, strip, ITEMSIZE[spec.dtype])
    layout = ArrayLayout(spec, strip, chunk, rows, level=level)
    return replace(layout, split=math.prod(layout.strip_grid) > 1)


def _step(extent: int, boxes: Iterable[Box], dim: int) -> int:
    """The widest step along one dimension that meets every edge inside the array."""
    edges = {edge for box in boxes if box.size for edge in (box.offset[dim], box.end[dim])}
    return math.gcd(*(edges - {0, extent})) or extent


def _chunk_within(rows: int, strip: Shape, itemsize: int) -> Shape:
    """As `_chunk`, where the rows of a file are given: a chunk has to divide them."""
    row_nbytes = math.prod(strip) * itemsize
    if row_nbytes > MAX_CHUNK_NBYTES:
        return (1, *_cut_row(strip, itemsize))
    if rows * row_nbytes <= MAX_CHUNK_NBYTES:
        return (rows, *strip)
    return (min(_divisors(rows), key=lambda tall: abs(math.log(tall * row_nbytes / GOOD_CHUNK_NBYTES))), *strip)


def _strip(spec: ArraySpec, boxes: Iterable[Box]) -> Shape:
    """Whole rows, unless some box is not contiguous in them: then the widest step that meets every inner column boundary."""
    whole = Box.whole(spec.shape)
    columns = {(box.offset[1:], box.end[1:]) for box in boxes if box.size and not is_contiguous(box, whole)}
    edges = [{start[dim] for start, _ in columns} | {end[dim] for _, end in columns} for dim in range(len(spec.shape) - 1)]
    return tuple(math.gcd(*(found - {0, extent})) or extent for found, extent in zip(edges, spec.shape[1:], strict=True))


def _chunk(rows: int, strip: Shape, itemsize: int) -> Shape:
    row_nbytes = math.prod(strip) * itemsize
    if row_nbytes <= MAX_CHUNK_NBYTES:
        return (_chunk_rows(rows, row_nbytes), *strip)
    # A row is larger than a chunk. Cut inside the row, by divisors, because only then the bytes keep their order.
    return (1, *_cut_row(strip, itemsize))


def _chunk_rows(rows: int, row_nbytes: int) -> int:
    """Rows per chunk: between 1 and 8 MiB, wasting least on the last chunk, and then nearest to 4 MiB."""
    total = rows * row_nbytes
    if total <= MAX_CHUNK_NBYTES:
        return rows
    fewest, most, good = -(-total // MAX_CHUNK_NBYTES), max(1, total // MIN_CHUNK_NBYTES), max(1, total // GOOD_CHUNK_NBYTES)
    counts = range(max(fewest, good - 128), max(fewest, min(most, good + 128)) + 1)
    return min(
        {-(-rows // count) for count in counts}, key=lambda tall: (-rows % tall, abs(tall * row_nbytes - GOOD_CHUNK_NBYTES))
    )


def _cut_row(strip: Shape, itemsize: int) -> Shape:
    inner = math.prod(strip[1:]) * itemsize
    if inner > MAX_CHUNK_NBYTES:
        return (1, *_cut_row(strip[1:], itemsize))
    width = min(_divisors(strip[0]), key=lambda part: abs(math.log(part * inner / GOOD_CHUNK_NBYTES)))
    return (width, *strip[1:])


def _divisors(number: int) -> set[int]:
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return {*small, *(number // part for part in small)}


# -- boxes as bytes ----------------------------------------------------------------------------------------------------


def is_contiguous(box: Box, within: Box) -> bool:
    """Whether the elements of `box` lie side by side in a row-major buffer that holds `within`."""
    extents = zip(box.shape, within.shape, strict=True)
    lead = next((dim for dim, extent in enumerate(box.shape) if extent != 1), len(box.shape))
    return all(a == b for a, b in list(extents)[lead + 1 :])


def contiguous_parts(box: Box, within: Box) -> list[Box]:
    """The fewest boxes that are contiguous in `within` and make up `box`, in row-major order."""
    if is_contiguous(box, within):
        return [box]
    cut = max(dim for dim, (a, b) in enumerate(zip(box.shape, within.shape, strict=True)) if a != b)
    leads = product(*(range(start, start + extent) for start, extent in zip(box.offset[:cut], box.shape[:cut], strict=True)))
    return [Box((*lead, *box.offset[cut:]), ((1,) * cut + box.shape[cut:])) for lead in leads]


def flat_index(where: Sequence[int], shape: Sequence[int]) -> int:
    index = 0
    for position, extent in zip(where, shape, strict=True):
        index = index * extent + position
    return index


def flat_offset(box: Box, within: Box) -> int:
    """Elements before the first one of `box` in a row-major buffer that holds `within`."""
    return flat_index([a - b for a, b in zip(box.offset, within.offset, strict=True)], within.shape)


def unflat_index(index: int, shape: Sequence[int]) -> Shape:
    where: list[int] = []
    for extent in reversed(shape):
        index, at = divmod(index, extent)
        where.append(at)
    return tuple(reversed(where))


def _touched(start: int, end: int, width: int) -> range:
    return range(start // width, -(-end // width))
