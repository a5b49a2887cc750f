"""What is wrong, and with whom: each detector as a pure function from observations to a verdict with its evidence.

A verdict names the guilty only as far as the observations carry; `confidence` says how far that is. Sensors that gather the
observations are in `diagnosis.py` and, for a loop of one's own, in `holdfast.elastic.sensors`; a simulator or a person can supply
others.
"""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median


class Trouble(StrEnum):
    """What a verdict is about."""

    EXIT = "exit"
    LEASE = "lease lost"
    HANG = "hang"
    STRAGGLER = "straggler"
    LOSS = "loss"
    CORRUPTION = "silent corruption"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`guilty` are ranks, lowest first; none where the trouble lies between ranks or cannot be told. `confidence` is 0 … 1."""

    trouble: Trouble
    guilty: tuple[int, ...]
    confidence: float
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        who = ranks_text(self.guilty) if self.guilty else "no single rank"
        return f"{self.trouble}: {who} ({self.confidence:.0%} sure); {'; '.join(self.evidence)}"


def ranks_text(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# -- exit and lease -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank's process ended, as waitpid tells: a code, or minus the signal."""

    rank: int
    code: int
    time_s: float


def judge_exits(exits: Iterable[Exit]) -> Verdict | None:
    """The first to go is the guilty one; those that the launcher then ended, and those that a dead peer tore down, are not.

    None while nobody has ended badly. SIGTERM is the launcher's or the scheduler's doing and convicts nobody unless it came alone.
    """
    bad = sorted((found for found in exits if found.code), key=lambda found: found.time_s)
    if not bad:
        return None
    own = [found for found in bad if found.code != -signal.SIGTERM]
    killed = [found for found in own if found.code < 0]
    # A rank that ended with an exception may just have lost its peer; one that a signal ended has not.
    first = (killed or own or bad)[0]
    confidence = 0.95 if killed else 0.8 if own else 0.5
    lines = tuple(
        f"rank {found.rank} {_ending(found.code)} {found.time_s - bad[0].time_s:.3f} s after the first" for found in bad[:4]
    )
    return Verdict(Trouble.EXIT, (first.rank,), confidence, lines)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    hint = ", as the kernel does when memory runs out," if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def judge_leases(silent_for_s: Mapping[int, float], *, lease_s: float, me: int) -> Verdict | None:
    """Who has not been heard for longer than a lease. When that is most of the others, this rank is the one that is cut off."""
    others = {rank: seconds for rank, seconds in silent_for_s.items() if rank != me}
    lost = sorted(rank for rank, seconds in others.items() if seconds > lease_s)
    if not lost:
        return None
    longest = max(others[rank] for rank in lost)
    line = f"{len(lost)} of {len(others)} other ranks silent for up to {longest:.1f} s, the lease is {lease_s:.1f} s"
    if len(others) > 1 and len(lost) * 2 > len(others):
        return Verdict(Trouble.LEASE, (me,), 0.7, (line, "this rank hears almost nobody"))
    return Verdict(Trouble.LEASE, tuple(lost), 0.9, (line,))


# -- hang ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """One rank in one process group: how many collectives it has entered, for how long that number has stood still, and where its
    training thread is (innermost frame first). `silent_s` is how long the process has said nothing, where that is too long."""

    entered: int
    still_s: float
    stack: tuple[str, ...] = ()
    silent_s: float = 0.0


def judge_hang(
    progress: Mapping[str, Mapping[int, Progress]], members: Mapping[str, Sequence[int]], *, after_s: float
) -> Verdict | None:
    """Which rank has not entered which collective (C4D's question, arXiv 2406.04594, §3.1), by group, rank and count.

    progress: by group, then rank; a rank that did not report is missing. Of several groups that stand still the clearest case is
    told. None while anything in every group moves.
    """
    suspects = [_hang_of(group, dict(found), members[group], after_s) for group, found in progress.items()]
    found = [verdict for verdict in suspects if verdict is not None]
    return max(found, key=lambda verdict: (verdict.confidence, -len(verdict.guilty)), default=None)


def _hang_of(group: str, found: dict[int, Progress], members: Sequence[int], after_s: float) -> Verdict | None:
    if not found or any(item.still_s < after_s for item in found.values()):
        return None
    missing = sorted(set(members) - found.keys())
    counts = Counter(item.entered for item in found.values())
    furthest, least = max(counts), min(counts)
    entered = f"was entered by {counts[furthest]} of {len(members)} ranks {_longest(found):.1f} s ago"
    line = f"group {group}: collective {furthest} {entered}"
    if missing:
        return Verdict(Trouble.HANG, tuple(missing), 0.9, (line, f"{ranks_text(missing)} did not answer at all"))
    silent = sorted(rank for rank, item in found.items() if item.silent_s)
    if silent:
        lines = tuple(
            f"rank {rank} has said nothing for {found[rank].silent_s:.1f} s, and had entered {found[rank].entered} by then"
            for rank in silent[:3]
        )
        return Verdict(Trouble.HANG, tuple(silent), 0.9, (line, *lines, *_waiting(found, furthest)))
    if furthest == least:
        text = "all ranks have entered it, so none is late: the network, other arguments on one of them, or long work of all"
        return Verdict(Trouble.HANG, (), 0.5, (line, text, *_stacks(found, list(found)[:1])))
    behind = sorted(rank for rank, item in found.items() if item.entered < furthest)
    first = sorted(rank for rank in behind if found[rank].entered == least)
    # Several that are one behind wait for the one that is furthest behind, through another group.
    lines = tuple(f"rank {rank} has entered {found[rank].entered}, not {found[rank].entered + 1}" for rank in first[:3])
    stacks = (*_stacks(found, first[:2]), *_waiting(found, furthest))
    return Verdict(Trouble.HANG, tuple(first), 0.95 if len(first) == 1 else 0.8, (line, *lines, *stacks))


def _waiting(found: Mapping[int, Progress], furthest: int) -> tuple[str, ...]:
    """Where one of those stands that have entered the collective: which call it is."""
    waiting = next(
        (rank for rank, item in found.items() if item.entered == furthest and item.stack and not item.silent_s), None
    )
    return () if waiting is None else (f"rank {waiting} waits in {' ← '.join(found[waiting].stack[:4])}",)


def _longest(found: Mapping[int, Progress]) -> float:
    return max(item.still_s for item in found.values())


def _stacks(found: Mapping[int, Progress], ranks: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"rank {rank} is in {' ← '.join(found[rank].stack[:4])}" for rank in ranks if found[rank].stack)


# -- straggler ----------------------------------------------------------------------------------------------------------------


def judge_stragglers(
    compute_s: Mapping[int, Sequence[float]], *, slower_by: float = 0.1, score: float = 5.0, windows: int = 3
) -> Verdict | None:
    """Who computes longer than its peers, steadily. Give the time of each step without waiting, of ranks that do the same work.

    A rank is a straggler when in each of the last `windows` runs of steps its median exceeds that of all ranks by `slower_by` and
    by `score` robust standard deviations (1.4826 × the median absolute deviation).
    """
    shortest = min((len(times) for times in compute_s.values()), default=0)
    if len(compute_s) < 3 or shortest < windows:
        return None
    size = shortest // windows
    slow = set(compute_s)
    factors: dict[int, float] = {}
    for window in range(windows):
        cut = slice(shortest - (window + 1) * size, shortest - window * size)
        typical = {rank: median(list(times)[-shortest:][cut]) for rank, times in compute_s.items()}
        middle = median(typical.values())
        spread = max(1.4826 * median(abs(value - middle) for value in typical.values()), 0.005 * middle)
        slow &= {
            rank for rank, value in typical.items() if value > middle * (1 + slower_by) and value - middle > score * spread
        }
        factors |= {rank: value / middle for rank, value in typical.items() if middle > 0}
    if not slow:
        return None
    guilty = tuple(sorted(slow))
    lines = tuple(f"rank {rank} computes {factors[rank]:.2f} × as long as the median rank" for rank in guilty[:4])
    return Verdict(Trouble.STRAGGLER, guilty, 0.9 if len(guilty) * 4 <= len(compute_s) else 0.6, lines)


# -- loss ---------------------------------------------------------------------------------------------------------------------


def judge_losses(
    losses: Mapping[int, float], history: Sequence[float], *, score: float = 10.0, least: int = 16
) -> Verdict | None:
    """Whether a step's losses, one of each rank, are finite and in line with the mean losses of the steps before.

    One rank's NaN is everybody's: after the gradients' all-reduce all have it. A spike is a mean that exceeds the median of the
    last `least` or more means by `score` robust standard deviations.
    """
    ill = sorted(rank for rank, loss in losses.items() if not math.isfinite(loss))
    if ill:
        own = len(ill) < len(losses)
        text = f"the loss of {ranks_text(ill)} is {losses[ill[0]]}" + (
            "" if own else ": all ranks, so the parameters may have it"
        )
        return Verdict(Trouble.LOSS, tuple(ill) if own else (), 1.0 if own else 0.5, (text,))
    if not losses or len(history) < least:
        return None
    mean, middle = sum(losses.values()) / len(losses), median(history)
    spread = max(1.4826 * median(abs(value - middle) for value in history), 1e-3 * abs(middle), 1e-12)
    if mean - middle <= score * spread:
        return None
    above = f"{(mean - middle) / spread:.1f} robust deviations above the {middle:.4g} of {len(history)} steps before"
    text = f"the mean loss is {mean:.4g}, {above}"
    worst = max(losses, key=lambda rank: losses[rank])
    alone = losses[worst] - middle > 0.8 * (mean - middle) * len(losses)
    return Verdict(Trouble.LOSS, (worst,) if alone else (), 0.7, (text,))


# -- silent corruption -----------------------------------------------------------------------------------------------------------


def judge_replicas(crcs: Mapping[int, Mapping[str, int]]) -> Verdict | None:
    """Which replica holds other bytes than the rest, by the CRC32C of every array that has to be equal.

    crcs: by rank, then array. A majority convicts the others; two replicas that differ convict nobody.
    """
    guilty: Counter[int] = Counter()
    lines: list[str] = []
    undecided: set[int] = set()
    for array in sorted({name for found in crcs.values() for name in found}):
        seen = {rank: found.get(array) for rank, found in crcs.items()}
        votes = Counter(seen.values()).most_common()
        if len(votes) == 1:
            continue
        wrong = sorted(rank for rank, crc in seen.items() if crc != votes[0][0])
        if votes[0][1] * 2 > len(seen):
            guilty.update(wrong)
            lines.append(f"{array}: {ranks_text(wrong)} differ{'s' if len(wrong) == 1 else ''} from {votes[0][1]} others")
        else:
            undecided |= set(seen)
            lines.append(f"{array}: no majority among {len(seen)} replicas, {len(votes)} different contents")
    if not lines:
        return None
    more = (f"and {len(lines) - 4} more arrays",) if len(lines) > 4 else ()
    if guilty:
        return Verdict(Trouble.CORRUPTION, tuple(sorted(guilty)), 0.5 if undecided else 0.99, (*lines[:4], *more))
    return Verdict(Trouble.CORRUPTION, (), 0.5, (*lines[:4], *more))


# -- links --------------------------------------------------------------------------------------------------------------------


def judge_links(reached: Mapping[tuple[int, int], bool]) -> Verdict | None:
    """Whose network is gone, from who could reach whom: a rank that most cannot reach, or one line between two."""
    bad = sorted(pair for pair, fine in reached.items() if not fine)
    if not bad:
        return None
    tried = Counter(rank for pair in reached for rank in pair)
    failed = Counter(rank for pair in bad for rank in pair)
    gone = sorted(rank for rank in failed if failed[rank] * 2 > tried[rank])
    lines = tuple(f"rank {one} does not reach rank {other}" for one, other in bad[:4])
    if len(bad) == 1 or not gone:
        return Verdict(Trouble.LINK, (), 0.8, (*lines, "each end still reaches others: the line between them, not a rank"))
    worst = max(failed[rank] / tried[rank] for rank in gone)
    guilty = tuple(rank for rank in gone if failed[rank] / tried[rank] == worst)
    return Verdict(Trouble.LINK, guilty, 0.9 if len(guilty) == 1 else 0.5, lines)
