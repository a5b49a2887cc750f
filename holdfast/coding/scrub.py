"""Where the damage is, when no checksum says so.

A valid codeword has zero syndromes. Where they are not zero, they say which fragment is wrong as long as at most half as many
are wrong as there are spare fragments: with m = 1 damage is seen and cannot be placed, with m = 2 one bad fragment is named.
Each byte column is judged by itself, so one chunk may have its first bytes wrong in one fragment and its last in another.

Being named is evidence and not proof: more bad fragments than that in the same column may look like one other. After a repair
the checksum has to agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from reedsolo import ReedSolomonError, RSCodec

from holdfast.coding.field import MULTIPLY, check_matrix, locator_polynomial, locators

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from holdfast.coding.field import Bytes


@dataclass(frozen=True, slots=True)
class DamagedChunk:
    """A chunk whose fragments contradict each other."""

    offset: int
    length: int
    columns: int  # how many bytes of the chunk are wrong in some fragment
    fragments: tuple[int, ...]  # the wrong ones, few enough to be rebuilt; empty when that cannot be told


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """What a scrub of `length` bytes per fragment found."""

    length: int
    damaged: tuple[DamagedChunk, ...]

    @property
    def is_clean(self) -> bool:
        return not self.damaged

    @property
    def is_located(self) -> bool:
        """Every damaged chunk names its culprits, so that each can be rebuilt from the other fragments."""
        return all(chunk.fragments for chunk in self.damaged)

    @property
    def fragments(self) -> tuple[int, ...]:
        """All fragments that are wrong somewhere."""
        return tuple(sorted({index for chunk in self.damaged for index in chunk.fragments}))

    def __str__(self) -> str:
        if self.is_clean:
            return f"clean: {self.length} bytes per fragment agree"
        lines = [f"{len(self.damaged)} damaged chunks"]
        for chunk in self.damaged:
            where = f"[{chunk.offset}, {chunk.offset + chunk.length})"
            culprits = f"fragment {', '.join(map(str, chunk.fragments))}" if chunk.fragments else "cannot tell which fragment"
            lines.append(f"  bytes {where}: {chunk.columns} wrong, {culprits}")
        return "\n".join(lines)


def syndrome_matrix(k: int, m: int, have: tuple[int, ...]) -> Bytes:
    """The (len(have)-k) × len(have) checks that the fragments `have` satisfy whatever the missing ones hold.

    The polynomial Γ that vanishes at the missing locators combines the full checks into fewer that do not see those
    fragments: row t is the sum over i of Γ_i times row t+i.
    """
    checks, elements = check_matrix(k, m), locators(k, m)
    missing = [j for j in range(k + m) if j not in have]
    gamma = locator_polynomial(elements[missing])
    rows = np.zeros((m - len(missing), len(have)), np.uint8)
    for t in range(rows.shape[0]):
        for i, coefficient in enumerate(gamma):
            rows[t] ^= MULTIPLY[coefficient, checks[t + i, list(have)]]
    return rows


def locate(k: int, m: int, fragments: Mapping[int, Bytes], syndromes_ML: Bytes) -> tuple[int, tuple[int, ...]]:
    """The number of damaged byte columns, and the fragments that explain all of them; none if nothing does.

    One column is decoded, then every column that the same culprits explain is crossed off: damage comes in runs, so this
    ends after one or two columns.
    """
    columns = np.flatnonzero(syndromes_ML.any(axis=0))
    spare = len(fragments) - k
    culprits: set[int] = set()
    left = columns
    while left.size:
        found = _decode_column(k, m, fragments, int(left[0]))
        culprits |= found
        # reedsolo answers beyond its reach too, so what it says is taken only within it: half as many as there are spare.
        if not found or 2 * len(found) > spare or len(culprits) > spare:
            return columns.size, ()
        explained = _explained(locators(k, m)[sorted(found)], syndromes_ML[:, left])
        if not explained[0]:
            return columns.size, ()
        left = left[~explained]
    return columns.size, tuple(sorted(culprits))


def _decode_column(k: int, m: int, fragments: Mapping[int, Bytes], column: int) -> set[int]:
    """The wrong fragments in one byte column, by reedsolo; empty when there are too many to tell."""
    missing = [j for j in range(k + m) if j not in fragments]
    word = bytes(int(fragments[j][column]) if j in fragments else 0 for j in range(k + m))
    try:
        _, _, errata = RSCodec(m).decode(word, erase_pos=missing)
    except ReedSolomonError:
        return set()
    return {int(position) for position in errata} - set(missing)


def _explained(culprits: Bytes, syndromes_ML: Bytes) -> NDArray[np.bool_]:
    """True for each column whose syndromes follow the recurrence of the culprits: sum over i of Λ_i S_(t+i) = 0 for all t."""
    polynomial = locator_polynomial(culprits)
    explained = np.ones(syndromes_ML.shape[1], np.bool_)
    for t in range(syndromes_ML.shape[0] - len(culprits)):
        total = np.zeros(syndromes_ML.shape[1], np.uint8)
        for i, coefficient in enumerate(polynomial):
            total ^= MULTIPLY[coefficient, syndromes_ML[t + i]]
        explained &= total == 0
    return explained
