"""What a save will write, and where: decided once, from the fragment table alone, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from holdfast.arrays import SMALL_ARRAY_NBYTES, ArraySpec, Box, Fragment, FragmentTable, check_coverage
from holdfast.ckpt.packing import MAX_LEVEL
from holdfast.ckpt.strips import ArrayLayout, Run, choose_layout, choose_split_layout
from holdfast.ckpt.zarrdoc import array_document
from holdfast.errors import ConfigError, StateError

PARENT = "parent"
"""Where layout.json names the step that this one was made from."""

MAX_NAME_PART_NBYTES = 200
"""Filesystems stop at 255 bytes; the rest is kept for what a later format may append."""


@dataclass(frozen=True)
class WritePlan:
    """A pure value: every array's layout, the state's own layout (mesh, placements), and the step."""

    step: int
    arrays: dict[str, ArrayLayout]
    layout: dict[str, Any] = field(default_factory=dict)
    whole_files: bool = False
    """Every file has one writer, as object stores want it."""
    part_of: str | None = None
    """For a part of a plan: the digest of the whole."""

    def part(self, names: Iterable[str]) -> WritePlan:
        """The plan for some arrays: all that a writer of these needs, and small enough to send."""
        arrays = {name: self.arrays[name] for name in names}
        return WritePlan(self.step, arrays, whole_files=self.whole_files, part_of=self.digest)

    @property
    def inherits(self) -> bool:
        """Whether bytes may be taken from an earlier step."""
        return PARENT in self.layout

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


def plan_write(
    table: FragmentTable,
    *,
    step: int,
    layout: Mapping[str, Any] | None = None,
    whole_files: bool = False,
    compress: Mapping[str, int] | None = None,
) -> WritePlan:
    """The plan that writes all ranks' distinct fragments as one checkpoint.

    `whole_files` is for object stores (`storage.is_remote`): files are cut as the fragments are. `compress` gives zstd levels (1
    to 19) by shell pattern over array names, the first that matches: {"optim/*": 3}. Arrays below 64 KiB, and those whose
    fragments form no regular grid, stay as they are.

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
    levels = _levels(specs.values(), compress or {})
    arrays = {name: _layout(specs[name], boxes[name], whole_files, levels.get(name)) for name in sorted(specs)}
    return WritePlan(step, arrays, json.loads(json.dumps(layout or {})), whole_files)


def _layout(spec: ArraySpec, boxes: list[Box], whole_files: bool, level: int | None) -> ArrayLayout:
    split = choose_split_layout(spec, boxes, level) if level is not None or (whole_files and is_large(spec)) else None
    return split or choose_layout(spec, boxes)


def is_large(spec: ArraySpec) -> bool:
    return spec.nbytes >= SMALL_ARRAY_NBYTES


def _levels(specs: Iterable[ArraySpec], compress: Mapping[str, int]) -> dict[str, int]:
    wrong = next((level for level in compress.values() if not 1 <= level <= MAX_LEVEL), None)
    if wrong is not None:
        raise ConfigError(f"zstd level {wrong}: it has to be 1 to {MAX_LEVEL}")
    first = {
        spec.name: next((level for pattern, level in compress.items() if fnmatchcase(spec.name, pattern)), None)
        for spec in specs
        if is_large(spec)
    }
    return {name: level for name, level in first.items() if level is not None}


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
