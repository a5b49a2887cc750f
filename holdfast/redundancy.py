"""How much may be lost: the one setting a user chooses for the safety of snapshots in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from holdfast.errors import ConfigError


class _Explain:
    """A method of a setting, and of the class for the setting that a user gets without choosing one."""

    def __get__(self, setting: Redundancy | None, owner: type[Redundancy]) -> Callable[..., None]:
        return partial(_explain, setting or owner())


def _explain(setting: Redundancy, *, nodes: int) -> None:
    """Print what the setting costs and survives on a cluster of `nodes`; the values are in `holdfast.coding.explain`."""
    from holdfast.coding import explain

    print(explain(parity=setting.parity, group_size=min(setting.group_size, nodes), nodes=nodes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Redundancy:
    """Any `parity` nodes of a group may die, memory and all, and nothing committed is lost.

    A group has `group_size` nodes (the last one takes the leftovers). More parity costs memory, parity / (group_size - parity)
    of a snapshot per node. `nodes_per_host` above 1 treats one machine as several nodes, each with a keeper and memory of its
    own: that protects against dying processes and rehearses a cluster, not against losing the machine.

    `explain(nodes=64)` prints what the setting costs and survives on a cluster of that size.
    """

    parity: int = 1
    group_size: int = 8
    nodes_per_host: int = 1

    def __post_init__(self) -> None:
        if self.parity < 0 or self.group_size <= self.parity or self.group_size > 255 or self.nodes_per_host < 1:
            raise ConfigError(
                "Redundancy needs parity >= 0, parity < group_size <= 255 and nodes_per_host >= 1; got "
                f"parity={self.parity}, group_size={self.group_size}, nodes_per_host={self.nodes_per_host}"
            )

    explain = _Explain()


@dataclass(frozen=True, slots=True)
class Stage:
    """This rank holds stage `number` of a pipeline of `count` stages, which may be substituted by its neighbours when it is lost.

    That is lossy (CheckFree, arXiv 2506.15461) and the last rung: only where neither memory nor a checkpoint can give it back. The
    stages have to be alike, and their parameters to have names of their own (`layers.7.…`).
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 2 or not 0 <= self.number < self.count:
            raise ConfigError(f"Stage needs a number from 0 to count - 1, and count >= 2; got {self.number} of {self.count}")
