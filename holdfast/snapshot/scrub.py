"""Scrubbing: committed slots are read again and again, and a byte that has rotted is put right from the group's parity.

Memory forgets: a bit turns, a stray write lands in a slot. The checksum that a fragment got when it was captured says so at the
next restore; a scrub says so before, while the group can still repair it. Nothing is written that does not have the checksum of
what was captured, and nothing while the slot may be changing.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError, MissingData
from holdfast.snapshot.exchange import Decoder, NodeBytes, SlotReader, parity_name
from holdfast.snapshot.slots import Slot, SlotHeader, SlotState, aligned
from holdfast.snapshot.store import NodeSlots, group_of
from holdfast.snapshot.view import GroupRecord, stride

logger = logging.getLogger(__name__)

PIECE_NBYTES = 1 << 20
DRILL_NBYTES = 1 << 18
REPAIR_LIMIT_NBYTES = 64 << 20
"""Damage of one region that is held in memory while it is decided; more than that is left to the next snapshot."""

ATTEMPTS = 16
"""Sets of survivors that are tried for one region, where more survive than are needed and some of them may be damaged too."""

Readers = Callable[[GroupRecord], Mapping[int, SlotReader]]
"""Readers of every node of a group that answers, this one included; closed by whoever asked."""

Pace = Callable[[int], None]
"""Called with the bytes just read; waits as long as the allowed rate asks for."""


class _MovedOn(Exception):
    """The slot has been given to a newer snapshot meanwhile; what was read of it says nothing."""


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of a slot's body that have one checksum: the fragments of one array, a parity row, or the meta."""

    name: str
    offset: int
    nbytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Rot:
    """A region whose bytes were not the ones that were written, and what became of it (`problem` is empty when repaired)."""

    slot: str
    step: int
    region: str
    nbytes: int
    problem: str = ""

    def __str__(self) -> str:
        where = f"{self.slot}, step {self.step}, {self.region}"
        if self.problem:
            return f"{where} has rotted and cannot be repaired: {self.problem}"
        return f"{where} had rotted; {self.nbytes} bytes are rewritten"


@dataclass(slots=True)
class Scrubbed:
    """One pass over a node's committed slots. `left` slots moved on to a newer snapshot before they were read to their end."""

    nbytes: int = 0
    slots: int = 0
    left: int = 0
    seconds: float = 0.0
    rot: list[Rot] = field(default_factory=list)

    @property
    def repaired(self) -> int:
        return sum(not item.problem for item in self.rot)


@dataclass(frozen=True, slots=True)
class Drilled:
    """A block of this node, recomputed from its peers and compared with the block itself."""

    step: int
    nbytes: int
    seconds: float
    agrees: bool


class Scrubber:
    """Reads and mends the slots of one node. Not for two threads at once."""

    def __init__(self, slots: NodeSlots, readers: Readers, pace: Pace) -> None:
        self._slots, self._readers, self._pace = slots, readers, pace
        self._cursors: dict[str, int] = {}
        self.damaged: set[tuple[str, int]] = set()
        """(slot, step) that could not be repaired and have not been replaced since."""

    # -- a pass --

    def scrub(self) -> Scrubbed:
        """Read every committed slot once, mending what has rotted."""
        found, started = Scrubbed(), time.monotonic()
        for name in sorted(self._slots):
            slot = self._committed(name)
            if slot is None:
                continue
            found.slots += 1
            try:
                self._scrub_slot(name, slot, slot.header, found)
            except (_MovedOn, ValueError):  # ValueError: its mapping was closed, another file has its name now
                found.left += 1
        found.seconds = time.monotonic() - started
        return found

    def _committed(self, name: str) -> Slot | None:
        slot = self._slots.get(name)
        return slot if slot is not None and slot.header.state is SlotState.COMMITTED else None

    def _scrub_slot(self, name: str, slot: Slot, header: SlotHeader, found: Scrubbed) -> None:
        self._mend_header(slot, header, found)
        self.damaged = {(other, step) for other, step in self.damaged if other != name or step == header.step}
        whole = True
        try:
            regions = [_meta_region(header), *self._regions(slot)]
        except CorruptData:
            regions = [_meta_region(header)]
        first = self._cursors.get(name, 0) % len(regions)
        for number in (*range(first, len(regions)), *range(first)):
            self._cursors[name] = number  # the next pass goes on here, so that every place is read however short a slot's life
            region = regions[number]
            crc = self._crc(slot, region)
            self._must_hold(slot, header)
            found.nbytes += region.nbytes
            if crc != region.crc32c:
                rot = self._mend(slot, header, region)
                found.rot.append(rot)
                whole = whole and not rot.problem
        if whole:
            self.damaged.discard((name, header.step))
        else:
            self.damaged.add((name, header.step))

    def _regions(self, slot: Slot) -> list[Region]:
        meta = slot.meta()
        if slot.header.rank >= 0:
            return [Region(row.array, row.slot_offset, row.nbytes, row.crc32c or 0) for row in meta.table if row.nbytes]
        group = group_of(slot)
        if group is None:
            raise CorruptData(f"slot {slot.path.name}: its group cannot be read")
        size = group.block_nbytes
        return [
            Region(f"row {row}", row * size, size, int(meta.objects[f"row-{row}"], 16)) for row in range(group.parity) if size
        ]

    def _crc(self, slot: Slot, region: Region) -> int:
        crc = 0
        for offset in range(region.offset, region.offset + region.nbytes, PIECE_NBYTES):
            piece = slot.body[offset : min(offset + PIECE_NBYTES, region.offset + region.nbytes)]
            crc = crc32c(piece, crc)
            self._pace(len(piece))
        return crc

    def _must_hold(self, slot: Slot, header: SlotHeader) -> None:
        if slot.header.sequence != header.sequence or self._slots.get(slot.path.name) is not slot:
            raise _MovedOn

    # -- mending --

    def _mend_header(self, slot: Slot, header: SlotHeader, found: Scrubbed) -> None:
        """The keeper knows what the header says; where the page says something else, it is written anew, twice."""
        with self._slots.lock:
            self._must_hold(slot, header)
            try:
                on_page = Slot.open(slot.path)
                same = on_page.header == slot.header
                on_page.close()
            except HoldfastError:
                same = False
            if not same:
                found.rot.append(Rot(slot.path.name, header.step, "header", 0))
                logger.warning("scrub: %s", found.rot[-1])
                slot.rewrite_header()

    def _mend(self, slot: Slot, header: SlotHeader, region: Region) -> Rot:
        """Decode the region from the group, and write what differs, if the decoded bytes are the ones that were captured."""
        name = slot.path.name
        try:
            pieces = self._decoded(slot, header, region)
        except (HoldfastError, OSError) as error:
            self._must_hold(slot, header)
            rot = Rot(name, header.step, region.name, 0, str(error))
            logger.error("scrub: %s", rot)
            return rot
        with self._slots.lock:
            self._must_hold(slot, header)
            for offset, data in pieces:
                slot.body[offset : offset + len(data)] = data
        rot = Rot(name, header.step, region.name, sum(len(data) for _, data in pieces))
        logger.warning("scrub: %s", rot)
        return rot

    def _decoded(self, slot: Slot, header: SlotHeader, region: Region) -> list[tuple[int, bytes]]:
        """The pieces of the region that have to change, (offset, bytes), so that it has its checksum again."""
        group = self._group_of(header)
        with _open(self._readers, group) as readers:
            problem = "no set of survivors gives bytes with the checksum of what was captured"
            for skip in _skips(group, readers, header.node):
                pieces, crc = self._attempt(slot, header, region, group, {n: r for n, r in readers.items() if n not in skip})
                if crc == region.crc32c:
                    return pieces
        raise CorruptData(problem)

    def _attempt(
        self, slot: Slot, header: SlotHeader, region: Region, group: GroupRecord, readers: Mapping[int, SlotReader]
    ) -> tuple[list[tuple[int, bytes]], int]:
        pieces: list[tuple[int, bytes]] = []
        crc, kept = 0, 0
        place, base = group.position(header.node), self._base(group, header)
        kind = "parity" if header.rank < 0 else "node"
        for offset, nbytes in _pieces(base + region.offset, region.nbytes, group.block_nbytes):
            data = decode(group, place, kind, offset, nbytes, readers)
            crc = crc32c(data, crc)
            here = offset - base
            if slot.body[here : here + nbytes] != data:
                pieces.append((here, data))
                kept += nbytes
            if kept > REPAIR_LIMIT_NBYTES:
                raise CorruptData(f"more than {REPAIR_LIMIT_NBYTES >> 20} MiB of it are wrong; the next snapshot replaces it")
            self._pace(nbytes * group.layout.k)
        return pieces, crc

    def _group_of(self, header: SlotHeader) -> GroupRecord:
        parity = self._slots.get(parity_name(header.index))
        group = group_of(parity) if parity is not None else None
        if group is None or group.step != header.step:
            raise MissingData("this node has no parity of that step, so it does not know its group")
        return group

    def _base(self, group: GroupRecord, header: SlotHeader) -> int:
        """Where the rank's body begins in the bytes of its node; parity rows lie as they are."""
        if header.rank < 0:
            return 0
        base = 0
        for record in group.records[group.position(header.node)].ranks:
            if record.rank == header.rank:
                return base
            base += stride(record)
        raise MissingData(f"rank {header.rank} is not part of its group's step {group.step}")

    # -- drills --

    def drill(self, node: int, random: Random) -> Drilled | None:
        """Recompute a random block of this node from its peers. None when there is nothing to recompute, or it moved on."""
        groups = [(slot, group) for slot in self._parities() if (group := group_of(slot)) is not None and group.block_nbytes]
        if not groups:
            return None
        slot, group = max(groups, key=lambda item: item[1].step)
        header, started = slot.header, time.monotonic()
        place = group.position(node)
        _, kind, base = random.choice(list(Decoder(group, node, {}, frozenset(), frozenset()).blocks()))
        offset = base + random.randrange(0, max(1, group.block_nbytes - DRILL_NBYTES), 64)
        nbytes = min(DRILL_NBYTES, base + group.block_nbytes - offset)
        try:
            with _open(self._readers, group) as readers:
                decoded = decode(group, place, kind, offset, nbytes, {n: r for n, r in readers.items() if n != node})
                agrees = decoded == _read(group, place, kind, offset, nbytes, readers[node])
            with _open(self._readers, group) as readers:  # a slot that moved on while it was read proves nothing
                _must_still_hold(group, readers)
            self._must_hold(slot, header)
        except (MissingData, _MovedOn):
            return None
        self._pace(nbytes * group.layout.n)
        return Drilled(group.step, nbytes, time.monotonic() - started, agrees)

    def _parities(self) -> Iterator[Slot]:
        for index in (0, 1):
            slot = self._committed(parity_name(index))
            if slot is not None:
                yield slot


# -- decoding a piece --------------------------------------------------------------------------------------------------


def decode(group: GroupRecord, place: int, kind: str, offset: int, nbytes: int, readers: Mapping[int, SlotReader]) -> bytes:
    """`nbytes` at `offset` of what position `place` holds ("node" bytes or "parity" rows), from the other nodes alone.

    The piece lies within one block. Raises MissingData when fewer than k of its stripe's blocks are within reach.
    """
    here = frozenset(readers)
    decoder = Decoder(group, group.records[place].node, readers, here, here)
    base = offset // group.block_nbytes * group.block_nbytes
    stripe = next(stripe for stripe, of, start in decoder.blocks() if (of, start) == (kind, base))
    return bytes(decoder.decode(stripe, offset - base, nbytes))


def _read(group: GroupRecord, place: int, kind: str, offset: int, nbytes: int, reader: SlotReader) -> bytes:
    scratch = memoryview(bytearray(nbytes))
    if kind == "parity":
        return bytes(reader.read(parity_name(group.index), group.epoch, group.step, offset, nbytes, scratch))
    return bytes(NodeBytes(group.records[place], group, reader).piece(offset, nbytes, scratch))


def _must_still_hold(group: GroupRecord, readers: Mapping[int, SlotReader]) -> None:
    """Raises MissingData when a node of the group has gone on to another step."""
    for place, record in enumerate(group.records):
        if record.node in readers:
            _read(group, place, "parity", 0, 1, readers[record.node])
            _read(group, place, "node", 0, min(1, record.nbytes), readers[record.node])


def _meta_region(header: SlotHeader) -> Region:
    return Region("meta", aligned(header.payload_nbytes), header.meta_nbytes, header.meta_crc32c)


def _pieces(offset: int, nbytes: int, block: int) -> Iterator[tuple[int, int]]:
    """The range cut at blocks, and into pieces of at most PIECE_NBYTES."""
    end = offset + nbytes
    while offset < end:
        stop = min(end, (offset // block + 1) * block, offset + PIECE_NBYTES)
        yield offset, stop - offset
        offset = stop


def _skips(group: GroupRecord, readers: Mapping[int, SlotReader], node: int) -> Iterator[frozenset[int]]:
    """Which nodes to leave out: nobody at first, then those that may be damaged themselves, as far as there are nodes to spare."""
    others = sorted(other for other in readers if other != node)
    spare = max(0, group.parity - 1)
    choices = itertools.chain.from_iterable(itertools.combinations(others, count) for count in range(spare + 1))
    for choice in itertools.islice(choices, ATTEMPTS):
        yield frozenset({node, *choice})


@contextmanager
def _open(readers: Readers, group: GroupRecord) -> Iterator[Mapping[int, SlotReader]]:
    found = readers(group)
    try:
        yield found
    finally:
        for reader in found.values():
            reader.close()
