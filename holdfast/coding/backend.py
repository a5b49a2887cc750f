"""Which code does the arithmetic. All back ends give the same bytes, and each has to prove it before its first use.

"auto" takes the first of ISA-L, numba and numpy that is installed and gives known answers. A library that computes a wrong
parity would be found out on the day the parity is needed, so the check runs in every process, once, in a few milliseconds.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from holdfast.coding import isal
from holdfast.coding.buffers import region
from holdfast.coding.field import matmul, parity_matrix
from holdfast.coding.swar import Swar
from holdfast.coding.tables import Tables
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.coding.buffers import Region
    from holdfast.coding.field import Bytes

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """One matrix, made ready.

    Sources and targets have equal lengths, at least 1 and at most LARGEST_CALL; targets overlap nothing.
    """

    def write(self, sources: Sequence[Region], targets: Sequence[Region]) -> None:
        """targets = matrix · sources"""

    def add(self, column: int, source: Region, targets: Sequence[Region]) -> None:
        """targets ^= matrix[:, column] · source"""


class Backend(Protocol):
    name: str

    def kernel(self, matrix_RC: Bytes) -> Kernel: ...

    def __hash__(self) -> int: ...  # kernels are kept per back end and matrix


NAMES = ("isal", "numba", "numpy")


def choose(name: str = "auto") -> Backend:
    """The back end of that name, checked; `ConfigError` if it is not here or computes wrongly."""
    if name == "auto":
        return _best()
    if name not in NAMES:
        raise ConfigError(f"backend is {name!r}; it can be {', '.join(map(repr, ('auto', *NAMES)))}")
    return _checked(name)


@cache
def _best() -> Backend:
    for name in NAMES:
        try:
            backend = _checked(name)
        except ConfigError as error:
            logger.debug("%s", error)
        else:
            logger.info("erasure coding by %s", backend)
            return backend
    raise AssertionError("the numpy back end fails its known answers: this numpy cannot be trusted with anything")


@cache
def _checked(name: str) -> Backend:
    backend = _make(name)
    if wrong := wrong_answer(backend):
        logger.warning("%s is not used: it computes a wrong %s", backend, wrong)
        raise ConfigError(f"{backend} computes a wrong {wrong}: replace the library, or let backend='auto' pass it over")
    return backend


def _make(name: str) -> Backend:
    if name == "isal":
        library = isal.load()
        if library is None:
            raise ConfigError(f"no usable libisal among {', '.join(isal.candidates())}; pip install pyeclib")
        return library
    return Swar() if name == "numba" else Tables()


def wrong_answer(backend: Backend) -> str | None:
    """What the back end gets wrong, or None. Lengths around vector widths, odd addresses, more rows than a kernel takes."""
    noise = np.random.default_rng(3).integers(0, 256, (21, 1100), dtype=np.uint8)
    for k, m in ((4, 2), (9, 8)):
        kernel = backend.kernel(parity_matrix(k, m))
        for length, shift in ((1, 0), (15, 1), (33, 0), (64, 3), (127, 0), (1024, 0), (1031, 5)):
            data = [region(row).cut(shift, shift + length) for row in noise[:k]]
            expected = matmul(parity_matrix(k, m), noise[:k, shift : shift + length])
            # Targets are cut out of longer rows, so that a kernel that writes beyond its target is found out too.
            whole, added = noise[:m].copy(), noise[:m].copy()
            kernel.write(data, [region(row).cut(shift, shift + length) for row in whole])
            for column, source in enumerate(data):
                kernel.add(column, source, [region(row).cut(shift, shift + length) for row in added])
            correct = noise[:m].copy()
            correct[:, shift : shift + length] = expected
            if not np.array_equal(whole, correct):
                return f"parity at k={k}, m={m}, length {length}"
            correct[:, shift : shift + length] ^= noise[:m, shift : shift + length]
            if not np.array_equal(added, correct):
                return f"update at k={k}, m={m}, length {length}"
    return None
