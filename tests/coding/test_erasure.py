"""The code: any k fragments give back the rest, in agreement with reedsolo, on every back end."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import reedsolo

from holdfast.coding import ErasureCode

SHAPES = [(1, 1), (2, 1), (4, 2), (8, 4), (12, 3)]


def fragments_of(code: ErasureCode, length: int, seed: int = 0) -> list[np.ndarray]:
    data = list(np.random.default_rng(seed).integers(0, 256, (code.k, length), dtype=np.uint8))
    parity = [np.empty(length, np.uint8) for _ in range(code.m)]
    code.encode(data, parity)
    return data + parity


@pytest.mark.parametrize(("k", "m"), [*SHAPES, (5, 3), (60, 4), (223, 32), (254, 1), (1, 254)])
def test_every_byte_column_is_a_codeword_of_reedsolo(k: int, m: int) -> None:
    fragments = np.stack(fragments_of(ErasureCode(k, m), 40))
    oracle = reedsolo.RSCodec(m)
    for column in range(fragments.shape[1]):
        assert bytes(oracle.encode(fragments[:k, column].tobytes())) == fragments[:, column].tobytes()


@pytest.mark.parametrize(("k", "m"), SHAPES[:-1])
def test_any_loss_of_at_most_m_fragments_is_rebuilt(k: int, m: int) -> None:
    code = ErasureCode(k, m)
    fragments = fragments_of(code, 97)
    for count in range(m + 1):
        for lost in combinations(range(k + m), count):
            out = {j: np.zeros(97, np.uint8) for j in lost}
            code.reconstruct({j: fragment for j, fragment in enumerate(fragments) if j not in lost}, out)
            for j in lost:
                np.testing.assert_array_equal(out[j], fragments[j])
