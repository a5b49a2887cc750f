"""Keep, pack, offload or recompute: the cheapest choice for every group of activations that fits a byte budget.

Each group (a layer, say) has options, each with the bytes it leaves on the device per token and what it costs per token.
Choosing one option per group is the multiple-choice knapsack problem; because tokens can be divided, its linear relaxation is
the real problem, and that one is solved exactly by walking down the convex hulls of the groups (Sinha and Zoltners, 1979).
At most one group ends up split between two options: some of its tokens take one, the rest the other, as in MEMO
(arXiv:2407.12117), whose single swap fraction is found here per group and over more than two options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to treat a group: device bytes per token, and cost per token in one unit for all (seconds, weighted error)."""

    name: str
    nbytes: float
    cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Activations that share their options, and how many tokens they have. An offload option whose transfer hides under the
    group's compute has cost 0; see `offload_cost`."""

    name: str
    tokens: int
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or self.tokens < 1:
            raise ConfigError(f"group {self.name!r} needs at least one option and one token")


@dataclass(frozen=True, slots=True)
class Choice:
    """The first `tokens` tokens of a group not yet taken by an earlier choice use `option`."""

    group: str
    option: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices in the order of the groups; total device bytes (never above the budget) and total cost."""

    choices: tuple[Choice, ...]
    nbytes: float
    cost: float


def solve_budget(groups: Sequence[Group], budget: float) -> Plan:
    """The plan of least cost whose bytes fit `budget`. Pure. Raises ConfigError if even the smallest options do not fit."""
    hulls = [_hull(group.options) for group in groups]
    position = [0] * len(groups)
    excess = sum(g.tokens * h[0].nbytes for g, h in zip(groups, hulls, strict=True)) - budget
    floor = sum(g.tokens * h[-1].nbytes for g, h in zip(groups, hulls, strict=True))
    if floor > budget:
        raise ConfigError(f"the smallest options take {floor:.0f} bytes; the budget is {budget:.0f}")
    steps = sorted(
        (_price(hull, i), g, i) for g, hull in enumerate(hulls) for i in range(len(hull) - 1)
    )  # cheapest cost per byte freed first; hulls are convex, so a group's own steps come in order
    moved_of_last = {}
    for _, g, i in steps:
        if excess <= 0:
            break
        freed = hulls[g][i].nbytes - hulls[g][i + 1].nbytes
        moved = min(groups[g].tokens, -int(-excess // freed))
        excess -= moved * freed
        if moved == groups[g].tokens:
            position[g] = i + 1
        else:
            moved_of_last[g] = moved
    return _assemble(groups, hulls, position, moved_of_last)


def offload_cost(nbytes: float, bytes_per_second: float, hidden_seconds: float) -> float:
    """Seconds per token that a transfer adds, once the compute of the same token has hidden what it can."""
    return max(0.0, nbytes / bytes_per_second - hidden_seconds)


def _price(hull: Sequence[Option], i: int) -> float:
    return (hull[i + 1].cost - hull[i].cost) / (hull[i].nbytes - hull[i + 1].nbytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that some price per byte would choose, cheapest first: fewer bytes at ever higher prices."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.nbytes)):
        if best and option.nbytes >= best[-1].nbytes:
            continue
        while len(best) > 1 and _price([best[-2], best[-1]], 0) >= _price([best[-2], option], 0):
            best.pop()
        best.append(option)
    return best


def _assemble(
    groups: Sequence[Group], hulls: Sequence[Sequence[Option]], position: Sequence[int], moved: dict[int, int]
) -> Plan:
    choices, nbytes, cost = [], 0.0, 0.0
    for g, group in enumerate(groups):
        parts = [(hulls[g][position[g]], group.tokens - moved.get(g, 0))]
        if g in moved:
            parts.append((hulls[g][position[g] + 1], moved[g]))
        for option, tokens in parts:
            choices.append(Choice(group.name, option.name, tokens))
            nbytes += option.nbytes * tokens
            cost += option.cost * tokens
    return Plan(tuple(choices), nbytes, cost)
