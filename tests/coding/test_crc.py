"""CRC32C and its algebra, against google-crc32c and against the bytes themselves."""

from __future__ import annotations

import mmap
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.coding import crc, crc32c, crc32c_blocks, crc32c_combine, crc32c_cuts, crc32c_xor, crc32c_zeros, isal
from holdfast.coding.buffers import readable
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = isal.load()
ENGINES = [crc.google, *([LIBRARY.crc32c] if LIBRARY else [])]


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_answers_of_the_standard(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    for engine in ENGINES:
        assert crc.is_correct(engine)
        assert not data or engine(readable(data, "data"), 0) == expected


@given(st.binary(max_size=600), st.integers(0, 2**32 - 1), st.integers(0, 63))
def test_it_agrees_with_google_crc32c_at_any_address(data: bytes, value: int, shift: int) -> None:
    moved = np.zeros(len(data) + 64, np.uint8)[shift : shift + len(data)]
    moved[:] = np.frombuffer(data, np.uint8)
    expected = google_crc32c.extend(value, data)
    assert crc32c(moved, value) == expected
    for engine in ENGINES:
        assert not data or engine(readable(moved, "data"), value) == expected


@given(st.binary(max_size=2000), st.integers(1, 500))
def test_every_block_has_the_crc_of_its_bytes(data: bytes, nbytes: int) -> None:
    expected = [google_crc32c.value(data[at : at + nbytes]) for at in range(0, len(data), nbytes)]
    found = crc32c_blocks(data, nbytes)
    assert found.dtype == np.uint32
    assert found.tolist() == expected


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=9))
def test_every_run_between_two_cuts_has_the_crc_of_its_bytes(data: bytes, places: list[int]) -> None:
    cuts = sorted(min(place, len(data)) for place in places)
    assert crc32c_cuts(data, cuts) == [google_crc32c.value(data[start:stop]) for start, stop in pairwise(cuts)]


def test_blocks_without_the_library_have_the_same_crcs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 5
    expected = crc32c_blocks(data, 100).tolist()
    monkeypatch.setattr(crc, "_engine", lambda: crc.google)
    assert crc32c_blocks(data, 100).tolist() == expected


def test_many_kinds_of_buffers_have_the_same_crc() -> None:
    data = bytes(range(256)) * 16
    with mmap.mmap(-1, 4096) as mapped:
        mapped[:] = data
        kinds: list[Any] = [
            data,
            bytearray(data),
            memoryview(data).cast("Q"),
            np.frombuffer(data, "<f4").reshape(4, -1),
            mapped,
        ]
        assert {crc32c(kind) for kind in kinds} == {google_crc32c.value(data)}
    assert crc32c(np.arange(0)) == crc32c(np.zeros((3, 0))) == 0


def test_more_than_a_c_int_can_count() -> None:
    length = 2**31 + 17
    with mmap.mmap(-1, length) as zeros:  # never written, so it costs no memory
        assert crc32c(zeros) == crc32c_zeros(length)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_crc_of_a_concatenation_follows_from_its_parts(a: bytes, b: bytes) -> None:
    assert crc32c_combine(crc32c(a), crc32c(b), len(b)) == crc32c(a + b) == crc32c(b, crc32c(a))


@given(st.integers(0, 5000))
def test_the_crc_of_zeros_needs_no_zeros(n: int) -> None:
    assert crc32c_zeros(n) == crc32c(bytes(n))


@given(st.binary(max_size=100), st.integers(0, 1000))
def test_padding_with_zeros_needs_no_bytes(data: bytes, n: int) -> None:
    assert crc32c_combine(crc32c(data), crc32c_zeros(n), n) == crc32c(data + bytes(n))


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_astronomic_lengths_add_up(a: int, b: int) -> None:
    assert crc32c_combine(crc32c_zeros(a), crc32c_zeros(b), b) == crc32c_zeros(a + b)


@given(st.integers(1, 9), st.integers(0, 200))
def test_the_crc_of_an_xor_follows_from_the_crcs(count: int, length: int) -> None:
    blocks = np.random.default_rng(count * 1000 + length).integers(0, 256, (count, length), dtype=np.uint8)
    parity = np.bitwise_xor.reduce(blocks, axis=0)
    assert crc32c_xor([crc32c(block) for block in blocks], length) == crc32c(parity)


def test_one_wrong_block_shows_in_the_crc_of_the_xor() -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (3, 5000), dtype=np.uint8)
    crcs = [crc32c(block) for block in blocks]
    for byte in (0, 777, 4999):
        parity = np.bitwise_xor.reduce(blocks, axis=0)
        parity[byte] ^= 1
        assert crc32c_xor(crcs, 5000) != crc32c(parity)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: crc32c("text"), "offers no buffer"),  # type: ignore[arg-type]
        (lambda: crc32c(np.zeros((4, 4))[:, 0]), "not contiguous"),
        (lambda: crc32c(b"x", -1), "no CRC32C"),
        (lambda: crc32c(b"", 2**32), "no CRC32C"),
        (lambda: crc32c_combine(2**32, 0, 1), "no CRC32C"),
        (lambda: crc32c_combine(0, -1, 1), "no CRC32C"),
        (lambda: crc32c_combine(0, 0, -1), "negative"),
        (lambda: crc32c_zeros(-1), "negative"),
        (lambda: crc32c_xor([], 10), "at least one"),
        (lambda: crc32c_cuts(b"xyz", [0, 2, 1]), "cuts have to ascend within 0 … 3"),
        (lambda: crc32c_cuts(b"xyz", [0, 4]), "cuts have to ascend within 0 … 3"),
        (lambda: crc32c_cuts(b"xyz", [-1, 2]), "cuts have to ascend within 0 … 3"),
        (lambda: crc32c_blocks(b"x", 0), "blocks of 0 bytes"),  # type: ignore[arg-type,return-value]
        (lambda: crc32c_blocks(b"x", 2**31), "blocks of 2147483648 bytes"),  # type: ignore[arg-type,return-value]
        (lambda: crc32c_xor([1, 2**40], 10), "no CRC32C"),
        (lambda: crc32c_xor([1, 2], -10), "negative"),
    ],
)
def test_hostile_arguments(act: Callable[[], int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()


def test_a_wrong_engine_is_found_out() -> None:
    assert not crc.is_correct(lambda data, value: crc.google(data, value) ^ (data.size == 558))
    assert not crc.is_correct(lambda data, value: crc.google(data, 0))


def test_threads_get_the_same_answer() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    expected, found = google_crc32c.value(data.tobytes()), []
    threads = [threading.Thread(target=lambda: found.append(crc32c(data))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
