"""Was every sample used exactly once? Decided from the journals of all ranks, and proved or not.

Steps that a recovery rolled back are void: their samples were used again by the steps that replaced them. What is left is one line
of steps; its runs of the stream have to join without gap or overlap, every micro-batch of every step has to be in the journal of
the rank that used it, and the samples are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.elastic.journal import DONE, Data, Journal, histories
from holdfast.elastic.order import position_of, samples_at

COUNTED_LIMIT = 50_000_000
"""Uses up to which every single sample is counted; beyond, the joined runs and the order, which is a permutation, say it."""


@dataclass(frozen=True, slots=True)
class Skipped:
    step: int
    position: int
    samples: int
    why: str


@dataclass(frozen=True, slots=True)
class DataAudit:
    """What became of one loader's samples. `problems` is empty exactly when the proof holds."""

    name: str
    size: int
    steps: int
    samples: int
    epochs: float
    counted: bool
    skipped: tuple[Skipped, ...]
    left_over: int
    problems: tuple[str, ...]

    @property
    def is_proved(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Audit:
    """A run's attempts and worlds, the steps done twice because a fault took them back, and one finding for each loader."""

    attempts: int
    worlds: tuple[int, ...]
    last_step: int
    rolled_back: int
    data: tuple[DataAudit, ...]

    @property
    def is_proved(self) -> bool:
        return bool(self.data) and all(item.is_proved for item in self.data)


@dataclass(slots=True)
class _Line:
    """What the surviving line of steps says about one step of one loader: the runs, and which data ranks bear witness."""

    runs: tuple[tuple[int, int, str], ...]
    data: Data
    attempt: int
    witnesses: set[int]


def audit(journals: Sequence[Journal]) -> Audit:
    """The proof for the present run of these journals, from its first step on."""
    attempts = histories(journals)
    lines, problems, begins, rolled_back = _surviving(attempts)
    names = sorted({name for attempt in attempts for journal in attempt for name in journal.begin.data})
    found = [_audit_loader(name, lines.get(name, {}), begins.get(name, []), problems.get(name, [])) for name in names]
    worlds = tuple(attempt[0].begin.world for attempt in attempts)
    last = max((max(known) for known in lines.values() if known), default=0)
    return Audit(len(attempts), worlds, last, rolled_back, tuple(found))


def uses_of(journals: Sequence[Journal], name: str, sample: int) -> list[tuple[int, int]]:
    """(epoch, step) of every use of `sample` on the surviving line."""
    lines, *_ = _surviving(histories(journals))
    return [
        (epoch, step)
        for step, line in sorted(lines.get(name, {}).items())
        for start, count, skipped in line.runs
        for epoch in range(start // line.data.size, (start + count - 1) // line.data.size + 1)
        if not skipped and start <= _position_of(sample, epoch, line.data) < start + count
    ]


def _position_of(sample: int, epoch: int, data: Data) -> int:
    return position_of(sample, epoch, data.size, data.seed, shuffle=data.shuffle)


# -- the surviving line ------------------------------------------------------------------------------------------------------

_Lines = dict[str, dict[int, _Line]]


def _surviving(
    attempts: Sequence[Sequence[Journal]],
) -> tuple[_Lines, dict[str, list[str]], dict[str, list[tuple[int, int]]], int]:
    """Steps that no recovery took back, by loader; disagreements; (step, position) at every begin; steps rolled back."""
    lines: _Lines = {}
    problems: dict[str, list[str]] = {}
    begins: dict[str, list[tuple[int, int]]] = {}
    done: set[int] = set()
    rolled_back = 0
    for attempt in attempts:
        restored = max(journal.begin.step for journal in attempt)
        reached = _reached(attempt) if attempt is attempts[-1] else None
        rolled_back += sum(step > restored for step in done)
        done = {step for step in done if step <= restored} | {step.step for journal in attempt for step in journal.steps}
        for known in lines.values():
            for step in [step for step in known if step > restored]:
                del known[step]
        for journal in attempt:
            for name, data in journal.begin.data.items():
                begins.setdefault(name, []).append((journal.begin.step, data.position))
                _add(lines.setdefault(name, {}), journal, name, data, problems.setdefault(name, []), reached)
    return lines, problems, begins, rolled_back


def _reached(attempt: Sequence[Journal]) -> int | None:
    """How far all ranks of the last attempt have come; further steps are in flight, or were when the run was killed."""
    done = all(journal.end is not None and journal.end.why == DONE for journal in attempt)
    return None if done else min(journal.last_step for journal in attempt)


def _add(known: dict[int, _Line], journal: Journal, name: str, data: Data, problems: list[str], reached: int | None) -> None:
    for step in journal.steps:
        if reached is not None and step.step > reached:
            break
        runs = tuple(step.uses.get(name, ()))
        line = known.setdefault(step.step, _Line(runs, data, journal.begin.attempt, set()))
        if line.runs != runs:
            problems.append(
                f"step {step.step}: rank {journal.begin.rank} used {_runs(runs)}, others used {_runs(line.runs)} in the same step"
            )
        line.witnesses.add(data.rank)


def _runs(runs: Sequence[tuple[int, int, str]]) -> str:
    return ", ".join(f"{position}…{position + samples - 1}" for position, samples, _ in runs) or "nothing"


# -- one loader --------------------------------------------------------------------------------------------------------------


def _audit_loader(
    name: str, lines: Mapping[int, _Line], begins: Sequence[tuple[int, int]], problems: Sequence[str]
) -> DataAudit:
    found = [*problems, *_gaps(lines, begins), *_without_witness(lines)]
    data = next(iter(lines.values())).data if lines else None
    used = [(start, count) for line in lines.values() for start, count, why in line.runs if not why]
    skipped = tuple(Skipped(step, *run) for step, line in sorted(lines.items()) for run in line.runs if run[2])
    samples, size = sum(count for _, count in used), data.size if data else 0
    counted = data is not None and samples <= COUNTED_LIMIT
    if data is not None and counted:
        found += _count(used, data)
    end = max((start + count for line in lines.values() for start, count, _ in line.runs), default=0)
    left_over = data.epochs * size - end if data is not None and data.epochs is not None else 0
    return DataAudit(name, size, len(lines), samples, end / size if size else 0.0, counted, skipped, left_over, tuple(found))


def _gaps(lines: Mapping[int, _Line], begins: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Steps and positions have to follow each other, and every restored cursor has to stand where its step ended."""
    ends = {0: 0}
    at, before = 0, 0
    for step in sorted(lines):
        if step != before + 1:
            yield (
                f"steps {before + 1}…{step - 1} are in no journal"
                if step > before + 2
                else f"step {before + 1} is in no journal"
            )
        for position, samples, _ in lines[step].runs:
            if position != at:
                what = "were never used" if position > at else "were used twice"
                yield f"step {step}: positions {min(at, position)}…{max(at, position) - 1} of the stream {what}"
            at = position + samples
        ends[step], before = at, step
    for step, position in dict.fromkeys(begins):
        if step in ends and ends[step] != position:
            yield f"a recovery to step {step} went on at position {position}, and the step had ended at {ends[step]}"


def _without_witness(lines: Mapping[int, _Line]) -> Iterator[str]:
    """Every rank that had a part of a step has to have written so."""
    lacking: dict[tuple[int, int], list[int]] = {}
    for step, line in lines.items():
        for rank in sorted(set(range(line.data.plan.world)) - line.witnesses) if line.runs else ():
            lacking.setdefault((rank, line.attempt), []).append(step)
    for (rank, attempt), steps in sorted(lacking.items()):
        yield (
            f"{len(steps)} step(s) from {min(steps)} to {max(steps)} are in no journal of data rank "
            f"{rank} (attempt {attempt}); it is lost, or on another host: name that host's records too"
        )


def _count(used: Sequence[tuple[int, int]], data: Data) -> Iterator[str]:
    """Every sample, by epoch: as often as the runs cover its epoch, which is once."""
    for epoch in sorted({place // data.size for start, count in used for place in (start, start + count - 1)}):
        first = epoch * data.size
        cut = [(max(start, first), min(start + count, first + data.size)) for start, count in used]
        places = np.concatenate([np.arange(a, b) for a, b in cut if a < b])
        times = np.bincount(samples_at(places, data.size, data.seed, shuffle=data.shuffle), minlength=data.size)
        if times.max(initial=0) > 1:
            twice, sample = int((times > 1).sum()), int(times.argmax())
            yield f"epoch {epoch}: {twice} sample(s) were used more than once; sample {sample} {int(times[sample])} times"
