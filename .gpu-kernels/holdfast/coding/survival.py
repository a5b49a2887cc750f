"""What a choice of parity and group size costs, and what it survives, in numbers a user can compare.

The model: every node is lost with probability p between one snapshot and the next, independently of the others, and something
is lost for good when a group loses more than its parities. Whole racks that go at once are not in the model; spread groups over
failure domains (`form_groups`) and read each rack as one loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.coding.groups import group_sizes
from holdfast.coding.layout import RotatingLayout
from holdfast.errors import ConfigError

NODE_LOSS = (1e-4, 1e-3, 1e-2)
LOSSES = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to protect the cluster. Memory and network are per node, in parts of its snapshot's bytes."""

    name: str
    memory: float
    network: float
    loss: tuple[float, ...]  # probability that something is lost, for each p in NODE_LOSS
    survived: tuple[float, ...]  # share of the ways to lose 1, 2, 3, 4 nodes at once that lose nothing


@dataclass(frozen=True, slots=True)
class Explanation:
    """The chosen redundancy beside replication. Prints itself as a table."""

    nodes: int
    parity: int
    group_sizes: tuple[int, ...]
    schemes: tuple[Scheme, ...]  # the chosen one first

    @property
    def chosen(self) -> Scheme:
        return self.schemes[0]

    def __str__(self) -> str:
        head = ["", "memory", "network", *(f"lost at p={p:g}" for p in NODE_LOSS), *(f"{f} lost" for f in LOSSES)]
        rows = [head, *map(_cells, self.schemes)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([self._title(), "", *map(str.rstrip, lines), "", _LEGEND])

    def _title(self) -> str:
        sizes = sorted(set(self.group_sizes))
        groups = f"{len(self.group_sizes)} group{'s' * (len(self.group_sizes) > 1)} of {' and '.join(map(str, sizes))}"
        if self.nodes == 1 or not self.parity:
            nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
            return f"{nodes} without parity: a lost node costs the work since the last checkpoint"
        return f"{self.nodes} nodes in {groups}: any {min(self.parity, min(sizes) - 1)} of a group may be lost, memory and all"


_LEGEND = """\
memory: kept beside a node's own snapshot (twice that while the next one is made). network: sent by each node per snapshot; it
receives as much. Both in parts of the snapshot. lost at p: the probability that snapshots are lost for good, when each node
fails with probability p between two snapshots, independently. n lost: the share of the ways to lose n nodes at once that lose
nothing."""


def explain(parity: int, group_size: int, nodes: int) -> Explanation:
    """What `parity` losses per group of `group_size` cost and survive on a cluster of `nodes`, against replication."""
    if not 0 <= parity < group_size:
        raise ConfigError(f"groups of {group_size} nodes cannot lose {parity} of them: need 0 <= parity < group_size")
    sizes = group_sizes(nodes, group_size)
    layouts = [RotatingLayout(size, min(parity, size - 1)) for size in sizes]
    memory = sum(layout.memory_overhead * layout.n for layout in layouts) / nodes
    network = sum((layout.n - 1) / layout.k * layout.n for layout in layouts if layout.m) / nodes
    chosen = _scheme("this choice", memory, network, [(layout.n, layout.m) for layout in layouts])
    rivals = [_replication("replication, equal memory", memory, nodes)] if 0 < memory != int(memory) else []
    rivals += [
        _replication(f"replication, {c} cop{'y' if c == 1 else 'ies'}", c, nodes) for c in _copies(parity, memory, nodes)
    ]
    return Explanation(nodes, parity, sizes, (chosen, *rivals))


def _copies(parity: int, memory: float, nodes: int) -> list[int]:
    """Whole numbers of copies worth comparing with: one, as many as parities, and what the memory would pay for."""
    return sorted({copies for copies in (1, parity, int(memory)) if 1 <= copies < nodes})


def _replication(name: str, memory: float, nodes: int) -> Scheme:
    """Cliques that copy each other: as many copies as the memory pays for, one more for as many nodes as the rest pays."""
    copies = int(memory)
    richer = round((memory - copies) * nodes / (copies + 2))  # cliques of copies + 2
    poorer, rest = divmod(nodes - richer * (copies + 2), copies + 1)
    cliques = [(copies + 2, copies + 1)] * richer + [(copies + 1, copies)] * poorer
    if rest:  # too few for a clique of their own: they join one, or stand alone if there is none
        size = rest + (cliques.pop()[0] if cliques else 0)
        cliques.append((size, min(copies, size - 1)))
    return _scheme(name, memory, memory, cliques)


def _scheme(name: str, memory: float, network: float, groups: list[tuple[int, int]]) -> Scheme:
    loss = tuple(_probability_of_loss(groups, p) for p in NODE_LOSS)
    return Scheme(name, memory, network, loss, _survived(groups))


def _probability_of_loss(groups: list[tuple[int, int]], p: float) -> float:
    """1 minus the product of the groups' chances, in logarithms because they are very near 1."""
    total = 0.0
    for n, m in groups:
        lost = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(m + 1, n + 1))
        total += math.log1p(-min(lost, 1.0)) if lost < 1 else -math.inf
    return -math.expm1(total)


def _survived(groups: list[tuple[int, int]]) -> tuple[float, ...]:
    """Ways to spread f losses over the groups with at most m each, over all ways: coefficients of a product of polynomials."""
    nodes = sum(n for n, _ in groups)
    ways = [1] + [0] * max(LOSSES)
    for n, m in groups:
        own = [math.comb(n, i) if i <= m else 0 for i in range(len(ways))]
        ways = [sum(ways[i] * own[f - i] for i in range(f + 1)) for f in range(len(ways))]
    return tuple(ways[f] / math.comb(nodes, f) if f <= nodes else math.nan for f in LOSSES)


def _cells(scheme: Scheme) -> list[str]:
    survived = ["-" if math.isnan(share) else _percent(share) for share in scheme.survived]
    return [scheme.name, f"+{scheme.memory:.0%}", f"{scheme.network:.2f}", *(f"{p:.1e}" for p in scheme.loss), *survived]


def _percent(share: float) -> str:
    """Rounded down, so that only certainty reads 100 %."""
    return f"{math.floor(share * 1000) / 10:g} %"
