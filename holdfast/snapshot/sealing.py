"""A filled slot becomes a snapshot: its bytes are checksummed in one pass, and its header says so last."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from holdfast.arrays import FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import ClusterError
from holdfast.snapshot.outline import CELL_NBYTES, Outline, Sums, checksum
from holdfast.snapshot.slots import Meta, Slot, SlotState, aligned


@dataclass(frozen=True, slots=True)
class Seal:
    """What makes a filled slot a snapshot: the meta that goes behind its payload, and the CRCs of the payload."""

    payload_nbytes: int
    meta: bytes
    sums: Sums


def summed(slot: Slot, table: FragmentTable, objects: dict[str, str], payload_nbytes: int, marks: Collection[int] = ()) -> Seal:
    """Read every byte of a filled slot once; nothing is changed yet."""
    rows = [(row.slot_offset, row.nbytes) for row in table]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    crcs = [0] * len(rows)
    sums = checksum(slot.body, [rows[place] for place in order], payload_nbytes, marks)
    for place, crc in zip(order, sums.spans, strict=True):
        crcs[place] = crc
    meta = Meta(table.with_crcs(crcs), objects).to_bytes()
    if aligned(payload_nbytes) + len(meta) > slot.capacity:
        raise ClusterError(f"rank {slot.header.rank}: table and objects of {len(meta)} bytes do not fit behind the snapshot")
    return Seal(payload_nbytes, meta, sums)


def seal_rank(slot: Slot, seal: Seal, epoch: int, step: int, world: int) -> Outline:
    """The slot is VERIFIED: payload, then table with CRCs and objects, then the header. Returns what its bytes are."""
    body, nbytes, start = slot.body, seal.payload_nbytes, aligned(seal.payload_nbytes)
    stop = start + len(seal.meta)
    body[nbytes:start] = bytes(start - nbytes)
    body[start:stop] = seal.meta
    outline = Outline(epoch, step, stop, _continued(list(seal.sums.cells), body, nbytes, stop), seal.sums.marks)
    slot.update(
        state=SlotState.VERIFIED,
        epoch=epoch,
        step=step,
        world=world,
        payload_nbytes=nbytes,
        meta_nbytes=len(seal.meta),
        meta_crc32c=crc32c(seal.meta),
    )
    return outline


def _continued(cells: list[int], body: memoryview, start: int, stop: int) -> tuple[int, ...]:
    """The cells of body[:start] and those that follow up to `stop`."""
    for low in range(start // CELL_NBYTES * CELL_NBYTES, stop, CELL_NBYTES):
        high = min(low + CELL_NBYTES, stop)
        if low < start:
            cells[low // CELL_NBYTES] = crc32c(body[start:high], cells[low // CELL_NBYTES])
        else:
            cells.append(crc32c(body[low:high]))
    return tuple(cells)
