"""The keepers of a simulated job: slots without bytes, driven by the shipped Coordinator, with recovery between epochs.

A slot knows its step and its certificates: for which epochs' parity groups it was encoded, and for which members of such a group it
stands (its own bytes, and those it rebuilt for the lost). That is what deciding a recovery needs, and what the checks are about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.coding import form_groups
from holdfast.elastic.membership import View
from holdfast.snapshot.coordinator import (
    Acknowledged,
    Action,
    Announce,
    Begin,
    Commit,
    Coordinator,
    Encoded,
    GivenUp,
    Input,
    Protect,
)
from holdfast.snapshot.view import effective_parity

if TYPE_CHECKING:
    from holdfast.elastic.simulation import _World

FILL_S = 4.0
"""Virtual seconds from an announced step to its parity."""


@dataclass(slots=True)
class _Slot:
    step: int = 0
    certificates: dict[int, frozenset[int]] = field(default_factory=dict)
    """By epoch of the groups that encoded it: the members whose bytes are here."""


@dataclass(frozen=True, slots=True)
class _Order:
    """From the coordinator to a keeper."""

    epoch: int
    action: Action


@dataclass(frozen=True, slots=True)
class _Told:
    """From a keeper to the coordinator; no event: it has entered the epoch, and its slots may be looked at."""

    epoch: int
    sender: int
    event: Input | None


@dataclass(frozen=True, slots=True)
class _Filled:
    """The parity of an announced step is there, on this keeper."""

    epoch: int
    action: Announce | Protect


class SimKeeper:
    """One member's keeper: obeys orders of its own epoch, and answers only while its lease runs."""

    def __init__(self, member: int, committee: Committee) -> None:
        self.member, self.committee = member, committee
        self.epoch = 0
        self.slots = [_Slot(), _Slot()]

    def receive(self, what: Any) -> None:
        if what.epoch < self.epoch:
            return  # fenced: its sender was replaced
        if what.epoch > self.epoch:  # the sender tries again until this keeper has entered
            self.committee.world.later(self.committee.world.now_s + 0.5, "keeper", self.member, what)
        elif isinstance(what, _Told):
            self.committee.hear(what)
        elif isinstance(what, _Filled):
            self._filled(what.action)
        else:
            self._obey(what.action)

    def _obey(self, action: Action) -> None:
        if isinstance(action, Announce):
            self.slots[action.index] = _Slot(action.step)
        if isinstance(action, Announce | Protect):
            self.committee.fill(self, _Filled(self.epoch, action))
        elif isinstance(action, Commit):
            slot = self.slots[action.index]
            if slot.step != action.step or self.epoch not in slot.certificates:
                self.committee.world.fail(f"member {self.member} is told to commit step {action.step} and has not encoded it")
            slot.certificates = {self.epoch: frozenset({self.member})}
            self.committee.tell(self, Acknowledged(self.member, action.step, action.step))

    def _filled(self, action: Announce | Protect) -> None:
        slot = self.slots[action.index]
        if slot.step == action.step:
            slot.certificates[self.epoch] = frozenset({self.member})
            self.committee.tell(self, Encoded(self.member, action.step, action.step, action.round))


class Committee:
    """All keepers of the job: the coordinator of each epoch, recovery at its start, and what is known to be committed."""

    def __init__(self, world: _World, parity: int, group_size: int) -> None:
        self.world, self.parity, self.group_size = world, parity, group_size
        self.commits = self.rebuilt = self.fell_back = self.last_committed = 0
        self._times: list[float] = []
        self._coordinators: dict[int, Coordinator] = {}
        self._entered: dict[int, set[int]] = {}
        self._groups: dict[int, list[tuple[int, ...]]] = {}
        self._homes: dict[int, int] = {}
        self._safe = (0, 0)
        """The newest step that all nodes had encoded, and the epoch whose groups protect it."""
        self._lost: set[int] = set()
        """Members whose memory went since then."""

    # -- what the world does --

    def entered(self, member: int, view: View) -> None:
        keeper = self.world.keepers[member]
        keeper.epoch = view.epoch
        self.world.send(member, self._home(view.epoch), _Told(view.epoch, member, None), "keeper")

    def forgot(self, member: int) -> None:
        """The member's memory is gone."""
        self._lost.add(member)

    def committed_since(self, since_s: float) -> int:
        return sum(time_s >= since_s for time_s in self._times)

    # -- what keepers do --

    def fill(self, keeper: SimKeeper, filled: _Filled) -> None:
        dice = self.world.dice
        if isinstance(filled.action, Announce) and dice.random() < 0.2 / self.world.size:
            action = filled.action
            self.tell(keeper, GivenUp(keeper.member, action.step, action.step, "passed", action.round))
            return
        self.world.later(self.world.now_s + FILL_S * (0.5 + dice.random() / 2), "keeper", keeper.member, filled)

    def tell(self, keeper: SimKeeper, event: Input) -> None:
        told = _Told(keeper.epoch, keeper.member, event)
        coordinator = self._home(keeper.epoch)
        if self.world.may_write(keeper.member):
            self.world.send(keeper.member, coordinator, told, "keeper")
        else:  # no lease, no word; it may come back
            self.world.later(self.world.now_s + self.world.timing.beat_s, "retry", keeper.member, told)

    def retry(self, keeper: SimKeeper, told: _Told) -> None:
        if told.epoch == keeper.epoch and told.event is not None:
            self.tell(keeper, told.event)

    def hear(self, told: _Told) -> None:
        if told.event is None:
            self._joined(told.epoch, told.sender)
        elif told.epoch in self._coordinators:
            self._feed(told.epoch, told.event)

    # -- the coordinator of an epoch --

    def _joined(self, epoch: int, member: int) -> None:
        here = self._entered.setdefault(epoch, set())
        here.add(member)
        if len(here) == len(self._view(epoch).members) and epoch not in self._coordinators:
            self._recover(epoch)
            self._feed(epoch, Begin())

    def _feed(self, epoch: int, event: Input) -> None:
        coordinator = self._coordinators[epoch]
        before = (coordinator.committed, coordinator.index)
        actions = coordinator.feed(event)
        if (coordinator.committed, coordinator.index) != before and not any(isinstance(action, Protect) for action in actions):
            self.commits, self.last_committed = self.commits + 1, coordinator.committed
            self._times.append(self.world.now_s)
        view = self._view(epoch)
        for action in actions:
            if isinstance(action, Announce):
                self._check_may_empty(action, coordinator.committed, view)
            if isinstance(action, Commit):  # all have encoded it: from here on it must not be lost, whoever hears of it
                self._safe, self._lost = (action.step, epoch), self._lost & view.members
            for member in view.members:
                self.world.send(self._home(epoch), member, _Order(epoch, action), "keeper")

    def _check_may_empty(self, action: Announce, committed: int, view: View) -> None:
        for member in view.members if committed else ():
            found = self.world.keepers[member].slots[1 - action.index]
            if member not in self._lost and found.step != committed:
                self.world.fail(
                    f"step {action.step} empties slot {action.index} of member {member}, whose other slot has step {found.step} "
                    f"and not {committed}, which is committed"
                )

    # -- recovery --

    def _recover(self, epoch: int) -> None:
        """The newest step that the groups of some epoch can put together, from what the members of this one hold."""
        members = self._view(epoch).members
        held: dict[tuple[int, int, int], set[int]] = {}
        for member in members:
            for index, slot in enumerate(self.world.keepers[member].slots):
                for encoded_in, stands_for in slot.certificates.items():
                    held.setdefault((slot.step, encoded_in, index), set()).update(stands_for)
        step, encoded_in, index = max(
            (found for found, whose in held.items() if self._is_enough(found[1], whose)), default=(0, 0, 1)
        )
        self._check_kept(step, members)
        if step:
            self._rebuild(step, encoded_in, index, members, held[step, encoded_in, index])
        else:
            for member in members:
                self.world.keepers[member].slots = [_Slot(), _Slot()]
            self.fell_back += self._safe[0] > 0
            self._safe, self._lost = (0, 0), set()
        settings: dict[str, Any] = {"every": 1, "checkpoint_every": 0}
        self._coordinators = {
            epoch: Coordinator(members, committed=step, index=index, protected=not step, **settings)
        }  # an older one is fenced off

    def _is_enough(self, encoded_in: int, whose: set[int]) -> bool:
        return all(
            self._is_survivable(sum(member not in whose for member in group), group) for group in self._groups_of(encoded_in)
        )

    def _is_survivable(self, missing: int, group: tuple[int, ...]) -> bool:
        return missing <= effective_parity(self.parity, len(group))

    def _check_kept(self, step: int, members: frozenset[int]) -> None:
        """Told by who is gone, not by what the slots say."""
        committed, epoch = self._safe
        if step >= committed:
            return
        gone = self._lost | (self._view(epoch).members - members)
        if all(self._is_survivable(len(gone.intersection(group)), group) for group in self._groups_of(epoch)):
            self.world.fail(
                f"step {committed} was committed, and recovery found step {step}; no group had lost more than its parity covers"
            )

    def _rebuild(self, step: int, encoded_in: int, index: int, members: frozenset[int], whose: set[int]) -> None:
        lost = sorted(self._view(encoded_in).members - whose)
        hosts = sorted(member for member in members if self.world.keepers[member].slots[index].step != step)
        self.rebuilt += len(lost)
        for host in hosts:
            self.world.keepers[host].slots[index] = _Slot(step, {encoded_in: frozenset()})
        for place, member in enumerate(lost):
            host = hosts[place % len(hosts)] if hosts else min(members)
            slot = self.world.keepers[host].slots[index]
            slot.certificates[encoded_in] = slot.certificates.get(encoded_in, frozenset()) | {member}

    def _groups_of(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._groups:
            self._groups = {known: found for known, found in self._groups.items() if known > epoch - 8}
            nodes = sorted(self._view(epoch).members)
            found = form_groups([str(node) for node in nodes], self.group_size, min(self.parity, self.group_size - 1))
            self._groups[epoch] = [tuple(nodes[place] for place in group.nodes) for group in found]
        return self._groups[epoch]

    def _home(self, epoch: int) -> int:
        """The member whose keeper runs the coordinator: the lowest."""
        if epoch not in self._homes:
            self._homes[epoch] = min(self._view(epoch).members)
        return self._homes[epoch]

    def _view(self, epoch: int) -> View:
        return self.world.views[epoch]
