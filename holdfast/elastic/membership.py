"""Who takes part: numbered views, leases and fencing, as tables of states and events. Pure: no clock, no sockets, no threads.

A **view** has an epoch, its members and a few of them as electors. View e+1 is decided by single-decree Paxos among the electors
of view e (a majority; Lamport, "Paxos Made Simple"; one configuration decides the next, as in Vertical Paxos), so there is one view
for each epoch and no single process whose loss ends the run. The elector that got a view decided leads it: it grants leases to
members, misses the dead, and proposes the next view.

**Lease.** A member may write only while its lease runs. The leader never grants beyond what a majority of electors has promised it
(they vote for no other until then), and leaves a member out of a view only when that member's lease has run out. So when a view is
decided, nobody who is left out of it holds a lease. Clocks may differ at will; they may run at rates that differ by `drift`.

**Fencing.** Every message carries the epoch of its sender's view. A later one brings the view with it, an earlier one is answered
with the newer view and has no other effect; keepers refuse it as well. A zombie can therefore neither commit nor write.

Whoever runs this feeds `Tick` and messages to one `Node` for each process, and carries out what `feed` returns. The simulator runs
the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import TypeAlias

from holdfast.errors import ConfigError

Ballot: TypeAlias = tuple[int, int]
NO_BALLOT: Ballot = (0, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds. A member beats every `beat_s`, may write for `lease_s` after its last granted beat, and is missed after `silent_s`;
    the other electors take over `takeover_s` after the leader's last beat. A view is left alone for `settle_s`, so that losses and
    newcomers in quick succession make one view together."""

    beat_s: float = 0.2
    lease_s: float = 1.0
    silent_s: float = 1.2
    takeover_s: float = 1.5
    retry_s: float = 0.5
    settle_s: float = 0.1
    drift: float = 0.01
    electors: int = 5

    def __post_init__(self) -> None:
        # A grant is cut to what the electors last promised the leader, up to a beat and a tick ago, and has to last until the next
        # beat: with less than four beats to a lease, healthy members lapse now and then.
        if not self.beat_s * 4 <= self.lease_s <= self.silent_s <= self.takeover_s:
            raise ConfigError(f"need 4 × beat_s <= lease_s <= silent_s <= takeover_s; got {self}")
        if self.electors < 1 or not 0 <= self.drift < 0.2:
            raise ConfigError(f"need at least one elector and a drift of 0 … 0.2; got {self.electors} and {self.drift}")

    def outlasts(self, seconds: float) -> float:
        """How long to wait by one's own clock until `seconds` have passed on any other."""
        return seconds * (1 + 2 * self.drift) + 1e-9


@dataclass(frozen=True, slots=True)
class View:
    epoch: int
    members: frozenset[int]
    electors: tuple[int, ...]
    leader: int

    @property
    def majority(self) -> int:
        return len(self.electors) // 2 + 1


def first_view(members: Iterable[int], timing: Timing) -> View:
    """What a start agrees on by other means: the lowest members elect, and the lowest of all leads."""
    ordered = sorted(members)
    return View(1, frozenset(ordered), tuple(ordered[: timing.electors]), ordered[0])


def next_view(view: View, leader: int, *, without: Iterable[int] = (), joining: Iterable[int] = (), electors: int) -> View:
    """The view after this one; electors that are left out are replaced by the lowest other members."""
    members = (view.members - frozenset(without)) | frozenset(joining)
    kept = [elector for elector in view.electors if elector in members]
    fresh = (member for member in sorted(members) if member not in kept) if len(kept) < electors else ()
    return View(view.epoch + 1, members, (*kept, *islice(fresh, max(0, electors - len(kept)))), leader)


# -- messages ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beat:
    """A member is alive; `sent_s` is by its own clock and comes back with the grant."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class Grant:
    """The lease runs for `for_s` from `sent_s` of the beat that it answers."""

    sent_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Join:
    """A process that is in no view asks to be in the next."""


@dataclass(frozen=True, slots=True)
class Lead:
    """The leader asks its electors to vote for no other for a while."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class Follow:
    sent_s: float


@dataclass(frozen=True, slots=True)
class Prepare:
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Promise:
    ballot: Ballot
    accepted: tuple[Ballot, View] | None


@dataclass(frozen=True, slots=True)
class Accept:
    ballot: Ballot
    view: View


@dataclass(frozen=True, slots=True)
class Accepted:
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Refuse:
    """The elector has promised a higher ballot, or its vote to the leader it still follows."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Install:
    view: View


Body: TypeAlias = Beat | Grant | Join | Lead | Follow | Prepare | Promise | Accept | Accepted | Refuse | Install


@dataclass(frozen=True, slots=True)
class Message:
    """`epoch` is that of the sender's view; zero from a process that is in none."""

    sender: int
    epoch: int
    body: Body


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; to be fed at least twice per `beat_s`."""


Event: TypeAlias = Tick | Message


# -- what a node tells whoever runs it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    to: int
    message: Message


@dataclass(frozen=True, slots=True)
class Entered:
    """This process is in a new view; what it does from now on belongs to that epoch."""

    view: View


@dataclass(frozen=True, slots=True)
class Stopped:
    """A view without this process was decided: it may write nothing any more. It may ask to join again with empty hands."""

    view: View


@dataclass(frozen=True, slots=True)
class Decided:
    """This process saw the view being decided, and is the first to know."""

    view: View


Action: TypeAlias = Send | Entered | Stopped | Decided


class Standing(Enum):
    """OUTSIDE: in no view yet · MEMBER: in the newest known view · REMOVED: the newest known view is without it."""

    OUTSIDE = "outside"
    MEMBER = "member"
    REMOVED = "removed"


class Role(Enum):
    """FOLLOWING: an elector or a plain member · PREPARING, PROPOSING: asking for the next view · LEADING: granting leases."""

    FOLLOWING = "following"
    PREPARING = "preparing"
    PROPOSING = "proposing"
    LEADING = "leading"


class ProtocolError(RuntimeError):
    """An event that the current state does not expect."""


@dataclass(slots=True)
class _Candidacy:
    """What an elector keeps while it asks for the next view."""

    ballot: Ballot
    wish: View
    since_s: float
    promises: dict[int, tuple[Ballot, View] | None] = field(default_factory=dict)
    accepted_by: set[int] = field(default_factory=set)
    view: View | None = None


@dataclass(slots=True)
class _Leadership:
    """What a leader keeps: when it heard whom, until when whose lease may run, and what its electors have promised."""

    heard: dict[int, float]
    since_s: float
    leases: dict[int, float] = field(default_factory=dict)
    followed: dict[int, float] = field(default_factory=dict)
    joining: set[int] = field(default_factory=set)
    led_s: float = -1e18


class Node:
    """One process's part of the protocol. `feed(event, now_s)` returns what to do; `now_s` is a clock that never goes back."""

    def __init__(self, me: int, timing: Timing, view: View | None, known: Iterable[int], now_s: float) -> None:
        self.me, self.timing = me, timing
        self.view: View | None = None
        self.standing, self.role = Standing.OUTSIDE, Role.FOLLOWING
        self.lease_until_s = -1e18
        self._known = tuple(known)  # whom to ask while in no view
        self._turn = me
        self._beat_s = -1e18
        self._granted_s = now_s
        self._promised: Ballot = NO_BALLOT
        self._accepted: tuple[Ballot, View] | None = None
        self._bound_until_s = -1e18
        self._heard_s = now_s
        self._candidacy: _Candidacy | None = None
        self._lead: _Leadership | None = None
        if view is not None:
            self._adopt(view, now_s)

    @property
    def epoch(self) -> int:
        return 0 if self.view is None else self.view.epoch

    def may_write(self, now_s: float) -> bool:
        """Whether this process may commit, capture or answer for its epoch at this moment."""
        return self.standing is Standing.MEMBER and now_s < self.lease_until_s

    def feed(self, event: Event, now_s: float) -> list[Action]:
        """Raises ProtocolError for an event that no state expects."""
        if isinstance(event, Tick):
            return self._tick(now_s)
        body = event.body
        if isinstance(body, Install):
            return self._install(body.view, now_s)
        if isinstance(body, Join):
            return self._join(event.sender, now_s)
        if self.view is None:
            return []  # meant for a predecessor with this address
        if event.epoch < self.view.epoch:
            return [self._send(event.sender, Install(self.view))]
        if event.epoch > self.view.epoch:
            return [self._send(event.sender, Beat(now_s))]  # too old to judge it; the answer is the newer view
        try:
            handle = _TABLE[self.role, type(body)]
        except KeyError:
            raise ProtocolError(f"{body} from {event.sender} is not expected while {self.role.value}") from None
        return handle(self, event.sender, body, now_s)

    def rejoin(self, now_s: float) -> None:
        """A removed process asks to be let in again; what it held counts for nothing."""
        if self.standing is not Standing.REMOVED:
            raise ProtocolError(f"a process that is {self.standing.value} cannot rejoin")
        assert self.view is not None
        self._known = tuple(sorted(self.view.electors))
        self.standing, self._granted_s, self._beat_s = Standing.OUTSIDE, now_s, -1e18

    # -- time passes --

    def _tick(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        if now_s - self._beat_s >= self.timing.beat_s and self.standing is not Standing.REMOVED:
            self._beat_s = now_s
            actions.append(self._beat(now_s))
        if self.role is Role.LEADING:
            return actions + self._look_after(now_s)
        if self.standing is Standing.MEMBER and self._is_elector():
            if self.role is Role.FOLLOWING and now_s - self._heard_s > self._patience():
                return actions + self._prepare(self._without_leader(), now_s)
            candidacy = self._candidacy
            if candidacy is not None and now_s - candidacy.since_s > self.timing.retry_s * (1 + self._seat()):
                return actions + self._prepare(candidacy.wish, now_s)
        return actions

    def _beat(self, now_s: float) -> Action:
        if self.standing is Standing.OUTSIDE:
            self._turn += 1
            return self._send(self._known[self._turn % len(self._known)], Join())
        assert self.view is not None
        to = self.view.leader
        if now_s - self._granted_s > self.timing.takeover_s:  # the leader may be gone: others know who follows it
            self._turn += 1
            late = now_s - self._granted_s > 3 * self.timing.takeover_s  # all electors may be gone, and replaced long ago
            others = tuple(self.view.members) if late else self.view.electors
            to = others[self._turn % len(others)]
        return self._send(to, Beat(now_s))

    def _patience(self) -> float:
        return self.timing.takeover_s * (1 + 0.5 * self._seat())

    def _seat(self) -> int:
        assert self.view is not None
        return self.view.electors.index(self.me)

    def _is_elector(self) -> bool:
        return self.view is not None and self.me in self.view.electors

    # -- members --

    def _granted(self, sender: int, body: Grant, now_s: float) -> list[Action]:
        self.lease_until_s = max(self.lease_until_s, body.sent_s + body.for_s)
        self._granted_s = now_s
        return []

    def _install(self, view: View, now_s: float) -> list[Action]:
        if view.epoch <= self.epoch:
            return []
        if self.standing is not Standing.MEMBER and self.me not in view.members:
            self._known, self.view = (view.leader, *view.electors), None if self.view is None else view
            return []
        self._adopt(view, now_s)
        return [Entered(view)] if self.standing is Standing.MEMBER else [Stopped(view)]

    def _adopt(self, view: View, now_s: float) -> None:
        """A new instance begins: nothing promised in the last one counts, and no lease of it is good."""
        self.view = view
        self.standing = Standing.MEMBER if self.me in view.members else Standing.REMOVED
        self.lease_until_s, self._granted_s, self._heard_s = -1e18, now_s, now_s
        self._promised, self._accepted, self._bound_until_s = NO_BALLOT, None, -1e18
        self._candidacy = None
        leads = view.leader == self.me and self.standing is Standing.MEMBER
        self.role = Role.LEADING if leads else Role.FOLLOWING
        self._lead = _Leadership(dict.fromkeys(view.members, now_s), now_s) if leads else None

    # -- leading --

    def _look_after(self, now_s: float) -> list[Action]:
        """Keep the electors' promise fresh, and propose a view without the silent and with those who ask."""
        assert self._lead is not None
        assert self.view is not None
        lead, timing = self._lead, self.timing
        actions: list[Action] = []
        if now_s - lead.led_s >= timing.beat_s:
            lead.led_s = now_s
            actions += [self._send(elector, Lead(now_s)) for elector in self.view.electors]
        silent = [
            member
            for member, heard_s in lead.heard.items()
            if now_s - heard_s > timing.silent_s and now_s > lead.leases.get(member, -1e18) and member != self.me
        ]
        if (silent or lead.joining) and now_s - lead.since_s > timing.settle_s:
            wish = next_view(self.view, self.me, without=silent, joining=lead.joining, electors=timing.electors)
            return actions + self._prepare(wish, now_s)
        return actions

    def _beaten(self, sender: int, body: Beat, now_s: float) -> list[Action]:
        assert self._lead is not None
        if sender not in self._lead.heard:
            return []
        self._lead.heard[sender] = now_s
        for_s = min(self.timing.lease_s, self._led_until() - now_s)
        if for_s <= 0:
            return []
        self._lead.leases[sender] = now_s + self.timing.outlasts(for_s)
        # By the member's clock, which may be slower: it gives up a little early.
        return [self._send(sender, Grant(body.sent_s, for_s * (1 - 2 * self.timing.drift)))]

    def _led_until(self) -> float:
        """Until when a majority of the electors will vote for nobody else."""
        assert self._lead is not None
        assert self.view is not None
        sent = sorted(self._lead.followed.values(), reverse=True)
        return sent[self.view.majority - 1] + self.timing.lease_s if len(sent) >= self.view.majority else -1e18

    def _followed(self, sender: int, body: Follow, now_s: float) -> list[Action]:
        assert self._lead is not None
        self._lead.followed[sender] = max(body.sent_s, self._lead.followed.get(sender, -1e18))
        return []

    def _join(self, sender: int, now_s: float) -> list[Action]:
        """Whoever asks is let in by the leader, and told of the leader by everybody else."""
        if self.view is None:
            return []
        if self.standing is Standing.MEMBER and self._lead is not None and sender not in self.view.members:
            self._lead.joining.add(sender)
            return []
        return [self._send(sender, Install(self.view))]

    # -- deciding the next view --

    def _without_leader(self) -> View:
        assert self.view is not None
        return next_view(self.view, self.me, without=[self.view.leader], electors=self.timing.electors)

    def _prepare(self, wish: View, now_s: float) -> list[Action]:
        assert self.view is not None
        highest = max(self._promised, self._candidacy.ballot if self._candidacy else NO_BALLOT)
        self._candidacy = _Candidacy((highest[0] + 1, self.me), wish, now_s)
        self.role = Role.PREPARING
        return [self._send(elector, Prepare(self._candidacy.ballot)) for elector in self.view.electors]

    def _prepared(self, sender: int, body: Prepare, now_s: float) -> list[Action]:
        assert self.view is not None
        bound = now_s < self._bound_until_s and sender != self.view.leader
        if body.ballot <= self._promised or bound:
            return [self._send(sender, Refuse(self._promised))]
        self._promised = body.ballot
        return [self._send(sender, Promise(body.ballot, self._accepted))]

    def _promise(self, sender: int, body: Promise, now_s: float) -> list[Action]:
        assert self._candidacy is not None
        assert self.view is not None
        candidacy = self._candidacy
        if body.ballot != candidacy.ballot:
            return []
        candidacy.promises[sender] = body.accepted
        if len(candidacy.promises) < self.view.majority:
            return []
        # What may have been decided already has to be proposed again, whatever this elector wished.
        accepted = [found for found in candidacy.promises.values() if found is not None]
        candidacy.view = max(accepted, key=lambda found: found[0])[1] if accepted else candidacy.wish
        self.role, candidacy.since_s = Role.PROPOSING, now_s
        return [self._send(elector, Accept(candidacy.ballot, candidacy.view)) for elector in self.view.electors]

    def _accept(self, sender: int, body: Accept, now_s: float) -> list[Action]:
        if body.ballot < self._promised:
            return [self._send(sender, Refuse(self._promised))]
        self._promised, self._accepted = body.ballot, (body.ballot, body.view)
        return [self._send(sender, Accepted(body.ballot))]

    def _was_accepted(self, sender: int, body: Accepted, now_s: float) -> list[Action]:
        assert self._candidacy is not None
        assert self.view is not None
        candidacy = self._candidacy
        if body.ballot != candidacy.ballot or candidacy.view is None:
            return []
        candidacy.accepted_by.add(sender)
        if len(candidacy.accepted_by) < self.view.majority:
            return []
        view, everybody = candidacy.view, self.view.members | candidacy.view.members
        told = [Send(member, Message(self.me, view.epoch, Install(view))) for member in everybody if member != self.me]
        return [Decided(view), *self._install(view, now_s), *told]

    def _refused(self, sender: int, body: Refuse, now_s: float) -> list[Action]:
        assert self._candidacy is not None
        # The next attempt, after a pause of its own length for each elector, goes above what was promised.
        self._candidacy.ballot = max(self._candidacy.ballot, (body.ballot[0], self.me))
        self.role = Role.PREPARING
        return []

    def _asked_to_follow(self, sender: int, body: Lead, now_s: float) -> list[Action]:
        assert self.view is not None
        if sender != self.view.leader:
            return []
        self._heard_s = now_s
        self._bound_until_s = now_s + self.timing.outlasts(self.timing.lease_s)
        return [self._send(sender, Follow(body.sent_s))]

    def _redirect(self, sender: int, body: Beat, now_s: float) -> list[Action]:
        """A member of this view that has lost its leader; until there is another, there is nothing to tell."""
        return []

    def _ignore(self, sender: int, body: Body, now_s: float) -> list[Action]:
        return []

    def _send(self, to: int, body: Body) -> Send:
        return Send(to, Message(self.me, self.epoch, body))


# Of the same epoch only; what comes from another never gets here.
_COMMON: dict[type, Callable[..., list[Action]]] = {
    Grant: Node._granted,
    Lead: Node._asked_to_follow,
    Prepare: Node._prepared,
    Accept: Node._accept,
}
_TABLE: dict[tuple[Role, type], Callable[..., list[Action]]] = {
    **{(role, body): handle for role in Role for body, handle in _COMMON.items()},
    (Role.FOLLOWING, Beat): Node._redirect,
    (Role.PREPARING, Beat): Node._redirect,
    (Role.PROPOSING, Beat): Node._redirect,
    (Role.LEADING, Beat): Node._beaten,
    (Role.LEADING, Follow): Node._followed,
    (Role.PREPARING, Follow): Node._ignore,  # it led until it asked for the next view
    (Role.PROPOSING, Follow): Node._ignore,
    (Role.PREPARING, Promise): Node._promise,
    (Role.PROPOSING, Promise): Node._ignore,  # beyond the majority
    (Role.PREPARING, Accepted): Node._ignore,  # of a ballot that was given up
    (Role.PROPOSING, Accepted): Node._was_accepted,
    (Role.PREPARING, Refuse): Node._refused,
    (Role.PROPOSING, Refuse): Node._refused,
}
