"""Proving a checkpoint: every data byte, every shard index and every Zarr document against what the save wrote."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.arrays import Box
from holdfast.ckpt.blocks import BLOCK_NBYTES, block_crcs
from holdfast.ckpt.dual import can_be_dual, head
from holdfast.ckpt.manifest import StoredRun, read_document
from holdfast.ckpt.storage import REMOTE_THREADS, OpenFile, is_remote
from holdfast.ckpt.strips import ArrayLayout
from holdfast.ckpt.views import run_bytes
from holdfast.ckpt.zarrdoc import array_document, group_document, groups, packed_index, shard_index
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.ckpt.reader import Checkpoint

READ_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not what was written: which array, which of its rows, and where on the disk."""

    array: str
    file: str
    byte_offset: int
    nbytes: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        rows = f" rows {self.offset[0]}..{self.offset[0] + self.shape[0]}" if self.offset else ""
        return f"{self.array or self.file}{rows}: {self.what} ({self.file}+{self.byte_offset}, {self.nbytes} bytes)"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found; `damages` is empty exactly when every byte is the one that was saved."""

    path: str
    step: int
    arrays: int
    checked_nbytes: int
    damages: list[Damage] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.damages


def verify(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None, *, threads: int = 2) -> VerifyReport:
    """Read and check every byte of every file. Damage is listed; only a document that cannot be understood is raised."""
    damages: list[Damage] = []
    pending: deque[tuple[int, Future[list[Damage]]]] = deque()
    checked = 0
    threads = max(threads, REMOTE_THREADS) if is_remote(checkpoint.path) else threads
    with ThreadPoolExecutor(threads, "holdfast-verify") as pool:
        for run, start, stop in _parts(checkpoint):
            pending.append((stop - start, pool.submit(_check_part, checkpoint, run, start, stop)))
            while len(pending) > 4 * threads:
                checked += _take(pending, damages, progress)
        while pending:
            checked += _take(pending, damages, progress)
    damages += [damage for name in checkpoint.layouts for damage in _check_frame(checkpoint, name)]
    damages += [
        damage for name in groups(checkpoint.layouts) if (damage := _check_document(checkpoint, name, group_document()))
    ]
    return VerifyReport(str(checkpoint.path), checkpoint.step, len(checkpoint.layouts), checked, damages)


def verify_array(checkpoint: Checkpoint, name: str, progress: Callable[[int], None] | None = None) -> Iterator[Damage]:
    """Every byte of one array and of what stands around it in its files."""
    for run in checkpoint.runs(name):
        for start in range(0, run.nbytes, READ_NBYTES):
            stop = min(start + READ_NBYTES, run.nbytes)
            yield from _check_part(checkpoint, run, start, stop)
            if progress is not None:
                progress(stop - start)
    yield from _check_frame(checkpoint, name)


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[StoredRun, int, int]]:
    for name in checkpoint.layouts:
        for run in checkpoint.runs(name):
            for start in range(0, run.nbytes, READ_NBYTES):
                yield run, start, min(start + READ_NBYTES, run.nbytes)


def _take(
    pending: deque[tuple[int, Future[list[Damage]]]], damages: list[Damage], progress: Callable[[int], None] | None
) -> int:
    nbytes, result = pending.popleft()
    damages += result.result()
    if progress is not None:
        progress(nbytes)
    return nbytes


def _check_part(checkpoint: Checkpoint, run: StoredRun, start: int, stop: int) -> list[Damage]:
    """The damaged stretches of one part of a run, neighbouring blocks joined."""
    data = memoryview(bytearray(stop - start))
    try:
        with checkpoint.open_file(run.run.file) as file:
            got = _read_fully(file, data, run.run.byte_offset + start)
    except HoldfastError as error:
        return [_damage(checkpoint, run, start, stop, str(error))]
    if got < len(data):
        return [_damage(checkpoint, run, start + got, stop, f"the file ends {len(data) - got} bytes early")]
    wrong = checkpoint.sums(run).wrong(data, start)
    gaps = [index for index, (one, two) in enumerate(pairwise(wrong), 1) if two[0] - one[0] > 1]
    stretches = [wrong[low:high] for low, high in pairwise([0, *gaps, len(wrong)])] if wrong else []
    return [
        _damage(
            checkpoint,
            run,
            blocks[0][0] * BLOCK_NBYTES,
            min((blocks[-1][0] + 1) * BLOCK_NBYTES, stop),
            f"crc32c is {blocks[0][1]:08x}, expected {int(run.blocks[blocks[0][0]]):08x}",
        )
        for blocks in stretches
    ]


def _read_fully(file: OpenFile, data: memoryview, at: int) -> int:
    done = 0
    while done < len(data) and (got := file.read_into([data[done:]], at + done)):
        done += got
    return done


def _damage(checkpoint: Checkpoint, run: StoredRun, start: int, stop: int, what: str) -> Damage:
    first, last = (checkpoint.block_box(run, at // BLOCK_NBYTES) for at in (start, stop - 1))
    box = Box(first.offset, (last.end[0] - first.offset[0], *first.shape[1:])) if first.offset else first
    return Damage(run.array, run.run.file, run.run.byte_offset + start, stop - start, box.offset, box.shape, what)


# -- everything around the data ----------------------------------------------------------------------------------------


def _check_frame(checkpoint: Checkpoint, name: str) -> Iterator[Damage]:
    """The array's own zarr.json, its small copy and its shard indexes: what other Zarr readers go by."""
    layout = checkpoint.layouts[name]
    damage = _check_document(checkpoint, name, array_document(layout))
    if damage is not None:
        yield damage
    for shard in range(layout.shards):
        damage = _check_shard(checkpoint, layout, shard)
        if damage is not None:
            yield damage
    if layout.head_nbytes:
        yield from _check_head(checkpoint, layout)
    if name in checkpoint.small:
        yield from _check_small(checkpoint, layout)


def _check_document(checkpoint: Checkpoint, name: str, expected: dict[str, Any]) -> Damage | None:
    file = f"{name}/zarr.json"
    try:
        data = read_document(checkpoint.path, file)
        what = None if json.loads(data) == expected else "says something else than the root zarr.json"
    except HoldfastError as error:
        data, what = b"", str(error)
    except (ValueError, RecursionError) as error:
        what = f"not JSON ({error})"
    return None if what is None else Damage(name, file, 0, len(data), (), (), what)


def _check_shard(checkpoint: Checkpoint, layout: ArrayLayout, shard: int) -> Damage | None:
    expected, begins = shard_end(layout, shard, checkpoint.runs(layout.spec.name))
    found = memoryview(bytearray(len(expected)))
    try:
        with checkpoint.open_file(layout.file(shard)) as file:
            size = file.size()
            _read_fully(file, found, min(begins, size))
    except HoldfastError:
        return None  # a missing file has been listed with its data
    whole = Box.whole(layout.spec.shape)
    if size != begins + len(expected):
        what = f"the file has {size} bytes, expected {begins + len(expected)}"
        return Damage(layout.spec.name, layout.file(shard), min(size, begins), len(expected), whole.offset, whole.shape, what)
    if bytes(found) != expected:
        return Damage(
            layout.spec.name, layout.file(shard), begins, len(expected), whole.offset, whole.shape, "the shard index is damaged"
        )
    return None


def shard_end(layout: ArrayLayout, shard: int, runs: Iterable[StoredRun]) -> tuple[bytes, int]:
    """The index of a shard's file, and the byte at which it has to begin."""
    if not layout.is_packed:
        return (b"" if layout.is_plain else shard_index(layout, shard)), layout.data_nbytes(shard)
    held = [run for run in runs if run.run.file == layout.file(shard)]
    begins = max((run.run.byte_offset + run.nbytes for run in held), default=0)
    chunks = ((run.run.held, run.run.byte_offset, run.nbytes) for run in held)
    return (b"" if layout.is_plain else packed_index(layout, shard, chunks)), begins


def _check_head(checkpoint: Checkpoint, layout: ArrayLayout) -> Iterator[Damage]:
    """The safetensors header in front of a shard that is both."""
    if not can_be_dual(layout) or len(expected := head(layout)) != layout.head_nbytes:
        what = "the array says that a header stands in front of it, which none can"
        yield Damage(layout.spec.name, f"{layout.spec.name}/zarr.json", 0, 0, (), (), what)
        return
    try:
        found = memoryview(bytearray(len(expected)))
        with checkpoint.open_file(layout.file(0)) as fd:
            _read_fully(fd, found, 0)
    except HoldfastError:
        return  # a missing file has been listed with its data
    if found != expected:
        whole = Box.whole(layout.spec.shape)
        what = "the safetensors header is damaged"
        yield Damage(layout.spec.name, layout.file(0), 0, len(expected), whole.offset, whole.shape, what)


def _check_small(checkpoint: Checkpoint, layout: ArrayLayout) -> Iterator[Damage]:
    """The copy of a small array in objects.parquet against the checksums of its runs."""
    whole = Box.whole(layout.spec.shape)
    for run in checkpoint.runs(layout.spec.name):
        data = run_bytes(memoryview(checkpoint.small[layout.spec.name]), whole, run.run, layout.spec.dtype)
        if not np.array_equal(block_crcs(data), run.blocks):
            what = "the copy in objects.parquet differs from what was saved"
            yield Damage(run.array, run.run.file, run.run.byte_offset, run.nbytes, run.box.offset, run.box.shape, what)
