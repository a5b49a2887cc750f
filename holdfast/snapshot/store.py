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
from holdfast.events import crash_point
from holdfast.snapshot.exchange import SlotReader, parity_name, rebuild_blocks, slot_name
from holdfast.snapshot.slots import Meta, Slot, SlotHeader, SlotState, aligned
from holdfast.snapshot.view import GroupRecord, RankRecord, stride

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

    def seal_parity(self, group: GroupRecord, state: SlotState) -> None:
        """Write behind the parity rows which group and step they belong to; only then does the header say that they are whole."""
        slot = self[parity_name(group.index)]
        size = group.parity * group.block_nbytes
        rows = {
            f"row-{row}": f"{crc32c(slot.body[row * group.block_nbytes : (row + 1) * group.block_nbytes]):08x}"
            for row in range(group.parity)
        }
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

    def rebuild(
        self,
        group: GroupRecord,
        lost: int,
        readers: Mapping[int, SlotReader],
        with_data: frozenset[int],
        with_parity: frozenset[int],
    ) -> int:
        """Recompute what node `lost` held, into slots here, and check every byte; returns the bytes. Closes the readers.

        Raises MissingData where too little survives, and CorruptData when what survives is damaged.
        """
        record = next(record for record in group.records if record.node == lost)
        # Parity that outlived the node's bytes stays where it is: another node may be reading it for a rebuild of its own.
        parity_too = lost == self.node and lost not in with_parity
        fresh: dict[str, Slot] = {}
        with self.lock:
            for rank in record.ranks:
                name = slot_name(rank.rank, group.index)
                header = SlotHeader(self.job, self.node, rank.rank, group.index, SlotState.FILLING)
                self[name] = fresh[name] = Slot.create(self.memory / name, header, rank.body_nbytes + META_ROOM)
            if parity_too:
                name = parity_name(group.index)
                header = SlotHeader(self.job, self.node, -1, group.index, SlotState.FILLING)
                self[name] = Slot.create(self.memory / name, header, group.parity * group.block_nbytes + META_ROOM)

        def store(kind: str, offset: int, data: memoryview) -> None:
            if kind == "parity":
                self[parity_name(group.index)].body[offset : offset + len(data)] = data
                return
            base = 0
            for rank in record.ranks:
                start, stop = max(offset, base), min(offset + len(data), base + rank.body_nbytes)
                if start < stop:
                    fresh[slot_name(rank.rank, group.index)].body[start - base : stop - base] = data[
                        start - offset : stop - offset
                    ]
                base += stride(rank)

        try:
            rebuild_blocks(group, lost, readers, with_data, with_parity, store, parity_too=parity_too)
        finally:
            for reader in readers.values():
                reader.close()
        crash_point("rebuild.decoded")
        for rank in record.ranks:
            _check_rebuilt(fresh[slot_name(rank.rank, group.index)], rank, group)
        if parity_too:
            self.seal_parity(group, SlotState.COMMITTED)
        crash_point("rebuild.checked")
        return record.nbytes


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


def _check_rebuilt(slot: Slot, record: RankRecord, group: GroupRecord) -> None:
    """Every byte that was decoded has the CRC it had when it was captured; only then does the header say so."""
    fields = {"payload_nbytes": record.payload_nbytes, "meta_nbytes": record.meta_nbytes, "meta_crc32c": record.meta_crc32c}
    slot.header = SlotHeader(
        slot.header.job, slot.header.node, record.rank, group.index, SlotState.FILLING, sequence=slot.header.sequence, **fields
    )
    for row in slot.meta().table:
        found = crc32c(slot.body[row.slot_offset : row.slot_offset + row.nbytes])
        if found != row.crc32c:
            raise CorruptData(
                f"step {group.step}, rank {record.rank}, {row.array}: rebuilt bytes have crc32c {found:08x}, expected "
                f"{row.crc32c:08x}; a survivor's memory is damaged"
            )
    slot.update(state=SlotState.COMMITTED, epoch=group.epoch, step=group.step, world=group.world)
