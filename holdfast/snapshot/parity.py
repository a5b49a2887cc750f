"""The parities of a stripe: made from its blocks, or from what has changed in them since the last commit.

The first owner of a stripe gathers its k blocks, computes all m parities and hands m-1 on, which moves the fewest bytes that can
be moved: S(n-1)/(n-m) per node. Where little has changed, it takes the committed parity of the last snapshot and adds the
differences only. Either way the result is checked against the CRCs that the bytes had when they were captured.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.coding import ErasureCode, crc32c, crc32c_combine, crc32c_xor, crc32c_zeros
from holdfast.errors import CorruptData, HoldfastError, KeeperUnreachable
from holdfast.snapshot import exchange
from holdfast.snapshot.exchange import (
    Block,
    NodeBytes,
    RowsInFlight,
    SlotReader,
    bytes_of,
    pieces,
    wanted,
    workspace,
)
from holdfast.snapshot.outline import Change, difference, other_name
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.store import row_name
from holdfast.snapshot.view import GroupRecord, stride

logger = logging.getLogger(__name__)

WORTH_CHANGING = 0.5
"""Part of a stripe's bytes up to which differences are sent. Above, the whole blocks cost less than old and new side by side."""

Base = tuple[int, int]
"""(epoch, step) of the committed snapshot that differences are taken against."""

Forward = Callable[[int, int, int, memoryview, Base | None], None]
"""Hand on a piece of parity: (node, row, offset in the block, bytes, base).

With a base the bytes are to be XORed into what the row was in that snapshot, and a piece at the block's end says that it is done.
"""


@dataclass(frozen=True, slots=True)
class Stripe:
    """One stripe: where its data lies, and who keeps its parities."""

    group: GroupRecord
    blocks: tuple[Block, ...]
    owners: tuple[int, ...]
    """Nodes by row."""

    @classmethod
    def of(cls, group: GroupRecord, number: int, readers: Mapping[int, SlotReader]) -> Stripe:
        layout = group.layout
        blocks = (Block(bytes_of(group, p, readers), wanted(group, p, number)[1]) for p in layout.data_nodes(number))
        return cls(group, tuple(blocks), tuple(group.records[place].node for place in layout.parity_owners(number)))

    @property
    def nbytes(self) -> int:
        return self.group.block_nbytes


def encode_stripe(
    group: GroupRecord,
    node: int,
    readers: Mapping[int, SlotReader],
    own: memoryview,
    forward: Forward,
    last: Slot | None = None,
) -> int:
    """Compute all parities of the stripe that `node` owns first: row 0 into `own`, the others handed on; returns row 0's CRC.

    `last` is the node's parity slot of the snapshot before; where it fits and little has changed, only changes are read.
    """
    stripe = Stripe.of(group, group.position(node), readers)
    base = _base(group, last)
    if base is not None and last is not None:
        try:
            changed = _changes(stripe, base)
            if changed is not None:
                return _encode_changes(stripe, changed, own, forward, last, base)
        except KeeperUnreachable:
            raise
        except HoldfastError as error:
            logger.warning("step %d is encoded whole, its differences could not be used: %s", group.step, error)
    return _encode_whole(stripe, own, forward)


# -- whole -----------------------------------------------------------------------------------------------------------------


def encode_row(group: GroupRecord, node: int, row: int, readers: Mapping[int, SlotReader]) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of one of a node's parity rows, made from the data of the group alone; they are good until the next.

    Ends with CorruptData where it does not fit the CRCs that the data had when it was captured: then what came before is void.
    """
    stripe = Stripe.of(group, (group.position(node) - row) % group.layout.stripes, readers)
    for offset, rows in _encoded(stripe, [0] * group.parity):
        yield offset, rows[row]


def _encode_whole(stripe: Stripe, own: memoryview, forward: Forward) -> int:
    crcs = [0] * stripe.group.parity
    for offset, parity in _encoded(stripe, crcs, own):
        for row in range(1, len(parity)):
            forward(stripe.owners[row], row, offset, parity[row], None)
    return crcs[0]


def _encoded(stripe: Stripe, crcs: list[int], own: memoryview | None = None) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, all parities) piece by piece, row 0 in its place in `own` if there is one; their CRCs grow in `crcs`."""
    k, m, size = len(stripe.blocks), stripe.group.parity, stripe.nbytes
    code, piece = ErasureCode(k, m), min(exchange.PIECE_NBYTES, size)
    scratch = workspace(k + m, piece)
    offset = 0
    for data in pieces(stripe.blocks, size, scratch, check=False):
        nbytes = len(data[0])
        parity = [buffer[:nbytes] for buffer in scratch[k:]]
        if own is not None:
            parity[0] = own[offset : offset + nbytes]
        code.encode(data, parity)
        crcs[:] = [crc32c(row, crc) for row, crc in zip(parity, crcs, strict=True)]
        yield offset, parity
        offset += nbytes
    _check(stripe, crcs)


def _check(stripe: Stripe, parity_crcs: list[int]) -> None:
    """The XOR of all fragments is zero, and so the parities' CRCs follow from those that the data had when it was captured.

    That one comparison checks every byte that was read, sent and encoded, for the price of reading the parities.
    """
    size = stripe.nbytes
    expected = [_crc(block, size) for block in stripe.blocks]
    if crc32c_xor(parity_crcs, size) == crc32c_xor(expected, size):
        return
    scratch = [memoryview(bytearray(min(exchange.PIECE_NBYTES, size)))]
    for block, crc in zip(stripe.blocks, expected, strict=True):
        found = 0
        for (data,) in pieces([block], size, scratch, check=False):
            found = crc32c(data, found)
        if found != crc:
            raise CorruptData(
                f"step {stripe.group.step}: a block of node {_node(block)} arrives with crc32c {found:08x} and was captured with "
                f"{crc:08x}; its memory or the network damages data"
            )
    raise CorruptData(
        f"step {stripe.group.step}: parity does not fit its blocks, and they are whole now; memory here is at fault"
    )


def _crc(block: Block, nbytes: int) -> int:
    """CRC of a block as its keeper knows it from the capture; zeros where no slot reaches."""
    value, at = 0, 0
    for place, name, start, count in _node_bytes(block).parts(block.base, nbytes):
        value = _padded(value, place - at)
        value = crc32c_combine(value, _outline(block, name, start, count)["crc"], count)
        at = place + count
    return _padded(value, nbytes - at)


def _padded(value: int, zeros: int) -> int:
    return crc32c_combine(value, crc32c_zeros(zeros), zeros) if zeros else value


# -- by changes ------------------------------------------------------------------------------------------------------------


def _base(group: GroupRecord, last: Slot | None) -> Base | None:
    """The committed snapshot that `last` is the parity of, if it is of this epoch and every byte of it lies where it does now.

    A new epoch may follow a rebuild or a regrouping, and begins with a whole encoding.
    """
    if last is None or last.header.state is not SlotState.COMMITTED:
        return None
    try:
        old = GroupRecord.from_json(json.loads(last.meta().objects["group"]))
    except (HoldfastError, KeyError, ValueError, TypeError):
        return None
    fits = old.epoch == group.epoch and old.index != group.index and _places(old) == _places(group)
    return (old.epoch, old.step) if fits else None


def _places(group: GroupRecord) -> tuple[Any, ...]:
    ranks = tuple((record.node, tuple(rank.rank for rank in record.ranks)) for record in group.records)
    strides = tuple(stride(rank) for record in group.records for rank in record.ranks)
    return group.parity, group.block_nbytes, ranks, strides


@dataclass(frozen=True, slots=True)
class Piece:
    """One changed run of a slot that lies in a block, in part or whole: `offset` is that of its first byte in the block."""

    column: int
    name: str
    change: Change
    offset: int


def _changes(stripe: Stripe, base: Base) -> list[Piece] | None:
    """What of the stripe has changed since `base`; None where somebody cannot tell, or it is too much to be worth it."""
    found: list[Piece] = []
    for column, block in enumerate(stripe.blocks):
        for place, name, start, count in _node_bytes(block).parts(block.base, stripe.nbytes, padding=True):
            told = _outline(block, name, start, count, base)["changed"]
            if told is None:
                return None
            found += [Piece(column, name, Change(*item), place + item[0] - start) for item in told]
    moved = stripe.group.parity * sum(piece.change.nbytes for piece in found)
    return found if moved <= WORTH_CHANGING * stripe.nbytes * len(stripe.blocks) else None


def _encode_changes(stripe: Stripe, changed: list[Piece], own: memoryview, forward: Forward, last: Slot, base: Base) -> int:
    """Row 0 begins as what it was and follows every change; the owners of the other rows do the same with what they are sent."""
    m, size = stripe.group.parity, stripe.nbytes
    code = ErasureCode(len(stripe.blocks), m)
    for offset, data in committed_row(last, 0, size):
        own[offset : offset + len(data)] = data
    for piece in changed:
        delta = _delta(stripe, piece, base)
        start, stop = max(0, piece.offset), min(size, piece.offset + len(delta))
        rows = [memoryview(bytearray(stop - start)) for _ in range(m)]
        code.accumulate(rows, piece.column, delta[start - piece.offset : stop - piece.offset])
        add(own, start, rows[0])
        for row in range(1, m):
            forward(stripe.owners[row], row, start, rows[row], base)
    for row in range(1, m):
        forward(stripe.owners[row], row, size, memoryview(b""), base)
    return crc32c(own)


def _delta(stripe: Stripe, piece: Piece, base: Base) -> memoryview:
    """Old XOR new of a changed run, which has the CRC that follows from what both were when they were captured."""
    group, change = stripe.group, piece.change
    reader = _node_bytes(stripe.blocks[piece.column]).reader
    if reader.mapped:
        new = reader.slot(piece.name, group.epoch, group.step)
        delta = difference(reader.slot(other_name(piece.name), *base), new, change.offset, change.nbytes).data
    else:
        where = {"name": piece.name, "epoch": group.epoch, "step": group.step, "base": base}
        _, delta = reader.ask("difference", **where, offset=change.offset, nbytes=change.nbytes)
    if len(delta) != change.nbytes or crc32c(delta) != change.crc32c:
        raise CorruptData(
            f"step {group.step}: what changed in {piece.name} of node {reader.member.node} at {change.offset} arrives as something "
            "else than was captured"
        )
    return delta


def committed_row(last: Slot, row: int, block_nbytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a row as it was committed. Ends with CorruptData where it no longer has the CRC that it had then."""
    found, base = 0, row * block_nbytes
    for offset in range(0, block_nbytes, exchange.PIECE_NBYTES):
        stop = min(offset + exchange.PIECE_NBYTES, block_nbytes)
        data = bytes(last.body[base + offset : base + stop])
        found = crc32c(data, found)
        yield offset, data
    expected = int(last.meta().objects[row_name(row)], 16)
    if found != expected:
        raise CorruptData(
            f"parity row {row} of step {last.header.step} has crc32c {found:08x} and was sealed with {expected:08x}"
        )


def add(row: memoryview, offset: int, delta: memoryview | bytes) -> None:
    """The row follows a change that starts at `offset`."""
    if len(delta):
        target = np.frombuffer(row, np.uint8, len(delta), offset)
        np.bitwise_xor(target, np.frombuffer(delta, np.uint8), out=target)


def receive_piece(
    view: memoryview, row: int, offset: int, data: memoryview | bytes, rows: RowsInFlight, *, is_change: bool
) -> bool:
    """A piece that a first owner handed on is in its place in `view`, the row; True when that made the last row complete."""
    if not is_change:
        view[offset : offset + len(data)] = data
        return rows.add(row, len(data))
    add(view, offset, data)
    return offset == len(view) and rows.add(row, len(view))


# -- helpers ---------------------------------------------------------------------------------------------------------------


def _node_bytes(block: Block) -> NodeBytes:
    assert isinstance(block.of, NodeBytes)
    return block.of


def _node(block: Block) -> int:
    return _node_bytes(block).reader.member.node


def _outline(block: Block, name: str, start: int, nbytes: int, base: Base | None = None) -> dict[str, Any]:
    source = _node_bytes(block)
    epoch, step = source.epoch, source.step
    where = {"name": name, "epoch": epoch, "step": step, "offset": start, "nbytes": nbytes}
    told: dict[str, Any] = source.reader.ask("outline", **where, base=base)
    return told
