"""What a slot's bytes are, 4 MiB by 4 MiB: their CRCs as they were captured, and which of them differ from the last commit.

The CRCs are made once, in the pass over a filled slot that checksums its fragments. All later questions are answered from
them: the CRC of a parity block, and what changed since the committed slot beside this one. A keeper that adopted or rebuilt a slot
has no outline of it; then CRCs are read from the bytes, and nothing is said about changes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from holdfast.coding import crc32c, crc32c_combine, crc32c_xor, crc32c_zeros
from holdfast.errors import MissingData
from holdfast.snapshot.slots import Slot, SlotState

CELL_NBYTES = 4 << 20
MANY = 0.5
"""Part of the cells from which on a list of changes is worth nothing: the whole is sent for less."""

_REREAD_NBYTES = 64 << 10
"""Up to here a second look at bytes that are in the cache costs less than the algebra that would save it."""


@dataclass(frozen=True, slots=True)
class Outline:
    """The CRC32C of every CELL_NBYTES of a slot's body at (epoch, step); the last cell ends where the snapshot does."""

    epoch: int
    step: int
    nbytes: int
    crcs: tuple[int, ...]

    def crc(self, body: memoryview, start: int, stop: int) -> int:
        """CRC of bytes [start, stop): of whole cells as they were captured, and of the ragged ends as they are now."""
        first, last = -(-start // CELL_NBYTES), stop // CELL_NBYTES
        if first >= last:
            return crc32c(body[start:stop])
        value = crc32c(body[start : first * CELL_NBYTES])
        for cell in range(first, last):
            value = crc32c_combine(value, self.crcs[cell], CELL_NBYTES)
        return crc32c(body[last * CELL_NBYTES : stop], value)

    def padded(self, cell: int, nbytes: int) -> int:
        """CRC of the cell with zeros behind it up to `nbytes`: past a snapshot's end parity counts zeros."""
        start = cell * CELL_NBYTES
        have = max(0, min(nbytes, self.nbytes - start))
        value = self.crcs[cell] if have else 0
        return crc32c_combine(value, crc32c_zeros(nbytes - have), nbytes - have) if nbytes > have else value


def checksum(body: memoryview, spans: Sequence[tuple[int, int]], nbytes: int) -> tuple[list[int], list[int]]:
    """The CRC of every (offset, nbytes) span and of every cell of body[:nbytes], in one pass. Spans ascend and do not meet."""
    cells = [0] * -(-nbytes // CELL_NBYTES)
    found: list[int] = []
    at = 0
    for offset, length in spans:
        _extend(cells, body, at, offset)
        found.append(_span(cells, body, offset, offset + length))
        at = offset + length
    _extend(cells, body, at, nbytes)
    return found, cells


def _span(cells: list[int], body: memoryview, start: int, stop: int) -> int:
    whole = 0
    for low, high in _by_cell(start, stop):
        piece, cell = crc32c(body[low:high]), low // CELL_NBYTES
        whole = piece if low == start else crc32c_combine(whole, piece, high - low)
        if low % CELL_NBYTES == 0:
            cells[cell] = piece
        elif high - low <= _REREAD_NBYTES:
            cells[cell] = crc32c(body[low:high], cells[cell])
        else:
            cells[cell] = crc32c_combine(cells[cell], piece, high - low)
    return whole


def _extend(cells: list[int], body: memoryview, start: int, stop: int) -> None:
    for low, high in _by_cell(start, stop):
        cell = low // CELL_NBYTES
        cells[cell] = crc32c(body[low:high], cells[cell])


def _by_cell(start: int, stop: int) -> list[tuple[int, int]]:
    cuts = [start, *range((start // CELL_NBYTES + 1) * CELL_NBYTES, stop, CELL_NBYTES), stop]
    return list(pairwise(cuts)) if start < stop else []


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

    def crc(self, slot: Slot, start: int, stop: int) -> int:
        known = self._of(slot)
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
