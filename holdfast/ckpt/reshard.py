"""Any stored layout to any mesh: what each target rank holds, as boxes of stored arrays. Pure; printed by `--dry-run`.

The stored side needs no description, for a checkpoint names logical arrays. So a plan only says which boxes a rank wants and
where in its local tensor they go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from holdfast.arrays import ArraySpec, rank_name, shard_box
from holdfast.ckpt.cuts import LocalArray, Part, check_blocks, cut
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.patterns import filled, matched
from holdfast.ckpt.rules import CONVENTIONS, Rule, Rules, parameter_of
from holdfast.errors import LayoutMismatch

_RANK_LOCAL = re.compile(r"(.+)@rank-(\d+)")


@dataclass(frozen=True)
class ReshardPlan:
    """What every rank of a mesh holds."""

    mesh: Mesh
    ranks: tuple[tuple[LocalArray, ...], ...]

    @property
    def rank_nbytes(self) -> tuple[int, ...]:
        return tuple(sum(local.nbytes for local in rank) for rank in self.ranks)

    @cached_property
    def replicas(self) -> list[tuple[LocalArray, list[tuple[int, str]]]]:
        """Every distinct local tensor that holds anything, with the ranks that hold it and their names for it."""
        found: dict[tuple[Part, ...], tuple[LocalArray, list[tuple[int, str]]]] = {}
        for rank, locals_ in enumerate(self.ranks):
            for local in locals_:
                if local.nbytes and local.parts:
                    found.setdefault(local.parts, (local, []))[1].append((rank, local.name))
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Wanted:
    """An array as the trainer has it: its name, its rule, and the stored arrays that it is made of."""

    name: str
    rule: Rule
    stored: tuple[str, ...]
    expert: int | None = None
    experts: int = 0


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
    wanted = _wanted(specs, rules)
    bounds = _stage_bounds(wanted, mesh, rules)
    _check_mesh(specs, mesh, wanted, rules.source or "the rules")
    ranks = tuple(_rank(specs, mesh, rules, wanted, bounds, rank, world == mesh.ranks) for rank in range(mesh.ranks))
    return ReshardPlan(mesh, ranks)


def _rank(
    specs: Mapping[str, ArraySpec],
    mesh: Mesh,
    rules: Rules,
    wanted: Iterable[Wanted],
    bounds: tuple[int, ...],
    rank: int,
    own: bool,
) -> tuple[LocalArray, ...]:
    where = mesh.coordinate(rank)
    locals_ = []
    for want in wanted:
        name = _name_on_rank(want, mesh, rules, bounds, where)
        if name is not None:
            sources = [specs.get(rank_name(stored, rank), specs[stored]) if own else specs[stored] for stored in want.stored]
            locals_.append(cut(name, sources, want.rule, mesh, where, want.expert))
    return tuple(locals_)


# -- what the trainer calls it -----------------------------------------------------------------------------------------


def _wanted(specs: Mapping[str, ArraySpec], rules: Rules) -> list[Wanted]:
    """The trainer's arrays, in the order of the stored ones."""
    groups = sorted({name.split("/", 1)[0] for name in specs})
    used: set[str] = set()
    found: list[Wanted] = []
    for name in specs:
        if not _RANK_LOCAL.fullmatch(name) and name not in used:
            for want in _wanted_from(name, specs, rules):
                used.update(want.stored)
                found.append(_as_shaped(want, specs, groups))
    return found


def _wanted_from(name: str, specs: Mapping[str, ArraySpec], rules: Rules) -> Iterator[Wanted]:
    """What the trainer makes of the stored array `name`: the first rule that speaks of it decides."""
    for rule in rules.rules:
        if not rule.stored:
            if rule.speaks_for(name):
                yield Wanted(name, rule, (name,))
                return
            continue
        wild = next((found[0] for pattern in rule.stored if (found := matched(pattern, parameter_of(name)))), None)
        if wild is not None:
            yield from _renamed(name, wild, specs, rule)
            return
    yield Wanted(name, Rule(match=name), (name,))


def _renamed(name: str, wild: tuple[str, ...], specs: Mapping[str, ArraySpec], rule: Rule) -> Iterator[Wanted]:
    stored = tuple(with_parameter(name, filled(pattern, wild)) for pattern in rule.stored)
    missing = [other for other in stored if other not in specs]
    if missing:
        raise LayoutMismatch(f"rule {rule.match!r} is made of {', '.join(stored)}; the checkpoint lacks {', '.join(missing)}")
    if not rule.is_stacked:
        yield Wanted(with_parameter(name, filled(rule.match, wild)), rule, stored)
        return
    experts = _stacked(specs, name)
    for expert in range(experts):
        yield Wanted(with_parameter(name, filled(rule.match, wild, expert)), rule, stored, expert, experts)


def with_parameter(name: str, parameter: str) -> str:
    """`name` with another parameter in it: `optim/<parameter>/exp_avg`."""
    parts = name.split("/")
    return "/".join([parts[0], parameter, *parts[2:]]) if len(parts) > 1 else parameter


def _stacked(specs: Mapping[str, ArraySpec], name: str) -> int:
    """How many experts are stacked in the parameter that `name` belongs to."""
    shapes = [spec.shape for other, spec in specs.items() if parameter_of(other) == parameter_of(name) and spec.shape]
    if not shapes:
        raise LayoutMismatch(f"{name}: a stack of experts has a dimension to stack along; its shape is []")
    return max(shape[0] for shape in shapes)


def _as_shaped(want: Wanted, specs: Mapping[str, ArraySpec], groups: Iterable[str]) -> Wanted:
    """Optimizer state of another shape than its parameter is not cut, and belongs to the first of several stored arrays."""
    name = want.stored[0]
    if name.count("/") > 1:
        parameters = [specs[known] for group in groups if (known := f"{group}/{parameter_of(name)}") in specs]
        if (parameters and parameters[0].shape != specs[name].shape) or (want.expert is not None and not specs[name].shape):
            rule = Rule(match=want.rule.match, stored=want.rule.stored[:1], stage=want.rule.stage)
            return Wanted(want.name, rule, (name,), None, want.experts)
    return want


# -- pipeline stages and single experts --------------------------------------------------------------------------------


def layer_of(name: str, words: Iterable[str]) -> int | None:
    """The number that follows one of `words` in a name: 7 for `layers.7.wq.weight`."""
    match = _layer_match(name, words)
    return int(match[1]) if match else None


def with_layer(name: str, words: Iterable[str], layer: int) -> str:
    """The same name with another number of its layer."""
    match = _layer_match(name, words)
    if match is None:
        return name
    parameter = parameter_of(name)
    return with_parameter(name, f"{parameter[: match.start(1)]}{layer}{parameter[match.end(1) :]}")


def _layer_match(name: str, words: Iterable[str]) -> re.Match[str] | None:
    return re.search(rf"(?:^|[./])(?:{'|'.join(map(re.escape, words))})\.(\d+)\.", parameter_of(name))


def _stage_bounds(wanted: Iterable[Wanted], mesh: Mesh, rules: Rules) -> tuple[int, ...]:
    """The first layer of every stage, and the number of layers at the end."""
    layers = 1 + max((layer for want in wanted if (layer := layer_of(want.name, rules.layers)) is not None), default=-1)
    stages = mesh.size("pp")
    if rules.stages and stages > 1 and (len(rules.stages) != stages or sum(rules.stages) != layers):
        raise LayoutMismatch(
            f"mesh {mesh}: the rules give {len(rules.stages)} stages with {sum(rules.stages)} layers, the checkpoint has {layers}"
        )
    if stages > max(1, layers):
        raise LayoutMismatch(f"mesh {mesh}: {stages} pipeline stages need as many layers, the checkpoint has {layers}")
    if rules.stages and stages > 1:
        return (0, *accumulate(rules.stages))
    return tuple(layers * stage // stages for stage in range(stages + 1))


def _name_on_rank(want: Wanted, mesh: Mesh, rules: Rules, bounds: tuple[int, ...], where: Mapping[str, int]) -> str | None:
    """What the rank calls the array; None when it does not hold it."""
    name, local = want.name, rules.numbering == "local"
    if want.experts and mesh.size("ep") > 1:
        mine = shard_box((want.experts,), [(0, mesh.size("ep"), where["ep"])])
        wild, expert = matched(want.rule.match, parameter_of(name)) or ((), None)
        if expert is None or not mine.offset[0] <= expert < mine.end[0]:
            return None
        name = with_parameter(name, filled(want.rule.match, wild, expert - mine.offset[0])) if local else name
    stages, stage = mesh.size("pp"), where.get("pp", 0)
    if stages == 1:
        return name
    layer = layer_of(name, rules.layers)
    if layer is not None:
        inside = bounds[stage] <= layer < bounds[stage + 1]
        return (with_layer(name, rules.layers, layer - bounds[stage]) if local else name) if inside else None
    kind = want.rule.stage or ("first" if re.search(r"emb|wte|wpe", parameter_of(name)) else "last")
    return name if kind == "all" or stage == (0 if kind == "first" else stages - 1) else None


# -- what cannot be ----------------------------------------------------------------------------------------------------


def _check_mesh(specs: Mapping[str, ArraySpec], mesh: Mesh, wanted: Iterable[Wanted], source: str) -> None:
    wanted = list(wanted)
    for axis in ("tp", "ep"):
        cut_by = [(want, dim) for want in wanted if (dim := getattr(want.rule, axis)) is not None]
        if mesh.size(axis) > 1 and not cut_by and not (axis == "ep" and any(want.experts for want in wanted)):
            raise LayoutMismatch(
                f"mesh {mesh}: {source} cut no array of this checkpoint by {axis}; give --rules (docs/ckpt.md)"
            )
        for want, dim in cut_by:
            _check_dim(specs[want.stored[0]], axis, dim + (want.expert is not None), mesh.size(axis))
    for want in wanted:
        if want.rule.blocks and specs[want.stored[0]].shape:
            check_blocks(want.name, [specs[stored] for stored in want.stored], want.rule, mesh.size("tp"), want.expert)
        if want.experts and mesh.size("ep") > want.experts:
            raise LayoutMismatch(f"{want.name}: {want.experts} experts cannot be dealt out to {mesh.size('ep')} ranks for ep")


def _check_dim(spec: ArraySpec, axis: str, dim: int, size: int) -> None:
    if spec.shape and dim >= len(spec.shape):
        raise LayoutMismatch(f"{spec.name}: the rule cuts dimension {dim} by {axis}, its shape is {list(spec.shape)}")
    if spec.shape and spec.shape[dim] < size:
        raise LayoutMismatch(f"{spec.name}: dimension {dim} of {list(spec.shape)} cannot be cut into {size} parts for {axis}")
