"""Parity made from what changed is the parity of the whole, bit for bit, or the whole is encoded: there is no third outcome."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.coding import crc32c
from holdfast.snapshot import exchange, outline, parity
from holdfast.snapshot.exchange import parity_name, slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.outline import Outline, Outlines, checksum
from holdfast.snapshot.slots import Slot, SlotHeader, SlotState
from holdfast.snapshot.store import group_of
from tests.snapshot.nodes import NBYTES, Nodes

CELL = 1000


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "CELL_NBYTES", CELL)
    monkeypatch.setattr("holdfast.snapshot.sealing.CELL_NBYTES", CELL)
    monkeypatch.setattr(exchange, "PIECE_NBYTES", 3000)


@pytest.fixture
def whole_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of stripes that were encoded whole."""
    found: list[int] = []
    encode = parity._encode_whole

    def count(stripe: Any, *rest: Any) -> int:
        found.append(stripe.group.step)
        return encode(stripe, *rest)

    monkeypatch.setattr(parity, "_encode_whole", count)
    return found


# -- a pass over a slot ------------------------------------------------------------------------------------------------------


def test_one_pass_gives_the_crc_of_every_span_and_of_every_cell() -> None:
    chance = random.Random(1)
    for _ in range(50):
        nbytes = chance.randrange(1, 9000)
        body = memoryview(bytearray(chance.randbytes(nbytes)))
        cuts = sorted(chance.sample(range(nbytes + 1), min(nbytes, 2 * chance.randrange(5))))
        spans = [(low, high - low) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]
        marks = {chance.randrange(nbytes + 99) for _ in range(3)}
        found = checksum(body, spans, nbytes, marks)
        assert found.spans == [crc32c(body[offset : offset + length]) for offset, length in spans]
        assert found.cells == [crc32c(body[start : start + CELL]) for start in range(0, nbytes, CELL)]
        within = {mark for mark in marks if 0 < mark < nbytes and mark % CELL}
        assert found.marks == {mark: crc32c(body[mark // CELL * CELL : mark]) for mark in within}


def test_the_crc_of_any_range_follows_from_its_cells() -> None:
    body = memoryview(bytearray(random.Random(2).randbytes(7777)))
    marks = {*range(0, 7777, 666), *range(1, 7777, 1002), 7777}
    sums = checksum(body, [], 7777, marks)
    known, bare = (Outline(1, 1, 7777, tuple(sums.cells), at) for at in (sums.marks, {}))
    for start in range(0, 7777, 333):
        for stop in [*range(start, 7777, 501), 7777]:
            assert known.crc(body, start, stop) == bare.crc(body, start, stop) == crc32c(body[start:stop])


def test_where_there_are_marks_no_byte_is_read_again() -> None:
    body = memoryview(bytearray(random.Random(2).randbytes(7777)))
    sums = checksum(body, [], 7777, {1234, 5678})
    known = Outline(1, 1, 7777, tuple(sums.cells), sums.marks)
    expected = [crc32c(body[start:stop]) for start, stop in ((1234, 5678), (5678, 7777))]
    nothing = memoryview(bytearray(7777))
    assert [known.crc(nothing, 1234, 5678), known.crc(nothing, 5678, 7777)] == expected


# -- keepers -----------------------------------------------------------------------------------------------------------------


def test_a_step_that_is_captured_once_more_is_compared_once_more(shm: Path) -> None:
    """What was found changed in the capture that was given up says nothing of the next one, though both are of one step."""
    slots = {name: Slot.create(shm / name, SlotHeader("job", 0, 0, int(name[-1])), 9000) for name in ("slot-0-0", "slot-0-1")}
    outlines = Outlines(slots)

    def fill(name: str, step: int, state: SlotState, *changed: int) -> None:
        slot = slots[name]
        slot.body[:8192] = bytes(8192)
        for place in changed:
            slot.body[place] = 1
        slot.update(state=state, epoch=1, step=step, payload_nbytes=8192)
        outlines.put(name, Outline(1, step, 8192, tuple(checksum(slot.body, [], 8192).cells)))

    fill("slot-0-0", 1, SlotState.COMMITTED)
    for places in ((100,), (5000, 7000), ()):
        fill("slot-0-1", 2, SlotState.VERIFIED, *places)
        found = outlines.changes(slots["slot-0-1"], (1, 1))
        assert found is not None
        assert [change.offset for change in found] == [place // CELL * CELL for place in places]
    for slot in slots.values():
        slot.close()


@pytest.fixture
def nodes(shm: Path) -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def build(count: int, m: int, *, mapped: bool = True) -> Nodes:
        made.append(Nodes(shm, count, m, mapped=mapped))
        made[-1].enter()
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("count", "m"), [(2, 1), (4, 1), (4, 2), (5, 3)])
def test_parity_by_changes_equals_parity_of_the_whole(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None], whole_encodings: list[int], count: int, m: int, mapped: bool
) -> None:
    group = nodes(count, m, mapped=mapped)
    group.commit(wait_until)
    del whole_encodings[:]
    group.commit(wait_until)
    for offset in (0, 999, 12_500, 24_990, 40_000):
        group.change(offset % count, offset, 20)
        group.commit(wait_until)
    group.commit(wait_until, text=" with more to say than in the steps before")
    assert whole_encodings == [], "all of these were made from the changes alone"


def test_more_changes_than_are_worth_it_are_encoded_whole(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None], whole_encodings: list[int]
) -> None:
    group = nodes(3, 1)
    group.commit(wait_until)
    del whole_encodings[:]
    for node in group.keepers:
        group.change(node, 0, NBYTES * 3 // 4)
    group.commit(wait_until)
    assert set(whole_encodings) == {group.step}


def test_a_shorter_snapshot_leaves_nothing_of_the_longer_one_behind_in_its_parity(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None]
) -> None:
    group = nodes(3, 1)
    for text in ("", " " * 900, "", " " * 1800, ""):
        group.commit(wait_until, text=text)
    group.data[1] = group.data[1][:-3000]
    group.commit(wait_until)
    group.data[2] = np.concatenate([group.data[2], group.data[2][:900]])
    group.commit(wait_until)


def test_a_capture_that_was_given_up_between_two_commits_changes_nothing(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None], whole_encodings: list[int]
) -> None:
    group = nodes(3, 1)
    group.commit(wait_until)
    wait_until(lambda: group.links[1].page.target[0] > group.step, "the next step is asked for")
    step = group.links[1].page.target[0]
    group.change(0, 100, 20)
    group.links[1].give_up(step, "busy")
    del whole_encodings[:]
    wait_until(lambda: group.links[1].page.target[2] > 2, "another order")
    group.commit(wait_until)
    assert whole_encodings == []


def test_the_committed_parity_is_not_built_upon_once_it_has_rotted(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None], whole_encodings: list[int]
) -> None:
    group = nodes(3, 1)
    group.commit(wait_until)
    slot = Slot.open(group.place(1) / parity_name(group.index), writable=True)
    slot.body[77] ^= 4
    slot.close()
    group.change(0, 100, 20)
    del whole_encodings[:]
    group.commit(wait_until)
    assert whole_encodings == [group.step], "one stripe, the one of the rotten parity"


def test_committed_bytes_that_have_rotted_do_not_enter_the_next_parity(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None]
) -> None:
    group = nodes(3, 1)
    group.commit(wait_until)
    slot = Slot.open(group.place(0) / slot_name(0, group.index), writable=True)
    slot.body[150] ^= 4
    slot.close()
    group.change(0, 100, 20)  # in the same cell: the difference is not the one between the captures
    group.commit(wait_until)


def test_after_a_lost_node_was_rebuilt_parity_is_the_one_of_the_whole(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None]
) -> None:
    group = nodes(3, 1)
    group.commit(wait_until)
    group.commit(wait_until)
    index = group.index
    record = group_of(Slot.open(group.place(0) / parity_name(index)))
    assert record is not None
    group.links.pop(2).close()
    group.keepers.pop(2).close()
    group.keepers[2] = Keeper("job", 2, group.place(2))
    members = [group.keepers[node].member.to_json() for node in (0, 1)]
    group.ask(2, "rebuild", group=record.to_json(), lost=2, survivors=members, with_data=[0, 1], with_parity=[0, 1])
    group.enter(index=index)
    wait_until(lambda: group.ask(2, "health")["parity"], "its parity")
    group.assert_parity(index)
    for offset in (10, 30_000):
        group.change(1, offset, 20)
        group.commit(wait_until)


def test_a_new_epoch_begins_with_a_whole_encoding(
    nodes: Callable[..., Nodes], wait_until: Callable[..., None], whole_encodings: list[int]
) -> None:
    """What was committed before may have been rebuilt or regrouped since; nothing is added to it."""
    group = nodes(3, 1)
    group.commit(wait_until)
    group.commit(wait_until)
    index = group.index
    group.enter(index=index)
    del whole_encodings[:]
    group.change(0, 100, 20)
    group.commit(wait_until)
    assert whole_encodings == [group.step] * 3
    group.change(0, 100, 20)
    group.commit(wait_until)
    assert whole_encodings == [group.step - 1] * 3, "and goes on with changes alone"


def test_equal_crcs_are_no_proof_that_nothing_changed(nodes: Callable[..., Nodes], wait_until: Callable[..., None]) -> None:
    """Two contents of a cell with one CRC: found by linearity, four bytes that undo what four others did."""
    group = nodes(3, 1)
    group.commit(wait_until)
    group.data[0][:CELL] = collision(group.data[0][:CELL])
    group.commit(wait_until)


def collision(cell: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Other bytes of the same length with the same CRC32C."""
    target = crc32c(cell)
    basis: dict[int, tuple[int, int]] = {}
    zero = crc32c(np.zeros(len(cell), np.uint8))
    for bit in range(40):
        flip = np.zeros(len(cell), np.uint8)
        flip[bit // 8] = 1 << bit % 8
        value, made_of = crc32c(flip) ^ zero, 1 << bit
        while value:
            top = value.bit_length()
            if top not in basis:
                basis[top] = value, made_of
                break
            value, made_of = value ^ basis[top][0], made_of ^ basis[top][1]
        else:
            other = cell.copy()
            for place in range(40):
                other[place // 8] ^= (made_of >> place & 1) << place % 8
            assert crc32c(other) == target
            assert not np.array_equal(other, cell)
            return other
    raise AssertionError("33 vectors of 32 bits are dependent")
