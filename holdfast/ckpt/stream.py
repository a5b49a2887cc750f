"""Local tensors into files, a bounded amount at a time: the same loop serves every output format.

A format only has to say at which byte of which file a tensor begins. Nothing here grows with the checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.arrays import ITEMSIZE, Box, split_rows
from holdfast.ckpt.cuts import LocalArray, Part
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.reading import Progress
from holdfast.ckpt.strips import contiguous_parts, flat_offset
from holdfast.errors import ConfigError

DEFAULT_MEMORY_NBYTES = 1 << 30
LEAST_MEMORY_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a local tensor goes: its bytes begin at an offset of each file, which has its full size already.

    Replicas are one destination with several places: their bytes are read once.
    """

    local: LocalArray
    places: tuple[tuple[Path, int], ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of one part, and the file ranges that they go to."""

    part: Part
    destination: Destination

    @property
    def nbytes(self) -> int:
        return self.part.box.size * ITEMSIZE[self.destination.local.dtype]


def stream(
    checkpoint: Checkpoint,
    destinations: Iterable[Destination],
    *,
    max_memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """Every destination holds its tensor's bytes, checked on the way. Padding is left as the file has it: zero."""
    check_memory(max_memory_nbytes)
    budget = max_memory_nbytes // 2  # the other half is for sieves and for what Python itself takes
    batch: list[_Piece] = []
    held = 0
    for piece in _pieces(destinations, budget // 4):
        if held + piece.nbytes > budget:
            _flush(checkpoint, batch, threads, progress)
            batch, held = [], 0
        batch.append(piece)
        held += piece.nbytes
    _flush(checkpoint, batch, threads, progress)


def check_memory(max_memory_nbytes: int) -> None:
    if max_memory_nbytes < LEAST_MEMORY_NBYTES:
        raise ConfigError(f"{max_memory_nbytes} bytes of memory are too few: give at least {LEAST_MEMORY_NBYTES >> 20}MiB")


def _pieces(destinations: Iterable[Destination], limit_nbytes: int) -> Iterator[_Piece]:
    for destination in destinations:
        for part in destination.local.parts:
            for box in _rows(part.box, ITEMSIZE[destination.local.dtype], limit_nbytes):
                moved = tuple(at + low - base for at, low, base in zip(part.at, box.offset, part.box.offset, strict=True))
                yield _Piece(replace(part, box=box, at=moved), destination)


def _rows(box: Box, itemsize: int, limit_nbytes: int) -> Iterator[Box]:
    """Cut by rows, and inside a row that is itself too large."""
    if not box.size:
        return
    for rows in split_rows(box, itemsize, limit_nbytes):
        if rows.size * itemsize > limit_nbytes and len(rows.shape) > 1:
            for inner in _rows(Box(rows.offset[1:], rows.shape[1:]), itemsize, limit_nbytes):
                yield Box((rows.offset[0], *inner.offset), (1, *inner.shape))
        else:
            yield rows


def _flush(checkpoint: Checkpoint, batch: list[_Piece], threads: int, progress: Progress | None) -> None:
    buffers = [memoryview(bytearray(piece.nbytes)) for piece in batch]
    requests = [(piece.part.array, piece.part.box, buffer) for piece, buffer in zip(batch, buffers, strict=True)]
    checkpoint.read_boxes(requests, threads=threads, progress=progress)
    for piece, buffer in zip(batch, buffers, strict=True):
        _write(piece, buffer)


def _write(piece: _Piece, buffer: memoryview) -> None:
    local = piece.destination.local
    itemsize = ITEMSIZE[local.dtype]
    whole, here = Box.whole(local.shape), Box(piece.part.at, piece.part.box.shape)
    for path, begins in piece.destination.places:
        fd = os.open(path, os.O_WRONLY)
        try:
            done = 0
            for run in contiguous_parts(here, whole):
                nbytes = math.prod(run.shape) * itemsize
                _pwrite(fd, buffer[done : done + nbytes], begins + flat_offset(run, whole) * itemsize)
                done += nbytes
        finally:
            os.close(fd)


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
