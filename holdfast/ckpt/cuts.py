"""One rank's tensor of one array: which boxes of stored arrays it is made of, and where in it each goes. Pure.

Read forwards this cuts what is stored for a trainer; read backwards it says where in the checkpoint a trainer's tensor belongs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Shape, shard_box
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.rules import Rule
from holdfast.errors import LayoutMismatch


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a stored array, and where its first element goes in the local tensor."""

    array: str
    box: Box
    at: Shape


@dataclass(frozen=True, slots=True)
class LocalArray:
    """One rank's tensor of one array. Elements that no part fills are padding, and zero.

    `shape` has the dimensions of the stored array. A single expert out of a stacked array is one row of it: `is_row`, and the
    trainer's tensor has `tensor_shape`, without the leading 1.
    """

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    is_row: bool = False

    @property
    def tensor_shape(self) -> Shape:
        return self.shape[1:] if self.is_row else self.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def box(self) -> Box | None:
        """The one box of the stored array of the same name that this is, where it is one."""
        if len(self.parts) == 1 and self.parts[0].box.shape == self.shape and not self.is_row:
            return self.parts[0].box if self.parts[0].array.partition("@rank-")[0] == self.name else None
        return None


def cut(
    name: str, sources: Sequence[ArraySpec], rule: Rule, mesh: Mesh, where: Mapping[str, int], expert: int | None = None
) -> LocalArray:
    """What the rank at `where` on `mesh` holds of a trainer's array that is stored as `sources`: one, or one for each block.

    Tensor and expert parallelism cut first, and what is left is cut by rows: the order FSDP2 has on a 2-D mesh.
    """
    row = 0 if expert is None else 1
    shape, parts = _cut_tp(sources, rule, mesh.size("tp"), where.get("tp", 0), expert)
    if rule.ep is not None and mesh.size("ep") > 1 and shape:
        shape, parts = _clip(shape, parts, shard_box(shape, [(rule.ep, mesh.size("ep"), where["ep"])]))
    if mesh.size("dp", "fsdp") > 1 and len(shape) > row:
        index = where.get("dp", where.get("fsdp", 0))
        shape, parts = _clip(shape, parts, shard_box(shape, [(row, mesh.size("dp", "fsdp"), index)]))
    return LocalArray(name, sources[0].dtype, shape, tuple(parts), expert is not None)


def _cut_tp(sources: Sequence[ArraySpec], rule: Rule, size: int, index: int, expert: int | None) -> tuple[Shape, list[Part]]:
    spec = sources[0]
    if rule.blocks and spec.shape and (size > 1 or len(sources) > 1):
        return _cut_blocks(sources, rule, size, index, expert)
    whole = _whole(spec, expert)
    parts = [Part(spec.name, whole, (0,) * len(spec.shape))]
    if rule.tp is None or not spec.shape:
        return whole.shape, parts
    dim = rule.tp + (0 if expert is None else 1)
    multiple = rule.pad * size if rule.pad > 1 else 1
    padded = _replaced(whole.shape, dim, -(-whole.shape[dim] // multiple) * multiple)
    return _clip(padded, parts, shard_box(padded, [(dim, size, index)]))


def _whole(spec: ArraySpec, expert: int | None) -> Box:
    return Box.whole(spec.shape) if expert is None else Box.whole(spec.shape).rows(expert, expert + 1)


# -- fused blocks ------------------------------------------------------------------------------------------------------


def _cut_blocks(
    sources: Sequence[ArraySpec], rule: Rule, size: int, index: int, expert: int | None
) -> tuple[Shape, list[Part]]:
    """The rank's share of each block, in the trainer's order."""
    dim = (rule.tp or 0) + (0 if expert is None else 1)
    whole = _whole(sources[0], expert)
    parts: list[Part] = []
    at = 0
    for block, start, stop in _segments(rule, block_extents(sources, rule, expert), size, index):
        source = sources[block if len(sources) > 1 else 0]
        box = Box(_replaced(whole.offset, dim, start), _replaced(whole.shape, dim, stop - start))
        parts.append(Part(source.name, box, _replaced((0,) * len(whole.shape), dim, at)))
        at += stop - start
    return _replaced(whole.shape, dim, at), parts


def _replaced(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])


def _segments(rule: Rule, blocks: tuple[tuple[int, int], ...], size: int, index: int) -> Iterator[tuple[int, int, int]]:
    """(block, start, stop) in stored rows, in the order in which the trainer's tensor has them.

    `blocks` gives each block's first row in its stored array and its rows.
    """
    if rule.groups == 1:
        for block, (first, extent) in enumerate(blocks):
            share = shard_box((extent,), [(0, size, index)])
            yield block, first + share.offset[0], first + share.end[0]
        return
    groups = shard_box((rule.groups,), [(0, size, index)])
    for group in range(groups.offset[0], groups.end[0]):
        for block, (first, extent) in enumerate(blocks):
            rows = extent // rule.groups
            if all(start == 0 for start, _ in blocks):  # each block has an array of its own, its groups side by side
                yield block, group * rows, (group + 1) * rows
            else:  # fused in the checkpoint too, in the same order
                before = group * sum(count // rule.groups for _, count in blocks) + first // rule.groups
                yield block, before, before + rows


def block_extents(sources: Sequence[ArraySpec], rule: Rule, expert: int | None = None) -> tuple[tuple[int, int], ...]:
    """First row and rows of every block, in its stored array. Raises LayoutMismatch when the shapes do not fit the blocks."""
    dim, shape = (rule.tp or 0) + (0 if expert is None else 1), sources[0].shape
    if len(sources) > 1:
        found = tuple(source.shape[dim] for source in sources)
        if rule.block_extents(sum(found)) != found:
            names = ", ".join(source.name for source in sources)
            raise LayoutMismatch(f"{names}: have {list(found)} rows, the rule says {list(rule.blocks)}")
        return tuple((0, extent) for extent in found)
    extents = rule.block_extents(shape[dim])
    if extents is None:
        raise LayoutMismatch(f"{sources[0].name}: blocks {list(rule.blocks)} do not add up to dimension {dim} of {list(shape)}")
    return tuple((sum(extents[:block]), extent) for block, extent in enumerate(extents))


def check_blocks(name: str, sources: Sequence[ArraySpec], rule: Rule, size: int, expert: int | None = None) -> None:
    """Raise LayoutMismatch for blocks that `size` ranks would tear apart where a rule says that they hang together."""
    extents = [extent for _, extent in block_extents(sources, rule, expert)]
    if rule.groups > 1 and (rule.groups % size or any(extent % rule.groups for extent in extents)):
        raise LayoutMismatch(f"{name}: {rule.groups} groups of blocks {extents} cannot be dealt out to {size} ranks for tp")
    for extent in extents:
        if extent % rule.unit or (rule.groups == 1 and extent // rule.unit % size):
            raise LayoutMismatch(
                f"{name}: a block of {extent} rows in units of {rule.unit} cannot be cut into {size} equal parts for tp"
            )


def _clip(shape: Shape, parts: Iterable[Part], box: Box) -> tuple[Shape, list[Part]]:
    """The part of a local tensor that lies in `box`, as a local tensor of its own."""
    kept = []
    for part in parts:
        common = Box(part.at, part.box.shape).intersect(box)
        if common is not None:
            moved = tuple(base + low - at for base, low, at in zip(part.box.offset, common.offset, part.at, strict=True))
            at = tuple(low - base for low, base in zip(common.offset, box.offset, strict=True))
            kept.append(Part(part.array, Box(moved, common.shape), at))
    return box.shape, kept
