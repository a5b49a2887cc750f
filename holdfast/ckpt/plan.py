"""What a save will write, and where: decided once, from the fragment table alone, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from holdfast.arrays import ArraySpec, Box, Fragment, FragmentTable, check_coverage
from holdfast.ckpt.strips import ArrayLayout, Run, choose_layout
from holdfast.ckpt.zarrdoc import array_document
from holdfast.errors import ConfigError, StateError

MAX_NAME_PART_NBYTES = 200
"""Filesystems stop at 255 bytes; the rest is kept for what a later format may append."""


@dataclass(frozen=True)
class WritePlan:
    """A pure value: every array's layout, the state's own layout (mesh, placements), and the step."""

    step: int
    arrays: dict[str, ArrayLayout]
    layout: dict[str, Any] = field(default_factory=dict)
    part_of: str | None = None
    """For a part of a plan: the digest of the whole."""

    def part(self, names: Iterable[str]) -> WritePlan:
        """The plan for some arrays: all that a writer of these needs, and small enough to send."""
        return WritePlan(self.step, {name: self.arrays[name] for name in names}, part_of=self.digest)

    @property
    def nbytes(self) -> int:
        return sum(array.spec.nbytes for array in self.arrays.values())

    @property
    def specs(self) -> dict[str, ArraySpec]:
        return {name: array.spec for name, array in self.arrays.items()}

    def runs(self, fragment: Fragment) -> list[Run]:
        """Where each byte of the fragment goes; together the runs tile its box."""
        return self.arrays[fragment.array].runs(fragment.box)

    @cached_property
    def digest(self) -> str:
        """Equal on all ranks exactly when their plans are: 16 bytes to compare instead of gathering plans."""
        if self.part_of is not None:
            return self.part_of
        documents = {name: array_document(array) for name, array in self.arrays.items()}
        text = json.dumps([self.step, documents, self.layout], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan_write(table: FragmentTable, *, step: int, layout: Mapping[str, Any] | None = None) -> WritePlan:
    """The plan that writes all ranks' distinct fragments as one checkpoint.

    Raises LayoutMismatch where the fragments leave a hole or overlap, StateError where two names cannot stand side by side in a
    directory tree. Plain values in, plain values out: no I/O, no clock, no torch.
    """
    if step < 0:
        raise ConfigError(f"step {step} is negative")
    specs = table.specs()
    check_names(specs)
    boxes: dict[str, list[Box]] = {name: [] for name in specs}
    for row in table:
        boxes[row.array].append(row.box)
    check_coverage(specs.values(), boxes)
    arrays = {name: choose_layout(specs[name], boxes[name]) for name in sorted(specs)}
    return WritePlan(step, arrays, json.loads(json.dumps(layout or {})))


def check_names(names: Iterable[str]) -> None:
    """Names are paths on disk: no part may be too long, and none may lie inside another array's directory."""
    names = set(names)
    for name in names:
        parts = name.split("/")
        long = next((part for part in parts if len(part.encode(errors="replace")) > MAX_NAME_PART_NBYTES), None)
        if long is not None:
            raise StateError(f"array name part {long[:40]!r}… is longer than {MAX_NAME_PART_NBYTES} bytes; shorten it")
        above = next(("/".join(parts[:cut]) for cut in range(1, len(parts)) if "/".join(parts[:cut]) in names), None)
        if above is not None:
            raise StateError(f"array {name} would lie inside array {above}; rename one of the two")
