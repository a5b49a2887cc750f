"""A snapshot's way through one keeper, from announced to committed.

Announced (slot FILLING) → filled by the trainers → checksummed (VERIFIED) → peers told → parity exchanged (ENCODED) → committed
on the coordinator's word (COMMITTED). Every arrow has a crash point; whatever dies at one, the older slot is still COMMITTED on
every node. What takes time runs on one worker thread, and what it found is sealed only if its round is still the present one.

An exchange that failed, because a peer or the network was away for a moment, is done once more in a round of its own: what the
trainers have captured stays as it is. A message that was sent twice, for want of an answer, is heard once.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.arrays import FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError, StaleEpoch
from holdfast.events import crash_point
from holdfast.snapshot.coordinator import UNPROTECTED, Encoded, GivenUp
from holdfast.snapshot.exchange import RowsInFlight, SlotReader, parity_name, slot_name
from holdfast.snapshot.outline import base_of
from holdfast.snapshot.parity import Base, Forward, committed_row, encode_stripe, receive_piece
from holdfast.snapshot.priority import priority
from holdfast.snapshot.sealing import seal_rank, summed
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.store import META_ROOM, rank_record
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, effective_parity
from holdfast.snapshot.wire import Connection, Header

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Round:
    """One attempt at a snapshot: `step` into slot `index`. `rows` counts the parity that has arrived for it.

    `ordered` is the round in which it was announced: what ranks capture for that one counts in all attempts that follow.
    """

    epoch: int
    number: int
    step: int
    index: int
    ordered: int
    is_published: bool = False
    """All ranks here are verified, and the group has been told."""
    rows: RowsInFlight | None = None


class Rounds:
    """The verbs that carry a snapshot, and the worker behind them."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members, self._slots, self._lock = keeper, keeper.members, keeper.slots, keeper.lock
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Round | None] | None] = queue.SimpleQueue()
        self.tables: dict[int, tuple[str, FragmentTable]] = {}
        self.present: Round | None = None
        self.groups: dict[int, dict[int, NodeRecord]] = {}
        self.filled_at = time.monotonic()
        """When a rank here last had a snapshot ready."""
        self._readers: dict[int, SlotReader] = {}
        threading.Thread(target=self._work, name="holdfast-worker", daemon=True).start()

    def reset(self) -> None:
        """A new epoch: nothing of the last one's rounds is sealed any more. Called with the lock held."""
        self.present = None
        self.groups.clear()
        self.tables.clear()
        self.put(self._close_readers)  # they map memory that the next epoch may not need any more

    def put(self, job: Callable[[], None], now: Round | None = None) -> None:
        """Have the worker do this after what it has to do already. If it fails, `now` is given up."""
        self._jobs.put((job, now))

    def close(self) -> None:
        self._jobs.put(None)

    # -- verbs of trainers --

    def verb_filled(
        self,
        rank: int,
        attachment: str,
        step: int,
        index: int,
        payload_nbytes: int,
        layout: str,
        payload: memoryview,
    ) -> Header:
        """A trainer has captured `step`; its fragment table comes along when it changed, its objects always."""
        table_nbytes = int.from_bytes(payload[:8], "little")
        table, objects = payload[8 : 8 + table_nbytes], json.loads(bytes(payload[8 + table_nbytes :]))
        with self._lock:
            self._keeper.trainers.check(rank, attachment)
            if table_nbytes:
                self.tables[rank] = (layout, FragmentTable.from_bytes(table))
            now = self.present
            if now is None or (now.step, now.index) != (step, index):
                return {"taken": False}
            if self.tables.get(rank, ("", None))[0] != layout:
                return {"taken": False, "table": True}
            self.filled_at = time.monotonic()
        self.put(lambda: self._verify(now, rank, payload_nbytes, objects), now)
        return {"taken": True}

    def verb_give_up(self, rank: int, attachment: str, step: int, reason: str) -> None:
        with self._lock:
            self._keeper.trainers.check(rank, attachment)
            if self._members.view is None:
                return  # keepers are regrouping; the round is void already
            number = self.present.number if self.present is not None and self.present.step == step else 0
            self._keeper.tell(GivenUp(self._keeper.node, step, self._keeper.progress(), reason, number))

    def verb_reserve(self, rank: int, attachment: str, index: int, body_nbytes: int) -> Header:
        """Room for a snapshot that has outgrown its slot; the trainer maps the slot anew. Never a slot that is in use."""
        name = slot_name(rank, index)
        with self._lock:
            self._keeper.trainers.check(rank, attachment)
            slot = self._slots.get(name)
            if slot is not None and slot.header.state is not SlotState.FILLING:
                raise StaleEpoch(f"{name} holds step {slot.header.step} ({slot.header.state.name}) and is not being filled")
            self._slots.room(name, rank, index, body_nbytes + META_ROOM)
            self._slots.void(name, self._members.epoch)
        return {}

    # -- verbs of peers --

    def verb_announce(self, step: int, index: int, round: int, look: int = 0) -> None:
        """Empty slot `index` everywhere on this node and let the ranks capture `step` into it.

        A `look` that was not announced before has them sum that portion of what they hold alike.
        """
        with self._lock:
            if self._is_known(round):
                return
            self._enter(Round(self._members.epoch, round, step, index, ordered=round))
            ranks = self._members.local_ranks
            for name in (*(slot_name(rank, index) for rank in ranks), parity_name(index)):
                self._slots.void(name, self._members.epoch)
            crash_point("keeper.announced")
            for rank in ranks:
                self._keeper.trainers.pages[rank]["look"] = look
                self._keeper.trainers.pages[rank].set_target(step, index)

    def verb_protect(self, step: int, index: int, round: int) -> None:
        """Compute the parity of a step that was restored, or whose last exchange failed; as soon as all ranks here have it."""
        with self._lock:
            if self._is_known(round):
                return
            last = self.present
            is_same = last is not None and (last.step, last.index) == (step, index)
            ordered = last.ordered if last is not None and is_same else round
            now = self._enter(Round(self._members.epoch, round, step, index, ordered))
        self.put(lambda: self._publish(now), now)

    def _is_known(self, number: int) -> bool:
        return self.present is not None and self.present.number >= number

    def _enter(self, now: Round) -> Round:
        self.present = now
        self.groups = {other: group for other, group in self.groups.items() if other >= now.number}
        return now

    def _continued(self, now: Round) -> Round | None:
        """The present round, where what was captured for `now` counts in it."""
        present = self.present
        same = present is not None and (present.epoch, present.ordered) == (now.epoch, now.ordered)
        return present if same else None

    def verb_verified(self, round: int, record: Header) -> None:
        """A node of the group has checked all its ranks' slots; with the last one, parity can be computed.

        A peer that heard of the round before we did may already be done with it; its record is kept until we hear of it too.
        """
        found = NodeRecord.from_json(record)
        with self._lock:
            now = self.present
            if round < (now.number if now else 0):
                return
            group = self.groups.setdefault(round, {})
            if found.node in group:
                return
            group[found.node] = found
            if len(group) == len(self._members.group_nodes):
                self.put(lambda: self._encode(round), now)

    def verb_parity(
        self,
        step: int,
        index: int,
        round: int,
        row: int,
        offset: int,
        block_nbytes: int,
        crc: int,
        base: list[int] | None = None,
        payload: memoryview | bytes = b"",
        epoch_of_sender: int = -1,
    ) -> None:
        """A piece of a parity row that a first owner computed for this node, or with `base` a change of what it was then."""
        if crc32c(payload) != crc:
            raise CorruptData(f"parity row {row} of step {step} at {offset}: the piece arrived damaged")
        with self._lock:
            if epoch_of_sender >= 0:
                self._members.check("parity", epoch_of_sender)
            now = self.present
            if now is None or now.number != round:
                return
            rows = self._prepare_parity(now, block_nbytes)
            last = base_of(self._slots, parity_name(index), (base[0], base[1])) if base else None
        if last is not None and rows.adopt(row):
            self._adopt_row(now, last, row, block_nbytes)
        with self._lock:
            if self.present is now and receive_piece(
                self._row(now, row, block_nbytes), row, offset, payload, rows, is_change=last is not None
            ):
                self.put(lambda: self._protected(now), now)

    def _adopt_row(self, now: Round, last: Slot, row: int, block_nbytes: int) -> None:
        """The row begins as what it was in the last snapshot; piece by piece, so that nobody waits long for the lock."""
        for offset, data in committed_row(last, row, block_nbytes):
            with self._lock:
                if self.present is not now:
                    return
                self._row(now, row, block_nbytes)[offset : offset + len(data)] = data

    def _row(self, now: Round, row: int, block_nbytes: int) -> memoryview:
        return self._slots[parity_name(now.index)].body[row * block_nbytes : (row + 1) * block_nbytes]

    # -- the worker: everything that takes time --

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, now = item
            priority.busy(since=time.monotonic())
            try:
                job()
            # A snapshot that fails, for whatever reason, is given up and counted; training goes on and the next one is tried.
            except (HoldfastError, OSError) as error:
                logger.error("snapshot given up on node %d: %s: %s", self._keeper.node, type(error).__name__, error)
                self._give_up(now)
            except Exception:
                logger.exception("snapshot given up on node %d", self._keeper.node)
                self._give_up(now)
            finally:
                priority.busy(since=None)
        self._close_readers()

    def _give_up(self, now: Round | None) -> None:
        with self._lock:
            if now is not None and self._continued(now) is not None and self._members.view is not None:
                reason = UNPROTECTED if now.is_published else "failed"
                self._keeper.tell(GivenUp(self._keeper.node, now.step, self._keeper.progress(), reason, now.number))

    def _verify(self, now: Round, rank: int, payload_nbytes: int, objects: dict[str, str]) -> None:
        """Checksum a filled slot and seal it with its table, objects and header."""
        with self._lock:
            if self._continued(now) is None:
                return
            slot, table = self._slots[slot_name(rank, now.index)], self.tables[rank][1]
        crash_point("snapshot.filled")
        if not self._keeper.poison.allows(rank, now.step, table, slot.body):
            self._keeper.poison.refuse(now.step, now.number)
            return
        seal = summed(slot, table, objects, payload_nbytes, self._keeper.outlines.marks(slot.path.name))
        with self._lock:
            present = self._continued(now)
            if present is None:
                return  # another round may be filling this slot by now
            outline = seal_rank(slot, seal, now.epoch, now.step, self._members.current().world)
            self._keeper.outlines.put(slot.path.name, outline)
        crash_point("snapshot.verified")
        self._publish(present)

    def _publish(self, now: Round) -> None:
        """Tell the group, once all ranks here are verified."""
        with self._lock:
            if self.present is not now:
                return
            record = self._node_record(now.step, now.index)
            if record is not None and not now.is_published:
                now.is_published = True
                for node in self._members.group_nodes:
                    self._members.post(node, "verified", round=now.number, record=record.to_json())

    def _encode(self, number: int) -> None:
        """Compute the parities of the stripe this node owns first; the other rows arrive from their first owners."""
        with self._lock:
            now = self.present
            if now is None or now.number != number:
                return
            group = self._group(now)
            if group.parity:
                rows = self._prepare_parity(now, group.block_nbytes)
                own, last = self._row(now, 0, group.block_nbytes), self._slots.get(parity_name(1 - now.index))
                if group.epoch != now.epoch:
                    last = None  # a restored step is encoded whole
                members = [self._members.current().member(node) for node in self._members.group_nodes]
        if not group.parity:
            self._protected(now)
            return
        try:
            with ExitStack() as stack:
                forward = self._forward(now, group.block_nbytes, stack)
                rows.crcs[0] = encode_stripe(group, self._keeper.node, self._group_readers(members), own, forward, last)
        except BaseException:
            self._close_readers()  # answers may still be on their way to them
            raise
        crash_point("snapshot.exchanged")
        if rows.add(0, group.block_nbytes):
            self._protected(now)

    def _protected(self, now: Round) -> None:
        """All parity this node has to hold is there: seal it and tell the coordinator."""
        with self._lock:
            if self.present is not now:
                return
            group = self._group(now)
            if group.parity:
                self._slots.seal_parity(group, SlotState.ENCODED, now.rows.crcs if now.rows else None)
            for slot in self._slots.of_step(now.step, now.index):
                if slot.header.state is not SlotState.ENCODED:
                    slot.update(state=SlotState.ENCODED)
        crash_point("snapshot.encoded")
        with self._lock:
            if self.present is now:
                self._keeper.tell(Encoded(self._keeper.node, now.step, self._keeper.progress(), now.number))

    def _group_readers(self, members: list[Member]) -> dict[int, SlotReader]:
        """Readers of the group's nodes, kept from round to round of an epoch. For the worker alone."""
        for member in members:
            self._readers.setdefault(member.node, self._keeper.reader(member)).refresh()
        return self._readers

    def _close_readers(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _forward(self, now: Round, block_nbytes: int, stack: ExitStack) -> Forward:
        where: dict[str, Any] = {
            "step": now.step,
            "index": now.index,
            "round": now.number,
            "block_nbytes": block_nbytes,
            "epoch_of_sender": now.epoch,
        }
        connections: dict[int, Connection] = {}

        def forward(node: int, row: int, offset: int, data: memoryview, base: Base | None) -> None:
            connection = connections.get(node)
            if connection is None:
                connection = connections[node] = self._keeper.connection(self._members.current().member(node))
                stack.callback(connection.close)
            connection.ask("parity", data, row=row, offset=offset, crc=crc32c(data), base=base, **where)

        return forward

    # -- records; called with the lock held --

    def _prepare_parity(self, now: Round, block_nbytes: int) -> RowsInFlight:
        """The counter of parity rows of this round, with room for them."""
        if now.rows is None:
            parity = effective_parity(self._members.current().parity, len(self._members.group_nodes))
            name = parity_name(now.index)
            self._slots.empty(name, -1, now.index, now.epoch, parity * block_nbytes + META_ROOM)
            now.rows = RowsInFlight(parity, block_nbytes)
        return now.rows

    def _node_record(self, step: int, index: int) -> NodeRecord | None:
        """The record of this node once all its ranks are verified at `step`."""
        headers = {slot.header.rank: slot.header for slot in self._slots.of_step(step, index)}
        ranks = self._members.local_ranks
        if any(rank not in headers for rank in ranks):
            return None
        return NodeRecord(self._keeper.node, tuple(rank_record(headers[rank]) for rank in ranks))

    def _group(self, now: Round) -> GroupRecord:
        nodes, view = self._members.group_nodes, self._members.current()
        records = tuple(self.groups[now.number][node] for node in nodes)
        epoch = max(slot.header.epoch for slot in self._slots.of_step(now.step, now.index) if slot.header.rank >= 0)
        return GroupRecord(epoch, now.step, now.index, view.world, effective_parity(view.parity, len(nodes)), records)
