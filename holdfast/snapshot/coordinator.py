"""Which step is snapshotted next, and when it counts: the commit protocol of one job as a table of states and events.

Pure: no clock, no sockets. The keeper of the lowest node feeds it events and carries out the actions. Losing it loses nothing,
because recovery reads the slots' headers and never asks a coordinator.

A step can only be committed when every rank has captured that same step. Ranks run freely, so the coordinator names a step that
lies ahead of all of them; a rank that had already passed it says so, the round is given up, and the next one aims further.
Where every rank has captured the step and only its parity could not be had, that is tried again in a new round of the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

LEAD_LIMIT = 256
"""Furthest that a target may lie ahead of the newest completed step. Reached only when steps are far shorter than messages."""

LAST_TRIES = 10
"""Rounds for the last step of a run that may fail before the run ends without it."""

CALM_ROUNDS = 16
"""Commits in a row without a missed target before the next target is named one step closer."""

SPILL_TRIES = 4
"""Attempts at a checkpoint that cannot wait for the next commit, 1, 2 and 4 seconds apart, before the run goes on or ends
without it."""

ENCODE_TRIES = 6
"""Attempts at the parity of a step that its ranks have captured, after the first: at once, then 1, 2, 4, 8 and 16 seconds apart."""

UNPROTECTED = "unprotected"
"""The reason of a node whose ranks' bytes are whole while their parity could not be had."""

RETRY_LIMIT = 32
"""Most commits that pass between two attempts at a checkpoint that keeps failing; they double from one on."""


class Phase(Enum):
    """WAITING for all keepers to enter the epoch · FILLING: a step is announced · COMMITTING: all encoded it · IDLE · STOPPED."""

    WAITING = "waiting"
    FILLING = "filling"
    COMMITTING = "committing"
    IDLE = "idle"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Begin:
    """Every keeper has entered the epoch; `progress` is the newest step that a rank has completed, where ranks train on."""

    progress: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """`round` is the one of the announcement that this answers: a step may be announced again, and what was filled before is
    void then."""

    node: int
    step: int
    progress: int
    round: int


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A rank of the node cannot deliver `step`: it passed it, or its capture saw a mutation; or, with the reason UNPROTECTED, its
    bytes are there and the exchange of parity failed."""

    node: int
    step: int
    progress: int
    reason: str
    round: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    node: int
    step: int
    progress: int


@dataclass(frozen=True, slots=True)
class SpillEnded:
    """The checkpoint that was written from slot `index` is committed, or, with `ok` false, does not exist."""

    index: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Hurry:
    """What is in memory may soon be lost: the newest committed step has to become a checkpoint at once."""


@dataclass(frozen=True, slots=True)
class Finishing:
    """All ranks of the node have ended their loop at `step`; with `keep` they wait for that step to be committed."""

    node: int
    step: int
    keep: bool


Input = Begin | Encoded | GivenUp | Acknowledged | SpillEnded | Hurry | Finishing


@dataclass(frozen=True, slots=True)
class Announce:
    """Every node: empty slot `index` and have every rank capture `step` into it."""

    step: int
    index: int
    round: int


@dataclass(frozen=True, slots=True)
class Protect:
    """The `step` in slot `index` has no parity yet, and its bytes are there: it was restored, or the last attempt at its parity
    failed. Compute it after `delay_s`, before anything else. A rank that is still capturing it goes on."""

    step: int
    index: int
    round: int
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Commit:
    step: int
    index: int


@dataclass(frozen=True, slots=True)
class Spill:
    """Write the committed `step` in slot `index` as a universal checkpoint, after `delay_s`; the slot is not refilled before
    SpillEnded."""

    step: int
    index: int
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Stop:
    """The run has ended on every node. Where `saved` is false, its last step was to become a checkpoint and did not: what is in
    memory is all there is, and must stay."""

    saved: bool = True


Action = Announce | Protect | Commit | Spill | Stop


class ProtocolError(RuntimeError):
    """An event that the current state does not expect."""


class Coordinator:
    """One epoch's protocol. `feed` takes an event and returns what to do now."""

    def __init__(
        self,
        nodes: Iterable[int],
        *,
        every: int,
        checkpoint_every: int,
        committed: int = 0,
        index: int = 1,
        protected: bool = True,
        overdue: bool = False,
        spilled: int = 0,
    ) -> None:
        self.nodes = frozenset(nodes)
        self.every, self.checkpoint_every = every, checkpoint_every
        self.committed, self.index = committed, index
        self._unprotected = not protected
        self._overdue = overdue
        """Nothing that these nodes would be rebuilt from is committed: the next step is captured, whatever `every` says."""
        self.phase = Phase.WAITING
        self.step = 0
        self.round = 0
        self._ordered = 0
        """The round in which the step was announced; those after it are new attempts at its parity."""
        self._tries = 0
        self.lead = 1
        self.given_up = 0
        self._spilled = spilled
        self._spilling: tuple[int, int] | None = None
        self._spill_failures = 0
        self._retry_at = 0
        self._commits = 0
        self._hurry = 0
        self._waiting: set[int] = set()
        self._progress = committed
        self._calm = 0
        self._failed_last = 0
        self._finishing: dict[int, Finishing] = {}

    def feed(self, event: Input) -> list[Action]:
        try:
            handle = _TABLE[self.phase, type(event)]
        except KeyError:
            raise ProtocolError(f"{event} is not expected while {self.phase.value}") from None
        return handle(self, event)

    # -- one method for each cell of the table --

    def _begin(self, event: Begin) -> list[Action]:
        self._progress = max(self._progress, event.progress)
        if self._unprotected:
            return self._protect()
        self.phase = Phase.IDLE
        return self._spill() + self._next()

    def _encoded(self, event: Encoded) -> list[Action]:
        self._progress = max(self._progress, event.progress)
        if event.round != self.round:
            return []
        self._waiting.discard(event.node)
        if self._waiting:
            return []
        self.phase, self._waiting = Phase.COMMITTING, set(self.nodes)
        return [Commit(self.step, 1 - self.index)]

    def _give_up(self, event: GivenUp) -> list[Action]:
        self._progress = max(self._progress, event.progress)
        # What a rank says of its capture holds for every attempt at its parity; a failed exchange is one attempt's.
        if event.round < (self.round if event.reason == UNPROTECTED else self._ordered):
            return []
        if event.reason == UNPROTECTED and self._is_wanted():
            return self._protect_again()
        self.given_up += 1
        at_the_end = len(self._finishing) == len(self.nodes)
        self._failed_last += at_the_end and event.reason not in ("passed", "busy")  # who is busy will be done soon
        self._calm = 0
        if event.reason == "passed":
            self.lead = min(self.lead * 2, LEAD_LIMIT)
        return self._next()

    def _acknowledged(self, event: Acknowledged) -> list[Action]:
        self._progress = max(self._progress, event.progress)
        if event.step != self.step:
            return []
        self._waiting.discard(event.node)
        if self._waiting:
            return []
        # Only now may the older slot be refilled: every node has the newer one committed.
        self.committed, self.index = self.step, 1 - self.index
        self._unprotected = self._overdue = False
        self._commits += 1
        self._calm += 1
        if self._calm >= CALM_ROUNDS:
            self.lead, self._calm = max(1, self.lead - 1), 0
        return self._spill() + self._next()

    def _spill_ended(self, event: SpillEnded) -> list[Action]:
        if self._spilling is not None:
            step, self._spilling = self._spilling[0], None
            if event.ok:
                self._spilled, self._spill_failures = max(self._spilled, step), 0
            else:
                self._spill_failures += 1
                self._retry_at = self._commits + min(2 ** (self._spill_failures - 1), RETRY_LIMIT)
        return self._spill() + (self._next() if self.phase is Phase.IDLE else [])

    def _hurry_up(self, event: Hurry) -> list[Action]:
        # A step that all have encoded will be committed whatever happens, and is worth waiting for.
        self._hurry = self.step if self.phase is Phase.COMMITTING else self.committed
        self._spill_failures = min(self._spill_failures, SPILL_TRIES - 1)
        return self._spill()

    def _finish(self, event: Finishing) -> list[Action]:
        self._finishing[event.node] = event
        self._progress = max(self._progress, event.step)
        return self._next() if self.phase is Phase.IDLE else []

    def _finish_while_filling(self, event: Finishing) -> list[Action]:
        self._finish(event)
        passed = self.step > event.step  # a node that has ended will never reach the announced step
        return self._next() if passed or (self._tries and not self._is_wanted()) else []

    def _ignore(self, event: Input) -> list[Action]:
        return []

    def _note_progress(self, event: GivenUp) -> list[Action]:
        self._progress = max(self._progress, event.progress)
        return []

    # -- what follows --

    def _next(self) -> list[Action]:
        """Announce the next step, or wait for what stands in its way."""
        self.phase = Phase.IDLE
        if len(self._finishing) == len(self.nodes):
            return self._last()
        if self._finishing or self._is_spilling(1 - self.index):
            return []
        ahead = self._progress + self.lead
        return self._announce(-(-ahead // self._stride) * self._stride)

    @property
    def _stride(self) -> int:
        return 1 if self._overdue else self.every

    def _last(self) -> list[Action]:
        steps = {event.step for event in self._finishing.values()}
        step, keep = max(steps), self._keeps()
        # Nodes that ended at different steps have no last step in common that could be captured.
        wanted = keep and len(steps) == 1 and self._failed_last < LAST_TRIES
        if wanted and (self.committed < step or self._overdue):
            return [] if self._is_spilling(1 - self.index) else self._announce(step)
        spill = self._spill()
        if spill or self._spilling is not None:
            return spill
        self.phase = Phase.STOPPED
        return [Stop(saved=not keep or not self.checkpoint_every or self._spilled >= step)]

    def _keeps(self) -> bool:
        """Somebody waits for the last step to be kept."""
        return any(event.keep and event.step for event in self._finishing.values())

    def _protect(self) -> list[Action]:
        self.index = 1 - self.index  # until it is committed, the other slot is the one that may not be touched
        self._open_round(self.committed)
        self._ordered = self.round
        return [Protect(self.step, 1 - self.index, self.round)]

    def _is_wanted(self) -> bool:
        """Another attempt at this step's parity protects the run sooner than the next snapshot would."""
        if self._tries >= ENCODE_TRIES:
            return False
        if len(self._finishing) == len(self.nodes):
            return self._keeps() and self.step == max(event.step for event in self._finishing.values())
        # The next snapshot would empty the slot of a restored step, which nothing else may hold by now.
        return self._unprotected or self._progress < (self.step // self._stride + 1) * self._stride

    def _protect_again(self) -> list[Action]:
        delay_s, self._tries = _pause_s(self._tries), self._tries + 1
        self._open_round(self.step)
        return [Protect(self.step, 1 - self.index, self.round, delay_s)]

    def _announce(self, step: int) -> list[Action]:
        self._open_round(step)
        self._ordered = self.round
        return [Announce(step, 1 - self.index, self.round)]

    def _open_round(self, step: int) -> None:
        if step != self.step:
            self._tries = 0
        self.phase, self.step, self._waiting = Phase.FILLING, step, set(self.nodes)
        self.round += 1

    def _is_spilling(self, index: int) -> bool:
        return self._spilling is not None and self._spilling[1] == index

    def _spill(self) -> list[Action]:
        """Have the committed step written, where it is due and nothing else is being written."""
        if not self.checkpoint_every or self._spilling is not None or self._spilled >= self.committed:
            return []
        if self._unprotected or self._overdue or self.phase is Phase.WAITING:
            return []  # the slots are not in the state that `committed` and `index` speak of
        last = len(self._finishing) == len(self.nodes) and self._keeps()
        if last or self._spilled < self._hurry:
            due, delay_s = self._spill_failures < SPILL_TRIES, _pause_s(self._spill_failures)
        else:
            crossed = self.committed // self.checkpoint_every > self._spilled // self.checkpoint_every
            due, delay_s = crossed and self._commits >= self._retry_at, 0.0
        if not due:
            return []
        self._spilling = self.committed, self.index
        return [Spill(self.committed, self.index, delay_s)]


def _pause_s(failures: int) -> float:
    return 2.0 ** (failures - 1) if failures else 0.0


_TABLE: dict[tuple[Phase, type], Callable[..., list[Action]]] = {
    (Phase.WAITING, Begin): Coordinator._begin,
    (Phase.WAITING, Finishing): Coordinator._finish_while_filling,
    (Phase.WAITING, GivenUp): Coordinator._note_progress,  # of the epoch before: ranks train on while keepers regroup
    (Phase.WAITING, Hurry): Coordinator._hurry_up,
    (Phase.FILLING, Encoded): Coordinator._encoded,
    (Phase.FILLING, GivenUp): Coordinator._give_up,
    (Phase.FILLING, SpillEnded): Coordinator._spill_ended,
    (Phase.FILLING, Hurry): Coordinator._hurry_up,
    (Phase.FILLING, Finishing): Coordinator._finish_while_filling,
    (Phase.FILLING, Acknowledged): Coordinator._ignore,
    (Phase.COMMITTING, Acknowledged): Coordinator._acknowledged,
    (Phase.COMMITTING, SpillEnded): Coordinator._spill_ended,
    (Phase.COMMITTING, Hurry): Coordinator._hurry_up,
    (Phase.COMMITTING, Finishing): Coordinator._finish,
    (Phase.COMMITTING, GivenUp): Coordinator._ignore,  # of an older round: its message was overtaken
    (Phase.COMMITTING, Encoded): Coordinator._ignore,
    (Phase.IDLE, SpillEnded): Coordinator._spill_ended,
    (Phase.IDLE, Hurry): Coordinator._hurry_up,
    (Phase.IDLE, Finishing): Coordinator._finish,
    (Phase.IDLE, Acknowledged): Coordinator._ignore,  # told twice: its message was sent again when a connection broke
    (Phase.IDLE, GivenUp): Coordinator._ignore,
    (Phase.IDLE, Encoded): Coordinator._ignore,
    (Phase.STOPPED, SpillEnded): Coordinator._ignore,
    (Phase.STOPPED, Hurry): Coordinator._ignore,
    (Phase.STOPPED, Finishing): Coordinator._ignore,
    (Phase.STOPPED, Acknowledged): Coordinator._ignore,
    (Phase.STOPPED, GivenUp): Coordinator._ignore,
    (Phase.STOPPED, Encoded): Coordinator._ignore,
}
