"""What differs between two checkpoints: arrays, rows, and by how much.

Equal checksums settle most arrays without reading them; only runs that differ, or that were cut differently, are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holdfast.arrays import ITEMSIZE, Box, split_rows
from holdfast.ckpt.reader import Checkpoint

PIECE_NBYTES = 8 << 20

_NUMBERS = {name for name in ITEMSIZE if not name.startswith(("float8", "complex"))}
"""Dtypes in which a largest change means something and can be computed without torch."""


@dataclass(frozen=True, slots=True)
class ArrayDifference:
    """An array that is not the same: how much of it, the first such row, the largest change where there are numbers."""

    name: str
    what: str
    elements: int = 0
    rows: int = 0
    first_row: int | None = None
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """All that differs; `is_same` when nothing does."""

    one: str
    other: str
    equal: int
    changed: list[ArrayDifference] = field(default_factory=list)
    only_one: list[str] = field(default_factory=list)
    only_other: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    read_nbytes: int = 0

    @property
    def is_same(self) -> bool:
        return not (self.changed or self.only_one or self.only_other or self.objects)


def diff(one: Checkpoint, other: Checkpoint, only: Callable[[str], bool] = lambda _: True) -> Difference:
    """Compare two checkpoints, whatever layouts they were written from. Reads only what checksums leave open."""
    names, others = ({name for name in checkpoint.specs if only(name)} for checkpoint in (one, other))
    changed: list[ArrayDifference] = []
    read_nbytes = 0
    for name in sorted(names & others):
        if one.specs[name] != other.specs[name]:
            changed.append(ArrayDifference(name, f"{_kind(one, name)} became {_kind(other, name)}"))
        elif not _same_checksums(one, other, name):
            read_nbytes += 2 * one.specs[name].nbytes
            found = _compare(one, other, name)
            changed += [found] if found.elements else []
    return Difference(
        str(one.path),
        str(other.path),
        len(names & others) - len(changed),
        changed,
        sorted(names - others),
        sorted(others - names),
        sorted(_changed_objects(one, other)),
        read_nbytes,
    )


def _kind(checkpoint: Checkpoint, name: str) -> str:
    spec = checkpoint.specs[name]
    return f"{spec.dtype}{list(spec.shape)}"


def _same_checksums(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    sums = [{(run.box, run.nbytes): run.blocks.tobytes() for run in checkpoint.runs(name)} for checkpoint in (one, other)]
    return sums[0] == sums[1]


def _compare(one: Checkpoint, other: Checkpoint, name: str) -> ArrayDifference:
    spec = one.specs[name]
    elements, rows, first, largest = 0, 0, None, 0.0
    for box in split_rows(Box.whole(spec.shape), ITEMSIZE[spec.dtype], PIECE_NBYTES):
        a, b = (_piece(checkpoint, name, box) for checkpoint in (one, other))
        differs = (a != b).any(axis=-1).reshape(box.shape)
        if differs.any():
            touched = differs.reshape(box.shape[0] if box.shape else 1, -1).any(axis=1)
            elements, rows = elements + int(differs.sum()), rows + int(touched.sum())
            first = int(np.argmax(touched)) + (box.offset[0] if box.offset else 0) if first is None else first
            largest = max(largest, _largest(a, b, spec.dtype) if spec.dtype in _NUMBERS else 0.0)
    return ArrayDifference(name, "values", elements, rows, first, largest if spec.dtype in _NUMBERS else None)


def _piece(checkpoint: Checkpoint, name: str, box: Box) -> np.ndarray[Any, np.dtype[np.uint8]]:
    itemsize = ITEMSIZE[checkpoint.specs[name].dtype]
    out = np.empty((box.size, itemsize), np.uint8)
    checkpoint.read_box(name, box, out)
    return out


def _largest(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], dtype: str) -> float:
    """The largest absolute difference between two pieces, NaNs left aside."""
    with np.errstate(all="ignore"):  # NaNs and infinities are data here
        values = [_numbers(piece, dtype) for piece in (a, b)]
        gap = np.abs(values[0] - values[1])
    return float(np.nanmax(gap)) if not np.isnan(gap).all() else 0.0


def _numbers(piece: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (piece.view("<u2").astype("<u4") << 16).view("<f4").astype("f8")
    return piece.view(np.dtype(dtype)).astype("f8")


def _changed_objects(one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    for rank in sorted({*one.objects, *other.objects}):
        a, b = one.objects.get(rank, {}), other.objects.get(rank, {})
        yield from (f"{name} of rank {rank}" for name in sorted({*a, *b}) if a.get(name) != b.get(name))
