"""A lost node's bytes and parity, recomputed from its group into slots of this keeper, and believed only when they are proved.

The survivors share the work where the network is between them: each decodes the stripes it is given and sends only what was lost,
so what comes in here is what was lost and not k times as much. On one host every slot can be mapped, and decoding happens here.

Rebuilt data has to have the CRCs it was captured with. Parity has none of its own that outlived it, so every survivor proves its
slots and parity rows against their CRCs, what is written is read back, and a piece of each row has to decode to what a survivor
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.coding import crc32c
from holdfast.errors import CorruptData, HoldfastError
from holdfast.events import crash_point
from holdfast.snapshot.exchange import Decoder, parity_name, slot_name
from holdfast.snapshot.slots import Slot, SlotHeader, SlotState
from holdfast.snapshot.store import META_ROOM
from holdfast.snapshot.view import GroupRecord, Member, RankRecord, stride
from holdfast.snapshot.wire import Connection, Header, Reply

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper


@dataclass(frozen=True, slots=True)
class Task:
    """Recompute what `lost` held at the group's step from these nodes' data and parity."""

    group: GroupRecord
    lost: int
    survivors: tuple[Member, ...]
    with_data: frozenset[int]
    with_parity: frozenset[int]

    @classmethod
    def from_json(cls, fields: Header) -> Task:
        return cls(
            GroupRecord.from_json(fields["group"]),
            fields["lost"],
            tuple(Member.from_json(member) for member in fields["survivors"]),
            frozenset(fields["with_data"]),
            frozenset(fields["with_parity"]),
        )

    def to_json(self) -> Header:
        return {
            "group": self.group.to_json(),
            "lost": self.lost,
            "survivors": [member.to_json() for member in self.survivors],
            "with_data": sorted(self.with_data),
            "with_parity": sorted(self.with_parity),
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


class Repair:
    """The verbs of a rebuild: doing one, and doing a share of another keeper's."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._slots, self._lock = keeper, keeper.slots, keeper.lock
        self._shares: dict[int, Decoder] = {}

    # -- a share of another keeper's rebuild --

    def verb_check(self, epoch: int, step: int, index: int) -> Header:
        """Which slots of this node have rotted since they were sealed; reads every byte of that step."""
        return {"damaged": self._slots.damaged(epoch, step, index)}

    def verb_share(self, task: Header, connection: int) -> None:
        """Over this connection, pieces of the task will be asked for."""
        self._shares[connection] = self._decoder(Task.from_json(task))

    def verb_decode(self, stripe: int, offset: int, nbytes: int, connection: int) -> Reply:
        data = self._shares[connection].decode(stripe, offset, nbytes)
        return {"crc32c": crc32c(data)}, data

    def disconnected(self, connection: int) -> None:
        share = self._shares.pop(connection, None)
        if share is not None:
            share.close()

    # -- a rebuild --

    def verb_rebuild(
        self, group: Header, lost: int, survivors: list[Header], with_data: list[int], with_parity: list[int]
    ) -> Header:
        """Recompute what node `lost` held, into slots of this keeper. Blocks until every byte is proved and sealed.

        The answer names the survivors whose memory turned out damaged (`damaged`); then nothing is sealed.
        """
        fields = {"group": group, "lost": lost, "survivors": survivors, "with_data": with_data, "with_parity": with_parity}
        task = Task.from_json(fields)
        with ThreadPoolExecutor(max(1, len(task.survivors)), "holdfast-check") as pool:
            checks = {member.node: pool.submit(_check, member, task.group) for member in task.survivors}
            problem = ""
            try:
                nbytes = self._rebuild(task, lambda: [node for node, found in checks.items() if found.result()])
            except CorruptData as error:
                problem = str(error)
            damaged = {node: found.result() for node, found in checks.items() if found.result()}
        if problem and not damaged:
            raise CorruptData(problem)
        if damaged:
            return {"damaged": {str(node): names for node, names in damaged.items()}, "nbytes": 0}
        return {"nbytes": nbytes}

    def _rebuild(self, task: Task, find_damage: Callable[[], list[int]]) -> int:
        group = task.group
        record = next(record for record in group.records if record.node == task.lost)
        # Parity that outlived the node's bytes stays where it is: another node may be reading it for a rebuild of its own.
        parity_too = task.lost == self._keeper.node and task.lost not in task.with_parity
        fresh = self._fresh_slots(group, record.ranks, parity_too=parity_too)
        sums: dict[int, int] = {}

        def store(kind: str, offset: int, data: memoryview) -> None:
            if kind == "parity":
                fresh[parity_name(group.index)].body[offset : offset + len(data)] = data
                sums[offset] = crc32c(data)
                return
            base = 0
            for rank in record.ranks:
                start, stop = max(offset, base), min(offset + len(data), base + rank.body_nbytes)
                if start < stop:
                    slot = fresh[slot_name(rank.rank, group.index)]
                    slot.body[start - base : stop - base] = data[start - offset : stop - offset]
                base += stride(rank)

        decoder = self._decoder(task)
        try:
            self._decode(task, decoder, store, parity_too=parity_too)
            crash_point("rebuild.decoded")
            if find_damage():
                return 0  # what was made of damaged bytes is worth nothing, whatever its CRCs say
            for rank in record.ranks:
                _prove_data(fresh[slot_name(rank.rank, group.index)], rank, group)
            if parity_too:
                _prove_parity(fresh[parity_name(group.index)], decoder, sums, group)
        finally:
            decoder.close()
        with self._lock:
            for rank in record.ranks:
                slot = fresh[slot_name(rank.rank, group.index)]
                slot.update(state=SlotState.COMMITTED, epoch=group.epoch, step=group.step, world=group.world)
            if parity_too:
                self._slots.seal_parity(group, SlotState.COMMITTED)
        crash_point("rebuild.checked")
        return record.nbytes

    def _fresh_slots(self, group: GroupRecord, ranks: Sequence[RankRecord], *, parity_too: bool) -> dict[str, Slot]:
        wanted = {slot_name(rank.rank, group.index): (rank.rank, rank.body_nbytes) for rank in ranks}
        if parity_too:
            wanted[parity_name(group.index)] = (-1, group.parity * group.block_nbytes)
        with self._lock:
            for name, (rank, nbytes) in wanted.items():
                header = SlotHeader(self._keeper.job, self._keeper.node, rank, group.index, SlotState.FILLING)
                self._slots[name] = Slot.create(self._keeper.memory / name, header, nbytes + META_ROOM)
                self._keeper.outlines.forget(name)
            return {name: self._slots[name] for name in wanted}

    def _decoder(self, task: Task) -> Decoder:
        readers = {member.node: self._keeper.reader(member) for member in task.survivors}
        return Decoder(task.group, task.lost, readers, task.with_data, task.with_parity)

    def _decode(self, task: Task, decoder: Decoder, store: Callable[[str, int, memoryview], None], *, parity_too: bool) -> None:
        """Every block of the lost node, each from whoever is to decode it; different workers at the same time."""
        shared = workers(task, self._keeper.member, mapped=self._keeper.mapped)
        mine: list[tuple[int, str, int]] = []
        others: dict[int, list[tuple[int, str, int]]] = {}
        for stripe, kind, base in decoder.blocks():
            if kind == "node" or parity_too:
                worker = shared.get(stripe)
                (mine if worker is None else others.setdefault(worker.node, [])).append((stripe, kind, base))
        members = {member.node: member for member in task.survivors}
        with ThreadPoolExecutor(max(1, len(others)), "holdfast-repair") as pool:
            under_way = [pool.submit(_fetch, members[node], task, decoder, blocks, store) for node, blocks in others.items()]
            for stripe, kind, base in mine:
                for offset, data in decoder.whole(stripe):
                    store(kind, base + offset, data)
            for share in under_way:
                share.result()


def _fetch(
    worker: Member,
    task: Task,
    decoder: Decoder,
    blocks: list[tuple[int, str, int]],
    store: Callable[[str, int, memoryview], None],
) -> None:
    """Have `worker` decode these blocks, and store what it sends."""
    connection = Connection((worker.address, worker.port), worker.token)
    wanted = [(stripe, kind, base, *piece) for stripe, kind, base in blocks for piece in decoder.pieces()]
    scratch = memoryview(bytearray(max(nbytes for *_, nbytes in wanted)))

    def ask(number: int) -> None:
        if number < len(wanted):
            stripe, _, _, offset, nbytes = wanted[number]
            connection.send("decode", stripe=stripe, offset=offset, nbytes=nbytes)

    try:
        connection.ask("share", task=task.to_json())
        ask(0)
        for number, (_, kind, base, offset, nbytes) in enumerate(wanted):
            ask(number + 1)  # the worker always knows what comes next
            header, data = connection.receive(scratch[:nbytes])
            if len(data) != nbytes or crc32c(data) != header["crc32c"]:
                raise CorruptData(f"step {task.group.step}: {nbytes} bytes that node {worker.node} decoded arrived damaged")
            store(kind, base + offset, data)
    finally:
        connection.close()


def _check(member: Member, group: GroupRecord) -> list[str]:
    """The damaged slots of a survivor; raises nothing that reading its bytes would not raise as well."""
    try:
        connection = Connection((member.address, member.port), member.token, timeout_s=600)
        try:
            return list(connection.ask("check", epoch=group.epoch, step=group.step, index=group.index)["damaged"])
        finally:
            connection.close()
    except HoldfastError:
        return []


def _prove_data(slot: Slot, record: RankRecord, group: GroupRecord) -> None:
    """Every byte that was decoded has the CRC it had when it was captured; only then may the header say so."""
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


def _prove_parity(slot: Slot, decoder: Decoder, sums: Mapping[int, int], group: GroupRecord) -> None:
    """What was computed is what is in the slot, and a piece of every row decodes to what a survivor holds."""
    pieces = list(decoder.pieces())
    for stripe, kind, base in decoder.blocks():
        if kind != "parity":
            continue
        for offset, nbytes in pieces:
            found = crc32c(slot.body[base + offset : base + offset + nbytes])
            if found != sums[base + offset]:
                raise CorruptData(
                    f"step {group.step}: parity at {base + offset} of {slot.path.name} was computed with crc32c "
                    f"{sums[base + offset]:08x} and is read back with {found:08x}; this memory is damaged"
                )
        offset, nbytes = pieces[group.step % len(pieces)]
        if decoder.contradicts(stripe, offset, nbytes, slot.body[base + offset : base + offset + nbytes]):
            raise CorruptData(f"step {group.step}: rebuilt parity of stripe {stripe} does not decode to what a survivor holds")
