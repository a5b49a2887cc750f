"""Which node of a group keeps what: rotating parity stripes, and the plans for making them and for using them.

A group of n nodes with m parities cuts every node's bytes into k = n - m blocks. Stripe t takes one block of each of k nodes
and puts its m parities on the other m, nodes t … t+m-1 (mod n), so that the work, the memory and the traffic of parity are the
same on every node:

    n = 4, m = 1          node 0   node 1   node 2   node 3
    stripe 0              parity   block 2  block 1  block 0
    stripe 1              block 0  parity   block 2  block 1
    stripe 2              block 1  block 0  parity   block 2
    stripe 3              block 2  block 1  block 0  parity

Nothing here moves a byte: these are functions from numbers to numbers, the same on every node.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.coding.buffers import ALIGNMENT, is_whole, staggered_length
from holdfast.coding.field import MAX_FRAGMENTS
from holdfast.errors import ConfigError, MissingData

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

WORTH_STAGGERING = 4 << 20  # bytes from which a block is staggered, so that this costs at most 1.6 % more parity


@dataclass(frozen=True, slots=True)
class Transfer:
    """One block of stripe `stripe` goes from node to node: data block `block`, or parity `parity` computed by the sender."""

    stripe: int
    source: int
    target: int
    block: int | None = None
    parity: int | None = None


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """All transfers of one snapshot, in an order in which each can start when the earlier ones of its stripe are done."""

    transfers: tuple[Transfer, ...]

    def sent(self, node: int) -> int:
        """How many blocks the node sends."""
        return sum(transfer.source == node for transfer in self.transfers)

    def received(self, node: int) -> int:
        return sum(transfer.target == node for transfer in self.transfers)


@dataclass(frozen=True, slots=True)
class Repair:
    """`worker` reads the fragments `reads` of one stripe and rebuilds the fragments `rebuilds`.

    Both map a fragment number, as `ErasureCode.reconstruct` takes it (column, or k + parity), to the node that keeps it.
    """

    stripe: int
    worker: int
    reads: dict[int, int]
    rebuilds: dict[int, int]


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """One `Repair` for every stripe that lost something, spread over the survivors."""

    lost: tuple[int, ...]
    repairs: tuple[Repair, ...]

    def received(self, node: int) -> int:
        """How many blocks come into the node over the network: what it reads of others, and what is rebuilt for it."""
        reads = sum(node != home for repair in self.repairs if repair.worker == node for home in repair.reads.values())
        return reads + sum(node == home for repair in self.repairs for home in repair.rebuilds.values())

    def sent(self, node: int) -> int:
        """How many blocks leave the node: what others read of it, and what it has rebuilt for the lost."""
        reads = sum(node == home for repair in self.repairs if repair.worker != node for home in repair.reads.values())
        return reads + sum(len(repair.rebuilds) for repair in self.repairs if repair.worker == node)


@dataclass(frozen=True, slots=True)
class RotatingLayout:
    """n nodes of which any m may be lost. n = 1 or m = 0: no protection. n = 2, m = 1: a mirror."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (is_whole(self.n, 1, MAX_FRAGMENTS) and is_whole(self.m, 0, self.n - 1)):
            raise ConfigError(f"a group needs 0 <= m < n <= {MAX_FRAGMENTS}; got n={self.n}, m={self.m}")

    # -- who has what ------------------------------------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Data blocks per stripe, and blocks per node."""
        return self.n - self.m

    @property
    def stripes(self) -> int:
        """One per node; none where there is nothing to protect with."""
        return self.n if self.m else 0

    @property
    def memory_overhead(self) -> float:
        """Parity kept per node, as a part of its own bytes."""
        return self.m / self.k

    def parity_owners(self, t: int) -> tuple[int, ...]:
        """The nodes that keep parities 0 … m-1 of stripe t."""
        self._check_stripe(t)
        return tuple((t + r) % self.n for r in range(self.m))

    def first_owner(self, t: int) -> int:
        """The node that gathers the blocks of stripe t and computes all its parities."""
        return self.parity_owners(t)[0]

    def data_nodes(self, t: int) -> tuple[int, ...]:
        """The nodes that give a block to stripe t, in the order of their columns."""
        self._check_stripe(t)
        return tuple((t + self.m + column) % self.n for column in range(self.k))

    def block(self, node: int, t: int) -> int | None:
        """Which of the node's k blocks is in stripe t; None if it keeps a parity of it."""
        return None if self._is_owner(node, t) else (t - node - 1) % self.n

    def column(self, node: int, t: int) -> int | None:
        """The node's place among the data fragments of stripe t; None if it keeps a parity of it."""
        return None if self._is_owner(node, t) else (node - t - self.m) % self.n

    def stripe_of(self, node: int, block: int) -> int:
        """The stripe that protects the node's block."""
        self._check_node(node)
        self._check_block(block)
        return (block + node + 1) % self.n

    def fragments(self, t: int) -> tuple[int, ...]:
        """The node of every fragment of stripe t: data columns 0 … k-1, then parities."""
        return self.data_nodes(t) + self.parity_owners(t)

    # -- bytes -------------------------------------------------------------------------------------------------------------

    def block_length(self, node_bytes: Iterable[int]) -> int:
        """The length of all blocks of the group, given every node's bytes.

        Each node counts as long as the longest, by zeros that are never stored or sent, and is cut into k equal blocks. They
        are whole cache lines, and long ones are staggered: the blocks of a stripe have different numbers, so that their places
        in the nodes' slots then differ in the bits that caches index by.
        """
        sizes = list(node_bytes)
        if len(sizes) != self.n or min(sizes) < 0:
            raise ConfigError(f"block_length needs the bytes of {self.n} nodes, none negative; got {sizes}")
        even = -(-max(sizes) // self.k)
        return staggered_length(even) if even >= WORTH_STAGGERING else -(-even // ALIGNMENT) * ALIGNMENT

    def block_span(self, block: int, block_length: int, node_bytes: int) -> tuple[int, int]:
        """The node's real bytes [start, stop) in a block; the rest of the block is zeros, all of it where start = stop."""
        self._check_block(block)
        return min(block * block_length, node_bytes), min((block + 1) * block_length, node_bytes)

    # -- plans -------------------------------------------------------------------------------------------------------------

    def traffic_plan(self) -> TrafficPlan:
        """What has to move to protect one snapshot: to the first owner of each stripe, and m-1 parities on from there.

        n - 1 blocks per node, which is the least that any scheme can do. With m = 1 that is every byte once.
        """
        transfers: list[Transfer] = []
        for t in range(self.stripes):
            first, *others = self.parity_owners(t)
            transfers += [Transfer(t, node, first, block=self.block(node, t)) for node in self.data_nodes(t)]
            transfers += [Transfer(t, first, owner, parity=r) for r, owner in enumerate(others, 1)]
        return TrafficPlan(tuple(transfers))

    def repair_plan(self, lost: Collection[int]) -> RepairPlan:
        """Who rebuilds which stripe when these nodes are lost: each survivor takes its share.

        Left to the replacement alone, n blocks per block would come in over its one network link. Here each survivor reads k-1
        blocks of others for each stripe it works on, and only what was rebuilt goes to the replacement. `MissingData` if
        more than m nodes are lost.
        """
        gone = tuple(sorted(set(lost)))
        for node in gone:
            self._check_node(node)
        if len(gone) > self.m:
            raise MissingData(
                f"nodes {list(gone)} of a group of {self.n} are lost and it survives {self.m}: its snapshot cannot be rebuilt "
                "from memory. Fall back to a checkpoint"
            )
        read: dict[int, int] = defaultdict(int)
        worked: dict[int, int] = defaultdict(int)
        repairs = [self._repair(t, gone, read, worked) for t in range(self.stripes)] if gone else []
        return RepairPlan(gone, tuple(repairs))

    def _repair(self, t: int, lost: tuple[int, ...], read: dict[int, int], worked: dict[int, int]) -> Repair:
        """The survivor that has worked least does it, and reads from itself and from those that were read least."""
        homes = dict(enumerate(self.fragments(t)))
        here = {fragment: home for fragment, home in homes.items() if home not in lost}
        worker = min(here.values(), key=lambda home: (worked[home], (home - t) % self.n))
        chosen = sorted(here, key=lambda fragment: (here[fragment] != worker, read[here[fragment]], fragment))[: self.k]
        worked[worker] += 1
        for fragment in chosen:
            read[here[fragment]] += here[fragment] != worker
        return Repair(
            stripe=t,
            worker=worker,
            reads={fragment: here[fragment] for fragment in sorted(chosen)},
            rebuilds={fragment: home for fragment, home in homes.items() if home in lost},
        )

    # -- helpers -----------------------------------------------------------------------------------------------------------

    def _is_owner(self, node: int, t: int) -> bool:
        self._check_node(node)
        self._check_stripe(t)
        return (node - t) % self.n < self.m

    def _check_node(self, node: int) -> None:
        if not 0 <= node < self.n:
            raise ConfigError(f"node {node} is not among 0 … {self.n - 1}")

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self.k:
            raise ConfigError(f"block {block} is not among 0 … {self.k - 1}")

    def _check_stripe(self, t: int) -> None:
        if not 0 <= t < self.stripes:
            raise ConfigError(f"stripe {t} does not exist: a group of n={self.n}, m={self.m} has {self.stripes} stripes")
