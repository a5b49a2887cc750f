"""Any stored layout to any mesh: what each target rank holds, as boxes of stored arrays. Pure; printed by `--dry-run`.

The stored side needs no description, for a checkpoint names logical arrays. So a plan only says which boxes a rank wants and
where in its local tensor they go; read backwards, the same plan says where a rank's local tensors belong in a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.arrays import ITEMSIZE, ArraySpec, Box, Shape, rank_name, shard_box
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.rules import CONVENTIONS, Rule, Rules, parameter_of
from holdfast.errors import LayoutMismatch

_RANK_LOCAL = re.compile(r"(.+)@rank-(\d+)")


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a stored array, and where its first element goes in the local tensor."""

    array: str
    box: Box
    at: Shape


@dataclass(frozen=True, slots=True)
class LocalArray:
    """One rank's tensor of one array. Elements that no part fills are padding, and zero."""

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def box(self) -> Box | None:
        """The one box of the stored array that this is, where it is one."""
        if len(self.parts) == 1 and self.parts[0].box.shape == self.shape:
            return self.parts[0].box
        return None


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """What every rank of a mesh holds."""

    mesh: Mesh
    ranks: tuple[tuple[LocalArray, ...], ...]

    @property
    def rank_nbytes(self) -> tuple[int, ...]:
        return tuple(sum(local.nbytes for local in rank) for rank in self.ranks)


def plan_reshard(
    specs: Mapping[str, ArraySpec],
    mesh: Mesh,
    *,
    rules: Rules | None = None,
    world: int | None = None,
) -> ReshardPlan:
    """Who holds what on `mesh`. Raises LayoutMismatch for a mesh that the arrays cannot be cut for.

    `world` is the number of ranks that saved. State that a rank had for itself (`<array>@rank-<r>`) goes back to rank r when
    the new mesh has as many ranks; otherwise every rank gets rank 0's.
    """
    rules = rules or CONVENTIONS
    applied = _applied(specs, rules)
    layers = _layers(specs, rules)
    _check_mesh(specs, mesh, applied, layers, rules.source or "the rules")
    ranks = tuple(_rank(specs, mesh, rules, applied, layers, rank, world == mesh.ranks) for rank in range(mesh.ranks))
    return ReshardPlan(mesh, ranks)


def _rank(
    specs: Mapping[str, ArraySpec],
    mesh: Mesh,
    rules: Rules,
    applied: Mapping[str, Rule],
    layers: int,
    rank: int,
    own: bool,
) -> tuple[LocalArray, ...]:
    where = mesh.coordinate(rank)
    locals_ = []
    for name, rule in applied.items():
        if _on_this_rank(name, rule, mesh, rules, layers, where):
            source = specs.get(rank_name(name, rank), specs[name]) if own else specs[name]
            locals_.append(_local(name, source, rule, mesh, where))
    return tuple(locals_)


def _applied(specs: Mapping[str, ArraySpec], rules: Rules) -> dict[str, Rule]:
    """The rule of every array that all ranks share. Optimizer state of another shape than its parameter is not cut."""
    groups = sorted({name.split("/", 1)[0] for name in specs})
    applied = {}
    for name in specs:
        if _RANK_LOCAL.fullmatch(name):
            continue
        rule = rules.of(name) or Rule(match=name)
        if name.count("/") > 1:
            parameters = [specs[known] for group in groups if (known := f"{group}/{parameter_of(name)}") in specs]
            if parameters and parameters[0].shape != specs[name].shape:
                rule = Rule(match=rule.match, stage=rule.stage)
        applied[name] = rule
    return applied


def _local(name: str, spec: ArraySpec, rule: Rule, mesh: Mesh, where: Mapping[str, int]) -> LocalArray:
    """Cut by tensor and expert parallelism first, and what is left by rows: the order FSDP2 has on a 2-D mesh."""
    shape, parts = _cut_tp(spec, rule, mesh.size("tp"), where.get("tp", 0))
    if rule.ep is not None and mesh.size("ep") > 1 and spec.shape:
        shape, parts = _cut(shape, parts, shard_box(shape, [(rule.ep, mesh.size("ep"), where["ep"])]))
    if mesh.size("dp", "fsdp") > 1 and spec.shape:
        index = where.get("dp", where.get("fsdp", 0))
        shape, parts = _cut(shape, parts, shard_box(shape, [(0, mesh.size("dp", "fsdp"), index)]))
    return LocalArray(name, spec.dtype, shape, tuple(parts))


def _cut_tp(spec: ArraySpec, rule: Rule, size: int, index: int) -> tuple[Shape, list[Part]]:
    whole = Part(spec.name, Box.whole(spec.shape), (0,) * len(spec.shape))
    if rule.tp is None or not spec.shape:
        return spec.shape, [whole]
    dim = rule.tp
    if rule.blocks and size > 1:
        return _cut_blocks(spec, rule, size, index)
    unit = rule.pad * size if rule.pad > 1 else 1
    padded = (*spec.shape[:dim], -(-spec.shape[dim] // unit) * unit, *spec.shape[dim + 1 :])
    return _cut(padded, [whole], shard_box(padded, [(dim, size, index)]))


def _cut_blocks(spec: ArraySpec, rule: Rule, size: int, index: int) -> tuple[Shape, list[Part]]:
    """Fused blocks: the rank's share of each block, one after the other."""
    dim, parts, at, start = rule.tp or 0, [], 0, 0
    for extent in rule.blocks:
        share = shard_box((extent,), [(0, size, index)])
        offset = (*(0,) * dim, start + share.offset[0], *(0,) * (len(spec.shape) - dim - 1))
        shape = (*spec.shape[:dim], share.shape[0], *spec.shape[dim + 1 :])
        parts.append(Part(spec.name, Box(offset, shape), (*(0,) * dim, at, *(0,) * (len(spec.shape) - dim - 1))))
        at, start = at + share.shape[0], start + extent
    return (*spec.shape[:dim], at, *spec.shape[dim + 1 :]), parts


def _cut(shape: Shape, parts: Iterable[Part], box: Box) -> tuple[Shape, list[Part]]:
    """The part of a local tensor that lies in `box`, as a local tensor of its own."""
    kept = []
    for part in parts:
        common = Box(part.at, part.box.shape).intersect(box)
        if common is not None:
            moved = tuple(base + low - at for base, low, at in zip(part.box.offset, common.offset, part.at, strict=True))
            at = tuple(low - base for low, base in zip(common.offset, box.offset, strict=True))
            kept.append(Part(part.array, Box(moved, common.shape), at))
    return box.shape, kept


# -- pipeline stages and single experts --------------------------------------------------------------------------------


def _number(name: str, words: Iterable[str]) -> int | None:
    """The number that follows one of `words` in a name: 7 for `layers.7.wq.weight`."""
    match = re.search(rf"(?:^|[./])(?:{'|'.join(map(re.escape, words))})\.(\d+)\.", parameter_of(name))
    return int(match[1]) if match else None


def _layers(specs: Iterable[str], rules: Rules) -> int:
    return 1 + max((number for name in specs if (number := _number(name, rules.layers)) is not None), default=-1)


def _on_this_rank(name: str, rule: Rule, mesh: Mesh, rules: Rules, layers: int, where: Mapping[str, int]) -> bool:
    stages, stage = mesh.size("pp"), where.get("pp", 0)
    if stages == 1:
        return True
    layer = _number(name, rules.layers)
    if layer is not None:
        return layers * stage // stages <= layer < layers * (stage + 1) // stages
    kind = rule.stage or ("first" if re.search(r"emb|wte|wpe", parameter_of(name)) else "last")
    return kind == "all" or stage == (0 if kind == "first" else stages - 1)


def _check_mesh(specs: Mapping[str, ArraySpec], mesh: Mesh, applied: Mapping[str, Rule], layers: int, source: str) -> None:
    if mesh.size("pp") > max(1, layers):
        raise LayoutMismatch(f"mesh {mesh}: {mesh.size('pp')} pipeline stages need as many layers, the checkpoint has {layers}")
    for axis in ("tp", "ep"):
        cut = [(name, dim) for name, rule in applied.items() if (dim := getattr(rule, axis)) is not None]
        if mesh.size(axis) > 1 and not cut:
            raise LayoutMismatch(
                f"mesh {mesh}: {source} cut no array of this checkpoint by {axis}; give --rules (docs/ckpt.md)"
            )
        for name, dim in cut:
            _check_dim(specs[name], axis, dim, mesh.size(axis))
    for name, rule in applied.items():
        shape = specs[name].shape
        if rule.blocks and shape and sum(rule.blocks) != shape[rule.tp or 0]:
            raise LayoutMismatch(f"{name}: blocks {list(rule.blocks)} do not add up to dimension {rule.tp} of {list(shape)}")


def _check_dim(spec: ArraySpec, axis: str, dim: int, size: int) -> None:
    if spec.shape and dim >= len(spec.shape):
        raise LayoutMismatch(f"{spec.name}: the rule cuts dimension {dim} by {axis}, its shape is {list(spec.shape)}")
    if spec.shape and spec.shape[dim] < size:
        raise LayoutMismatch(f"{spec.name}: dimension {dim} of {list(spec.shape)} cannot be cut into {size} parts for {axis}")
