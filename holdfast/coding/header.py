"""Headers and manifests that repair themselves: a few hundred bytes that everything else depends on.

Wire format, for a given nsym:

    message   "hfh1" | length of payload, u32 | CRC32C of the payload, u32 | payload | zeros     (255 - nsym)·D bytes
    parity    Reed-Solomon, nsym symbols for each of D codewords                                   nsym·D bytes

all integers little-endian. Byte i of the block belongs to codeword i mod D, so a run of damage is spread over all codewords:
nsym // 2 bytes per codeword are repaired wherever they are, hence any run of nsym // 2 · D bytes. The payload is readable in a
hex dump, from byte 12. D is not written outside the codewords, because it would be the one thing that damage must not touch: it
is tried out. So bytes may follow the block, such as the rest of a page.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from reedsolo import ReedSolomonError, RSCodec

from holdfast.coding.buffers import is_whole, readable
from holdfast.coding.crc import crc32c
from holdfast.coding.field import MULTIPLY, parity_matrix
from holdfast.errors import ConfigError, CorruptData

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from holdfast.coding.field import Bytes

MAGIC = b"hfh1"
PREFIX = struct.Struct("<4sII")
CODEWORD = 255
LARGEST_PAYLOAD = 1 << 20
MOST_TRIALS = 64  # D up to which a block is found whose length field is damaged and whose end is not known: 16 KiB


class HeaderCodec:
    """Turns a payload into a block that survives nsym // 2 wrong bytes per codeword of 255, anywhere, in unknown places."""

    def __init__(self, nsym: int = 32) -> None:
        if not is_whole(nsym, 2, 200):
            raise ConfigError(f"nsym is {nsym!r}; it can be 2 … 200 (two parity bytes repair one byte)")
        self.nsym = nsym
        self._room = CODEWORD - nsym

    def block_size(self, payload_size: int) -> int:
        """How many bytes `encode` returns for a payload of this size."""
        return CODEWORD * self._depth(payload_size)

    def capacity(self, block_size: int) -> int:
        """The longest payload whose block fits into so many bytes, such as a page; negative if none does."""
        return block_size // CODEWORD * self._room - PREFIX.size

    def encode(self, payload: Buffer) -> bytes:
        """The block: payload, its length, its CRC32C and the parity. About 50 microseconds for a payload of 512 bytes."""
        data = readable(payload, "payload").array.tobytes()
        if len(data) > LARGEST_PAYLOAD:
            raise ConfigError(f"a payload of {len(data)} bytes is no header; at most {LARGEST_PAYLOAD} are taken")
        depth = self._depth(len(data))
        message = PREFIX.pack(MAGIC, len(data), crc32c(data)) + data
        message_KD = np.frombuffer(message.ljust(self._room * depth, b"\0"), np.uint8).reshape(self._room, depth)
        return message_KD.tobytes() + self._parity(message_KD).tobytes()

    def decode(self, block: Buffer) -> tuple[bytes, int]:
        """The payload, and how many bytes of the block had to be repaired. Bytes after the block are ignored.

        `CorruptData` if there is no block or if it is beyond repair; a wrong payload is never returned.
        """
        data = readable(block, "block").array
        reasons = []
        for depth in self._depths(data):
            try:
                return self._decode(data[: CODEWORD * depth].reshape(CODEWORD, depth))
            except CorruptData as error:
                reasons.append(str(error))
        first = reasons[0] if reasons else f"{data.size} bytes are too few for a block of {CODEWORD}"
        raise CorruptData(
            f"no header can be read from these {data.size} bytes: {first}. Up to {self.nsym // 2} wrong bytes per codeword can "
            "be repaired; use another copy or an older one"
        )

    def _depth(self, payload_size: int) -> int:
        return -(-(PREFIX.size + payload_size) // self._room)

    def _depths(self, block: Bytes) -> Iterator[int]:
        """The possible D: the one that the length field claims, the one if nothing follows the block, then all small ones."""
        fitting = block.size // CODEWORD
        if not fitting:
            return
        magic, length, _ = PREFIX.unpack(block[: PREFIX.size].tobytes())
        claimed = self._depth(length) if magic == MAGIC else 0
        tried = dict.fromkeys([claimed, fitting, *range(min(fitting, MOST_TRIALS), 0, -1)])
        yield from (depth for depth in tried if 1 <= depth <= fitting)

    def _decode(self, block_ND: Bytes) -> tuple[bytes, int]:
        wrong_NsymD = self._parity(block_ND[: self._room]) != block_ND[self._room :]
        repaired_ND, repaired = block_ND, 0
        if damaged := np.flatnonzero(wrong_NsymD.any(axis=0)).tolist():
            repaired_ND = block_ND.copy()
            for codeword in damaged:
                repaired_ND[:, codeword] = self._repair(block_ND[:, codeword], codeword, block_ND.shape[1])
            repaired = int(np.count_nonzero(repaired_ND != block_ND))
        message = repaired_ND[: self._room].tobytes()
        magic, length, checksum = PREFIX.unpack_from(message)
        if magic != MAGIC:
            raise CorruptData(f"it begins with {magic!r} and not with {MAGIC!r}")
        payload = message[PREFIX.size : PREFIX.size + length]
        if len(payload) != length or crc32c(payload) != checksum:
            raise CorruptData(f"its payload of {length} bytes does not have the CRC32C {checksum:08x} that it should")
        return payload, repaired

    def _repair(self, codeword: Bytes, number: int, depth: int) -> Bytes:
        try:
            _, repaired, _ = RSCodec(self.nsym).decode(codeword.tobytes())
        except ReedSolomonError as error:
            raise CorruptData(f"codeword {number} of {depth} has more than {self.nsym // 2} wrong bytes") from error
        return np.frombuffer(repaired, np.uint8)

    def _parity(self, message_KD: Bytes) -> Bytes:
        """nsym × D parity symbols: for each message byte one table row is looked up, and the rows are XORed."""
        rows_KDW = _contributions(self.nsym)[np.arange(self._room)[:, None], message_KD]
        parity_DW: NDArray[np.uint64] = np.bitwise_xor.reduce(rows_KDW, axis=0)
        return parity_DW.view(np.uint8)[:, : self.nsym].T


@cache
def _contributions(nsym: int) -> NDArray[np.uint64]:
    """What value v in message position p adds to the parity, for all p and v; a few MiB, made once.

    Multiplication is linear, so what a value adds is the XOR of what its bits add.
    """
    room, words = CODEWORD - nsym, -(-nsym // 8)
    table = np.zeros((room, 256, words * 8), np.uint8)
    rows, sums = parity_matrix(room, nsym).T, table.view(np.uint64)
    for value in (1 << bit for bit in range(8)):
        table[:, value, :nsym] = MULTIPLY[rows, value]
        sums[:, value : 2 * value] = sums[:, :value] ^ sums[:, value : value + 1]
    return sums
