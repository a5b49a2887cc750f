"""What a slot's bytes are, 4 MiB by 4 MiB: their CRCs as they were captured, and which of them differ from the last commit.

The CRCs are made once, in the pass over a filled slot that checksums its fragments. All later questions are answered from
them: the CRC of a parity block, and what changed since the committed slot beside this one. Where blocks begin and end within a
cell is known from the last time they were asked for. A keeper that adopted or rebuilt a slot has no outline of it; then CRCs are
read from the bytes, and nothing is said about changes.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from holdfast.coding import crc32c, crc32c_combine, crc32c_cuts, crc32c_xor, crc32c_zeros
from holdfast.errors import MissingData
from holdfast.snapshot.slots import Slot, SlotState

CELL_NBYTES = 4 << 20
MANY = 0.5
"""Part of the cells from which on a list of changes is worth nothing: the whole is sent for less."""

MOST_MARKS = 64
"""Places within cells that are remembered of a rank's slots; one for each end of a block is enough."""


@dataclass(frozen=True, slots=True)
class Outline:
    """The CRC32C of every CELL_NBYTES of a slot's body at (epoch, step); the last cell ends where the snapshot does.

    `marks` are places within cells, each with the CRC of its cell up to there.
    """

    epoch: int
    step: int
    nbytes: int
    crcs: tuple[int, ...]
    marks: Mapping[int, int] = field(default_factory=dict)

    def crc(self, body: memoryview, start: int, stop: int) -> int:
        """CRC of bytes [start, stop): as they were captured, but for ragged ends without a mark, which are read."""
        first, last = -(-start // CELL_NBYTES), stop // CELL_NBYTES
        if first >= last:
            return crc32c(body[start:stop])
        value = self._from(body, start, first * CELL_NBYTES)
        for cell in range(first, last):
            value = crc32c_combine(value, self.crcs[cell], CELL_NBYTES)
        begin = last * CELL_NBYTES
        if begin < stop == self.nbytes:
            return crc32c_combine(value, self.crcs[last], stop - begin)
        if stop in self.marks:
            return crc32c_combine(value, self.marks[stop], stop - begin)
        return crc32c(body[begin:stop], value)

    def _from(self, body: memoryview, start: int, stop: int) -> int:
        """CRC of the end of a cell: what the whole has and the rest before it has not."""
        if start in self.marks:
            return crc32c_combine(self.marks[start], self.crcs[start // CELL_NBYTES], stop - start)
        return crc32c(body[start:stop])

    def padded(self, cell: int, nbytes: int) -> int:
        """CRC of the cell with zeros behind it up to `nbytes`: past a snapshot's end parity counts zeros."""
        start = cell * CELL_NBYTES
        have = max(0, min(nbytes, self.nbytes - start))
        value = self.crcs[cell] if have else 0
        return crc32c_combine(value, crc32c_zeros(nbytes - have), nbytes - have) if nbytes > have else value


@dataclass(frozen=True, slots=True)
class Sums:
    """What one pass over a body found: the CRC of every span, of every cell, and of the cells up to marks within them."""

    spans: list[int]
    cells: list[int]
    marks: dict[int, int]


def checksum(body: memoryview, spans: Sequence[tuple[int, int]], nbytes: int, marks: Collection[int] = ()) -> Sums:
    """The CRC of every (offset, nbytes) span and of every cell of body[:nbytes], in one pass. Spans ascend and do not meet."""
    inside = {mark for mark in marks if 0 < mark < nbytes and mark % CELL_NBYTES}
    ends = (end for offset, length in spans for end in (offset, offset + length))
    cuts = sorted({0, nbytes, *ends, *inside, *range(0, nbytes, CELL_NBYTES)})
    found = Sums([0] * len(spans), [0] * -(-nbytes // CELL_NBYTES), {})
    wanted = iter([(number, *span) for number, span in enumerate(spans) if span[1]])
    number, offset, length = next(wanted, (-1, nbytes, 0))
    for (low, high), crc in zip(pairwise(cuts), crc32c_cuts(body[:nbytes], cuts), strict=True):
        cell = low // CELL_NBYTES
        found.cells[cell] = crc32c_combine(found.cells[cell], crc, high - low) if low % CELL_NBYTES else crc
        if high in inside:
            found.marks[high] = found.cells[cell]
        if low >= offset:
            found.spans[number] = crc32c_combine(found.spans[number], crc, high - low) if low > offset else crc
            if high == offset + length:
                number, offset, length = next(wanted, (-1, nbytes, 0))
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes [offset, offset + nbytes) of a body that differ from the base, and the CRC of old XOR new."""

    offset: int
    nbytes: int
    crc32c: int


class Outlines:
    """The outlines of one keeper's slots, and the answers they give to the peers that make parity. Safe for many threads."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self._slots = slots
        self._known: dict[str, Outline] = {}
        self._marks: dict[str, set[int]] = {}
        self._changes: dict[str, tuple[tuple[int, int, int, int], list[Change] | None]] = {}
        self._lock = threading.Lock()

    def put(self, name: str, outline: Outline) -> None:
        """A slot was filled. What was said of its last content is forgotten: a step that is given up may be captured once more."""
        with self._lock:
            self._known[name] = outline
            self._changes.pop(name, None)

    def forget(self, name: str) -> None:
        """The slot is not the one that was filled here; from now on its bytes speak for themselves."""
        with self._lock:
            self._known.pop(name, None)
            self._changes.pop(name, None)

    def answer(self, slot: Slot, offset: int, nbytes: int, base: tuple[int, int] | None) -> dict[str, Any]:
        """What a peer asks about a range of a slot: its CRC, or with `base` which of its cells have changed since then."""
        if base is None:
            return {"crc": self.crc(slot, offset, offset + nbytes)}
        changes = self.changes(slot, base)
        if changes is None:
            return {"changed": None}
        end = offset + nbytes
        touched = [c for c in changes if c.offset < end and offset < c.offset + c.nbytes]
        return {"changed": [[c.offset, c.nbytes, c.crc32c] for c in touched]}

    def marks(self, name: str) -> set[int]:
        """Places within cells of this slot, or the one beside it, where somebody has asked for the bytes before or after."""
        with self._lock:
            return set(self._marks.get(name[:-1], ()))

    def _mark(self, name: str, places: set[int]) -> None:
        with self._lock:
            known = self._marks.setdefault(name[:-1], set())
            if len(known | places) > MOST_MARKS:  # the blocks lie elsewhere by now
                known.clear()
            known |= places

    def crc(self, slot: Slot, start: int, stop: int) -> int:
        known = self._of(slot)
        self._mark(slot.path.name, {place for place in (start, stop) if place % CELL_NBYTES})
        return crc32c(slot.body[start:stop]) if known is None else known.crc(slot.body, start, stop)

    def changes(self, slot: Slot, base: tuple[int, int]) -> list[Change] | None:
        """What differs from the committed snapshot `base` (epoch, step) in the slot beside this one.

        None where that is unknown, or most of it.
        """
        key = (slot.header.epoch, slot.header.step, *base)
        name = slot.path.name
        with self._lock:
            kept, known = self._changes.get(name), self._known.get(name)
        if kept is None or kept[0] != key:
            kept = key, self._compare(slot, base)
            with self._lock:
                if self._known.get(name) is known:  # else the step was captured once more while the last capture was compared
                    self._changes[name] = kept
        return kept[1]

    def _compare(self, slot: Slot, base: tuple[int, int]) -> list[Change] | None:
        old = self._slots.get(other_name(slot.path.name))
        if old is None or old.header.state is not SlotState.COMMITTED or (old.header.epoch, old.header.step) != base:
            return None
        before, after = self._of(old), self._of(slot)
        if before is None or after is None:
            return None
        if sum(map(int.__ne__, before.crcs, after.crcs)) > MANY * max(2, len(after.crcs)):
            return None
        nbytes = max(before.nbytes, after.nbytes)
        found = []
        for cell in range(-(-nbytes // CELL_NBYTES)):
            start = cell * CELL_NBYTES
            size = min(CELL_NBYTES, nbytes - start)
            was, now = before.padded(cell, size), after.padded(cell, size)
            # Equal CRCs alone are no proof: over a large cluster two in four billion come up every few days.
            if was != now or not _equal(old, slot, start, size):
                found.append(Change(start, size, crc32c_xor([was, now], size)))
        return found

    def _of(self, slot: Slot) -> Outline | None:
        with self._lock:
            known = self._known.get(slot.path.name)
        same = known is not None and (known.epoch, known.step) == (slot.header.epoch, slot.header.step)
        return known if same else None


def other_name(name: str) -> str:
    """The slot beside this one: every rank and every node's parity has two."""
    return name[:-1] + ("1" if name[-1] == "0" else "0")


def difference(old: Slot, new: Slot, offset: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Old XOR new, with zeros past the end of each snapshot."""
    out = np.zeros(nbytes, np.uint8)
    for slot in (old, new):
        have = max(0, min(nbytes, slot.header.body_nbytes - offset))
        out[:have] ^= np.frombuffer(slot.body, np.uint8, have, offset) if have else out[:0]
    return out


def base_of(slots: Mapping[str, Slot], name: str, base: tuple[int, int]) -> Slot:
    """The slot beside `name`, which has to hold the committed snapshot `base`. Raises MissingData."""
    old = slots.get(other_name(name))
    if old is None or (old.header.epoch, old.header.step) != base or old.header.state is not SlotState.COMMITTED:
        raise MissingData(f"slot {other_name(name)} no longer holds step {base[1]} of epoch {base[0]}")
    return old


def _equal(old: Slot, new: Slot, start: int, nbytes: int) -> bool:
    ends = [min(start + nbytes, slot.header.body_nbytes) for slot in (old, new)]
    if ends[0] != ends[1]:
        return not difference(old, new, start, nbytes).any()
    size = ends[0] - start
    return size <= 0 or np.array_equal(
        np.frombuffer(old.body, np.uint8, size, start), np.frombuffer(new.body, np.uint8, size, start)
    )
