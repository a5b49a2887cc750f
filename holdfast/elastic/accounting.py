"""Where the time went: every second of every rank has a class, and the productive ones by all of them are the ETTR.

ETTR is the effective training time ratio: time in steps that counted, over all the time that ranks were taken. A step that a
recovery rolled back did not count, however long it took. Decided from the journals alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from holdfast.elastic.journal import DONE, Journal, histories


class Kind(StrEnum):
    """What a second was spent on."""

    PRODUCTIVE = "productive"
    """in a step that counted"""
    STALL = "stall"
    """in such a step, held by a snapshot"""
    LOST = "lost work"
    """in a step that a recovery rolled back"""
    DETECTION = "detection"
    """from a rank's last completed step until the first survivor noticed; the step in flight is in here"""
    RESTART = "restart"
    """until a new process was born"""
    STARTUP = "startup"
    """until it called protect: imports, building the model; and all of the first start"""
    RESTORE = "restore"
    """until training could go on"""
    ENDING = "ending"
    """waiting for the last step to be safe"""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one rank's time. `stalled_s` of it were snapshots'; only productive spans have any."""

    rank: int
    kind: Kind
    start_s: float
    end_s: float
    stalled_s: float = 0.0
    attempt: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Account:
    """The ledger of a run: seconds by class over all ranks, and the spans that they are the sum of."""

    spans: tuple[Span, ...]
    seconds: Mapping[str, float]
    step_s: float
    stall_per_step_s: float
    steps: int

    @property
    def rank_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def ettr(self) -> float:
        return self.seconds[Kind.PRODUCTIVE] / self.rank_seconds if self.rank_seconds else 0.0


def account(journals: Sequence[Journal]) -> Account:
    """Class every second of the present run of these journals."""
    attempts = histories(journals)
    counted = [_counted_until(attempts, number) for number in range(len(attempts))]
    spans: list[Span] = []
    busy: dict[int, float] = {}
    for number, attempt in enumerate(attempts):
        for journal in attempt:
            before = _journal_of(attempts[number - 1], journal.begin.rank) if number else None
            gap = _gap(attempts[number - 1], before, journal) if before is not None else ()
            own = [*gap, *_of_attempt(journal, counted[number], first=number == 0)]
            spans += _without_overlap(own, busy)
    seconds = {kind.value: 0.0 for kind in Kind}
    for span in spans:
        seconds[span.kind] += span.seconds - span.stalled_s
        seconds[Kind.STALL] += span.stalled_s
    steps = [pair for attempt in attempts for pair in _durations(attempt[0])]
    return Account(
        tuple(spans),
        {kind: round(value, 4) for kind, value in seconds.items()},
        median(duration for duration, _ in steps) if steps else 0.0,
        sum(stall for _, stall in steps) / len(steps) if steps else 0.0,
        len(steps),
    )


def _counted_until(attempts: Sequence[Sequence[Journal]], number: int) -> float:
    """The last step of an attempt that no later one rolled back."""
    return min((journal.begin.step for later in attempts[number + 1 :] for journal in later), default=float("inf"))


def _journal_of(attempt: Sequence[Journal], rank: int) -> Journal | None:
    return next((journal for journal in attempt if journal.begin.rank == rank), None)


def _of_attempt(journal: Journal, counted_until: float, *, first: bool) -> Iterator[Span]:
    begin = journal.begin
    rank, attempt = begin.rank, begin.attempt
    yield Span(rank, Kind.STARTUP, begin.born_s, begin.entered_s, attempt=attempt)
    fresh = first and not begin.rung
    yield Span(rank, Kind.STARTUP if fresh else Kind.RESTORE, begin.entered_s, begin.time_s, attempt=attempt)
    good = [step for step in journal.steps if step.step <= counted_until]
    lost = journal.steps[len(good) :]
    turn = good[-1].time_s if good else begin.time_s
    if good:
        yield Span(rank, Kind.PRODUCTIVE, begin.time_s, turn, sum(step.stall_s for step in good), attempt)
    if lost:
        yield Span(rank, Kind.LOST, turn, lost[-1].time_s, attempt=attempt)
        turn = lost[-1].time_s
    if journal.end is not None and journal.end.why == DONE:
        yield Span(rank, Kind.ENDING, turn, journal.end.time_s, attempt=attempt)


def _gap(attempt: Sequence[Journal], before: Journal, after: Journal) -> Iterator[Span]:
    """Between a rank's last step of one attempt and its process of the next; nothing where the attempt had ended well."""
    if before.end is not None and before.end.why == DONE:
        return
    rank, last_s = before.begin.rank, before.steps[-1].time_s if before.steps else before.begin.time_s
    noticed = [journal.end.time_s for journal in attempt if journal.end is not None and journal.end.time_s >= last_s]
    turn = min(noticed, default=last_s)
    yield Span(rank, Kind.DETECTION, last_s, turn, attempt=before.begin.attempt)
    yield Span(rank, Kind.RESTART, turn, after.begin.born_s, attempt=before.begin.attempt)


def _without_overlap(spans: Sequence[Span], busy: dict[int, float]) -> Iterator[Span]:
    """A rank's seconds are counted once, even where clocks or a process that lived on (born long ago) say otherwise."""
    for span in spans:
        start = max(span.start_s, busy.get(span.rank, span.start_s))
        if span.end_s > start:
            busy[span.rank] = span.end_s
            yield Span(span.rank, span.kind, start, span.end_s, min(span.stalled_s, span.end_s - start), span.attempt)


def _durations(journal: Journal) -> Iterator[tuple[float, float]]:
    before = journal.begin.time_s
    for step in journal.steps:
        yield step.time_s - before, step.stall_s
        before = step.time_s
