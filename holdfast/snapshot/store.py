"""The slots of one node: made, found again after a crash, sealed, rebuilt, and freed.

What a slot holds is said by its own header alone, so a keeper that starts anew knows as much as the one that died.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from holdfast.arrays import FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.slots import Meta, Slot, SlotHeader, SlotState, aligned
from holdfast.snapshot.view import GroupRecord, RankRecord

logger = logging.getLogger(__name__)

META_ROOM = 1 << 20
"""Room kept behind a payload for fragment table and objects, beyond what the first snapshot needs."""


class NodeSlots(dict[str, Slot]):
    """Slots by file name, below one directory. Building it takes over what a predecessor left there.

    `lock` guards it against a second thread; whoever changes more than one slot holds it.
    """

    def __init__(self, job: str, node: int, memory: Path) -> None:
        super().__init__(_adopt(memory))
        self.job, self.node, self.memory = job, node, memory
        self.lock = threading.RLock()

    # -- room --

    def room(self, name: str, rank: int, index: int, body_nbytes: int) -> None:
        """See that slot `name` exists with room for `body_nbytes`; a committed one is never touched."""
        slot = self.get(name)
        if slot is not None and (slot.header.state is SlotState.COMMITTED or slot.capacity >= body_nbytes):
            return
        if slot is not None:
            slot.close()
        self[name] = Slot.create(self.memory / name, SlotHeader(self.job, self.node, rank, index), body_nbytes)

    def discard(self, name: str) -> None:
        """Take the slot's file away. Who has it mapped keeps what he has, and it is nobody's snapshot."""
        slot = self.pop(name)
        slot.path.unlink(missing_ok=True)
        slot.close()

    def void(self, name: str, epoch: int) -> None:
        """Say that the slot is being filled: what it held is no longer a snapshot."""
        if name in self:
            self[name].update(state=SlotState.FILLING, step=0, epoch=epoch, payload_nbytes=0, meta_nbytes=0)

    def empty(self, name: str, rank: int, index: int, epoch: int, body_nbytes: int) -> Slot:
        """Slot `name`, void and with room for so much. One that is void already is not written to once more."""
        for _ in range(2):
            if name in self and not _is_void(self[name].header, epoch):
                self.void(name, epoch)
            self.room(name, rank, index, body_nbytes)
        return self[name]

    def keep_only(self, ranks: Iterable[int]) -> None:
        """Free the slots of all other ranks: they lived here once, and a newer step is committed without them."""
        mine = {slot_name(rank, index) for rank in ranks for index in (0, 1)} | {parity_name(0), parity_name(1)}
        for name in set(self) - mine:
            self.discard(name)

    # -- content --

    def of_step(self, step: int, index: int) -> list[Slot]:
        """This node's slots at `index` that hold `step` whole, parity included."""
        with self.lock:
            return [
                slot
                for slot in self.values()
                if slot.header.index == index and slot.header.step == step and slot.header.state >= SlotState.VERIFIED
            ]

    def seal_parity(self, group: GroupRecord, state: SlotState, crcs: Mapping[int, int] | None = None) -> None:
        """Write behind the parity rows which group and step they belong to; only then does the header say that they are whole.

        `crcs` are those of rows that are known from when they were computed; the others are read.
        """
        known = crcs or {}
        slot = self[parity_name(group.index)]
        size = group.parity * group.block_nbytes

        def crc_of(row: int) -> int:
            stored = slot.body[row * group.block_nbytes : (row + 1) * group.block_nbytes]
            return known[row] if row in known else crc32c(stored)

        rows = {row_name(row): f"{crc_of(row):08x}" for row in range(group.parity)}
        data = Meta(FragmentTable.from_rows([]), {"group": json.dumps(group.to_json()), **rows}).to_bytes()
        start = aligned(size)
        slot.body[start : start + len(data)] = data
        slot.update(
            state=state,
            epoch=group.epoch,
            step=group.step,
            world=group.world,
            payload_nbytes=size,
            meta_nbytes=len(data),
            meta_crc32c=crc32c(data),
        )

    def damaged(self, epoch: int, step: int, index: int) -> list[str]:
        """The slots of this step that no longer hold what they held when they were sealed; reads every byte of them."""
        return [
            slot.path.name
            for slot in self.of_step(step, index)
            if slot.header.epoch == epoch and (not _rows_are_whole(slot) if slot.header.rank < 0 else _changed(slot))
        ]


def _is_void(header: SlotHeader, epoch: int) -> bool:
    return (header.state, header.step, header.epoch) == (SlotState.FILLING, 0, epoch)


def _adopt(memory: Path) -> dict[str, Slot]:
    """The slots a predecessor left, each checked; what cannot be trusted is removed and said."""
    found: dict[str, Slot] = {}
    for path in sorted((*memory.glob("slot-*-?"), *memory.glob("parity-?"))):
        try:
            slot = Slot.open(path, writable=True)
            if slot.header.state >= SlotState.VERIFIED:
                slot.meta()
            found[path.name] = slot
        except HoldfastError as error:
            logger.warning("slot %s is not adopted: %s", path.name, error)
            path.unlink(missing_ok=True)
    for leftover in memory.glob("*.new"):
        leftover.unlink(missing_ok=True)
    return found


def rank_record(header: SlotHeader) -> RankRecord:
    return RankRecord(header.rank, header.payload_nbytes, header.meta_nbytes, header.meta_crc32c, header.body_nbytes)


def group_of(slot: Slot) -> GroupRecord | None:
    """The group that a whole parity slot belongs to."""
    if slot.header.rank >= 0 or slot.header.state < SlotState.ENCODED:
        return None
    try:
        return GroupRecord.from_json(json.loads(slot.meta().objects["group"]))
    except (HoldfastError, KeyError, ValueError, TypeError) as error:
        logger.warning("parity slot %s is not usable: %s", slot.path.name, error)
        return None


def row_name(row: int) -> str:
    return f"row-{row}"


def _changed(slot: Slot) -> bool:
    """Some fragment, or the table of them, is not what was captured."""
    try:
        return any(crc32c(slot.body[row.slot_offset : row.slot_offset + row.nbytes]) != row.crc32c for row in slot.meta().table)
    except CorruptData:
        return True


def _rows_are_whole(slot: Slot) -> bool:
    """Every parity row has the CRC that it was sealed with."""
    group = group_of(slot)
    if group is None:
        return False
    size, known = group.block_nbytes, slot.meta().objects
    return all(f"{crc32c(slot.body[row * size : (row + 1) * size]):08x}" == known[row_name(row)] for row in range(group.parity))
