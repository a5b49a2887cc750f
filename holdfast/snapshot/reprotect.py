"""A rebuilt node's parity, made anew behind training: trainers wait for the node's bytes, and for nothing else.

Until it is done the node protects nobody, and says so (`Health.protects`): one more loss than its group's other parities cover is
then refused by the next recovery, for want of blocks. The others' parity stays as it is, so the node itself may be lost again.

It is made by the rounds' worker, before anything of the next snapshot, from the data of the group alone. Nothing that is read can
be of another step without being noticed: the CRCs that it is compared with at the end are asked for after the last byte was read,
and nobody gives one for a slot that has gone on. And since the capture was some time ago, every peer looks once more at what it
holds: parity of bytes that have rotted would be a promise to bring back the rot.

What fails is tried again, ever more rarely, for as long as no newer snapshot is committed: a peer may have been away for a moment.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError, MissingData
from holdfast.events import crash_point, emit
from holdfast.snapshot.exchange import SlotReader, parity_name
from holdfast.snapshot.parity import encode_row
from holdfast.snapshot.repair import rotten
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.store import META_ROOM
from holdfast.snapshot.view import GroupRecord, View

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

PAUSE_S = (0.5, 30.0)
"""Between two attempts, from the first to the longest; they double."""

TRIES = 20
"""After which what fails is no passing trouble: nine minutes."""


class Reprotect:
    """What this node owes its group, from a rebuild on until it has its parity again or a newer snapshot brings it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members, self._slots, self._lock = keeper, keeper.members, keeper.slots, keeper.lock
        self._owed: GroupRecord | None = None
        self._failures = 0

    def owe(self, group: GroupRecord) -> None:
        """The bytes of the group's step are here again, its parity is not. Called with the lock held."""
        self._slots.void(parity_name(group.index), group.epoch)
        self._owed, self._failures = group, 0
        if self._members.view is not None:  # else others may be rebuilt as well, and the epoch begins when all are
            self._keeper.rounds.put(partial(self._encode, group))

    def joined(self, view: View) -> None:
        """An epoch begins. Where its step is encoded or captured anew everywhere, nothing is owed. Called with the lock held."""
        group = self._owed
        if group is None:
            return
        if view.protected and view.in_memory and not view.cut_anew and view.committed == group.step:
            self._keeper.rounds.put(partial(self._encode, group))
        else:
            self._owed = None

    # -- by the worker --

    def _encode(self, group: GroupRecord) -> None:
        readers: Mapping[int, SlotReader] = {}
        with self._lock:
            if self._owed is not group or not self._is_newest(group):
                return
            room = group.parity * group.block_nbytes + META_ROOM
            slot = self._slots.empty(parity_name(group.index), -1, group.index, group.epoch, room)
            sequence = slot.header.sequence
        try:
            readers = self._readers(group)
            crcs = {row: self._encode_row(group, row, readers, slot, sequence) for row in range(group.parity)}
            self._must_be_whole(group, readers)
            crash_point("rebuild.encoded")
            with self._lock:
                self._must_be_ours(slot, sequence)
                self._slots.seal_parity(group, SlotState.COMMITTED, crcs)
                self._owed = None
        except (HoldfastError, OSError) as error:
            self._failed(group, error)
            return
        finally:
            for reader in readers.values():
                reader.close()
        logger.info("node %d has its parity of step %d again", self._keeper.node, group.step)
        emit("snapshot.reprotected", job=self._keeper.job, node=self._keeper.node, step=group.step)

    def _is_newest(self, group: GroupRecord) -> bool:
        """The group's step is still what this node would be rebuilt to: no newer one is committed. Called with the lock held."""
        held = [
            slot.header for slot in self._slots.values() if slot.header.state is SlotState.COMMITTED and slot.header.rank >= 0
        ]
        return bool(held) and max((header.step, header.epoch) for header in held) == (group.step, group.epoch)

    def _encode_row(self, group: GroupRecord, row: int, readers: Mapping[int, SlotReader], slot: Slot, sequence: int) -> int:
        crc, base = 0, row * group.block_nbytes
        for offset, data in encode_row(group, self._keeper.node, row, readers):
            with self._lock:
                self._must_be_ours(slot, sequence)
                slot.body[base + offset : base + offset + len(data)] = data
            crc = crc32c(data, crc)
        return crc

    def _must_be_ours(self, slot: Slot, sequence: int) -> None:
        """Raise MissingData when a newer snapshot has been given the slot. Called with the lock held."""
        if self._slots.get(slot.path.name) is not slot or slot.header.sequence != sequence:
            raise MissingData("its slot was given to a newer snapshot")

    def _must_be_whole(self, group: GroupRecord, readers: Mapping[int, SlotReader]) -> None:
        """Raise CorruptData when what a peer holds is no longer what it captured."""
        peers = [reader.member for node, reader in readers.items() if node != self._keeper.node]
        with ThreadPoolExecutor(len(peers), "holdfast-check") as pool:
            for peer, names in zip(peers, pool.map(lambda peer: rotten(peer, group), peers), strict=True):
                if set(names) - {parity_name(group.index)}:
                    raise CorruptData(f"{', '.join(names)} of node {peer.node} rotted")

    def _readers(self, group: GroupRecord) -> dict[int, SlotReader]:
        view = self._members.current()
        away = [record.node for record in group.records if record.node not in view.nodes]
        if away:
            raise MissingData(f"what nodes {away} of its group held lies elsewhere now")
        return {record.node: self._keeper.reader(view.member(record.node)) for record in group.records}

    def _failed(self, group: GroupRecord, error: Exception) -> None:
        with self._lock:
            present = self._members.view is not None and self._owed is group and self._is_newest(group)
            self._failures += 1
            pause_s = min(PAUSE_S[0] * 2 ** (self._failures - 1), PAUSE_S[1]) if self._failures < TRIES else None
        level = logging.WARNING if present else logging.INFO  # in an epoch that is over, nobody waits for it
        again = "until the next snapshot" if pause_s is None or not present else f"and tries again in {pause_s:.1f} s"
        logger.log(
            level,
            "node %d has its bytes of step %d back and not yet its parity, so it protects nobody %s: %s",
            self._keeper.node,
            group.step,
            again,
            error,
        )
        if present and pause_s is not None:
            args = (group, pause_s, self._members.epoch)
            threading.Thread(target=self._again, args=args, name="holdfast-again", daemon=True).start()

    def _again(self, group: GroupRecord, pause_s: float, epoch: int) -> None:
        if not self._keeper.wait_closed(pause_s) and self._members.epoch == epoch:
            self._keeper.rounds.put(partial(self._encode, group))
