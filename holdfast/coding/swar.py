"""The numba back end: eight bytes at a time in an ordinary register, for machines where no ISA-L can be had.

A product by c is the XOR of c·2^b over the set bits b of each byte. One 64-bit word holds eight bytes: isolating bit b of each
and spreading it over its byte gives a mask that selects c·2^b. No tables, no special instructions; LLVM makes vectors of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.coding.field import MULTIPLY
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from holdfast.coding.buffers import Region
    from holdfast.coding.field import Bytes

    Words = NDArray[np.uint64]

BLOCK = 32 << 10  # targets stay in the L1 cache while sources stream past; the call from Python is paid once per block


class Swar:
    name = "numba"

    def __init__(self) -> None:
        self._add_product = _compile()

    def __str__(self) -> str:
        return "numba"

    def kernel(self, matrix_RC: Bytes) -> SwarKernel:
        bits = MULTIPLY[matrix_RC[:, :, None], 1 << np.arange(8)]
        spread = bits.astype(np.uint64) * np.uint64(0x0101010101010101)
        return SwarKernel(self._add_product, matrix_RC, spread)


@dataclass(frozen=True, slots=True)
class SwarKernel:
    add_product: Any
    coefficients: Bytes  # row × column
    spread: Words  # row × column × 8: the eight products c·2^b of each coefficient, each repeated in all bytes of a word

    def write(self, sources: Sequence[Region], targets: Sequence[Region]) -> None:
        for start in range(0, sources[0].size, BLOCK):
            pieces = [target.array[start : start + BLOCK] for target in targets]
            for piece in pieces:
                piece.fill(0)
            for column, source in enumerate(sources):
                self._add_block(column, source.array[start : start + BLOCK], pieces)

    def add(self, column: int, source: Region, targets: Sequence[Region]) -> None:
        for start in range(0, source.size, BLOCK):
            pieces = [target.array[start : start + BLOCK] for target in targets]
            self._add_block(column, source.array[start : start + BLOCK], pieces)

    def _add_block(self, column: int, source: Bytes, targets: Sequence[Bytes]) -> None:
        whole = source.size & ~7
        words = source[:whole].view(np.uint64)
        for row, target in enumerate(targets):
            coefficient = self.coefficients[row, column]
            if coefficient == 1:
                np.bitwise_xor(target, source, out=target)
            elif coefficient:
                self.add_product(self.spread[row, column], words, target[:whole].view(np.uint64))
                target[whole:] ^= MULTIPLY[coefficient, source[whole:]]


@cache
def _compile() -> Any:
    try:
        import numba
    except ImportError as error:
        raise ConfigError(f"the numba back end needs numba: {error}") from error

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]  # numba carries no types
    def add_product(spread_8: Words, source: Words, target: Words) -> None:
        low_bits = np.uint64(0x0101010101010101)
        for i in range(source.size):
            word, product = source[i], np.uint64(0)
            for b in range(8):
                bit = (word >> np.uint64(b)) & low_bits
                product ^= ((bit << np.uint64(8)) - bit) & spread_8[b]
            target[i] ^= product

    return add_product
