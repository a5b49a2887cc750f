"""The header codec: what is within its reach comes back whole, the rest is refused, nothing wrong ever comes out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.coding import HeaderCodec, crc32c
from holdfast.errors import ConfigError, CorruptData

CODEC = HeaderCodec()
SIZES = [0, 1, 12, 210, 211, 212, 512, 1000, 3556, 5000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nsym", [2, 3, 32, 33, 200])
def test_what_went_in_comes_out(size: int, nsym: int) -> None:
    codec = HeaderCodec(nsym)
    payload = random.Random(size).randbytes(size)
    block = codec.encode(payload)
    assert codec.decode(block) == (payload, 0)
    assert len(block) == codec.block_size(size)


def test_every_codeword_is_one_of_reedsolo() -> None:
    block = np.frombuffer(CODEC.encode(b"the oracle speaks" * 50), np.uint8).reshape(255, -1)
    oracle = reedsolo.RSCodec(32)
    for column in range(block.shape[1]):
        assert bytes(oracle.encode(block[:223, column].tobytes())) == block[:, column].tobytes()


def test_the_payload_can_be_read_in_a_hex_dump() -> None:
    payload = b"step 4200, epoch 7, COMMITTED"
    assert CODEC.encode(payload)[12 : 12 + len(payload)] == payload


@pytest.mark.parametrize("size", SIZES)
def test_what_follows_the_block_is_ignored(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    block = CODEC.encode(payload)
    for rest in (b"\0", bytes(4096), random.Random(1).randbytes(999)):
        assert CODEC.decode(block + rest) == (payload, 0)


@given(st.binary(max_size=1500), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sixteen_wrong_bytes_per_codeword_are_repaired_and_counted(payload: bytes, random: random.Random, page: bool) -> None:
    block = bytearray(CODEC.encode(payload))
    depth = len(block) // 255
    wrong = 0
    for codeword in range(depth):
        for row in random.sample(range(255), random.randint(0, 16)):
            block[row * depth + codeword] ^= random.randint(1, 255)
            wrong += 1
    assert CODEC.decode(block + bytes(500) * page) == (payload, wrong)


@pytest.mark.parametrize("size", [0, 512, 3000])
@pytest.mark.parametrize("page", [False, True])
def test_a_run_of_damage_is_repaired_wherever_it_is(size: int, page: bool) -> None:
    payload = random.Random(size).randbytes(size)
    block = CODEC.encode(payload)
    run = 16 * (len(block) // 255)
    for start in {0, 1, 5, 100, len(block) // 2, len(block) - run}:
        damaged = bytearray(block + bytes(1000) * page)
        damaged[start : start + run] = bytes(b ^ 0xA5 for b in damaged[start : start + run])
        assert CODEC.decode(damaged) == (payload, run)


@pytest.mark.parametrize("size", [0, 100, 512, 3000])
def test_too_much_damage_is_refused(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    block = CODEC.encode(payload)
    depth = len(block) // 255
    for seed in range(10):
        damaged = bytearray(block)
        generator = random.Random(seed)
        for row in generator.sample(range(255), generator.randint(17, 60)):
            damaged[row * depth] ^= generator.randint(1, 255)
        with pytest.raises(CorruptData, match=r"Up to 16 wrong bytes per codeword can be repaired; use another copy"):
            CODEC.decode(damaged)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"hfh1",
        bytes(254),
        bytes(255),
        bytes(4096),
        b"\xff" * 4096,
        random.Random(0).randbytes(4096),
        b"hfh1" + b"\xff" * 8 + bytes(4000),
        CODEC.encode(b"cut short")[:-1],
        CODEC.encode(bytes(3000))[:3000],
        HeaderCodec(30).encode(b"another codec"),
    ],
    ids=lambda b: f"{len(b)} bytes",
)
def test_bytes_that_are_no_header_are_refused(hostile: bytes) -> None:
    with pytest.raises(CorruptData, match=f"no header can be read from these {len(hostile)} bytes"):
        CODEC.decode(hostile)


def codewords_of(message: bytes) -> bytes:
    """A block with correct parity around any message: damage that Reed-Solomon cannot see."""
    depth = -(-len(message) // 223)
    columns = np.frombuffer(message.ljust(223 * depth, b"\0"), np.uint8).reshape(223, depth)
    oracle = reedsolo.RSCodec(32)
    return np.stack([np.frombuffer(oracle.encode(c.tobytes()), np.uint8) for c in columns.T], axis=1).tobytes()


def test_a_length_or_a_checksum_that_lies_is_refused_although_the_parity_is_right() -> None:
    honest = CODEC.encode(b"payload" * 10)[:223]
    assert CODEC.decode(codewords_of(honest)) == (b"payload" * 10, 0)
    for position, value in ((4, 69), (4, 71), (7, 255), (8, honest[8] ^ 1), (0, 0), (3, 50), (20, 0)):
        lying = bytearray(honest)
        lying[position] = value
        with pytest.raises(CorruptData):
            CODEC.decode(codewords_of(lying))


def test_a_length_beyond_the_block_is_refused_although_the_checksum_fits() -> None:
    rest = bytes(range(211))
    message = b"hfh1" + (5000).to_bytes(4, "little") + crc32c(rest).to_bytes(4, "little") + rest
    with pytest.raises(CorruptData):
        CODEC.decode(codewords_of(message))


@given(st.binary(min_size=255, max_size=1100))
@settings(max_examples=100, deadline=None)
def test_noise_never_becomes_a_payload(noise: bytes) -> None:
    with pytest.raises(CorruptData):
        CODEC.decode(noise)


def test_a_page_holds_what_capacity_says() -> None:
    room = CODEC.capacity(4096)
    assert room == 3556
    assert len(CODEC.encode(bytes(room))) <= 4096 < len(CODEC.encode(bytes(room + 1)))
    assert CODEC.capacity(100) < 0


@pytest.mark.parametrize("payload", ["text", None, 7])
def test_a_payload_has_to_be_bytes(payload: Any) -> None:
    with pytest.raises(ConfigError, match="offers no buffer"):
        CODEC.encode(payload)


def test_settings_that_protect_nothing_are_refused() -> None:
    for nsym in (-1, 0, 1, 201, 255, 2.0, "32"):
        with pytest.raises(ConfigError, match="nsym is"):
            HeaderCodec(nsym)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no header"):
        CODEC.encode(bytes((1 << 20) + 1))


def test_long_payloads_are_found_by_their_length_field_or_by_their_end() -> None:
    payload = random.Random(5).randbytes(200_000)
    block = bytearray(CODEC.encode(payload))
    assert CODEC.decode(block + b"rest") == (payload, 0)
    block[0:8] = bytes(8)
    assert CODEC.decode(block)[0] == payload
