"""What can be restored from memory, decided from the survivors' own words.

`plan_restore` is pure. It is given what every reachable keeper says it holds and returns the newest step that is whole, or can
be made whole from parity, and what has to be rebuilt where. No coordinator is asked, because it may be among the dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.view import GroupRecord, Member, View


@dataclass(frozen=True, slots=True)
class SlotFound:
    rank: int
    index: int
    epoch: int
    step: int
    world: int
    state: SlotState
    meta_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """What one keeper says it holds: its ranks' slots, and the groups for which its parity is whole."""

    member: Member
    epoch: int
    slots: tuple[SlotFound, ...]
    groups: tuple[GroupRecord, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Survey:
        slots = tuple(
            SlotFound(s["rank"], s["index"], s["epoch"], s["step"], s["world"], SlotState(s["state"]), s["meta_nbytes"])
            for s in fields["slots"]
        )
        groups = tuple(GroupRecord.from_json(group) for group in fields["groups"])
        return cls(Member.from_json(fields["member"]), fields["epoch"], slots, groups)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Recompute what `lost` held, on the keeper of `host`, from these survivors."""

    lost: int
    host: int
    group: GroupRecord
    survivors: tuple[int, ...]
    with_parity: tuple[int, ...]

    def to_json(self, members: Mapping[int, Member]) -> dict[str, Any]:
        """What the keeper of `host` has to be told, with how the survivors are reached."""
        return {
            "group": self.group.to_json(),
            "lost": self.lost,
            "survivors": [members[node].to_json() for node in sorted({*self.survivors, *self.with_parity})],
            "with_data": list(self.survivors),
            "with_parity": list(self.with_parity),
        }


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Return to `step`: `holders` says on which node each rank's slot is once the rebuilds are done.

    Another node may hold a rank's slot as well, and nobody reads it. `groups` are those that have parity of it.
    """

    epoch: int
    step: int
    index: int
    world: int
    holders: Mapping[int, int]
    rebuilds: tuple[Rebuild, ...]
    protected: bool
    groups: tuple[GroupRecord, ...] = ()

    @property
    def missing(self) -> list[int]:
        """The ranks whose bytes nobody holds any more; none, except in what remains of a lost step."""
        return [rank for rank in range(self.world) if rank not in self.holders]

    def ranks_on(self, node: int) -> list[int]:
        """The ranks whose slots are read from `node`."""
        return [rank for rank, holder in self.holders.items() if holder == node]


Distrusted = frozenset[tuple[int, int]]
"""(node, step) pairs whose bytes were found damaged; treated as lost."""


def plan_restore(surveys: Sequence[Survey], distrusted: Distrusted = frozenset()) -> tuple[RestorePlan | None, list[str]]:
    """The newest step that can be restored, or None; and for every newer step a line saying why not."""
    found = {
        (slot.step, slot.epoch, slot.index) for survey in surveys for slot in survey.slots if slot.state >= SlotState.VERIFIED
    }
    found |= {(group.step, group.epoch, group.index) for survey in surveys for group in survey.groups}
    reasons: list[str] = []
    for step, epoch, index in sorted(found, reverse=True):
        plan = _plan_for(step, epoch, index, surveys, distrusted, reasons)
        if plan is not None:
            return plan, reasons
    return None, reasons


def lies_as(plan: RestorePlan, view: View) -> bool:
    """The step lies where the members of `view` would capture it, in the groups that they form: what protects it protects them.

    Elsewhere it is a source to restore from, until something newer is committed, and cannot be encoded anew.
    """
    homes = {rank: member.node for member in view.members for rank in member.ranks}
    formed = {group.nodes: group.layout.m for group in view.groups()}
    found = {tuple(record.node for record in group.records): group.parity for group in plan.groups}
    return plan.world == view.world and plan.holders == homes and found.items() <= formed.items()


def plan_remains(surveys: Sequence[Survey], distrusted: Distrusted = frozenset()) -> RestorePlan | None:
    """What is left of a step that cannot be restored: the one of which most is left, the newest of those. None when nothing is."""
    found = {
        (slot.step, slot.epoch, slot.index) for survey in surveys for slot in survey.slots if slot.state >= SlotState.VERIFIED
    }
    plans = [_plan_for(*step, surveys, distrusted, [], partial=True) for step in sorted(found, reverse=True)]
    return min((plan for plan in plans if plan is not None), key=lambda plan: len(plan.missing), default=None)


def was_ever_safe(surveys: Sequence[Survey]) -> bool:
    """Whether any step has come as far as parity. None was committed before that, and nothing is lost by beginning anew.

    A committed slot stays until a later step is committed, so every survivor of a commit can tell.
    """
    return any(survey.groups or any(slot.state >= SlotState.ENCODED for slot in survey.slots) for survey in surveys)


def _plan_for(
    step: int,
    epoch: int,
    index: int,
    surveys: Sequence[Survey],
    distrusted: Distrusted,
    reasons: list[str],
    *,
    partial: bool = False,
) -> RestorePlan | None:
    trusted = [survey for survey in surveys if (survey.member.node, step) not in distrusted]
    groups = {
        tuple(record.node for record in group.records): group
        for survey in trusted
        for group in survey.groups
        if (group.step, group.epoch) == (step, epoch)
    }
    home = {rank.rank: record.node for group in groups.values() for record in group.records for rank in record.ranks}
    slots: dict[int, tuple[int, SlotFound]] = {}
    for survey in trusted:
        for slot in survey.slots:
            if (slot.step, slot.epoch) == (step, epoch) and slot.state >= SlotState.VERIFIED:
                # A node that was away while its bytes were rebuilt elsewhere has them all the same.
                known = slots.setdefault(slot.rank, (survey.member.node, slot))
                if known[0] != home.get(slot.rank):
                    slots[slot.rank] = survey.member.node, slot
    if not slots and not groups:
        reasons.append(f"step {step}: the memory of every node that holds it is damaged")
        return None
    worlds = {slot.world for _, slot in slots.values()} | {group.world for group in groups.values()}
    world = max(worlds)
    holders = {rank: node for rank, (node, _) in slots.items()}
    rebuilds: list[Rebuild] = []
    for group in groups.values():
        rebuilds += _rebuilds(group, holders, trusted, surveys)
    if partial:
        rebuilds = [rebuild for rebuild in rebuilds if not _unrecoverable(rebuild)]
    for rebuild in rebuilds:
        problem = _unrecoverable(rebuild)
        if problem:
            reasons.append(f"step {step}: {problem}")
            return None
        record = rebuild.group.records[rebuild.group.position(rebuild.lost)]
        holders |= {rank.rank: rebuild.host for rank in record.ranks}
    missing = [rank for rank in range(world) if rank not in holders]
    if missing and not partial:
        reasons.append(f"step {step} is not complete: {_ranks(missing)} had not captured it, or lost it before it had parity")
        return None
    committed = all(slot.state is SlotState.COMMITTED for _, slot in slots.values())
    # A rebuilt node gets its parity back with its bytes; one that lost only its parity needs the group's protection anew.
    have_parity = {rebuild.lost for rebuild in rebuilds} | {
        survey.member.node for survey in trusted if any((g.step, g.epoch) == (step, epoch) for g in survey.groups)
    }
    whole = all(record.node in have_parity for group in groups.values() for record in group.records)
    # Bytes that lie elsewhere, where a rescue has put them, cannot be encoded anew where they belong; the next snapshot is.
    away = any(
        holders[rank.rank] != record.node for group in groups.values() for record in group.records for rank in record.ranks
    )
    protected = (committed and whole) or away
    return RestorePlan(epoch, step, index, world, holders, tuple(rebuilds), protected, tuple(groups.values()))


def _rebuilds(
    group: GroupRecord, holders: Mapping[int, int], trusted: Sequence[Survey], all_of: Sequence[Survey]
) -> list[Rebuild]:
    """One rebuild for every node of the group whose ranks nobody holds."""
    whole = [record.node for record in group.records if all(rank.rank in holders for rank in record.ranks)]
    present = {survey.member.node: survey for survey in trusted}
    parity = [
        node
        for node, survey in present.items()
        if any((found.step, found.epoch) == (group.step, group.epoch) for found in survey.groups)
    ]
    # Only in its own place are a node's bytes what the layout reads: ranks that were rebuilt elsewhere are no source.
    at_home = {record.node for record in group.records if all(holders.get(rank.rank) == record.node for rank in record.ranks)}
    survivors = tuple(node for node in whole if node in present and node in at_home)
    hosts = sorted(survey.member.node for survey in all_of)
    lost = [record.node for record in group.records if record.node not in whole]
    return [
        Rebuild(node, node if node in hosts else hosts[place % len(hosts)], group, survivors, tuple(sorted(parity)))
        for place, node in enumerate(lost)
    ]


def _unrecoverable(rebuild: Rebuild) -> str:
    """Why a rebuild cannot work, or nothing when every stripe has k blocks left."""
    group, layout = rebuild.group, rebuild.group.layout
    place = {record.node: position for position, record in enumerate(group.records)}
    for stripe in range(layout.stripes):
        owners = layout.parity_owners(stripe)
        data = sum(place[node] not in owners for node in rebuild.survivors)
        parity = sum(place[node] in owners for node in rebuild.with_parity if node in place)
        if data + parity < layout.k:
            lost = sorted(set(place) - set(rebuild.survivors))
            return (
                f"nodes {lost} of a group of {layout.n} are lost, and its parity covers {group.parity}; "
                f"stripe {stripe} has {data + parity} of the {layout.k} blocks it needs"
            )
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
