"""The numpy back end: XOR at the speed of memory, everything else by table. Always there, and needs nothing native.

A coefficient of 1 is an XOR, so with one parity this is as fast as any library. Other coefficients look pairs of bytes up in
tables of 65,536 products, about 0.5 GB/s: enough to be rescued by, too slow to plan on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from holdfast.coding.field import MULTIPLY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from holdfast.coding.buffers import Region
    from holdfast.coding.field import Bytes

BLOCK = 512 << 10  # so that a target stays in the cache while its sources stream past
WORTH_A_TABLE = 4 << 10  # bytes below which making the large table would take longer than using it


class Tables:
    name = "numpy"

    def __str__(self) -> str:
        return "numpy tables"

    def kernel(self, matrix_RC: Bytes) -> TablesKernel:
        return TablesKernel(tuple(tuple(map(int, row)) for row in matrix_RC))


@dataclass(frozen=True, slots=True)
class TablesKernel:
    coefficients: tuple[tuple[int, ...], ...]

    def write(self, sources: Sequence[Region], targets: Sequence[Region]) -> None:
        scratch = np.empty(min(BLOCK, sources[0].size), np.uint8)
        for start in range(0, sources[0].size, BLOCK):
            pieces = [source.array[start : start + BLOCK] for source in sources]
            for row, target in zip(self.coefficients, targets, strict=True):
                _combine(row, pieces, target.array[start : start + BLOCK], scratch)

    def add(self, column: int, source: Region, targets: Sequence[Region]) -> None:
        scratch = np.empty(min(BLOCK, source.size), np.uint8)
        for start in range(0, source.size, BLOCK):
            piece = source.array[start : start + BLOCK]
            for row, target in zip(self.coefficients, targets, strict=True):
                _add(row[column], piece, target.array[start : start + BLOCK], scratch)


def _combine(row: Sequence[int], sources: Sequence[Bytes], target: Bytes, scratch: Bytes) -> None:
    """target = the row times the sources. Two plain sources first: that reads each once and never clears the target."""
    order = sorted(range(len(row)), key=lambda c: row[c] != 1)
    if len(row) > 1 and row[order[1]] == 1:
        np.bitwise_xor(sources[order[0]], sources[order[1]], out=target)
        rest = order[2:]
    else:
        _product(row[order[0]], sources[order[0]], target)
        rest = order[1:]
    for c in rest:
        _add(row[c], sources[c], target, scratch)


def _add(coefficient: int, source: Bytes, target: Bytes, scratch: Bytes) -> None:
    if coefficient == 1:
        np.bitwise_xor(target, source, out=target)
    elif coefficient:
        product = scratch[: source.size]
        _product(coefficient, source, product)
        np.bitwise_xor(target, product, out=target)


def _product(coefficient: int, source: Bytes, target: Bytes) -> None:
    if coefficient == 1:
        target[:] = source
        return
    if source.size < WORTH_A_TABLE:
        np.take(MULTIPLY[coefficient], source, out=target, mode="clip")
        return
    even = source.size & ~1
    # mode="clip" lets numpy write straight into `out`; every 16-bit index is inside the table anyway.
    np.take(_pair_products(coefficient), source[:even].view(np.uint16), out=target[:even].view(np.uint16), mode="clip")
    if even < source.size:
        target[even] = MULTIPLY[coefficient, source[even]]


@lru_cache(maxsize=128)
def _pair_products(coefficient: int) -> NDArray[np.uint16]:
    """The products of both bytes of every 16-bit word, 128 KiB per coefficient; indifferent to the byte order."""
    high, low = np.divmod(np.arange(65536), 256)
    products = MULTIPLY[coefficient].astype(np.uint16)
    pairs: NDArray[np.uint16] = products[high] << 8 | products[low]
    return pairs
