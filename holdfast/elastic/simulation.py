"""The shipped state machines under a virtual clock: thousands of members, random faults, and what must hold checked all along.

`membership.Node` and `snapshot.coordinator.Coordinator` run as they are; only transport, clocks, keepers and time are made up. A
schedule of faults is data, so one that fails is cut down to the few faults that matter and printed as a script that fails again.

What must hold:

* one view for each epoch, and a process's epoch never falls;
* when a view is decided, nobody who is left out of it may still write;
* after any recovery, a step that was committed on all nodes is still there, unless more nodes of one parity group were lost than
  its parity covers;
* no slot is emptied while the other one holds nothing that all nodes have;
* when the faults end, all living members are in one view, hold leases, and commit steps.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.elastic.membership import (
    Action,
    Decided,
    Entered,
    Node,
    Send,
    Standing,
    Stopped,
    Tick,
    Timing,
    View,
    first_view,
)
from holdfast.elastic.simkeepers import Committee, SimKeeper

KINDS = ("kill", "pause", "cut", "loss")


def timing_of(beat_s: float) -> Timing:
    """All of the timing in proportion to a beat. Thousands of members are simulated with a slow one: fewer messages per second."""
    return Timing(
        beat_s=beat_s,
        lease_s=4 * beat_s,
        silent_s=4.5 * beat_s,
        takeover_s=5 * beat_s,
        retry_s=0.7 * beat_s,
        settle_s=2.5 * beat_s,
    )


SLOW = timing_of(1.5)


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s`: kill a member and its memory (a fresh one joins `for_s` later), pause it, cut `width` members off, or lose a share
    of all messages. `place` picks the member among those in the view, as a fraction."""

    at_s: float
    kind: str
    place: float
    for_s: float
    width: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulated run went. `broken` names what did not hold; it is empty in a good run."""

    members: int
    faults: int
    seed: int
    broken: tuple[str, ...]
    views: int
    commits: int
    last_step: int
    rebuilt: int
    fell_back: int
    virtual_s: float
    messages: int
    events: Counter[str]


def random_faults(
    seed: int, count: int, *, gap_s: float, burst: int = 1, widest: int = 2, kinds: Sequence[str] = KINDS
) -> tuple[Fault, ...]:
    """`count` faults at random members; most are kills. They come in bursts of `burst` within a second, about `gap_s` apart; a
    cut separates up to `widest` neighbours, who are often of one parity group.

    Nothing can be committed while an undetected death is in the view, so faults much closer than it takes to miss a member only
    show that nothing breaks; bursts with room in between show that the lost are rebuilt as well.
    """
    dice, at_s, found = random.Random(seed), 20.0, []
    for number in range(count):
        at_s += dice.expovariate(1 / gap_s) if number % burst == 0 else dice.random() / burst
        kind = dice.choice(kinds) if dice.random() < 0.5 else kinds[0]
        width = dice.randint(1, widest) if kind == "cut" else 1
        found.append(Fault(round(at_s, 3), kind, round(dice.random(), 6), round(dice.uniform(1, 20), 3), width))
    return tuple(found)


def simulate(
    members: int,
    faults: Sequence[Fault],
    *,
    seed: int = 0,
    timing: Timing = SLOW,
    parity: int = 2,
    group_size: int = 8,
    calm_s: float = 120.0,
    make: type[Node] = Node,
) -> Outcome:
    """Run a job of so many members (one keeper each) through the faults and `calm_s` more; stops at the first thing that breaks.

    make: the membership machine to run; a broken one shows that the checks see it.
    """
    return _World(members, faults, seed, timing, parity, group_size, make).run(calm_s)


def shrink(faults: Sequence[Fault], fails: Any) -> tuple[Fault, ...]:
    """The fewest of these faults with which `fails(faults)` still holds, by delta debugging (Zeller and Hildebrandt 2002)."""
    left, pieces = tuple(faults), 2
    while len(left) > 1:
        size = max(1, len(left) // pieces)
        smaller = (left[:start] + left[start + size :] for start in range(0, len(left), size))
        found = next((candidate for candidate in smaller if fails(candidate)), None)
        if found is not None:
            left, pieces = found, max(2, pieces - 1)
        elif size == 1:
            break
        else:
            pieces = min(len(left), pieces * 2)
    return left


def script(outcome: Outcome, faults: Iterable[Fault], beat_s: float = SLOW.beat_s) -> str:
    """What to paste to see it again."""
    lines = "\n".join(f"    {fault}," for fault in faults)
    return (
        "from holdfast.elastic.simulation import Fault, simulate, timing_of\n\n"
        f"faults = [\n{lines}\n]\n"
        f"print(simulate({outcome.members}, faults, seed={outcome.seed}, timing=timing_of({beat_s})).broken)\n"
    )


class _Broken(Exception):
    """Something that must hold does not."""


class _World:
    """Everything that is made up: the clock, the network, the processes, and the eye that sees all of them."""

    def __init__(
        self, members: int, faults: Sequence[Fault], seed: int, timing: Timing, parity: int, group_size: int, make: type[Node]
    ) -> None:
        self.size, self.faults, self.seed, self.timing, self.make = members, tuple(faults), seed, timing, make
        self.dice = random.Random(seed)
        self.now_s = 0.0
        self._queue: list[tuple[float, int, str, int, Any]] = []
        self._order = 0
        self.nodes: dict[int, Node] = {}
        self.clocks: dict[int, tuple[float, float]] = {}
        self.paused_until: dict[int, float] = {}
        self.cut_until: dict[int, float] = {}
        self.lossy_until, self.messages = 0.0, 0
        self._stream_s: dict[tuple[int, int], float] = {}
        self.views: dict[int, View] = {}
        self.newest: View = first_view(range(members), timing)
        self.views[1] = self.newest
        self.committee = Committee(self, parity, group_size)
        self.keepers: dict[int, SimKeeper] = {}
        self.events: Counter[str] = Counter()
        self._next_member = members
        for member in range(members):
            self._start(member, self.newest)
            self.committee.entered(member, self.newest)
        for fault in self.faults:
            self.later(fault.at_s, "fault", -1, fault)

    # -- what keepers and nodes use --

    def later(self, at_s: float, kind: str, to: int, what: Any) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at_s, self._order, kind, to, what))

    def send(self, sender: int, to: int, what: Any, kind: str = "message") -> None:
        """Over a network that delays, reorders, and where a fault says so, loses. Keepers' connections are streams: in order, and
        what a fault holds up comes when it is over."""
        self.messages += 1
        now_s, cut, stream = self.now_s, self.cut_until, kind == "keeper"
        at_s = now_s + 0.0005 + self.dice.random() * 0.01
        if cut and sender != to and (cut.get(sender, 0) > now_s) != (cut.get(to, 0) > now_s):
            if not stream:
                return
            at_s += max(cut.get(sender, 0), cut.get(to, 0)) - now_s
        if now_s < self.lossy_until and sender != to and self.dice.random() < 0.2:
            if not stream:
                return
            at_s += 0.3
        if stream:
            at_s = self._stream_s[sender, to] = max(at_s, self._stream_s.get((sender, to), 0.0) + 1e-6)
        self.later(at_s, kind, to, what)

    def clock(self, member: int) -> float:
        """Each has a clock of its own that began anywhere and runs a little fast or slow."""
        offset, rate = self.clocks[member]
        return offset + self.now_s * rate

    def may_write(self, member: int) -> bool:
        return self.nodes[member].may_write(self.clock(member))

    def fail(self, what: str) -> None:
        raise _Broken(f"at {self.now_s:.3f} s: {what}")

    # -- running --

    def run(self, calm_s: float) -> Outcome:
        end_s = (self.faults[-1].at_s + max(fault.for_s for fault in self.faults) if self.faults else 0.0) + calm_s
        broken: tuple[str, ...] = ()
        try:
            while self._queue and self._queue[0][0] <= end_s:
                self.now_s, _, kind, to, what = heapq.heappop(self._queue)
                self._happen(kind, to, what)
            self._check_calm(calm_s)
        except _Broken as found:
            broken = (str(found),)
        return Outcome(
            members=self.size,
            faults=len(self.faults),
            seed=self.seed,
            broken=broken,
            views=len(self.views),
            commits=self.committee.commits,
            last_step=self.committee.last_committed,
            rebuilt=self.committee.rebuilt,
            fell_back=self.committee.fell_back,
            virtual_s=round(self.now_s, 3),
            messages=self.messages,
            events=self.events,
        )

    def _happen(self, kind: str, to: int, what: Any) -> None:
        if kind == "fault":
            self._break(what)
            return
        if kind == "start":
            self._start(to, None)
            return
        node = self.nodes.get(to)
        if node is None:
            return
        until = self.paused_until.get(to, 0.0)
        if until > self.now_s:  # a stopped process reads its messages when it goes on, all of them late
            self.later(until + self.dice.random() * 0.001, kind, to, what)
        elif kind == "tick":
            self.later(self.now_s + self.timing.beat_s * (0.4 + 0.1 * self.dice.random()), "tick", to, what)
            self._act(to, node.feed(Tick(), self.clock(to)))
            if node.standing is Standing.REMOVED:
                node.rejoin(self.clock(to))
        elif kind == "message":
            self._act(to, node.feed(what, self.clock(to)))
        elif kind == "retry":
            self.committee.retry(self.keepers[to], what)
        else:
            self.keepers[to].receive(what)

    def _act(self, member: int, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.send(member, action.to, action.message)
            elif isinstance(action, Decided):
                self._decided(action.view)
            elif isinstance(action, Entered):
                self._check_view(action.view)
                self.committee.entered(member, action.view)
            elif isinstance(action, Stopped):
                self.events["stopped"] += 1
                self.committee.forgot(member)
                self.keepers[member] = SimKeeper(member, self.committee)

    def _start(self, member: int, view: View | None) -> None:
        self.clocks[member] = (self.dice.uniform(0, 1e6), 1 + self.dice.uniform(-1, 1) * self.timing.drift * 0.9)
        known = [*self.newest.electors, self.newest.leader]
        self.nodes[member] = self.make(member, self.timing, view, known, self.clock(member))
        self.keepers[member] = SimKeeper(member, self.committee)
        self.later(self.now_s + self.dice.random() * self.timing.beat_s * 0.5, "tick", member, None)

    # -- faults --

    def _break(self, fault: Fault) -> None:
        alive = sorted(member for member in self.newest.members if member in self.nodes)
        first = int(fault.place * len(alive))
        victims = [alive[(first + step) % len(alive)] for step in range(min(fault.width, len(alive) - 1))] if alive else []
        self.events[fault.kind] += 1
        for victim in victims:
            if fault.kind == "kill":
                del self.nodes[victim]
                self.committee.forgot(victim)
                self.later(self.now_s + fault.for_s, "start", self._next_member, None)
                self._next_member += 1
            elif fault.kind == "pause":
                self.paused_until[victim] = self.now_s + fault.for_s
            elif fault.kind == "cut":
                self.cut_until[victim] = self.now_s + fault.for_s
        if fault.kind == "loss":
            self.lossy_until = self.now_s + fault.for_s

    # -- what must hold --

    def _decided(self, view: View) -> None:
        self._check_view(view)
        if view.epoch > self.newest.epoch:
            for member in self.newest.members - view.members:
                if member in self.nodes and self.may_write(member):
                    self.fail(f"member {member} is left out of epoch {view.epoch} and may still write")
            self.newest = view

    def _check_view(self, view: View) -> None:
        known = self.views.setdefault(view.epoch, view)
        if known != view:
            self.fail(f"two views for epoch {view.epoch}: led by {known.leader} and {view.leader}")

    def _check_calm(self, calm_s: float) -> None:
        if sum(elector in self.nodes for elector in self.newest.electors) < self.newest.majority:
            self.events["quorum lost"] += 1
            return
        epochs = sorted({node.epoch for node in self.nodes.values()})
        if len(epochs) > 1:
            self.fail(f"{calm_s:.0f} s after the last fault the members are in epochs {epochs[:5]}")
        without = [member for member in self.nodes if not self.may_write(member)]
        if without:
            self.fail(f"{calm_s:.0f} s after the last fault {len(without)} member(s) have no lease, such as {without[0]}")
        if self.committee.committed_since(self.now_s - calm_s / 2) == 0:
            self.fail(f"nothing was committed in the last {calm_s / 2:.0f} s of calm")


def cut_down(outcome: Outcome, faults: Sequence[Fault], **options: Any) -> tuple[Fault, ...]:
    """The faults of a broken run that matter: the same thing breaks without the others."""

    def fails(candidate: Sequence[Fault]) -> bool:
        again = simulate(outcome.members, candidate, seed=outcome.seed, **options)
        return bool(again.broken) and _kind(again) == _kind(outcome)

    return shrink(faults, fails)


def _kind(outcome: Outcome) -> str:
    """What broke, without its numbers."""
    return "".join(letter for letter in outcome.broken[0].split(": ", 1)[1] if not letter.isdigit())
