"""GF(2^8) and the matrices of the code."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from holdfast.coding.field import (
    EXP,
    MULTIPLY,
    check_matrix,
    decode_matrix,
    invert,
    locator_polynomial,
    matmul,
    parity_matrix,
)
from holdfast.errors import ConfigError


def multiply_by_hand(a: int, b: int) -> int:
    """Schoolbook: shift, add, reduce by 0x11d."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


def test_the_multiplication_table_is_the_field_of_0x11d() -> None:
    by_hand = [[multiply_by_hand(a, b) for b in range(256)] for a in range(256)]
    np.testing.assert_array_equal(MULTIPLY, np.array(by_hand, np.uint8))


def test_tables_cannot_be_changed_by_accident() -> None:
    for table in (MULTIPLY, EXP, parity_matrix(4, 2), check_matrix(4, 2)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1


def test_the_inverse_times_the_matrix_is_the_identity() -> None:
    generator = np.random.default_rng(1)
    for size in (1, 2, 5, 17):
        matrix = EXP[generator.integers(0, 255) + np.outer(np.arange(size), np.arange(size)) % 255 % 200]
        np.testing.assert_array_equal(matmul(invert(matrix), matrix), np.eye(size, dtype=np.uint8))


def test_a_singular_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="singular"):
        invert(np.array([[1, 2, 3], [1, 2, 3], [0, 0, 1]], np.uint8))


def test_one_parity_is_plain_xor() -> None:
    for k in (1, 2, 7, 254):
        np.testing.assert_array_equal(parity_matrix(k, 1), np.ones((1, k), np.uint8))


def test_no_parity_is_an_empty_matrix() -> None:
    assert parity_matrix(5, 0).shape == (0, 5)


@pytest.mark.parametrize(("k", "m"), [(4, 2), (8, 2), (8, 4), (12, 3), (254, 1), (1, 254), (128, 127)])
def test_the_xor_of_all_fragments_is_zero(k: int, m: int) -> None:
    np.testing.assert_array_equal(np.bitwise_xor.reduce(parity_matrix(k, m), axis=0), np.ones(k, np.uint8))


@pytest.mark.parametrize(("k", "m"), [(4, 2), (8, 2), (8, 4), (12, 3)])
def test_every_choice_of_k_fragments_determines_the_data(k: int, m: int) -> None:
    generator = np.concatenate([np.eye(k, dtype=np.uint8), parity_matrix(k, m)])
    for have in combinations(range(k + m), k):
        invert(generator[list(have)])  # raises if it cannot be done


def test_decoding_inverts_the_rows_of_the_generator() -> None:
    k, m, have = 6, 3, (1, 2, 4, 6, 7, 8)
    generator = np.concatenate([np.eye(k, dtype=np.uint8), parity_matrix(k, m)])
    np.testing.assert_array_equal(decode_matrix(k, m, have, want=(0, 3, 5)), invert(generator[list(have)])[[0, 3, 5]])


def test_a_locator_polynomial_vanishes_at_its_elements_only() -> None:
    elements = [1, 2, 77, 200]
    polynomial = locator_polynomial(elements)
    powers = np.ones(256, np.uint8)
    total = np.zeros(256, np.uint8)
    for coefficient in polynomial:
        total ^= MULTIPLY[coefficient, powers]
        powers = MULTIPLY[powers, np.arange(256)]
    assert set(np.flatnonzero(total == 0)) == set(elements)
