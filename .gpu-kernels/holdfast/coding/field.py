"""GF(2^8) and the matrices of the code: small, exact, and the reference every fast back end is checked against.

The field is the one of polynomial 0x11d with generator 2. A codeword is the k data fragments followed by the m parities, read
as a polynomial with the highest power first; it is valid when it vanishes at 2^0 … 2^(m-1). This is what reedsolo computes with
`fcr=0`, so any byte column can be checked by a second implementation. The root 2^0 = 1 says that the XOR of all fragments is
zero: with m = 1 the parity is plain XOR.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

POLYNOMIAL = 0x11D
MAX_FRAGMENTS = 255  # one fewer than field elements: each position needs its own non-zero power of the generator


def _powers_of_two() -> Bytes:
    powers, value = np.zeros(510, np.uint8), 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        value = value << 1 ^ (POLYNOMIAL if value & 0x80 else 0)
    return powers


EXP = _powers_of_two()  # EXP[e] = 2^e, long enough that a sum of two logarithms needs no modulo
LOG = np.zeros(256, np.int64)  # LOG[0] is meaningless: zero has no logarithm
LOG[EXP[:255]] = np.arange(255)


def _products() -> Bytes:
    table: Bytes = EXP[LOG[:, None] + LOG[None, :]]
    table[0, :] = table[:, 0] = 0
    return table


MULTIPLY = _products()  # MULTIPLY[a, b] = a·b

for _table in (EXP, LOG, MULTIPLY):
    _table.setflags(write=False)


def matmul(left_RN: Bytes, right_NC: Bytes) -> Bytes:
    """The product over the field. The plainest possible code, because it is what the fast ones are compared with."""
    result = np.zeros((left_RN.shape[0], right_NC.shape[1]), np.uint8)
    for n in range(left_RN.shape[1]):
        result ^= MULTIPLY[left_RN[:, n, None], right_NC[n]]
    return result


def invert(matrix_NN: Bytes) -> Bytes:
    """The inverse by Gauss-Jordan elimination; `ConfigError` for a singular matrix, which no choice of fragments leads to."""
    size = matrix_NN.shape[0]
    work = np.concatenate([matrix_NN, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivots = np.flatnonzero(work[column:, column])
        if not pivots.size:
            raise ConfigError(f"a {size}×{size} matrix over GF(2^8) is singular at column {column}: no fragments decode by it")
        pivot = column + int(pivots[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = MULTIPLY[EXP[255 - LOG[work[column, column]]], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= MULTIPLY[factors[:, None], work[column]]
    return work[:, size:]


def locators(k: int, m: int) -> Bytes:
    """X_j = 2^(n-1-j), the field element that stands for fragment j."""
    return EXP[np.arange(k + m - 1, -1, -1)]


@cache
def check_matrix(k: int, m: int) -> Bytes:
    """H, m × (k+m), with H[i, j] = X_j^i: the product with a valid codeword is zero."""
    exponents = np.arange(m)[:, None] * np.arange(k + m - 1, -1, -1)[None, :]
    return _frozen(EXP[exponents % 255])


@cache
def parity_matrix(k: int, m: int) -> Bytes:
    """P, m × k: parities = P · data."""
    return decode_matrix(k, m, have=tuple(range(k)), want=tuple(range(k, k + m)))


def decode_matrix(k: int, m: int, have: Sequence[int], want: Sequence[int]) -> Bytes:
    """The len(want) × k matrix that turns the k fragments `have` into the fragments `want`.

    H · codeword = 0 splits into the fragments that are here and the m that are not: missing = H_missing⁻¹ · H_have · have.
    H_missing is a Vandermonde matrix of distinct elements and so can always be inverted. This inverts m × m and not k × k.
    """
    missing = [j for j in range(k + m) if j not in set(have)]
    checks = check_matrix(k, m)
    solution = matmul(invert(checks[:, missing]), checks[:, list(have)])
    return _frozen(solution[[missing.index(j) for j in want]])


def locator_polynomial(elements: Sequence[int] | Bytes) -> Bytes:
    """Coefficients, lowest power first, of the product of (x - e) over the elements."""
    coefficients = np.ones(1, np.uint8)
    for element in elements:
        shifted = np.concatenate([np.zeros(1, np.uint8), coefficients])
        shifted[:-1] ^= MULTIPLY[int(element), coefficients]
        coefficients = shifted
    return coefficients


def _frozen(matrix: Bytes) -> Bytes:
    matrix = np.ascontiguousarray(matrix)
    matrix.setflags(write=False)
    return matrix
