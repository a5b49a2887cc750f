"""What the tests of the code share: the back ends that are here, and random fragments."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from holdfast.coding import ErasureCode

if TYPE_CHECKING:
    from collections.abc import Callable

BACKENDS = ["isal", pytest.param("numba", marks=pytest.mark.skipif(not find_spec("numba"), reason="no numba")), "numpy"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """noise(rows, columns): random bytes, the same in every run; every call gives others."""
    generator = np.random.default_rng(20240229)
    return lambda *shape: generator.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def fragments_of(noise: Callable[..., np.ndarray]) -> Callable[[ErasureCode, int], list[np.ndarray]]:
    """k random data fragments of a length, and their m parities."""

    def make(code: ErasureCode, length: int) -> list[np.ndarray]:
        data, parity = list(noise(code.k, length)), list(noise(code.m, length))
        code.encode(data, parity)
        return data + parity

    return make
