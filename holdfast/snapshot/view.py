"""Who takes part: the membership of one epoch, and the records of what a node holds. Plain values with a JSON form."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Self

from holdfast.coding import Group, RotatingLayout, form_groups
from holdfast.snapshot.interval import PUBLISHED_GPU_HOURS_PER_FAILURE


class _Json:
    """`to_json` and `from_json` for frozen dataclasses of plain values, tuples and other such dataclasses."""

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in _readers(type(self))}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        readers = _readers(cls)  # type: ignore[arg-type]
        return cls(**{name: readers[name](value) for name, value in fields.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.to_json() if isinstance(value, _Json) else value


@cache
def _readers(of: type[_Json]) -> dict[str, Callable[[Any], Any]]:
    """By field, what makes its value of one that was JSON. Hints are strings: to read them anew each time would take longer."""
    hints = typing.get_type_hints(of)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(of)}  # type: ignore[arg-type]


def _reader(hint: Any) -> Callable[[Any], Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = _reader(arguments[0])
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        item = _reader(arguments[0])
        return lambda value: tuple(map(item, value))
    if isinstance(hint, type) and issubclass(hint, _Json):
        return hint.from_json
    return lambda value: value


@dataclass(frozen=True, slots=True)
class RankRecord(_Json):
    """One rank's snapshot in a slot: what a reader needs to find and check it."""

    rank: int
    payload_nbytes: int
    meta_nbytes: int
    meta_crc32c: int
    body_nbytes: int


@dataclass(frozen=True, slots=True)
class NodeRecord(_Json):
    """What one node holds of a step. Its bytes are the bodies of its ranks, in order, each padded to `stride` bytes."""

    node: int
    ranks: tuple[RankRecord, ...]

    @property
    def nbytes(self) -> int:
        return sum(stride(record) for record in self.ranks)


def stride(record: RankRecord) -> int:
    """Whole pages, so that a text that is a few bytes longer in the next snapshot does not move the ranks behind it."""
    return -(-record.body_nbytes // 4096) * 4096


@dataclass(frozen=True, slots=True)
class GroupRecord(_Json):
    """A parity group at one step, in the order of its positions; stored with every parity slot, so any survivor knows all."""

    epoch: int
    step: int
    index: int
    world: int
    parity: int
    records: tuple[NodeRecord, ...]

    @property
    def layout(self) -> RotatingLayout:
        return RotatingLayout(len(self.records), self.parity)

    @property
    def block_nbytes(self) -> int:
        return self.layout.block_length(record.nbytes for record in self.records)

    def position(self, node: int) -> int:
        return next(place for place, record in enumerate(self.records) if record.node == node)


@dataclass(frozen=True, slots=True)
class Member(_Json):
    """A node and how its keeper is reached. `host` is equal for keepers that can map each other's memory, `domain` for nodes that
    fail together; without one that is the host."""

    node: int
    host: str
    address: str
    port: int
    token: str
    memory: str
    ranks: tuple[int, ...]
    domain: str = ""


@dataclass(frozen=True, slots=True)
class View(_Json):
    """The membership of one epoch and the settings that all of it shares.

    `committed` is the step that was restored, in slot `index`; `in_memory` that the slots hold
    it (else their content is void), and `protected` that every node has it committed with parity. `spilled` is the newest step
    that is a checkpoint already. `grace_s` is how long a keeper that is told to end may take to commit and write the last one.
    `cut_anew`: the step lies in another layout, or in storage only, and nothing in memory protects it in this one; so the first
    step that is completed is captured, whatever `every` says.
    `guests` are keepers of an earlier, larger membership: they held a part of it, and may go once something newer is committed.
    """

    job: str
    epoch: int
    world: int
    members: tuple[Member, ...]
    parity: int
    group_size: int
    every: int
    checkpoint_every: int
    checkpoints: str | None
    committed: int
    index: int
    protected: bool
    in_memory: bool
    spilled: int = 0
    grace_s: float = 20.0
    guests: tuple[Member, ...] = ()
    cut_anew: bool = False
    adaptive: bool = False
    """`every` is where to begin; the coordinator's keeper changes it to what the measured cost suggests."""
    checkpoint_adaptive: bool = False
    """The same of `checkpoint_every`."""
    failures: float = 1.0
    gpu_hours: float = PUBLISHED_GPU_HOURS_PER_FAILURE
    """What this run knew of its failures when the epoch began, as a gamma distribution: one failure in so many GPU-hours each."""

    def mtbf_s(self, running_s: float) -> float:
        """Mean time between failures of this run, after the epoch has gone on for so long without one."""
        return (3600 * self.gpu_hours / self.world + running_s) / self.failures

    @property
    def coordinator(self) -> int:
        return min(member.node for member in self.members)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(member.node for member in self.members)

    def member(self, node: int) -> Member:
        return next(member for member in self.members if member.node == node)

    def group_of(self, node: int) -> tuple[int, ...]:
        """The nodes that protect each other with `node`, in order."""
        return next(group.nodes for group in self.groups() if node in group.nodes)

    def groups(self) -> tuple[Group, ...]:
        """The parity groups of this membership, spread over the failure domains of its nodes; numbered as the nodes are."""
        return groups(self.members, self.group_size, self.parity)


def groups(members: Sequence[Member], size: int, parity: int) -> tuple[Group, ...]:
    """Groups of `size` nodes spread over domains; what is left over joins the last rather than stand unprotected."""
    return _groups(tuple(members), size, parity)


@lru_cache(maxsize=16)  # asked several times for each snapshot
def _groups(members: tuple[Member, ...], size: int, parity: int) -> tuple[Group, ...]:
    labels = [member.domain or member.host for member in members]
    # A group of one size holds at most size - 1 parities; more than that is asked of no group.
    found = form_groups(labels, size, min(parity, size - 1))
    return tuple(replace(group, nodes=tuple(members[place].node for place in group.nodes)) for group in found)


def effective_parity(parity: int, members: int) -> int:
    """Parities a group of this size can hold: one node alone has none, two mirror each other."""
    return min(parity, members - 1)
