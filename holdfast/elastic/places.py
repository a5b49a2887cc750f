"""Who sits where: the nodes that every host plays, the node of every rank, and who speaks for it. Pure.

A node is what is lost together: a keeper, its memory and the ranks whose snapshots are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank as its launch agent placed it. `nodes` is how many nodes its host plays, and `known` those that the host has been
    before (their memory is there), as the first rank of the host tells it."""

    agent: int
    local_rank: int
    local_world: int
    nodes: int
    known: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: its node, and whether it speaks for the node or for the host."""

    node: int
    nodes_here: tuple[int, ...]
    leads_node: bool
    leads_host: bool
    guests: tuple[int, ...] = ()
    """Nodes of an earlier, larger start whose memory is still on this host: sources to restore from, no members."""


def places_of(seats: Sequence[Seat]) -> list[Place]:
    """The place of every rank, in their order; all ranks compute the same from the same seats."""
    assigned = assign_nodes([seat for seat in seats if seat.local_rank == 0])
    members = {node for nodes in assigned.values() for node in nodes}
    return [_place_of(seat, assigned[seat.agent], members) for seat in seats]


def assign_nodes(hosts: Sequence[Seat]) -> dict[int, tuple[int, ...]]:
    """The nodes of every agent. A host keeps the numbers under which it holds snapshots, wherever torchrun has put its ranks."""
    taken: dict[int, list[int]] = {host.agent: [] for host in hosts}
    used: set[int] = set()
    for host in sorted(hosts, key=lambda host: host.agent):
        kept = [node for node in host.known if node not in used][: host.nodes]
        taken[host.agent] += kept
        used |= set(kept)
    free = (node for node in count() if node not in used)
    for host in sorted(hosts, key=lambda host: host.agent):
        taken[host.agent] += [next(free) for _ in range(host.nodes - len(taken[host.agent]))]
    return {agent: tuple(sorted(nodes)) for agent, nodes in taken.items()}


def _place_of(seat: Seat, nodes: tuple[int, ...], members: set[int]) -> Place:
    """Ranks of a host are dealt to its nodes in runs of equal length; the first rank of a node speaks for it."""
    own = seat.local_rank * len(nodes) // seat.local_world
    first = seat.local_rank == 0 or (seat.local_rank - 1) * len(nodes) // seat.local_world != own
    leads_host = seat.local_rank == 0
    return Place(nodes[own], nodes, first, leads_host, tuple(node for node in seat.known if leads_host and node not in members))
