"""A filled slot becomes a snapshot: its bytes are checksummed in one pass, and its header says so last."""

from __future__ import annotations

from holdfast.arrays import FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import ClusterError
from holdfast.snapshot.outline import CELL_NBYTES, Outline, checksum
from holdfast.snapshot.slots import Meta, Slot, SlotState, aligned


def seal_rank(
    slot: Slot, table: FragmentTable, objects: dict[str, str], payload_nbytes: int, epoch: int, step: int, world: int
) -> Outline:
    """The slot is VERIFIED: payload, then table with CRCs and objects, then the header. Returns what its bytes are."""
    body = slot.body
    rows = [(row.slot_offset, row.nbytes) for row in table]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    crcs = [0] * len(rows)
    found, cells = checksum(body, [rows[place] for place in order], payload_nbytes)
    for place, crc in zip(order, found, strict=True):
        crcs[place] = crc
    data = Meta(table.with_crcs(crcs), objects).to_bytes()
    start = aligned(payload_nbytes)
    if start + len(data) > slot.capacity:
        raise ClusterError(f"rank {slot.header.rank}: table and objects of {len(data)} bytes do not fit behind the snapshot")
    body[payload_nbytes:start] = bytes(start - payload_nbytes)
    body[start : start + len(data)] = data
    stop = start + len(data)
    outline = Outline(epoch, step, stop, _continued(cells, body, payload_nbytes, stop))
    slot.update(
        state=SlotState.VERIFIED,
        epoch=epoch,
        step=step,
        world=world,
        payload_nbytes=payload_nbytes,
        meta_nbytes=len(data),
        meta_crc32c=crc32c(data),
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
