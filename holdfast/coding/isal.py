"""ISA-L through ctypes: the fastest kernels for the machine, without a compiler and without a copy.

pyeclib's wheels carry a complete libisal for x86-64 and aarch64. Its path is private to the wheel, so it is looked for, and
never trusted before `backend.py` has seen it give known answers. Every call releases the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.coding.buffers import LARGEST_CALL, Region, region
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from holdfast.coding.field import Bytes

logger = logging.getLogger(__name__)

OVERRIDE = "HOLDFAST_ISAL"  # path of a libisal to use before all others
CRC_INVERT = 0xFFFFFFFF


def candidates() -> Iterator[str]:
    """Where a libisal may be, best first: the user's own, the one in pyeclib's wheel, the system's."""
    if override := os.environ.get(OVERRIDE):
        yield override
    try:
        files = importlib.metadata.files("pyeclib") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (str(Path(str(file.locate())).resolve()) for file in files if "libisal" in file.name)
    yield "libisal.so.2"


@cache
def load() -> Isal | None:
    """The first libisal that loads and has what is needed, or None."""
    for path in candidates():
        try:
            return Isal(path)
        except ConfigError as error:
            logger.debug("not used: %s", error)
    return None


class Isal:
    """One loaded libisal. `kernel` pins one of its kernels, such as "_avx2", where the library's own choice is not wanted."""

    name = "isal"

    def __init__(self, path: str, kernel: str = "") -> None:
        self.path, self.pinned = path, kernel
        # The library's own choice of tables suits its own choice of kernel; the pinned kernels are those without GFNI.
        tables = "_base" if kernel else ""
        try:
            library = ctypes.CDLL(path)
            self._init_tables = _function(library, "ec_init_tables" + tables, _INT, _INT, _POINTER, _POINTER)
            self.encode_data = _function(library, "ec_encode_data" + kernel, *[_INT] * 3, *[_POINTER] * 3)
            self.encode_update = _function(library, "ec_encode_data_update" + kernel, *[_INT] * 4, *[_POINTER] * 3)
            self._crc32_iscsi = _function(library, "crc32_iscsi", _POINTER, _INT, ctypes.c_uint32, result=ctypes.c_uint32)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"{path} is no usable libisal: {error}") from error

    def __str__(self) -> str:
        return f"ISA-L ({self.path}{', ' + self.pinned if self.pinned else ''})"

    def crc32c_cuts(self, data: Region, cuts: Sequence[int]) -> list[int]:
        """The CRC of every run between one cut and the next, none of which is longer than LARGEST_CALL."""
        call, start = self._crc32_iscsi, data.address
        return [call(start + low, high - low, CRC_INVERT) ^ CRC_INVERT for low, high in pairwise(cuts)]

    def kernel(self, matrix_RC: Bytes) -> IsalKernel:
        rows, columns = matrix_RC.shape
        tables = np.zeros(32 * rows * columns, np.uint8)
        matrix_RC = np.ascontiguousarray(matrix_RC)
        self._init_tables(columns, rows, region(matrix_RC).address, region(tables).address)
        return IsalKernel(self, rows, columns, region(tables))

    def crc32c(self, data: Region, value: int) -> int:
        register = value ^ CRC_INVERT
        for start in range(0, data.size, LARGEST_CALL):
            register = self._crc32_iscsi(data.address + start, min(LARGEST_CALL, data.size - start), register)
        return int(register) ^ CRC_INVERT

    def crc32c_blocks(self, data: Region, nbytes: int) -> Iterator[int]:
        """The CRC of each block of `nbytes`, for blocks so small that a checked call for each would cost more than its CRC."""
        call, start = self._crc32_iscsi, data.address
        for at in range(0, data.size, nbytes):
            yield call(start + at, min(nbytes, data.size - at), CRC_INVERT) ^ CRC_INVERT


@dataclass(frozen=True, slots=True)
class IsalKernel:
    """A matrix expanded into the tables that the library's kernels read."""

    isal: Isal
    rows: int
    columns: int
    tables: Region

    def write(self, sources: Sequence[Region], targets: Sequence[Region]) -> None:
        self.isal.encode_data(
            sources[0].size, self.columns, self.rows, self.tables.address, _addresses(sources), _addresses(targets)
        )

    def add(self, column: int, source: Region, targets: Sequence[Region]) -> None:
        self.isal.encode_update(
            source.size, self.columns, self.rows, column, self.tables.address, source.address, _addresses(targets)
        )


_INT = ctypes.c_int
_POINTER = ctypes.c_void_p


def _function(library: ctypes.CDLL, name: str, *arguments: Any, result: Any = None) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
    return function


def _addresses(regions: Sequence[Region]) -> Any:
    return (_POINTER * len(regions))(*[each.address for each in regions])
