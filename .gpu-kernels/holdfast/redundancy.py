"""How much may be lost: the one setting a user chooses for the safety of snapshots in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Redundancy:
    """Any `parity` nodes of a group may die, memory and all, and nothing committed is lost.

    A group has `group_size` nodes (the last one takes the leftovers). More parity costs memory, parity / (group_size - parity)
    of a snapshot per node. `nodes_per_host` above 1 treats one machine as several nodes, each with a keeper and memory of its
    own: that protects against dying processes and rehearses a cluster, not against losing the machine.
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

    def explain(self, nodes: int) -> Any:
        """What this setting costs and survives on a cluster of `nodes`; the value returned prints itself as a table."""
        from holdfast.coding import explain

        return explain(parity=self.parity, group_size=self.group_size, nodes=nodes)
