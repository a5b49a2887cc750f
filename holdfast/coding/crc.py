"""CRC32C, and the algebra that saves reading bytes twice.

A CRC is linear: that of a concatenation follows from those of its parts, that of an XOR from those of its operands. So a
chunk's checksum serves for every larger piece it is part of, and the checksum of an XOR parity checks all its sources at once.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache, reduce
from itertools import pairwise
from operator import xor
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from holdfast.coding import isal
from holdfast.coding.buffers import LARGEST_CALL, is_whole, readable, region
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from holdfast.coding.buffers import Region

logger = logging.getLogger(__name__)

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
ALL_ONES = 0xFFFFFFFF
SHORT = 4096
ONE = 1 << 31  # the polynomial 1; the lowest power is the highest bit


def crc32c(buf: Buffer, value: int = 0) -> int:
    """The CRC32C of the buffer, going on from `value`: crc32c(b, crc32c(a)) is the CRC of a followed by b.

    Reads in place, and releases the GIL with the ISA-L back end.
    """
    if type(buf) is bytes and len(buf) <= SHORT and google_crc32c.implementation == "c":
        return int(google_crc32c.extend(_checked(value), buf))  # a line of text: what is done around the CRC is all there is
    data = readable(buf, "buf")
    return _engine()(data, _checked(value)) if data.size else _checked(value)


def crc32c_blocks(buf: Buffer, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """The CRC32C of every block of `nbytes` bytes; the last block may be shorter."""
    data = readable(buf, "buf")
    if not is_whole(nbytes, 1, LARGEST_CALL):
        raise ConfigError(f"blocks of {nbytes!r} bytes: it has to be 1 … {LARGEST_CALL}")
    library = isal.load()
    if library is not None and _engine() == library.crc32c:
        crcs: Iterable[int] = library.crc32c_blocks(data, nbytes)
    else:
        crcs = (google(data.cut(at, at + nbytes), 0) for at in range(0, data.size, nbytes))
    return np.fromiter(crcs, np.uint32, -(-data.size // nbytes))


def crc32c_cuts(buf: Buffer, cuts: Sequence[int]) -> list[int]:
    """The CRC32C of every run of bytes between one cut and the next; cuts ascend, from 0 on, to the buffer's length at most."""
    data = readable(buf, "buf")
    if any(start > stop for start, stop in pairwise((0, *cuts, data.size))):
        raise ConfigError(f"cuts have to ascend within 0 … {data.size}")
    engine, library = _engine(), isal.load()
    if library is not None and engine == library.crc32c and data.size <= LARGEST_CALL:
        return library.crc32c_cuts(data, cuts)
    return [engine(data.cut(start, stop), 0) if start < stop else 0 for start, stop in pairwise(cuts)]


def crc32c_combine(a: int, b: int, len_b: int) -> int:
    """The CRC of two byte strings joined, from the CRC of each and the length of the second."""
    return _multiply(_checked(a), _shift(_length(len_b))) ^ _checked(b)


def crc32c_zeros(n: int) -> int:
    """The CRC of n zero bytes, in O(log n). Padding a block costs crc32c_combine(crc, crc32c_zeros(n), n)."""
    return _multiply(ALL_ONES, _shift(_length(n))) ^ ALL_ONES


def crc32c_xor(crcs: Sequence[int], length: int) -> int:
    """The CRC of the XOR of blocks that are `length` bytes long and have these CRCs.

    With m = 1 this is the CRC that the parity has to have; if it has, all the blocks were right when they went in.
    """
    if not crcs:
        raise ConfigError("crc32c_xor needs at least one CRC")
    total = reduce(xor, map(_checked, crcs))
    # Each CRC carries one CRC of zeros beside its linear part; an even number of them cancels, and one belongs in the result.
    return total if len(crcs) % 2 else total ^ crc32c_zeros(length)


@cache
def _engine() -> Callable[[Region, int], int]:
    """ISA-L's, if it knows the answers, else google-crc32c's."""
    library = isal.load()
    if library is not None and is_correct(library.crc32c):
        logger.info("CRC32C by %s", library)
        return library.crc32c
    logger.info("CRC32C by google-crc32c (%s)", google_crc32c.implementation)
    return google


def google(data: Region, value: int) -> int:
    """The fallback. It holds the GIL."""
    return int(google_crc32c.extend(value, data.array))


def is_correct(engine: Callable[[Region, int], int]) -> bool:
    """Known answers: the check value of RFC 3720 and lengths around the vector widths, against a CRC made bit by bit."""
    if engine(readable(b"123456789", "check"), 0) != 0xE3069283:
        return False
    noise = np.random.default_rng(3).integers(0, 256, 1031, dtype=np.uint8)
    whole, cuts = region(noise), [0, 1, 8, 25, 89, 216, 473, 1031]
    register, value = ALL_ONES, 0
    for start, stop in pairwise(cuts):
        for byte in noise[start:stop]:
            register = reduce(lambda r, _: r >> 1 ^ POLYNOMIAL * (r & 1), range(8), register ^ int(byte))
        value = engine(whole.cut(start, stop), value)
        if value != register ^ ALL_ONES or engine(whole.cut(0, stop), 0) != value:
            return False
    return True


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC's: four powers of x at a time, from the highest, which is the lowest bit."""
    a1 = a >> 1 ^ (POLYNOMIAL if a & 1 else 0)
    a2 = a1 >> 1 ^ (POLYNOMIAL if a1 & 1 else 0)
    a3 = a2 >> 1 ^ (POLYNOMIAL if a2 & 1 else 0)
    low, high = (0, a3, a2, a2 ^ a3), (0, a1, a, a ^ a1)
    times = [one ^ other for one in high for other in low]
    product = times[b & 15]
    for shift in (4, 8, 12, 16, 20, 24, 28):
        product = product >> 4 ^ _FOUR_STEPS[product & 15] ^ times[b >> shift & 15]
    return product


def _four_steps(value: int) -> int:
    """What the lowest four bits become when a polynomial is multiplied with x^4."""
    for _ in range(4):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    return value


_FOUR_STEPS = [_four_steps(value) for value in range(16)]


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x^(8·nbytes): what a CRC is multiplied with when that many bytes follow it."""
    result, square = ONE, 1 << (31 - 8)  # x^0 and x^8
    while nbytes:
        if nbytes & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        nbytes >>= 1
    return result


def _checked(value: int) -> int:
    if not 0 <= value <= ALL_ONES:
        raise ConfigError(f"{value!r} is no CRC32C: it has to be in 0 … 2^32-1")
    return int(value)


def _length(n: int) -> int:
    if n < 0:
        raise ConfigError(f"a length of {n} bytes is negative")
    return int(n)
