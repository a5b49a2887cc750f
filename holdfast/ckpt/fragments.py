"""What one node writes: its fragments' runs, summed on the way, to whatever files a step has.

A run is either written into its place in a file that others write to as well, or makes a file of its own (in object stores, and
where chunks are compressed), or, in an incremental save, is not written at all because an earlier step has the very same bytes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import numpy as np

from holdfast.arrays import SMALL_ARRAY_NBYTES, Box, Fragment, split_rows
from holdfast.ckpt.blocks import Crcs, block_crcs, combine
from holdfast.ckpt.journal import box_place
from holdfast.ckpt.manifest import StoredRun
from holdfast.ckpt.packing import pack
from holdfast.ckpt.plan import WritePlan
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.strips import ArrayLayout, Run
from holdfast.ckpt.views import as_bytes, run_bytes
from holdfast.ckpt.zarrdoc import packed_index, shard_index
from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError, StateError

logger = logging.getLogger(__name__)

SEGMENT_NBYTES = 8 << 20
"""One pwrite: large enough for the disk, small enough that two threads share one fragment."""


class DataFiles(Protocol):
    """Where runs go: `disk.DiskFiles` or `bucket.BucketFiles`."""

    @property
    def shares_files(self) -> bool: ...

    def write_at(self, file: str, at: int, data: memoryview) -> None: ...

    def put_file(self, file: str, parts: Iterable[memoryview | bytes]) -> None: ...

    def finish(self, file: str) -> None: ...


@dataclass(frozen=True)
class _RunWrite:
    """A run on its way. `segments` are the CRCs of its bytes, in order; `packed` are its chunks, where it is compressed."""

    run: Run
    view: memoryview
    unchanged: Future[bool] | None = None
    segments: list[Future[Crcs]] = field(default_factory=list)
    packed: Future[list[StoredRun]] | None = None


@dataclass(frozen=True)
class FragmentWrite:
    """A fragment on its way to the disk."""

    row: Fragment
    view: memoryview
    runs: list[_RunWrite]


class NodeWriter:
    """Writes one node's fragments; `runs` and `small` are what its journal says."""

    def __init__(
        self, plan: WritePlan, files: DataFiles, pool: ThreadPoolExecutor, rows: Sequence[Fragment], parent: Checkpoint | None
    ) -> None:
        self.plan, self.files, self.pool, self.parent = plan, files, pool, parent
        self.runs: list[StoredRun] = []
        self.small: dict[str, bytes] = {}
        self._left = Counter(run.file for row in rows for run in plan.runs(row))

    # -- begin ---------------------------------------------------------------------------------------------------------

    def start(self, row: Fragment, buffer: object) -> FragmentWrite:
        """Hand the fragment's bytes to the pool."""
        view = as_bytes(buffer)
        if len(view) != row.nbytes:
            raise StateError(f"{row.array}, rank {row.rank}: {len(view)} bytes were given, the fragment has {row.nbytes}")
        return FragmentWrite(row, view, [self._start_run(row, view, run) for run in self.plan.runs(row)])

    def _start_run(self, row: Fragment, view: memoryview, run: Run) -> _RunWrite:
        layout = self.plan.arrays[row.array]
        data = run_bytes(view, row.box, run, row.dtype)
        if self.parent is not None and self._may_inherit(layout, run):
            return _RunWrite(run, data, unchanged=self.pool.submit(self._is_unchanged, row.array, run, data))
        return self._write_run(row, run, data)

    def _write_run(self, row: Fragment, run: Run, data: memoryview) -> _RunWrite:
        layout = self.plan.arrays[row.array]
        if layout.is_packed:
            return _RunWrite(run, data, packed=self.pool.submit(self._put_packed, row, layout, run, data))
        if self.files.shares_files:
            return _RunWrite(run, data, segments=[self.pool.submit(job) for job in self._segments(layout, run, data)])
        return _RunWrite(run, data, segments=[self.pool.submit(self._put_run, layout, run, data)])

    # -- runs that share a file ----------------------------------------------------------------------------------------

    def _segments(self, layout: ArrayLayout, run: Run, data: memoryview) -> Iterator[partial[Crcs]]:
        for start in range(0, len(data), SEGMENT_NBYTES):
            tail = _index_after(layout, run) if start == 0 else None
            yield partial(self._write_segment, run, start, data[start : start + SEGMENT_NBYTES], tail)

    def _write_segment(self, run: Run, start: int, data: memoryview, tail: tuple[int, bytes] | None) -> Crcs:
        self.files.write_at(run.file, run.byte_offset + start, data)
        if tail is not None:  # whoever holds a file's first bytes writes the index behind its last ones
            self.files.write_at(run.file, tail[0], memoryview(tail[1]))
        return block_crcs(data)

    # -- runs that are a file ------------------------------------------------------------------------------------------

    def _put_run(self, layout: ArrayLayout, run: Run, data: memoryview) -> Crcs:
        if layout.spec.nbytes < SMALL_ARRAY_NBYTES:
            return block_crcs(data)  # the coordinator has it from the journal
        if run.box != layout.shard_box(layout.shard_of(run.box)):
            self.files.write_at(run.file, run.byte_offset, data)
            return block_crcs(data)
        crcs: list[Crcs] = []
        self.files.put_file(run.file, _summed(data, crcs, _index_after(layout, run)))
        return np.concatenate(crcs)

    def _put_packed(self, row: Fragment, layout: ArrayLayout, run: Run, data: memoryview) -> list[StoredRun]:
        stored: list[StoredRun] = []
        self.files.put_file(run.file, self._packed(row, layout, run, data, stored))
        return stored

    def _packed(
        self, row: Fragment, layout: ArrayLayout, run: Run, data: memoryview, stored: list[StoredRun]
    ) -> Iterator[memoryview]:
        """The chunks of one file, compressed, and their index; `stored` grows with them."""
        assert layout.level is not None
        at, whole = 0, Box.whole(layout.spec.shape)
        for held in layout.chunks(run.box):
            box = held.intersect(whole)
            assert box is not None
            chunk = memoryview(pack(run_bytes(data, run.held, Run(box, run.file, at, held), row.dtype), layout.level))
            crcs = block_crcs(chunk)
            place = Run(box, run.file, at, held)
            stored.append(StoredRun(row.array, place, len(chunk), combine(crcs, len(chunk)), crcs, row.rank, is_packed=True))
            at += len(chunk)
            yield chunk
        if not layout.is_plain:
            chunks = ((one.run.held, one.run.byte_offset, one.nbytes) for one in stored)
            yield memoryview(packed_index(layout, layout.shard_of(run.box), chunks))

    # -- runs that an earlier step has ---------------------------------------------------------------------------------

    @cached_property
    def _same_layouts(self) -> set[str]:
        """Arrays whose files have the same names and the same places in the parent."""
        assert self.parent is not None
        return {name for name, layout in self.plan.arrays.items() if self.parent.layouts.get(name) == layout}

    def _may_inherit(self, layout: ArrayLayout, run: Run) -> bool:
        large = layout.spec.nbytes >= SMALL_ARRAY_NBYTES
        return large and self.files.shares_files and run.held == run.box and layout.spec.name in self._same_layouts

    def _is_unchanged(self, name: str, run: Run, data: memoryview) -> bool:
        """Whether the parent's bytes, read back and checked, are these. Checksums alone only ever say no."""
        assert self.parent is not None
        twin = self._twin(name, run.box)
        if twin is not None and not np.array_equal(twin.blocks, block_crcs(data)):
            return False
        itemsize, at = len(data) // run.box.size, 0
        try:
            for part in split_rows(run.box, itemsize, SEGMENT_NBYTES):
                found = bytearray(part.size * itemsize)
                self.parent.read_box(name, part, found)
                if found != data[at : at + len(found)]:
                    return False
                at += len(found)
        except HoldfastError as error:
            logger.warning("%s is written anew: the earlier step cannot be inherited from (%s)", name, error)
            return False
        return True

    def _twin(self, name: str, box: Box) -> StoredRun | None:
        assert self.parent is not None
        return next((run for run in self.parent.runs(name) if run.box == box and not run.is_packed), None)

    def _inherited(self, row: Fragment, write: _RunWrite) -> list[StoredRun]:
        """The rows of an unchanged run, which name the step that wrote it."""
        assert self.parent is not None
        if self.plan.arrays[row.array].is_packed:
            found = [run for run in self.parent.runs(row.array) if run.run.file == write.run.file]
        else:
            crcs, twin = block_crcs(write.view), self._twin(row.array, write.run.box)
            origin = None if twin is None else twin.inherited_from
            crc = combine(crcs, len(write.view))
            found = [StoredRun(row.array, write.run, len(write.view), crc, crcs, row.rank, origin)]
        step = self.parent.step
        return [_inheriting(run, row.rank, step if run.inherited_from is None else run.inherited_from) for run in found]

    # -- end -----------------------------------------------------------------------------------------------------------

    def finish(self, write: FragmentWrite) -> None:
        """Wait for a fragment's writes, check its CRC and note its runs."""
        row = write.row
        for one in write.runs:
            if one.unchanged is not None and one.unchanged.result():
                self.runs += self._inherited(row, one)
                self._left[one.run.file] -= 1
                continue
            done = one if one.unchanged is None else self._write_run(row, one.run, one.view)
            self._note(row, done)
        self._check(write)

    def _note(self, row: Fragment, write: _RunWrite) -> None:
        run, nbytes = write.run, len(write.view)
        if write.packed is not None:
            self.runs += write.packed.result()
        else:
            crcs = np.concatenate([segment.result() for segment in write.segments])
            self.runs.append(StoredRun(row.array, run, nbytes, combine(crcs, nbytes), crcs, row.rank))
            if self.plan.arrays[row.array].spec.nbytes < SMALL_ARRAY_NBYTES:
                self.small[box_place(row.array, run.box)] = bytes(write.view)
        self._left[run.file] -= 1
        if not self._left[run.file]:
            self.files.finish(run.file)

    def _check(self, write: FragmentWrite) -> None:
        row = write.row
        if row.crc32c is None or not row.nbytes:
            return
        # From the run's own sum where the fragment is one run, as it nearly always is.
        last = self.runs[-1]
        is_one = len(write.runs) == 1 and last.box == row.box and last.nbytes == row.nbytes and not last.is_packed
        found = last.crc32c if is_one else crc32c(write.view)
        if found != row.crc32c:
            raise CorruptData(
                f"step {self.plan.step}, {row.array} of rank {row.rank} at {list(row.offset)}: crc32c is {found:08x}, "
                f"the fragment table says {row.crc32c:08x}; memory changed after it was captured; "
                "nothing was committed, the older checkpoints are whole"
            )


def _inheriting(run: StoredRun, rank: int, step: int) -> StoredRun:
    return StoredRun(run.array, run.run, run.nbytes, run.crc32c, run.blocks, rank, step, run.is_packed)


def _index_after(layout: ArrayLayout, run: Run) -> tuple[int, bytes] | None:
    """What follows the data of a file, for the run that begins it: where, and the shard index."""
    shard = layout.shard_of(run.box)
    if layout.is_plain or run.box.offset != layout.shard_box(shard).offset:
        return None
    return layout.data_nbytes(shard), shard_index(layout, shard)


def _summed(data: memoryview, crcs: list[Crcs], tail: tuple[int, bytes] | None) -> Iterator[memoryview | bytes]:
    """A file's bytes in parts, summed as they are handed out, with the padding and the index that follow them."""
    for start in range(0, len(data), SEGMENT_NBYTES):
        part = data[start : start + SEGMENT_NBYTES]
        yield part
        crcs.append(block_crcs(part))
    if tail is not None:
        yield bytes(tail[0] - len(data))
        yield tail[1]
