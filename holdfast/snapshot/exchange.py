"""Parity over nodes: pull the blocks of a stripe, encode them, hand the parities on; and rebuild what a lost node held.

A node's bytes are cut into blocks and spread over rotating stripes (RotatingLayout). The first owner of a stripe pulls its
k blocks and computes all m parities, handing m-1 on, which moves the fewest bytes that can be moved: S(n-1)/(n-m) per node.
Keepers on one host read each other's slots through a mapping; others ask over TCP, with a CRC on every piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.coding import ErasureCode, crc32c, staggered
from holdfast.errors import CorruptData, MissingData
from holdfast.snapshot.slots import Slot
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, stride
from holdfast.snapshot.wire import Connection

PIECE_NBYTES = 1 << 20
"""Bytes moved at a time: below 256 KiB the cost of a call shows, above 4 MiB the data has left the cache before encoding."""


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
        self.member, self._mapped = member, mapped
        self._slots: dict[str, Slot] = {}
        self._connection: Connection | None = None

    def read(self, name: str, epoch: int, step: int, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        """`nbytes` of the body of slot `name`, which has to hold (epoch, step); the view may be `scratch` or the slot itself."""
        if self._mapped:
            slot = self._slots.get(name)
            if slot is None:
                slot = self._slots[name] = Slot.open(Path(self.member.memory) / name)
                check_holds(slot, epoch, step)
            return slot.body[offset : offset + nbytes]
        header, data = self._ask(name=name, epoch=epoch, step=step, offset=offset, nbytes=nbytes, out=scratch[:nbytes])
        found = crc32c(data)
        if found != header["crc32c"]:
            raise CorruptData(
                f"{name} of node {self.member.node}: {nbytes} bytes at {offset} arrived with crc32c {found:08x}, were sent with "
                f"{header['crc32c']:08x}; the network damages data"
            )
        return data

    def _ask(self, **fields: Any) -> tuple[dict[str, Any], memoryview]:
        if self._connection is None:
            self._connection = Connection((self.member.address, self.member.port), self.member.token)
        return self._connection.ask("range", **fields)  # type: ignore[no-any-return]

    def close(self) -> None:
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
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
        self._record, self._group, self._reader = record, group, reader

    def piece(self, offset: int, nbytes: int, scratch: memoryview) -> memoryview:
        """Bytes [offset, offset + nbytes): a view of one slot where possible, else gathered in `scratch`."""
        parts = list(self._parts(offset, nbytes))
        if len(parts) == 1 and parts[0][3] == nbytes:
            _, name, start, count = parts[0]
            return self._read(name, start, count, scratch)
        out = scratch[:nbytes]
        out[:] = bytes(nbytes)
        spare = memoryview(bytearray(nbytes))
        for place, name, start, count in parts:
            out[place : place + count] = self._read(name, start, count, spare)
        return out

    def _read(self, name: str, start: int, nbytes: int, scratch: memoryview) -> memoryview:
        return self._reader.read(name, self._group.epoch, self._group.step, start, nbytes, scratch)

    def _parts(self, offset: int, nbytes: int) -> Iterator[tuple[int, str, int, int]]:
        """(place in the piece, slot, offset in its body, bytes) for every slot that the range touches."""
        base = 0
        for record in self._record.ranks:
            start, stop = max(offset, base), min(offset + nbytes, base + record.body_nbytes)
            if start < stop:
                yield start - offset, slot_name(record.rank, self._group.index), start - base, stop - start
            base += stride(record)


# -- encoding ----------------------------------------------------------------------------------------------------------

Forward = Callable[[int, int, int, memoryview], None]
"""Hand on a piece of parity: (node, row, offset in the block, bytes)."""


def encode_stripe(group: GroupRecord, node: int, readers: Mapping[int, SlotReader], own: memoryview, forward: Forward) -> None:
    """Compute all parities of the stripe that `node` owns first: row 0 into `own`, the others handed on piece by piece."""
    layout, size = group.layout, group.block_nbytes
    stripe = group.position(node)
    owners = layout.parity_owners(stripe)
    sources = [(_bytes_of(group, place, readers), _wanted(group, place, stripe)[1]) for place in layout.data_nodes(stripe)]
    code = ErasureCode(layout.k, group.parity)
    scratch = [buffer.data for buffer in staggered(layout.k + group.parity, min(PIECE_NBYTES, size))]
    for offset in range(0, size, PIECE_NBYTES):
        nbytes = min(PIECE_NBYTES, size - offset)
        data = [source.piece(base + offset, nbytes, scratch[i]) for i, (source, base) in enumerate(sources)]
        parity = [own[offset : offset + nbytes], *(buffer[:nbytes] for buffer in scratch[layout.k + 1 :])]
        code.encode(data, parity)
        for row in range(1, group.parity):
            forward(group.records[owners[row]].node, row, offset, parity[row])


# -- rebuilding --------------------------------------------------------------------------------------------------------


class Decoder:
    """Recomputes what `node` held, piece by piece, from any k blocks of each stripe.

    `readers` are the survivors by node, `with_data` those of them whose own bytes of this step are whole, `with_parity` those
    whose parity is. Raises MissingData when a stripe has fewer than k blocks left. Not for two threads at once.
    """

    def __init__(
        self,
        group: GroupRecord,
        node: int,
        readers: Mapping[int, SlotReader],
        with_data: frozenset[int],
        with_parity: frozenset[int],
    ) -> None:
        if not group.parity:
            raise MissingData(f"step {group.step}: node {node} was kept without parity and cannot be rebuilt")
        self.group, self._readers = group, readers
        self._place, self._with_data, self._with_parity = group.position(node), with_data, with_parity
        self._code = ErasureCode(group.layout.k, group.parity)
        self._scratch = [buffer.data for buffer in staggered(group.layout.k + 1, min(PIECE_NBYTES, group.block_nbytes))]

    def blocks(self) -> Iterator[tuple[int, str, int]]:
        """What the node held: (stripe, "node" or "parity", offset in its bytes or parity) of every block."""
        for stripe in range(self.group.layout.stripes):
            _, base, kind = _wanted(self.group, self._place, stripe)
            yield stripe, kind, base

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of every piece of a block."""
        size = self.group.block_nbytes
        return ((offset, min(PIECE_NBYTES, size - offset)) for offset in range(0, size, PIECE_NBYTES))

    def decode(self, stripe: int, offset: int, nbytes: int) -> memoryview:
        """Bytes of the node's block in `stripe`; the view is overwritten by the next call."""
        column = _wanted(self.group, self._place, stripe)[0]
        return self._reconstruct(stripe, column, self._sources(stripe), offset, nbytes)

    def contradicts(self, stripe: int, offset: int, nbytes: int, rebuilt: memoryview) -> bool:
        """The rebuilt bytes, used as a source themselves, do not give back a block that a survivor holds."""
        column = _wanted(self.group, self._place, stripe)[0]
        sources = self._sources(stripe)
        tested, read = sources.popitem()
        sources = {column: lambda offset, nbytes, scratch: rebuilt, **sources}
        expected = bytes(read(offset, nbytes, memoryview(bytearray(nbytes))))
        return bytes(self._reconstruct(stripe, tested, sources, offset, nbytes)) != expected

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _sources(self, stripe: int) -> dict[int, Read]:
        layout = self.group.layout
        found = _sources(self.group, stripe, self._place, self._readers, self._with_data, self._with_parity)
        if len(found) < layout.k:
            raise MissingData(
                f"step {self.group.step}: stripe {stripe} has {len(found)} of the {layout.k} blocks that rebuilding needs"
            )
        return dict(list(found.items())[: layout.k])

    def _reconstruct(self, stripe: int, wanted: int, sources: Mapping[int, Read], offset: int, nbytes: int) -> memoryview:
        out = self._scratch[-1][:nbytes]
        chosen = list(sources.items())[: self.group.layout.k]
        have = {index: read(offset, nbytes, self._scratch[place]) for place, (index, read) in enumerate(chosen)}
        self._code.reconstruct(have, {wanted: out})
        return out


def _wanted(group: GroupRecord, place: int, stripe: int) -> tuple[int, int, str]:
    """Which fragment of the stripe this position holds: (code index, offset in its bytes, kind)."""
    layout = group.layout
    column, block = layout.column(place, stripe), layout.block(place, stripe)
    if column is not None and block is not None:
        return column, block * group.block_nbytes, "node"
    row = layout.parity_owners(stripe).index(place)
    return layout.k + row, row * group.block_nbytes, "parity"


Read = Callable[[int, int, memoryview], memoryview]


def _sources(
    group: GroupRecord,
    stripe: int,
    without: int,
    readers: Mapping[int, SlotReader],
    with_data: frozenset[int],
    with_parity: frozenset[int],
) -> dict[int, Read]:
    """Every fragment of the stripe that a survivor holds, by code index, as a function that reads a piece of it."""
    layout = group.layout
    found: dict[int, Read] = {}
    for place in range(layout.n):
        node = group.records[place].node
        if place == without or node not in readers:
            continue
        index, base, kind = _wanted(group, place, stripe)
        if kind == "node" and node in with_data:
            found[index] = _node_piece(_bytes_of(group, place, readers), base)
        elif kind == "parity" and node in with_parity:
            found[index] = _parity_piece(group, readers[node], base)
    return found


def _node_piece(source: NodeBytes, base: int) -> Read:
    return lambda offset, nbytes, scratch: source.piece(base + offset, nbytes, scratch)


def _parity_piece(group: GroupRecord, reader: SlotReader, base: int) -> Read:
    name = parity_name(group.index)
    return lambda offset, nbytes, scratch: reader.read(name, group.epoch, group.step, base + offset, nbytes, scratch)


def _bytes_of(group: GroupRecord, place: int, readers: Mapping[int, SlotReader]) -> NodeBytes:
    record = group.records[place]
    return NodeBytes(record, group, readers[record.node])


# -- a counter of what has arrived -------------------------------------------------------------------------------------


class RowsInFlight:
    """Which parity rows of a step are complete; pieces may come from several threads, each byte once."""

    def __init__(self, rows: int, block_nbytes: int) -> None:
        self._missing = dict.fromkeys(range(rows), block_nbytes)
        self._lock = threading.Lock()

    def add(self, row: int, nbytes: int) -> bool:
        """Note `nbytes` of a row; True when that made the last row complete."""
        with self._lock:
            if row not in self._missing:
                return False
            self._missing[row] -= nbytes
            if self._missing[row] <= 0:
                del self._missing[row]
            return not self._missing
