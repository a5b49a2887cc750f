"""A lost node's bytes, recomputed from its group into slots of this keeper, and believed only when they are proved.

The survivors share the work where the network is between them: each decodes the stripes it is given and sends only what was lost,
so what comes in here is what was lost and not k times as much. On one host every slot can be mapped, and decoding happens here.

Rebuilt bytes are read back and have to have the CRCs they were captured with. That proves all that they were made of and every
way they came, so nothing on the way is checked before it fails; then every survivor is asked to look at its own memory, and where
that is whole the work is done once more with a check at every step. The node's parity is not waited for (reprotect.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from holdfast.coding import crc32c
from holdfast.errors import ClusterError, CorruptData, HoldfastError
from holdfast.events import crash_point
from holdfast.snapshot.exchange import Decoder, slot_name
from holdfast.snapshot.peers import ask, reach
from holdfast.snapshot.slots import Slot, SlotHeader, SlotState
from holdfast.snapshot.store import META_ROOM
from holdfast.snapshot.view import GroupRecord, Member, RankRecord, stride
from holdfast.snapshot.wire import Header, Reply

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

Store = Callable[[int, memoryview], None]
"""Keep bytes that belong at this offset of the lost node's."""


@dataclass(frozen=True, slots=True)
class Task:
    """Recompute what `lost` held at the group's step from these nodes' data and parity."""

    group: GroupRecord
    lost: int
    survivors: tuple[Member, ...]
    with_data: frozenset[int]
    with_parity: frozenset[int]
    check: bool = False
    """Check every piece on its way, to learn who damages it."""

    @classmethod
    def from_json(cls, fields: Header) -> Task:
        return cls(
            GroupRecord.from_json(fields["group"]),
            fields["lost"],
            tuple(Member.from_json(member) for member in fields["survivors"]),
            frozenset(fields["with_data"]),
            frozenset(fields["with_parity"]),
            fields.get("check", False),
        )

    def to_json(self) -> Header:
        return {
            "group": self.group.to_json(),
            "lost": self.lost,
            "survivors": [member.to_json() for member in self.survivors],
            "with_data": sorted(self.with_data),
            "with_parity": sorted(self.with_parity),
            "check": self.check,
        }


def workers(task: Task, here: Member, *, mapped: bool) -> dict[int, Member]:
    """Who decodes which stripe. Empty: everything is decoded here, because it can be mapped or because too little is whole."""
    nodes = {record.node: place for place, record in enumerate(task.group.records)}
    lost = {place for node, place in nodes.items() if node not in task.with_data}
    members = {member.node: member for member in task.survivors}
    near = mapped and all(member.host == here.host for member in task.survivors)
    whole = all(node in members and node in task.with_parity for node, place in nodes.items() if place not in lost)
    if near or not whole or nodes[task.lost] not in lost or len(nodes) - len(lost) < 2 or len(lost) > task.group.parity:
        return {}
    plan = task.group.layout.repair_plan(lost)
    return {repair.stripe: members[task.group.records[repair.worker].node] for repair in plan.repairs}


class Share:
    """One worker's part of another keeper's rebuild, piece by piece: what the next one needs is under way while one is sent."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._pieces: Iterator[tuple[int, memoryview]] = iter(())

    def piece(self, stripe: int, offset: int) -> memoryview:
        """The next piece of a block; offset 0 begins one. The view is good until the next call."""
        if offset == 0:
            self._pieces = self._decoder.whole(stripe)
        found, data = next(self._pieces, (-1, memoryview(b"")))
        if found != offset:
            raise ClusterError(f"a share's pieces are asked for in their order; {offset} of stripe {stripe} is not the next")
        if offset + len(data) == self._decoder.group.block_nbytes:
            next(self._pieces, None)  # the block is used up, and its readers are free for another
        return data

    @property
    def check(self) -> bool:
        return self._decoder.check

    def close(self) -> None:
        self._decoder.close()


class Repair:
    """The verbs of a rebuild: doing one, and doing a share of another keeper's."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._slots, self._lock = keeper, keeper.slots, keeper.lock
        self._shares: dict[int, Share] = {}
        self._one_at_a_time = threading.Lock()

    # -- a share of another keeper's rebuild --

    def verb_check(self, epoch: int, step: int, index: int) -> Header:
        """Which slots of this node have rotted since they were sealed; reads every byte of that step."""
        return {"damaged": self._slots.damaged(epoch, step, index)}

    def verb_share(self, task: Header, connection: int) -> None:
        """Over this connection, pieces of the task will be asked for."""
        self._shares[connection] = Share(self._decoder(Task.from_json(task)))

    def verb_decode(self, stripe: int, offset: int, connection: int) -> Reply:
        share = self._shares[connection]
        data = share.piece(stripe, offset)
        return {"crc32c": crc32c(data)} if share.check else {}, data

    def disconnected(self, connection: int) -> None:
        share = self._shares.pop(connection, None)
        if share is not None:
            share.close()

    # -- a rebuild --

    def verb_rebuild(
        self, group: Header, lost: int, survivors: list[Header], with_data: list[int], with_parity: list[int]
    ) -> Header:
        """Recompute what node `lost` held, into slots of this keeper. Blocks until every byte of its ranks is proved and sealed.

        The answer names the survivors whose memory turned out damaged (`damaged`); then nothing is sealed.
        """
        fields = {"group": group, "lost": lost, "survivors": survivors, "with_data": with_data, "with_parity": with_parity}
        task = Task.from_json(fields)
        with self._one_at_a_time:
            try:
                return {"nbytes": self._rebuild(task)}
            except CorruptData as error:
                logger.warning("step %d of node %d cannot be rebuilt at once: %s", task.group.step, lost, error)
            with ThreadPoolExecutor(max(1, len(task.survivors)), "holdfast-check") as pool:
                found = pool.map(lambda member: rotten(member, task.group), task.survivors)
                damaged = {str(member.node): names for member, names in zip(task.survivors, found, strict=True) if names}
            if damaged:
                return {"damaged": damaged, "nbytes": 0}
            return {"nbytes": self._rebuild(replace(task, check=True))}

    def _rebuild(self, task: Task) -> int:
        group = task.group
        record = next(record for record in group.records if record.node == task.lost)
        with ExitStack() as stack:
            fresh = {rank.rank: self._blank(group, rank, stack) for rank in record.ranks}

            def store(offset: int, data: memoryview) -> None:
                base = 0
                for rank in record.ranks:
                    start, stop = max(offset, base), min(offset + len(data), base + rank.body_nbytes)
                    if start < stop:
                        fresh[rank.rank].write(start - base, data[start - offset : stop - offset])
                    base += stride(rank)

            self._decode(task, store)
            crash_point("rebuild.decoded")
            for rank in record.ranks:
                _prove(fresh[rank.rank], rank, group)
            with self._lock:
                for rank in record.ranks:
                    self._seal(fresh[rank.rank], rank, group)
                stack.pop_all()
                # Parity that outlived the node's bytes stays where it is: another node may be reading it for a rebuild of its own.
                if task.lost == self._keeper.node and task.lost not in task.with_parity:
                    self._keeper.reprotect.owe(group)
        crash_point("rebuild.checked")
        return record.nbytes

    def _blank(self, group: GroupRecord, rank: RankRecord, stack: ExitStack) -> Slot:
        header = SlotHeader(self._keeper.job, self._keeper.node, rank.rank, group.index, SlotState.FILLING)
        path = self._keeper.memory / slot_name(rank.rank, group.index)
        slot = Slot.blank(path, header, rank.body_nbytes + META_ROOM)
        stack.callback(slot.discard_blank)
        return slot

    def _seal(self, slot: Slot, rank: RankRecord, group: GroupRecord) -> None:
        """From now on the rebuilt slot is what others find under its name. Called with the lock held."""
        name = slot.path.name
        slot.publish(rank.body_nbytes, state=SlotState.COMMITTED, epoch=group.epoch, step=group.step, world=group.world)
        former = self._slots.get(name)
        self._slots[name] = slot
        self._keeper.outlines.forget(name)
        if former is not None:
            former.close()

    def _decoder(self, task: Task) -> Decoder:
        readers = {member.node: self._keeper.reader(member) for member in task.survivors}
        return Decoder(task.group, task.lost, readers, task.with_data, task.with_parity, check=task.check)

    def _decode(self, task: Task, store: Store) -> None:
        """Every block of the lost node's bytes, each from whoever is to decode it; different workers at the same time."""
        shared = workers(task, self._keeper.member, mapped=self._keeper.mapped)
        decoder = self._decoder(task)
        mine: list[tuple[int, int]] = []
        others: dict[int, list[tuple[int, int]]] = {}
        for stripe, kind, base in decoder.blocks():
            if kind == "node":
                worker = shared.get(stripe)
                (mine if worker is None else others.setdefault(worker.node, [])).append((stripe, base))
        members = {member.node: member for member in task.survivors}
        try:
            with ThreadPoolExecutor(max(1, len(others)), "holdfast-repair") as pool:
                under_way = [
                    pool.submit(_fetch, members[node], task, decoder, blocks, store) for node, blocks in others.items()
                ]
                for stripe, base in mine:
                    for offset, data in decoder.whole(stripe):
                        store(base + offset, data)
                for share in under_way:
                    share.result()
        finally:
            decoder.close()


def _fetch(worker: Member, task: Task, decoder: Decoder, blocks: list[tuple[int, int]], store: Store) -> None:
    """Have `worker` decode these blocks, and store what it sends."""
    connection = reach(worker)
    wanted = [(stripe, base, *piece) for stripe, base in blocks for piece in decoder.pieces()]
    scratch = memoryview(bytearray(max(nbytes for *_, nbytes in wanted)))

    def ask(number: int) -> None:
        if number < len(wanted):
            stripe, _, offset, _ = wanted[number]
            connection.send("decode", stripe=stripe, offset=offset)

    try:
        connection.ask("share", task=task.to_json())
        ask(0)
        for number, (_, base, offset, nbytes) in enumerate(wanted):
            ask(number + 1)  # the worker always knows what comes next
            header, data = connection.receive(scratch[:nbytes])
            if len(data) != nbytes or ("crc32c" in header and crc32c(data) != header["crc32c"]):
                raise CorruptData(f"step {task.group.step}: {nbytes} bytes that node {worker.node} decoded arrived damaged")
            store(base + offset, data)
    finally:
        connection.close()


def rotten(member: Member, group: GroupRecord) -> list[str]:
    """The damaged slots of a survivor; raises nothing that reading its bytes would not raise as well."""
    try:
        return list(ask(member, "check", epoch=group.epoch, step=group.step, index=group.index)["damaged"])
    except HoldfastError:
        return []


def _prove(slot: Slot, record: RankRecord, group: GroupRecord) -> None:
    """Every byte that was decoded has the CRC it had when it was captured; only then may the header say so."""
    slot.header = replace(
        slot.header,
        payload_nbytes=record.payload_nbytes,
        meta_nbytes=record.meta_nbytes,
        meta_crc32c=record.meta_crc32c,
    )
    for row in slot.meta().table:
        found = crc32c(slot.body[row.slot_offset : row.slot_offset + row.nbytes])
        if found != row.crc32c:
            raise CorruptData(
                f"step {group.step}, rank {record.rank}, {row.array}: rebuilt bytes have crc32c {found:08x}, expected "
                f"{row.crc32c:08x}; a survivor's memory or the network is damaged"
            )
