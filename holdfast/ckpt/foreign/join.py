"""Putting a trainer's arrays together: the tensors of many ranks, and the layout rules, make the arrays that are stored.

The rules are those that cut a checkpoint for a trainer, read backwards. What several ranks hold has to be equal, and is compared
as it is read, unless a rule says that it is to be averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.arrays import ArraySpec, Box
from holdfast.ckpt.cuts import cut
from holdfast.ckpt.foreign.source import SourceArray, tensor_bytes
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.patterns import filled, matched
from holdfast.ckpt.reshard import layer_of, with_layer, with_parameter
from holdfast.ckpt.rules import Rule, Rules, parameter_of
from holdfast.ckpt.views import box_view
from holdfast.errors import LayoutMismatch


@dataclass(frozen=True)
class Held:
    """What one rank of a trainer holds, by the names it uses; `tp`, `pp` and `ep` say where the rank stands."""

    label: str
    arrays: Mapping[str, SourceArray]
    tp: int = 0
    pp: int = 0
    ep: int = 0


@dataclass(frozen=True)
class _Provider:
    """A tensor that holds a box of a stored array from `at` on; `row` when the tensor lacks the leading dimension."""

    label: str
    array: SourceArray
    at: tuple[int, ...]
    box: Box
    row: bool

    def read(self, box: Box) -> memoryview:
        start = tuple(a + low - base for a, low, base in zip(self.at, box.offset, self.box.offset, strict=True))
        wanted = Box(start[1:], box.shape[1:]) if self.row else Box(start, box.shape)
        if any(held.contains(wanted) for held in self.array.boxes):
            return self.array.read(wanted)
        return self._assembled(wanted)

    def _assembled(self, wanted: Box) -> memoryview:
        out = memoryview(bytearray(self.array.spec.nbytes // max(1, Box.whole(self.array.spec.shape).size) * wanted.size))
        for held in self.array.boxes:
            common = held.intersect(wanted)
            if common is not None:
                data = box_view(self.array.read(common), common, common, self.array.spec.dtype)
                box_view(out, wanted, common, self.array.spec.dtype)[...] = data
        return out


def join(ranks: Sequence[Held], rules: Rules) -> dict[str, SourceArray]:
    """The arrays of a checkpoint, by their stored names. Raises LayoutMismatch where the ranks' tensors do not fit together."""
    named = _globally_named(ranks, rules)
    parts: dict[str, list[tuple[Box, _Provider, bool]]] = {}
    shapes: dict[str, ArraySpec] = {}
    for name, holders in named.items():
        for stored, box, provider, spec, average in _placed(name, holders, named, rules):
            known = shapes.setdefault(stored, spec)
            if known.dtype != spec.dtype or len(known.shape) != len(spec.shape):
                raise LayoutMismatch(
                    f"{stored}: {provider.label} has {spec.dtype}{list(spec.shape)}, others {known.dtype}{list(known.shape)}"
                )
            shapes[stored] = replace(known, shape=tuple(map(max, known.shape, spec.shape)))
            parts.setdefault(stored, []).append((box, provider, average))
    return {stored: _joined(shapes[stored], found) for stored, found in parts.items()}


# -- names -------------------------------------------------------------------------------------------------------------

_Holders = list[tuple[Held, SourceArray]]


def _globally_named(ranks: Sequence[Held], rules: Rules) -> dict[str, _Holders]:
    """Who holds what, with layers and experts counted over all stages and ranks."""
    firsts = _first_layers(ranks, rules)
    named: dict[str, _Holders] = {}
    for rank in ranks:
        for name, array in rank.arrays.items():
            layer = layer_of(name, rules.layers)
            whole = name if layer is None else with_layer(name, rules.layers, layer + firsts[rank.pp])
            named.setdefault(_with_expert(whole, rank, ranks, rules), []).append((rank, array))
    return named


def _first_layers(ranks: Sequence[Held], rules: Rules) -> dict[int, int]:
    """The number of every stage's first layer, where stages count from 0 each."""
    counts: dict[int, int] = {}
    for rank in ranks:
        found = (layer for name in rank.arrays if (layer := layer_of(name, rules.layers)) is not None)
        counts[rank.pp] = max(counts.get(rank.pp, 0), 1 + max(found, default=-1))
    if rules.numbering == "global":
        return dict.fromkeys(counts, 0)
    return {stage: sum(counts[before] for before in counts if before < stage) for stage in counts}


def _with_expert(name: str, rank: Held, ranks: Sequence[Held], rules: Rules) -> str:
    rule = rules.of(name)
    if rule is None or not rule.is_stacked or rules.numbering == "global" or rank.ep == 0:
        return name
    wild, expert = matched(rule.match, parameter_of(name)) or ((), None)
    own = {found[1] for other in rank.arrays if (found := matched(rule.match, parameter_of(other))) and found[1] is not None}
    before = rank.ep * (1 + max(own, default=-1))
    return with_parameter(name, filled(rule.match, wild, before + (expert or 0)))


# -- places ------------------------------------------------------------------------------------------------------------


def _placed(name: str, holders: _Holders, named: Mapping[str, _Holders], rules: Rules) -> Any:
    """(stored name, box, provider, at least this spec, average) for every part of every holder's tensor."""
    rule = rules.of(name) or Rule(match=name)
    local = holders[0][1].spec
    if name.count("/") > 1 and not _is_like_parameter(name, local, named):
        for stored, box, row in _uncut(name, rule, local):
            spec = replace(local, name=stored, shape=box.end)
            yield from (
                (stored, box, _Provider(rank.label, array, box.offset, box, row), spec, False) for rank, array in holders
            )
        return
    size = 1 + max(rank.tp for rank, _ in holders) if rule.tp is not None and local.shape else 1
    mesh = Mesh((("tp", size),))
    expert = (matched(rule.match, parameter_of(name)) or ((), None))[1] if rule.is_stacked else None
    sources = _sources(name, rule, local, size, expert)
    if rule.extent is not None and rule.tp is not None and local.shape:
        rule = replace(rule, pad=local.shape[rule.tp])  # whatever the ranks hold beyond the extent is padding
    for rank, array in holders:
        want = cut(name, sources, rule, mesh, {"tp": rank.tp if size > 1 else 0}, expert)
        if want.tensor_shape != array.spec.shape or array.spec.dtype != local.dtype:
            raise LayoutMismatch(
                f"{name}: {rank.label} holds {array.spec.dtype}{list(array.spec.shape)}; by rule {rule.match!r} and the other "
                f"ranks it should hold {local.dtype}{list(want.tensor_shape)} (docs/ckpt.md, layout rules)"
            )
        for part in want.parts:
            spec = next(source for source in sources if source.name == part.array)
            yield part.array, part.box, _Provider(rank.label, array, part.at, part.box, want.is_row), spec, rule.average


def _is_like_parameter(name: str, local: ArraySpec, named: Mapping[str, _Holders]) -> bool:
    """Whether a piece of optimizer state is shaped like its parameter on the same rank, and so cut like it."""
    parameters = [other for other in named if other.count("/") == 1 and parameter_of(other) == parameter_of(name)]
    return bool(local.shape) and (not parameters or named[parameters[0]][0][1].spec.shape == local.shape)


def _uncut(name: str, rule: Rule, local: ArraySpec) -> list[tuple[str, Box, bool]]:
    """State that is not cut stands under each name that its parameter is stored under."""
    whole = Box.whole(local.shape)
    wild = (matched(rule.match, parameter_of(name)) or ((), None))[0]
    return [(with_parameter(name, filled(pattern, wild)), whole, False) for pattern in rule.stored] or [(name, whole, False)]


def _sources(name: str, rule: Rule, local: ArraySpec, size: int, expert: int | None) -> list[ArraySpec]:
    """The stored arrays that a tensor of this shape, one of `size` parts, belongs to."""
    shape = local.shape
    if rule.tp is not None and shape:
        if rule.tp >= len(shape):
            raise LayoutMismatch(f"{name}: rule {rule.match!r} cuts dimension {rule.tp}, its shape is {list(shape)}")
        extent = rule.extent or shape[rule.tp] * size
        if rule.pad > 1 and rule.extent is None:
            raise LayoutMismatch(f"{name}: rule {rule.match!r} pads it; say how many rows are real (extent = …)")
        if not rule.extent or extent <= shape[rule.tp] * size:
            shape = (*shape[: rule.tp], extent, *shape[rule.tp + 1 :])
        else:
            raise LayoutMismatch(
                f"{name}: rule {rule.match!r} says {extent} rows are real, the ranks hold {shape[rule.tp] * size}"
            )
    lead = () if expert is None else (expert + 1,)
    if not rule.stored:
        return [replace(local, name=name, shape=(*lead, *shape))]
    wild = (matched(rule.match, parameter_of(name)) or ((), None))[0]
    stored = [with_parameter(name, filled(pattern, wild)) for pattern in rule.stored]
    if len(stored) == 1 or rule.tp is None:
        return [replace(local, name=stored[0], shape=(*lead, *shape))]
    extents = rule.block_extents(shape[rule.tp])
    if extents is None:
        raise LayoutMismatch(f"{name}: blocks {list(rule.blocks)} do not add up to dimension {rule.tp} of {list(shape)}")
    return [
        replace(local, name=block, shape=(*lead, *shape[: rule.tp], extent, *shape[rule.tp + 1 :]))
        for block, extent in zip(stored, extents, strict=True)
    ]


# -- bytes -------------------------------------------------------------------------------------------------------------


def _joined(spec: ArraySpec, found: Sequence[tuple[Box, _Provider, bool]]) -> SourceArray:
    providers: dict[Box, list[_Provider]] = {}
    for box, provider, _ in found:
        providers.setdefault(box, []).append(provider)
    average = any(average for _, _, average in found)

    def read(box: Box) -> memoryview:
        held = next(held for held in providers if held.contains(box))
        copies = [provider.read(box) for provider in providers[held]]
        if average and len(copies) > 1:
            return _mean(copies, spec.dtype)
        for provider, copy in zip(providers[held][1:], copies[1:], strict=True):
            if not np.array_equal(np.frombuffer(copy, np.uint8), np.frombuffer(copies[0], np.uint8)):
                raise LayoutMismatch(
                    f"{spec.name}: {providers[held][0].label} and {provider.label} hold different values at {list(box.offset)}; "
                    "give a rule: tp = DIMENSION if it is cut, average = true if the copies have drifted apart"
                )
        return copies[0]

    return SourceArray(spec, tuple(box for box in providers if box.size) or (Box.whole(spec.shape),), read)


def _mean(copies: Sequence[memoryview], dtype: str) -> memoryview:
    """The mean of equal-shaped tensors, summed in float64 and rounded once."""
    import torch

    kind = getattr(torch, dtype)
    if not kind.is_floating_point:
        raise LayoutMismatch(f"average = true is for floating-point arrays; this one is {dtype}")
    tensors = [torch.frombuffer(bytearray(copy), dtype=kind).double() for copy in copies]
    mean = torch.stack(tensors).mean(0).to(kind)
    return tensor_bytes(mean)
