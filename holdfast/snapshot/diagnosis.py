"""What holds a running job up, found by the keepers while the trainers can only wait.

Every trainer's pulse tells its keeper how far it is: the last completed step, the collectives it has entered in each process group,
the processor time of its training thread. Keepers pass that on to the lowest node's, which compares. Nothing is asked of a training
thread, so a rank that is stopped or stuck is found by what the others say, and by its own silence. A verdict goes back to all
keepers; trainers hear of it with the answer to their next pulse. Nothing is ended or restarted because of one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError
from holdfast.events import emit
from holdfast.snapshot.peers import ask
from holdfast.snapshot.verdicts import Progress, Trouble, Verdict, judge_hang, judge_losses, judge_replicas, judge_stragglers
from holdfast.snapshot.wire import Header

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

PULSES = 20
"""Pulses in the time after which a hang is said."""

UNSURE = 10
"""How many times longer nothing may move before the first step is done, which compiles, and where nobody is late: a long piece of
work without a collective looks the same."""

USUAL_STEPS = 3
"""A hang is never said before this many times the usual step."""

STEPS_KEPT = 16
"""Steps of which the sums of some ranks are waited for."""

SAMPLES, ENOUGH = 60, 30
"""Paces that are remembered of a rank, and that are needed to call one slow."""

PACE_EVERY = 5
"""Paces are compared with every so many pulses: it takes 37 ms of 4,096 ranks (one of two shared cores)."""

SLOWER_BY, OF_A_STEP = 0.2, 0.1
"""A straggler computes so much longer than its peers, and that is at least so much of a step: less holds nobody up."""

LOSSES_KEPT = 64
"""Steps whose mean loss is remembered, those of which some rank's is waited for, and those that a rank tells in one pulse."""

LOOKS = 15
"""Portions of what replicas hold alike that are compared in the time after which a hang is said, at most one with each snapshot."""

AGAIN_S = 600.0
"""The same verdict is not said again before that."""

KEPT = 16
"""Verdicts that a keeper remembers."""


# -- what ranks say --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """One rank at one moment. `entered` and `at_step` count collectives by group, now and when `step` was completed; `busy_s` is
    the training thread's processor time then, None where that says nothing; `peers` is equal for ranks that do the same work."""

    step: int
    entered: Mapping[str, int]
    at_step: Mapping[str, int]
    groups: Mapping[str, Sequence[int]]
    busy_s: float | None
    peers: str
    sums: Sequence[tuple[int, Mapping[str, int]]] = ()
    """By step: CRC32C of a portion of what several ranks hold alike, by array."""
    losses: Sequence[tuple[int, float]] = ()
    """By step: what the script has told of it since the last pulse."""
    stack: Sequence[str] = ()
    left: bool = False
    after_s: float = 30.0


def pack(ranks: Sequence[int]) -> list[int]:
    """A group's ranks as [first, end, stride] where they are a range, as in every mesh; else the ranks after a -1."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[-1] + 1, stride) if stride > 0 else range(0)
    return [ranks[0], ranks[-1] + 1, stride] if list(even) == list(ranks) else [-1, *ranks]


def unpack(packed: Sequence[int]) -> Sequence[int]:
    return tuple(packed[1:]) if packed[0] == -1 else range(*packed)


# -- comparing them; pure ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """A rank's last pulse, when it came, when its step and its groups last moved, and its pace so far."""

    said: Pulse
    heard_s: float
    step_s: float
    moved_s: dict[str, float]
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


class Ledger:
    """The pulses of all ranks of one epoch. Pure: the time is an argument."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Known] = {}
        self._steps_s: deque[float] = deque(maxlen=32)
        self._newest = (-1, 0.0)
        self._sums: dict[int, dict[int, Mapping[str, int]]] = {}
        self._losses: dict[int, dict[int, float]] = {}
        self._means: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._tellers: set[int] = set()

    def hear(self, rank: int, said: Pulse, now_s: float) -> None:
        for step, sums in said.sums:
            self._sums.setdefault(step, {})[rank] = sums
        for step, loss in said.losses:
            self._losses.setdefault(step, {})[rank] = loss
            self._tellers.add(rank)
        before = self._ranks.get(rank)
        self._note_step(said.step, now_s)
        if before is None:
            self._ranks[rank] = _Known(said, now_s, now_s, dict.fromkeys(said.entered, now_s))
            return
        if said.step > before.said.step:
            before.step_s = now_s
            if said.busy_s is not None and before.said.busy_s is not None:
                before.paces.append((said.busy_s - before.said.busy_s) / (said.step - before.said.step))
        for group, count in said.entered.items():
            if before.said.entered.get(group) != count:
                before.moved_s[group] = now_s
        before.said, before.heard_s = said, now_s

    def _note_step(self, step: int, now_s: float) -> None:
        newest, since_s = self._newest
        if step > newest:
            if newest >= 0:
                self._steps_s.append((now_s - since_s) / (step - newest))
            self._newest = step, now_s

    @property
    def usual_step_s(self) -> float:
        return median(self._steps_s) if self._steps_s else 0.0

    def hang(self, now_s: float) -> Verdict | None:
        """Who has not entered which collective, once no rank has completed a step for long enough."""
        known = self._ranks
        if not known or any(item.said.left for item in known.values()):
            return None
        after_s = max(max(item.said.after_s for item in known.values()), USUAL_STEPS * self.usual_step_s)
        after_s *= 1 if self._steps_s else UNSURE
        if any(now_s - item.step_s < after_s for item in known.values()):
            return None
        members = {name: unpack(ranks) for item in known.values() for name, ranks in item.said.groups.items()}
        progress = {
            name: self._progress(name, ranks, now_s, after_s) for name, ranks in members.items() if self._counts(name, ranks)
        }
        # Where one group tells who is late, those that nobody waits in have nothing to say.
        late = {name: found for name, found in progress.items() if _is_uneven(found, members[name])}
        return judge_hang(late or progress, members, after_s=after_s if late else UNSURE * after_s)

    def _progress(self, name: str, ranks: Iterable[int], now_s: float, after_s: float) -> dict[int, Progress]:
        found = {}
        for rank in ranks:
            item = self._ranks.get(rank)
            if item is not None:
                silent_s = now_s - item.heard_s
                silent_s = silent_s if silent_s > after_s / 2 else 0.0
                still_s = now_s - item.moved_s.get(name, now_s)
                found[rank] = Progress(item.said.entered[name], still_s, tuple(item.said.stack), silent_s)
        return found

    def _counts(self, name: str, ranks: Iterable[int]) -> bool:
        """Whether the counts of this group can be compared: all who speak know it, and were equal when they had done the same step.

        In a group with sends and receives they are not.
        """
        speak = [self._ranks[rank].said for rank in ranks if rank in self._ranks]
        if any(name not in said.entered for said in speak):
            return False
        step = Counter(said.step for said in speak).most_common(1)[0][0] if speak else 0
        return len({said.at_step.get(name) for said in speak if said.step == step}) <= 1

    def corruption(self) -> Verdict | None:
        """Which replica holds other bytes, of the steps that all ranks have summed by now."""
        ripe = [step for step, told in self._sums.items() if told.keys() == self._ranks.keys()]
        found = [verdict for step in ripe for verdict in _unequal(step, self._sums.pop(step))]
        for step in sorted(self._sums)[:-STEPS_KEPT]:
            del self._sums[step]  # some rank was busy when that step was captured
        return max(found, key=lambda verdict: verdict.confidence, default=None)

    def loss(self) -> Verdict | None:
        """Whether a step's loss is no number, or far above those before: of the steps that all who tell any have told by now."""
        found = None
        for step in sorted(self._losses):
            told = self._losses[step]
            if told.keys() != self._tellers and len(self._losses) <= LOSSES_KEPT:
                break  # in order: what comes after it is compared with it
            del self._losses[step]
            verdict = judge_losses(told, self._means)
            if verdict is None:
                self._means.append(sum(told.values()) / len(told))
            else:
                found = found or replace(verdict, evidence=(f"in step {step}", *verdict.evidence))
        return found

    def straggler(self) -> Verdict | None:
        """Who computes longer than the ranks that do the same work, by enough to hold them up."""
        alike: dict[str, dict[int, Sequence[float]]] = {}
        for rank, item in self._ranks.items():
            alike.setdefault(item.said.peers, {})[rank] = item.paces
        found = [self._slow_of(paces) for paces in alike.values()]
        return max((one for one in found if one is not None), key=lambda one: one.confidence, default=None)

    def _slow_of(self, paces: Mapping[int, Sequence[float]]) -> Verdict | None:
        if min(map(len, paces.values())) < ENOUGH:
            return None
        verdict = judge_stragglers({rank: list(own) for rank, own in paces.items()}, slower_by=SLOWER_BY)
        if verdict is None:
            return None
        middle = median(median(own) for own in paces.values())
        excess_s = min(median(paces[rank]) for rank in verdict.guilty) - middle
        return verdict if excess_s > OF_A_STEP * self.usual_step_s else None


def _unequal(step: int, told: Mapping[int, Mapping[str, int]]) -> list[Verdict]:
    """Each array is compared among those that hold it."""
    holders: dict[str, list[int]] = {}
    for rank in sorted(told):
        for name in told[rank]:
            holders.setdefault(name, []).append(rank)
    found = []
    for ranks in {tuple(group) for group in holders.values()}:
        names = [name for name, group in holders.items() if tuple(group) == ranks]
        verdict = judge_replicas({rank: {name: told[rank][name] for name in names} for rank in ranks})
        if verdict is not None:
            found.append(replace(verdict, evidence=(f"after step {step}", *verdict.evidence)))
    return found


def _is_uneven(found: Mapping[int, Progress], members: Sequence[int]) -> bool:
    silent = any(item.silent_s for item in found.values())
    return silent or len(found) < len(members) or len({item.entered for item in found.values()}) > 1


# -- the keeper's part -------------------------------------------------------------------------------------------------------


class Diagnosis:
    """Passes the pulses of a node's ranks on, and on the lowest node judges those of all."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._said: dict[int, Header] = {}
        self._passed_s = self._judged_s = self._looked_s = 0.0
        self._after_s = 0.0
        self._judged = self._looks = 0
        self._ledger = Ledger()
        self._told: dict[tuple[Trouble, tuple[int, ...]], float] = {}
        self.verdicts: list[dict[str, Any]] = []
        """Of this epoch, oldest first, as `Verdict` with the time."""

    def reset(self) -> None:
        """A new epoch: other processes, other groups."""
        with self._lock:
            self._ledger, self._said, self._told, self.verdicts = Ledger(), {}, {}, []

    def verb_pulse(self, rank: int, attachment: str, said: Header, heard: int) -> Header:
        """A trainer says how far it is, and hears the verdicts that it has not heard yet."""
        keeper, now_s = self._keeper, time.monotonic()
        with keeper.lock:
            keeper.trainers.check(rank, attachment)
            view = keeper.members.view
        if view is not None:
            with self._lock:
                self._said[rank] = said
                is_due = now_s - self._passed_s >= said["after_s"] / PULSES / 2
                batch, self._said = (self._said, {}) if is_due else ({}, self._said)
                self._passed_s = now_s if is_due else self._passed_s
            if batch:
                keeper.members.post(view.coordinator, "pulses", said={str(rank): one for rank, one in batch.items()})
        fresh = self.verdicts[heard:] if heard <= len(self.verdicts) else self.verdicts
        return {"verdicts": fresh, "heard": len(self.verdicts)}

    def verb_pulses(self, said: Header, epoch_of_sender: int = -1) -> None:
        """Told to the lowest node's keeper by every other."""
        now_s = time.monotonic()
        pulses = {int(rank): Pulse(**one) for rank, one in said.items()}
        with self._lock:
            if epoch_of_sender not in (-1, self._keeper.members.epoch):
                return  # the next epoch has begun meanwhile, with other processes
            for rank, pulse in pulses.items():
                self._ledger.hear(rank, pulse, now_s)
            self._after_s = min(pulse.after_s for pulse in pulses.values())
            if now_s - self._judged_s < self._after_s / PULSES:
                return
            self._judged_s, self._judged = now_s, self._judged + 1
            found = [self._ledger.corruption(), self._ledger.loss(), self._ledger.hang(now_s)]
            if self._judged % PACE_EVERY == 0:
                found.append(self._ledger.straggler())
            fresh = [verdict for verdict in found if verdict is not None and self._is_due(verdict, now_s)]
        for verdict in fresh:
            threading.Thread(target=self._tell, args=(verdict,), name="holdfast-verdict", daemon=True).start()

    def look(self) -> int:
        """Which portion ranks should sum with the snapshot that is announced now: a new number where it is time for another."""
        now_s = time.monotonic()
        with self._lock:
            if self._after_s and now_s - self._looked_s >= self._after_s / LOOKS:
                self._looks, self._looked_s = self._looks + 1, now_s
            return self._looks

    def verb_verdict(self, verdict: Header) -> None:
        """What the lowest node's keeper has found; kept for `holdfast status` and for this node's trainers."""
        self.verdicts = [*self.verdicts, verdict]

    def verb_whereabouts(self, rank: int) -> Header:
        """What the kernel says of a trainer of this node."""
        pid = self._keeper.trainers.pids().get(rank, 0)
        return {"text": f"its process {pid} {_state_of(pid)}"}

    def _is_due(self, verdict: Verdict, now_s: float) -> bool:
        key = (verdict.trouble, verdict.guilty)
        if now_s - self._told.get(key, float("-inf")) < AGAIN_S or len(self.verdicts) >= KEPT:
            return False
        self._told[key] = now_s
        return True

    def _tell(self, verdict: Verdict) -> None:
        """Ask the kernels of the guilty, and let everybody know."""
        keeper, view = self._keeper, self._keeper.members.view
        if view is None:
            return
        nodes = {rank: member for member in view.members for rank in member.ranks}
        seen = []
        for rank in verdict.guilty[:3] if verdict.trouble is Trouble.HANG else ():
            try:
                seen.append(f"rank {rank}: {ask(nodes[rank], 'whereabouts', timeout_s=5, rank=rank)['text']}")
            except (HoldfastError, KeyError) as error:
                seen.append(f"rank {rank}: its keeper cannot be asked ({error})")
        found = Verdict(verdict.trouble, verdict.guilty, verdict.confidence, (*verdict.evidence, *seen))
        logger.warning("%s: %s", keeper.job, found)
        fields = asdict(found)
        emit("detector.verdict", job=keeper.job, **fields)
        keeper.members.broadcast("verdict", verdict={"time_s": time.time(), **fields})


_STATES = {
    "T": "is stopped: SIGCONT wakes it",
    "t": "is held by a debugger",
    "D": "waits for a disk or a device and cannot be interrupted",
    "Z": "has ended",
    "X": "has ended",
}


def _state_of(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "is gone"
    return _STATES.get(state, "runs")
