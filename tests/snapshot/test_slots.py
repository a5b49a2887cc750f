"""Slots say truthfully what is in them: whoever dies at whatever byte, and whichever bits flip."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.arrays import Fragment, FragmentTable
from holdfast.coding import HeaderCodec, crc32c
from holdfast.errors import CorruptData, MissingData, OutOfSharedMemory
from holdfast.snapshot.slots import HEADER_NBYTES, Meta, Slot, SlotHeader, SlotState, aligned

HALF = HEADER_NBYTES // 2


def new_slot(path: Path, nbytes: int = 8192) -> Slot:
    return Slot.create(path, SlotHeader("job", 1, 3, 0), nbytes)


def reopened(path: Path) -> SlotHeader:
    slot = Slot.open(path)
    slot.close()
    return slot.header


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def sealed(slot: Slot, meta: Meta, payload: bytes) -> None:
    data, start = meta.to_bytes(), aligned(len(payload))
    slot.body[: len(payload)] = payload
    slot.body[start : start + len(data)] = data
    slot.update(state=SlotState.VERIFIED, step=7, payload_nbytes=len(payload), meta_nbytes=len(data), meta_crc32c=crc32c(data))


META = Meta(
    FragmentTable.from_rows([Fragment("model/w", "float32", (5,), (0,), (5,), 3, 0, 20, 0xDEADBEEF)]),
    {"rng": '{"torch":1}', "optim": "[]"},
)


# -- headers -----------------------------------------------------------------------------------------------------------


def test_a_header_comes_back_as_it_was_written(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    written = slot.update(
        state=SlotState.COMMITTED, epoch=4, step=2**40, world=4096, payload_nbytes=4096, meta_nbytes=90, meta_crc32c=2**32 - 1
    )
    found = reopened(tmp_path / "slot")
    assert found == written
    assert type(found.state) is SlotState
    slot.close()


def test_the_newest_of_the_two_headers_counts(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    for step in range(1, 8):
        slot.update(step=step)
        assert reopened(tmp_path / "slot").step == step
    slot.close()


def test_a_successor_goes_on_counting_where_the_dead_writer_stopped(tmp_path: Path) -> None:
    new_slot(tmp_path / "slot").close()
    for step in range(1, 8):
        slot = Slot.open(tmp_path / "slot", writable=True)
        slot.update(step=step)
        slot.close()
        assert reopened(tmp_path / "slot").step == step


def test_a_header_torn_at_any_byte_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "slot"
    slot = new_slot(path)
    slot.update(state=SlotState.COMMITTED, epoch=1, step=1_111_111, world=8, payload_nbytes=640, meta_crc32c=0x11111111)
    slot.update(state=SlotState.FILLING, epoch=2, step=0, world=8, payload_nbytes=0, meta_crc32c=0)
    before, old = path.read_bytes(), slot.header
    slot.update(state=SlotState.COMMITTED, epoch=2, step=2_222_222, world=16, payload_nbytes=1280, meta_crc32c=0x22222222)
    new, after = slot.header, path.read_bytes()
    place = new.sequence % 2 * HALF
    other = slice(HALF - place, HEADER_NBYTES - place)
    assert before[other] == after[other]
    # Bytes that are equal in both make no new file; every count that does is tried.
    counts = [0, *(i - place + 1 for i in range(place, place + HALF) if before[i] != after[i])]
    seen = []
    for count in counts:
        write_at(path, place, after[place : place + count] + before[place + count : place + HALF])
        found = reopened(path)
        assert found in (old, new), f"after {count} bytes"
        seen.append(found == new)
    assert seen[0] is False
    assert seen[-1] is True
    slot.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_flipped_bits_in_a_header_are_repaired(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("slot") / "slot"
    slot = new_slot(path)
    slot.update(state=SlotState.VERIFIED, step=41, meta_crc32c=5)
    slot.update(state=SlotState.COMMITTED, step=42, meta_crc32c=6)
    place = slot.header.sequence % 2 * HALF
    size = HeaderCodec(nsym=32).block_size(len(json.dumps(asdict(slot.header), separators=(",", ":"))))
    page = bytearray(path.read_bytes()[:HEADER_NBYTES])
    # 16 wrong bytes per codeword can be repaired; 16 anywhere are never more than that.
    for where in data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=16)):
        page[place + where] ^= data.draw(st.integers(1, 255))
    write_at(path, 0, bytes(page))
    assert reopened(path) == slot.header
    slot.close()
    path.unlink()


def test_headers_beyond_repair_are_refused(tmp_path: Path) -> None:
    new_slot(tmp_path / "slot").close()
    write_at(tmp_path / "slot", 0, os.urandom(HEADER_NBYTES))
    with pytest.raises(CorruptData, match="neither header is whole"):
        Slot.open(tmp_path / "slot")


def test_the_older_header_stands_in_for_a_newer_one_beyond_repair(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    older = slot.update(step=1)
    newer = slot.update(step=2)
    write_at(tmp_path / "slot", newer.sequence % 2 * HALF, os.urandom(HALF))
    assert reopened(tmp_path / "slot") == older
    slot.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"state": 9},
        {"surprise": 1},
        {"version": 2},
        {"payload_nbytes": 1 << 60},
        {"meta_nbytes": 1 << 60},
        {"payload_nbytes": -(1 << 20), "meta_nbytes": 1 << 20},
        {"meta_nbytes": -1},
    ],
)
def test_a_sound_header_that_claims_the_impossible_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    slot = new_slot(tmp_path / "slot")
    slot.close()
    text = json.dumps({**asdict(slot.header), **fields}).encode()
    block = HeaderCodec(nsym=32).encode(text)
    write_at(tmp_path / "slot", 0, block.ljust(HALF, b"\0") * 2)
    with pytest.raises(CorruptData):
        Slot.open(tmp_path / "slot")


@pytest.mark.parametrize("nbytes", [0, 1, HALF, HEADER_NBYTES - 1, HEADER_NBYTES])
def test_a_file_without_a_body_is_refused(tmp_path: Path, nbytes: int) -> None:
    new_slot(tmp_path / "slot").close()
    os.truncate(tmp_path / "slot", nbytes)
    with pytest.raises(CorruptData, match="header page"):
        Slot.open(tmp_path / "slot")


def test_a_file_shorter_than_its_header_claims_is_refused(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot", 64 << 10)
    slot.update(payload_nbytes=60 << 10)
    slot.close()
    os.truncate(tmp_path / "slot", HEADER_NBYTES + (32 << 10))
    with pytest.raises(CorruptData, match="header claims"):
        Slot.open(tmp_path / "slot")


def test_a_slot_that_is_gone_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="is gone"):
        Slot.open(tmp_path / "slot")


# -- room --------------------------------------------------------------------------------------------------------------


def test_creating_a_slot_replaces_the_file_of_its_name_and_leaves_old_mappings_alone(tmp_path: Path) -> None:
    old = new_slot(tmp_path / "slot")
    old.body[:3] = b"old"
    fresh = new_slot(tmp_path / "slot", 16384)
    assert bytes(fresh.body[:3]) == b"\0\0\0"
    assert bytes(old.body[:3]) == b"old"
    assert fresh.capacity == 16384
    assert [path.name for path in tmp_path.iterdir()] == ["slot"]
    old.close()
    fresh.close()


def test_closing_a_slot_waits_for_the_last_view_of_it(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    view = slot.body[:4]
    slot.close()
    view[:] = b"kept"
    assert bytes(view) == b"kept"


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "tiny"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs root and the right to mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_memory_is_said_with_advice_and_leaves_no_file(tiny_tmpfs: Path) -> None:
    with pytest.raises(OutOfSharedMemory, match=r"8\.0 MiB for slot-0-0 .*1\.0 MiB are free.*--shm-size.*memory_dir"):
        new_slot(tiny_tmpfs / "slot-0-0", 8 << 20)
    assert list(tiny_tmpfs.iterdir()) == []
    new_slot(tiny_tmpfs / "slot-0-0", 512 << 10).close()


def test_a_slot_that_cannot_be_replaced_for_want_of_room_is_left_as_it_was(tiny_tmpfs: Path) -> None:
    slot = new_slot(tiny_tmpfs / "slot-0-0", 512 << 10)
    slot.update(state=SlotState.COMMITTED, step=5)
    with pytest.raises(OutOfSharedMemory):
        new_slot(tiny_tmpfs / "slot-0-0", 768 << 10)
    assert reopened(tiny_tmpfs / "slot-0-0").step == 5
    assert [path.name for path in tiny_tmpfs.iterdir()] == ["slot-0-0"]
    slot.close()


def test_a_blank_slot_has_a_name_once_it_is_published_and_its_room_is_its_own(tmp_path: Path) -> None:
    slot = Slot.blank(tmp_path / "slot-0-0", SlotHeader("job", 0, 0, 0, SlotState.FILLING), 20_000)
    slot.write(5000, memoryview(b"second"))
    slot.write(0, memoryview(b"f" * 5000))
    assert not (tmp_path / "slot-0-0").exists()
    slot.publish(5006, state=SlotState.COMMITTED, step=7)
    found = Slot.open(tmp_path / "slot-0-0")
    assert (found.header.state, found.header.step, found.capacity) == (SlotState.COMMITTED, 7, 20_480)
    assert bytes(found.body[:5010]) == b"f" * 5000 + b"second" + bytes(4)
    assert (tmp_path / "slot-0-0").stat().st_blocks * 512 >= 4096 + 20_480
    assert [path.name for path in tmp_path.iterdir()] == ["slot-0-0"]
    found.close()
    slot.close()


def test_a_blank_slot_that_finds_no_room_leaves_nothing(tiny_tmpfs: Path) -> None:
    header = SlotHeader("job", 0, 0, 0, SlotState.FILLING)
    with pytest.raises(OutOfSharedMemory, match=r"8\.0 MiB for slot-0-0"):
        Slot.blank(tiny_tmpfs / "slot-0-0", header, 8 << 20)
    assert list(tiny_tmpfs.iterdir()) == []
    first, second = (Slot.blank(tiny_tmpfs / f"slot-{rank}-0", header, 768 << 10) for rank in (0, 1))
    first.write(0, memoryview(bytes(600 << 10)))
    with pytest.raises(OutOfSharedMemory):
        second.write(0, memoryview(bytes(600 << 10)))
    second.discard_blank()
    first.publish(600 << 10)
    assert [path.name for path in tiny_tmpfs.iterdir()] == ["slot-0-0"]
    first.close()


# -- meta --------------------------------------------------------------------------------------------------------------


def test_meta_comes_back_with_its_table_and_objects(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    sealed(slot, META, b"x" * 20)
    found = Slot.open(tmp_path / "slot").meta()
    assert list(found.table) == list(META.table)
    assert found.objects == META.objects
    slot.close()


def test_meta_with_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    slot = new_slot(tmp_path / "slot")
    sealed(slot, META, b"x" * 20)
    start = aligned(20)
    for where in range(start, start + slot.header.meta_nbytes):
        slot.body[where] ^= 0x10
        with pytest.raises(CorruptData, match=r"step 7, rank 3.*crc32c"):
            slot.meta()
        slot.body[where] ^= 0x10
    assert slot.meta().objects == META.objects
    slot.close()


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 8, b"\1\0\0\0\2\0\0\0x{}", b"\0" * 8 + b"{}"])
def test_bytes_that_are_no_meta_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptData):
        Meta.from_bytes(data)
