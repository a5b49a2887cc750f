"""Which nodes of a cluster protect each other.

A failure domain (a rack, a switch, a power feed) takes all its nodes at once, and each of them counts against the m that their
group can lose. So the members of a group are spread over as many domains as there are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from holdfast.coding.layout import RotatingLayout
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that protect each other. Member i of the layout is cluster node `nodes[i]`."""

    nodes: tuple[int, ...]
    layout: RotatingLayout
    crowding: int  # the most members that share one failure domain

    @property
    def survives_domain(self) -> bool:
        """Losing any one failure domain whole costs no more nodes than the group may lose."""
        return self.crowding <= self.layout.m


def group_sizes(nodes: int, size: int) -> tuple[int, ...]:
    """Groups of `size`, and the leftovers in the last one; a cluster smaller than that is one group."""
    if nodes < 1 or size < 1:
        raise ConfigError(f"groups need at least one node each; got {nodes} nodes in groups of {size}")
    count = max(1, nodes // size)
    return (size,) * (count - 1) + (nodes - size * (count - 1),)


def form_groups(labels: Sequence[Hashable], size: int, parity: int) -> tuple[Group, ...]:
    """The groups of a cluster whose node i is in failure domain `labels[i]`; the same answer on every node.

    If the nodes can be grouped so that no two members of a group share a domain, they are.
    A group too small for `parity` loses all members but one at most: two nodes are a mirror, one alone has no protection.
    """
    if not 0 <= parity < size:
        raise ConfigError(f"groups of {size} nodes cannot lose {parity} of them: need 0 <= parity < size")
    room = list(group_sizes(len(labels), size))
    members: list[list[int]] = [[] for _ in room]
    domains: dict[Hashable, list[int]] = defaultdict(list)
    for node, label in enumerate(labels):
        domains[label].append(node)
    # Groups with room, the emptiest first; those that have a node of the present domain already wait until all others have one.
    open_groups = [(-free, group) for group, free in enumerate(room)]
    heapify(open_groups)
    for domain in sorted(domains.values(), key=len, reverse=True):
        served: list[tuple[int, int]] = []
        for node in domain:
            if not open_groups:
                open_groups, served = served, []
                heapify(open_groups)
            _, group = heappop(open_groups)
            members[group].append(node)
            room[group] -= 1
            if room[group]:
                served.append((-room[group], group))
        for item in served:
            heappush(open_groups, item)
    return tuple(_group(sorted(nodes), labels, parity) for nodes in members)


def _group(nodes: list[int], labels: Sequence[Hashable], parity: int) -> Group:
    layout = RotatingLayout(len(nodes), min(parity, len(nodes) - 1))
    return Group(tuple(nodes), layout, crowding=max(Counter(labels[node] for node in nodes).values()))
