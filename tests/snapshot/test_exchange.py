"""Parity over real slots: whatever m nodes of a group are lost, their bytes come back, near or over the network."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.coding import crc32c
from holdfast.errors import CorruptData, MissingData
from holdfast.snapshot import exchange
from holdfast.snapshot.birth import host_identity
from holdfast.snapshot.exchange import (
    Decoder,
    NodeBytes,
    RowsInFlight,
    SlotReader,
    check_holds,
    parity_name,
    slot_name,
)
from holdfast.snapshot.outline import Outlines
from holdfast.snapshot.parity import encode_stripe
from holdfast.snapshot.slots import Slot, SlotHeader, SlotState
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, RankRecord, stride
from holdfast.snapshot.wire import FileRange, Header, Server

EPOCH, STEP, INDEX = 3, 40, 1
TOKEN = "t"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several pieces, the last one short, without large slots."""
    monkeypatch.setattr(exchange, "PIECE_NBYTES", 1000)


def rebuild_blocks(
    record: GroupRecord,
    node: int,
    readers: dict[int, SlotReader],
    with_data: frozenset[int],
    with_parity: frozenset[int],
    store: Callable[[str, int, memoryview], None],
    *,
    parity_too: bool,
) -> None:
    """Every block of the node, once as a keeper decodes them alone, and piece by piece as it decodes a share for another."""
    decoder = Decoder(record, node, readers, with_data, with_parity)
    for stripe, kind, base in decoder.blocks():
        if parity_too or kind == "node":
            whole = {offset: bytes(data) for offset, data in decoder.whole(stripe)}
            for offset, nbytes in decoder.pieces():
                assert decoder.decode(stripe, offset, nbytes) == whole[offset]
                store(kind, base + offset, memoryview(whole[offset]))


class Group:
    """Nodes with real slot files, filled with random bytes, and their parity once `encode` has run."""

    def __init__(self, place: Path, sizes: list[list[int]], parity: int) -> None:
        generator = np.random.default_rng(len(sizes) * 10 + parity)
        self.slots: dict[int, dict[str, Slot]] = {}
        self.members: list[Member] = []
        self.damage, self.servers = 0, []
        records = []
        for position, ranks in enumerate(sizes):
            node = 2 * position + 1  # numbers and positions are different things
            memory = place / f"node-{node}"
            memory.mkdir(parents=True)
            slots, rank_records = {}, []
            for local, nbytes in enumerate(ranks):
                rank = 10 * node + local
                slot = self.slot(memory / slot_name(rank, INDEX), node, rank, nbytes)
                slot.body[:nbytes] = generator.integers(0, 256, nbytes, np.uint8).tobytes()
                slots[slot.path.name] = slot
                rank_records.append(RankRecord(rank, nbytes, 0, 0, nbytes))
            self.slots[node] = slots
            listener = socket.create_server(("127.0.0.1", 0))
            self.servers.append(Server([listener], TOKEN, self.answer(slots)))
            self.members.append(Member(node, "here", "127.0.0.1", listener.getsockname()[1], TOKEN, str(memory), ()))
            records.append(NodeRecord(node, tuple(rank_records)))
        self.record = GroupRecord(EPOCH, STEP, INDEX, sum(map(len, sizes)), parity, tuple(records))
        for member in self.members:
            size = self.record.parity * self.record.block_nbytes
            slot = self.slot(Path(member.memory) / parity_name(INDEX), member.node, -1, size)
            self.slots[member.node][parity_name(INDEX)] = slot

    def answer(self, slots: dict[str, Slot]) -> Any:
        """What keepers answer each other while they make parity and rebuild."""
        outlines = Outlines(slots)

        def handle(verb: str, fields: Header, payload: memoryview) -> Any:
            slot, offset, nbytes = slots[fields["name"]], fields["offset"], fields["nbytes"]
            check_holds(slot, fields["epoch"], fields["step"])
            data = slot.body[offset : offset + nbytes]
            if verb == "outline":
                return outlines.answer(slot, offset, nbytes, None)
            assert verb == "range"
            return {"crc32c": crc32c(data) ^ self.damage} if fields["check"] else {}, FileRange(
                *slot.file_range(offset, nbytes)
            )

        return handle

    @staticmethod
    def slot(path: Path, node: int, rank: int, nbytes: int) -> Slot:
        slot = Slot.create(path, SlotHeader("job", node, rank, INDEX), max(1, nbytes))
        slot.update(state=SlotState.ENCODED, epoch=EPOCH, step=STEP)
        return slot

    def readers(self, nodes: list[int], *, mapped: bool = True) -> dict[int, SlotReader]:
        return {member.node: SlotReader(member, mapped=mapped) for member in self.members if member.node in nodes}

    @property
    def nodes(self) -> list[int]:
        return [member.node for member in self.members]

    def encode(self, *, mapped: bool = True) -> None:
        size = self.record.block_nbytes

        def forward(node: int, row: int, offset: int, data: memoryview, base: Any) -> None:
            assert base is None
            start = row * size + offset
            self.slots[node][parity_name(INDEX)].body[start : start + len(data)] = data

        for node in self.nodes:
            readers = self.readers(self.nodes, mapped=mapped)
            encode_stripe(self.record, node, readers, self.slots[node][parity_name(INDEX)].body[:size], forward)
            close(readers)

    def rebuild(self, lost: int, survivors: list[int], *, mapped: bool = True, parity_too: bool = True) -> dict[str, bytes]:
        record = self.record.records[self.record.position(lost)]
        layout, size = self.record.layout, self.record.block_nbytes
        out = {"node": bytearray(layout.k * size), "parity": bytearray(self.record.parity * size)}

        def store(kind: str, offset: int, data: memoryview) -> None:
            out[kind][offset : offset + len(data)] = data

        readers = self.readers(survivors, mapped=mapped)
        try:
            rebuild_blocks(self.record, lost, readers, frozenset(survivors), frozenset(survivors), store, parity_too=parity_too)
        finally:
            close(readers)
        assert not any(out["node"][record.nbytes :]), "nothing but zeros lies behind the node's bytes"
        return {kind: bytes(data) for kind, data in out.items()}

    def expected(self, node: int) -> dict[str, bytes]:
        record, data = self.record.records[self.record.position(node)], b""
        for rank in record.ranks:
            body = bytes(self.slots[node][slot_name(rank.rank, INDEX)].body[: rank.body_nbytes])
            data += body.ljust(stride(rank), b"\0")
        length = self.record.layout.k * self.record.block_nbytes
        parity = self.slots[node][parity_name(INDEX)].body[: self.record.parity * self.record.block_nbytes]
        return {"node": data.ljust(length, b"\0"), "parity": bytes(parity)}

    def close(self) -> None:
        for server in self.servers:
            server.close()
        for slots in self.slots.values():
            for slot in slots.values():
                slot.close()


def close(readers: dict[int, SlotReader]) -> None:
    for reader in readers.values():
        reader.close()


def sizes_of(n: int, seed: int) -> list[list[int]]:
    """Uneven nodes of one to three ranks, one of them of a single byte; block ends fall within ranks and between them."""
    chance = random.Random(seed)
    sizes = [[chance.choice([1, 63, 64, 65, 1000, 4097]) + chance.randrange(3000) for _ in range(1 + i % 3)] for i in range(n)]
    sizes[-1] = [1]
    return sizes


SHAPES = [(n, m) for n in range(2, 7) for m in range(1, 4) if m < n]


@contextmanager
def group_of(place: Path, sizes: list[list[int]], parity: int) -> Iterator[Group]:
    group = Group(place, sizes, parity)
    try:
        yield group
    finally:
        group.close()


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_any_loss_of_at_most_m_nodes_is_rebuilt_byte_for_byte(tmp_path: Path, n: int, m: int) -> None:
    with group_of(tmp_path, sizes_of(n, seed=n * m), m) as group:
        group.encode()
        for count in range(1, m + 1):
            for lost in combinations(group.nodes, count):
                survivors = [node for node in group.nodes if node not in lost]
                for node in lost:
                    assert group.rebuild(node, survivors) == group.expected(node), f"{node} of {lost}"


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_the_loss_of_more_than_m_nodes_is_said(tmp_path: Path, n: int, m: int) -> None:
    with group_of(tmp_path, sizes_of(n, seed=1), m) as group:
        group.encode()
        for lost in combinations(group.nodes, m + 1):
            survivors = [node for node in group.nodes if node not in lost]
            with pytest.raises(MissingData, match=r"step 40: stripe \d has \d of the \d blocks"):
                group.rebuild(lost[0], survivors)


def test_a_group_without_parity_rebuilds_nothing_and_says_so(tmp_path: Path) -> None:
    with group_of(tmp_path, sizes_of(3, seed=1), 0) as group, pytest.raises(MissingData):
        group.rebuild(1, [3, 5], parity_too=False)


def test_survivors_without_parity_count_for_their_own_bytes_only(tmp_path: Path) -> None:
    with group_of(tmp_path, sizes_of(4, seed=2), 2) as group:
        group.encode()
        readers = group.readers([1, 3, 5])
        found = bytearray(group.record.layout.k * group.record.block_nbytes)

        def store(kind: str, offset: int, data: memoryview) -> None:
            found[offset : offset + len(data)] = data

        everybody = frozenset({1, 3, 5})
        rebuild_blocks(group.record, 7, readers, everybody, frozenset({1, 3}), store, parity_too=False)
        assert bytes(found) == group.expected(7)["node"]
        with pytest.raises(MissingData):
            rebuild_blocks(group.record, 7, readers, everybody, frozenset(), store, parity_too=False)
        close(readers)


def test_survivors_that_lost_their_own_bytes_still_give_their_parity(tmp_path: Path) -> None:
    with group_of(tmp_path, sizes_of(4, seed=2), 2) as group:
        group.encode()
        group.slots[5][slot_name(20 * 2 + 10, INDEX)].update(state=SlotState.FILLING, step=0)
        readers = group.readers([1, 3, 5])
        found = bytearray(group.record.layout.k * group.record.block_nbytes)

        def store(kind: str, offset: int, data: memoryview) -> None:
            found[offset : offset + len(data)] = data

        rebuild_blocks(group.record, 7, readers, frozenset({1, 3}), frozenset({1, 3, 5}), store, parity_too=False)
        assert bytes(found) == group.expected(7)["node"]
        close(readers)


# -- over the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 2), (5, 3)])
def test_the_same_over_tcp(tmp_path: Path, n: int, m: int) -> None:
    with group_of(tmp_path, sizes_of(n, seed=n), m) as group:
        group.encode()
        near = {node: group.expected(node) for node in group.nodes}
        for slots in group.slots.values():
            slots[parity_name(INDEX)].body[:] = bytes(slots[parity_name(INDEX)].capacity)
        group.encode(mapped=False)
        assert {node: group.expected(node) for node in group.nodes} == near
        for lost in combinations(group.nodes, m):
            survivors = [node for node in group.nodes if node not in lost]
            assert group.rebuild(lost[0], survivors, mapped=False) == near[lost[0]]


def test_bytes_damaged_on_the_way_are_refused(tmp_path: Path) -> None:
    with group_of(tmp_path, sizes_of(3, seed=3), 1) as group:
        group.encode()
        group.damage = 1
        with pytest.raises(CorruptData, match="the network damages data"):
            group.rebuild(1, [3, 5], mapped=False)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("change", [{"step": STEP + 1}, {"epoch": EPOCH + 1}, {"step": 0}])
def test_bytes_of_another_step_are_refused(tmp_path: Path, mapped: bool, change: dict[str, int]) -> None:
    with group_of(tmp_path, sizes_of(3, seed=4), 1) as group:
        group.encode()
        group.slots[3][slot_name(30, INDEX)].update(**change)
        with pytest.raises(MissingData, match=r"slot-30-1 of node 3 holds step \d+ of epoch \d, not step 40 of epoch 3"):
            group.rebuild(1, [3, 5], mapped=mapped)


def test_a_slot_that_is_gone_is_missing(tmp_path: Path) -> None:
    with group_of(tmp_path, sizes_of(3, seed=4), 1) as group:
        group.encode()
        (Path(group.members[1].memory) / slot_name(30, INDEX)).unlink()
        with pytest.raises(MissingData, match="slot-30-1 is gone"):
            group.rebuild(1, [3, 5])


# -- the bytes of a node -------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_node_are_its_ranks_in_order_with_zeros_between_and_behind(tmp_path: Path) -> None:
    with group_of(tmp_path, [[100, 1, 64, 130], [500]], 1) as group:
        expected = group.expected(1)["node"].ljust(2000, b"\0")
        readers = group.readers([1])
        node = NodeBytes(group.record.records[0], group.record, readers[1])
        chance = random.Random(5)
        for _ in range(300):
            offset, nbytes = chance.randrange(700), chance.randrange(1, 700)
            scratch = memoryview(bytearray(b"\xee" * nbytes))
            assert bytes(node.piece(offset, nbytes, scratch)) == expected[offset : offset + nbytes]
        close(readers)


def test_a_piece_within_one_slot_is_not_copied(tmp_path: Path) -> None:
    with group_of(tmp_path, [[200, 200], [1]], 1) as group:
        readers = group.readers([1])
        scratch = memoryview(bytearray(100))
        piece = NodeBytes(group.record.records[0], group.record, readers[1]).piece(50, 100, scratch)
        group.slots[1][slot_name(10, INDEX)].body[50] ^= 0xFF
        assert bytes(piece) == bytes(group.slots[1][slot_name(10, INDEX)].body[50:150])
        piece.release()
        close(readers)


# -- what has arrived ------------------------------------------------------------------------------------------------------


def test_rows_are_complete_when_every_byte_of_all_of_them_has_arrived_and_only_once() -> None:
    rows = RowsInFlight(2, 100)
    assert not rows.add(0, 60)
    assert not rows.add(1, 100)
    assert not rows.add(1, 100), "a row that is complete already"
    assert rows.add(0, 40)
    assert not rows.add(0, 40)


def test_containers_with_one_hostname_and_memory_of_their_own_map_nothing_of_each_other(shm: Path, tmp_path: Path) -> None:
    (shm / "a").mkdir()
    assert host_identity(shm / "a") == host_identity(shm)
    assert host_identity(tmp_path) != host_identity(shm)
