"""The bytes of nodes, near and far: as blocks of stripes, piece by piece; and what a lost node held, rebuilt from them.

A node's bytes are cut into blocks and spread over rotating stripes (RotatingLayout). Keepers on one host read each other's
slots through a mapping; others ask over TCP, the next piece always under way while the last one is worked on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.coding import ErasureCode, crc32c, staggered
from holdfast.errors import CorruptData, MissingData
from holdfast.snapshot.peers import reach
from holdfast.snapshot.slots import Slot
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, stride
from holdfast.snapshot.wire import Connection

PIECE_NBYTES = 8 << 20
"""Bytes moved at a time: over TCP 2 MiB cost a third more processor time, because both sides wake up more often."""


def slot_name(rank: int, index: int) -> str:
    return f"slot-{rank}-{index}"


def parity_name(index: int) -> str:
    return f"parity-{index}"


# -- reading the slots of a node, near or far --------------------------------------------------------------------------


class SlotReader:
    """Reads slot bodies of one node: through a mapping on the same host, else over the wire.

    Not for two threads at once. `close` gives back mappings and the connection.
    """

    def __init__(self, member: Member, *, mapped: bool) -> None:
        self.member, self.mapped = member, mapped
        self._slots: dict[str, Slot] = {}
        self._checked: set[str] = set()
        self._connection: Connection | None = None

    def refresh(self) -> None:
        """Take nothing that was found before for granted.

        Mappings are kept, because touching a peer's pages anew costs as much as reading them.
        """
        self._checked.clear()

    def read(self, name: str, epoch: int, step: int, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        """`nbytes` of the body of slot `name`, which has to hold (epoch, step); the view may be `scratch` or the slot itself."""
        self.start(name, epoch, step, offset, nbytes, check=True)
        return self.finish(name, epoch, step, offset, nbytes, scratch)

    def start(self, name: str, epoch: int, step: int, offset: int, nbytes: int, *, check: bool) -> None:
        """Ask for bytes that `finish` is going to return, and do not wait; with `check` they come with a CRC of their own."""
        if not self.mapped:
            self._connected().send("range", name=name, epoch=epoch, step=step, offset=offset, nbytes=nbytes, check=check)

    def finish(self, name: str, epoch: int, step: int, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        """The bytes of the oldest `start` that has not been finished; `scratch` is where they land when they come by wire."""
        if self.mapped:
            return self.slot(name, epoch, step).body[offset : offset + nbytes]
        header, data = self._connected().receive(scratch[:nbytes])
        if len(data) != nbytes:
            raise CorruptData(f"node {self.member.node} sent {len(data)} bytes of {name} where {nbytes} were asked for")
        if "crc32c" in header and (found := crc32c(data)) != header["crc32c"]:
            raise CorruptData(
                f"{name} of node {self.member.node}: {nbytes} bytes at {offset} arrived with crc32c {found:08x}, were sent with "
                f"{header['crc32c']:08x}; the network damages data"
            )
        return data

    def slot(self, name: str, epoch: int, step: int) -> Slot:
        """The slot itself, mapped; for nodes of this host only."""
        if name not in self._checked:
            slot = self._slots.pop(name, None)
            if slot is not None and not slot.reread():
                slot.close()
                slot = None
            self._slots[name] = slot = slot or Slot.open(Path(self.member.memory) / name)
            check_holds(slot, epoch, step)
            self._checked.add(name)
        return self._slots[name]

    def ask(self, verb: str, **fields: Any) -> Any:
        """A question to the node's keeper, on the connection that `start` uses."""
        return self._connected().ask(verb, **fields)

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = reach(self.member)
        return self._connection

    def close(self) -> None:
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        self._checked.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def check_holds(slot: Slot, epoch: int, step: int) -> None:
    """Refuse bytes of another step: the slot may have been refilled since the reader was told of it."""
    if (slot.header.epoch, slot.header.step) != (epoch, step):
        raise MissingData(
            f"slot {slot.path.name} of node {slot.header.node} holds step {slot.header.step} of epoch {slot.header.epoch}, "
            f"not step {step} of epoch {epoch}"
        )


class NodeBytes:
    """The bytes of one node at one step as a single range, without joining them; zeros past its end."""

    def __init__(self, record: NodeRecord, group: GroupRecord, reader: SlotReader) -> None:
        self._record, self._group, self.reader = record, group, reader
        self.epoch, self.step = group.epoch, group.step

    def piece(self, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        """Bytes [offset, offset + nbytes): a view of one slot where possible, else gathered in `scratch`."""
        self.start(offset, nbytes, check=True)
        return self.finish(offset, nbytes, scratch)

    def start(self, offset: int, nbytes: int, *, check: bool) -> None:
        for _, name, start, count in () if self.reader.mapped else self.parts(offset, nbytes):
            self.reader.start(name, self._group.epoch, self._group.step, start, count, check=check)

    def finish(self, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        parts = list(self.parts(offset, nbytes))
        if len(parts) == 1 and parts[0][3] == nbytes:
            _, name, start, count = parts[0]
            return self._finish(name, start, count, scratch)
        at = 0
        for place, name, start, count in parts:
            _clear(scratch[at:place])
            at = place + count
            data = self._finish(name, start, count, scratch[place:at])
            if self.reader.mapped:  # else they have landed there
                scratch[place:at] = data
        _clear(scratch[at:nbytes])
        return scratch[:nbytes]

    def _finish(self, name: str, start: int, nbytes: int, scratch: memoryview) -> memoryview:
        return self.reader.finish(name, self._group.epoch, self._group.step, start, nbytes, scratch)

    def parts(self, offset: int, nbytes: int, *, padding: bool = False) -> Iterator[tuple[int, str, int, int]]:
        """(place in the piece, slot, offset in its body, bytes) for every slot that the range touches.

        With `padding` a slot reaches as far as its stride: over the zeros that stand for what it may have held before.
        """
        base = 0
        for record in self._record.ranks:
            end = base + (stride(record) if padding else record.body_nbytes)
            start, stop = max(offset, base), min(offset + nbytes, end)
            if start < stop:
                yield start - offset, slot_name(record.rank, self._group.index), start - base, stop - start
            base += stride(record)


def _clear(view: memoryview) -> None:
    if len(view):
        np.frombuffer(view, np.uint8)[:] = 0


class Parity:
    """The parity of one node at one step as a range of bytes, read like `NodeBytes`."""

    def __init__(self, group: GroupRecord, reader: SlotReader) -> None:
        self._where, self._reader = (parity_name(group.index), group.epoch, group.step), reader

    def start(self, offset: int, nbytes: int, *, check: bool) -> None:
        self._reader.start(*self._where, offset, nbytes, check=check)

    def finish(self, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        return self._reader.finish(*self._where, offset, nbytes, scratch)


@dataclass(frozen=True, slots=True)
class Block:
    """One fragment of a stripe: the bytes from `base` on of a node, or of its parity."""

    of: NodeBytes | Parity
    base: int


def pieces(blocks: Sequence[Block], nbytes: int, scratch: Sequence[memoryview], *, check: bool) -> Iterator[list[memoryview]]:
    """All blocks side by side, PIECE_NBYTES at a time. The next piece is under way while the last one is worked on."""

    def start(offset: int) -> None:
        for block in blocks:
            block.of.start(block.base + offset, min(PIECE_NBYTES, nbytes - offset), check=check)

    start(0)
    for offset in range(0, nbytes, PIECE_NBYTES):
        if offset + PIECE_NBYTES < nbytes:
            start(offset + PIECE_NBYTES)
        size = min(PIECE_NBYTES, nbytes - offset)
        yield [block.of.finish(block.base + offset, size, place) for block, place in zip(blocks, scratch, strict=False)]


_local = threading.local()


def workspace(count: int, nbytes: int) -> list[memoryview]:
    """Scratch memory of this thread, kept from call to call: fresh pages would cost more than what is done in them."""
    kept: tuple[tuple[int, int], list[memoryview]] | None = getattr(_local, "scratch", None)
    if kept is None or kept[0] != (count, nbytes):
        kept = _local.scratch = (count, nbytes), [buffer.data for buffer in staggered(count, nbytes)]
    return kept[1]


# -- rebuilding --------------------------------------------------------------------------------------------------------


class Decoder:
    """Recomputes what `node` held, piece by piece, from any k blocks of each stripe.

    `readers` are the survivors by node, `with_data` those of them whose own bytes of this step are whole, `with_parity` those
    whose parity is. With `check` every piece is checked on its way; without, whoever asks checks what comes of them. Raises
    MissingData when a stripe has fewer than k blocks left. Not for two threads at once.
    """

    def __init__(
        self,
        group: GroupRecord,
        node: int,
        readers: Mapping[int, SlotReader],
        with_data: frozenset[int],
        with_parity: frozenset[int],
        *,
        check: bool = True,
    ) -> None:
        if not group.parity:
            raise MissingData(f"step {group.step}: node {node} was kept without parity and cannot be rebuilt")
        self.group, self._readers, self.check = group, readers, check
        self._place, self._with_data, self._with_parity = group.position(node), with_data, with_parity
        self._code = ErasureCode(group.layout.k, group.parity)
        self._scratch = [buffer.data for buffer in staggered(group.layout.k + 1, min(PIECE_NBYTES, group.block_nbytes))]

    def blocks(self) -> Iterator[tuple[int, str, int]]:
        """What the node held: (stripe, "node" or "parity", offset in its bytes or parity) of every block."""
        for stripe in range(self.group.layout.stripes):
            _, base, kind = wanted(self.group, self._place, stripe)
            yield stripe, kind, base

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of every piece of a block."""
        size = self.group.block_nbytes
        return ((offset, min(PIECE_NBYTES, size - offset)) for offset in range(0, size, PIECE_NBYTES))

    def decode(self, stripe: int, offset: int, nbytes: int) -> memoryview:
        """Bytes of the node's block in `stripe`; the view is overwritten by the next call."""
        column, sources = wanted(self.group, self._place, stripe)[0], self._sources(stripe)
        return self._reconstruct(column, self._read(sources, offset, nbytes))

    def whole(self, stripe: int) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of the node's whole block in `stripe`, the sources of the next piece always under way; to be used up."""
        column, sources = wanted(self.group, self._place, stripe)[0], self._sources(stripe)
        offset = 0
        with self._hanging_up():
            for data in pieces(list(sources.values()), self.group.block_nbytes, self._scratch, check=self.check):
                out = self._reconstruct(column, dict(zip(sources, data, strict=True)))
                yield offset, out
                offset += len(out)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _sources(self, stripe: int) -> dict[int, Block]:
        layout = self.group.layout
        found = _sources(self.group, stripe, self._place, self._readers, self._with_data, self._with_parity)
        if len(found) < layout.k:
            raise MissingData(
                f"step {self.group.step}: stripe {stripe} has {len(found)} of the {layout.k} blocks that rebuilding needs"
            )
        return dict(list(found.items())[: layout.k])

    def _read(self, sources: Mapping[int, Block], offset: int, nbytes: int) -> dict[int, memoryview]:
        """The same piece of each source, all of them asked for before the first is waited for."""
        with self._hanging_up():
            for block in sources.values():
                block.of.start(block.base + offset, nbytes, check=self.check)
            return {
                index: block.of.finish(block.base + offset, nbytes, self._scratch[place])
                for place, (index, block) in enumerate(sources.items())
            }

    @contextmanager
    def _hanging_up(self) -> Iterator[None]:
        """After a failure answers may still be on their way; nobody may take them for those to a later question."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _reconstruct(self, index: int, have: Mapping[int, memoryview]) -> memoryview:
        out = self._scratch[-1][: len(next(iter(have.values())))]
        self._code.reconstruct(have, {index: out})
        return out


def wanted(group: GroupRecord, place: int, stripe: int) -> tuple[int, int, str]:
    """Which fragment of the stripe this position holds: (code index, offset in its bytes, kind)."""
    layout = group.layout
    column, block = layout.column(place, stripe), layout.block(place, stripe)
    if column is not None and block is not None:
        return column, block * group.block_nbytes, "node"
    row = layout.parity_owners(stripe).index(place)
    return layout.k + row, row * group.block_nbytes, "parity"


def _sources(
    group: GroupRecord,
    stripe: int,
    without: int,
    readers: Mapping[int, SlotReader],
    with_data: frozenset[int],
    with_parity: frozenset[int],
) -> dict[int, Block]:
    """Every fragment of the stripe that a survivor holds, by code index."""
    layout = group.layout
    found: dict[int, Block] = {}
    for place in range(layout.n):
        node = group.records[place].node
        if place == without or node not in readers:
            continue
        index, base, kind = wanted(group, place, stripe)
        if kind == "node" and node in with_data:
            found[index] = Block(bytes_of(group, place, readers), base)
        elif kind == "parity" and node in with_parity:
            found[index] = Block(Parity(group, readers[node]), base)
    return found


def bytes_of(group: GroupRecord, place: int, readers: Mapping[int, SlotReader]) -> NodeBytes:
    record = group.records[place]
    return NodeBytes(record, group, readers[record.node])


# -- a counter of what has arrived -------------------------------------------------------------------------------------


class RowsInFlight:
    """Which parity rows of a step are complete; pieces may come from several threads, each byte once."""

    def __init__(self, rows: int, block_nbytes: int) -> None:
        self._missing = dict.fromkeys(range(rows), block_nbytes)
        self._adopted: set[int] = set()
        self._lock = threading.Lock()
        self.crcs: dict[int, int] = {}
        """The CRC of a row, where it was made from the row's bytes as they were computed."""

    def adopt(self, row: int) -> bool:
        """True the first time: the row is about to begin as what it was in the last snapshot."""
        with self._lock:
            fresh = row not in self._adopted
            self._adopted.add(row)
            return fresh

    def add(self, row: int, nbytes: int) -> bool:
        """Note `nbytes` of a row; True when that made the last row complete."""
        with self._lock:
            if row not in self._missing:
                return False
            self._missing[row] -= nbytes
            if self._missing[row] <= 0:
                del self._missing[row]
            return not self._missing
