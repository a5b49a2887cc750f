"""The oracle: a restored state is, bit for bit, one that this job was in before, or the error is loud.

Pure: it is given what the witnesses wrote and how the processes ended, and returns a verdict with its reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    """How a rehearsed run ended. Everything from SILENT on is a failure of holdfast or of the rehearsal."""

    RECOVERED = "recovered"
    LOUD = "loud error"
    SKIPPED = "skipped"
    SILENT = "SILENT ERROR"
    HUNG = "HUNG"
    CRASHED = "CRASHED"
    MISSED = "NOT REACHED"
    UNEXPECTED = "UNEXPECTED"

    @property
    def is_failure(self) -> bool:
        return self not in (Verdict.RECOVERED, Verdict.LOUD, Verdict.SKIPPED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rehearsed schedule. `restores` are (step, rung) of every start that restored, in order."""

    name: str
    faults: tuple[str, ...]
    verdict: Verdict
    detail: str
    restores: tuple[tuple[int, str], ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Testimony:
    """What the witnesses of one run saw, by rank and step: digests of the state, and of the state with the random generators."""

    steps: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=dict)
    exact: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=dict)
    starts: tuple[Mapping[str, Any], ...] = ()
    ends: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Testimony:
        steps: dict[tuple[int, int], set[str]] = defaultdict(set)
        exact: dict[tuple[int, int], set[str]] = defaultdict(set)
        starts: list[Mapping[str, Any]] = []
        ends: dict[int, int] = {}
        for line in lines:
            if line["fact"] == "step":
                steps[line["rank"], line["step"]].add(line["digest"])
                exact[line["rank"], line["step"]].add(line["digest"] + line["rng"])
            elif line["fact"] == "start":
                starts.append(line)
            else:
                ends[line["rank"]] = line["step"]
        return cls(_frozen(steps), _frozen(exact), tuple(starts), ends)

    @property
    def restores(self) -> tuple[tuple[int, str], ...]:
        seen = {start["start"]: (start["step"], start["rung"]) for start in self.starts if start["rung"]}
        return tuple(seen.values())


def judge(
    seen: Testimony, reference: Testimony | None, *, code: int | None, log: str, missed: Iterable[str], expect: str
) -> tuple[Verdict, str]:
    """`code` is None for a run that had to be ended; `missed` are faults that never struck; `reference` the undisturbed run."""
    silent = falsehoods(seen, reference)
    if silent:
        return Verdict.SILENT, silent[0]
    never = list(missed)
    if code is None:
        return Verdict.HUNG, f"it was ended after its time; the last that it said: {loud_error(log) or _tail(log)}"
    if never:
        return Verdict.MISSED, f"{never[0]} never came to pass; the run ended with {code}"
    if code == 0:
        problem = _incomplete(seen, reference)
        if problem:
            return Verdict.SILENT, problem
        if expect == "loud":
            return Verdict.UNEXPECTED, "it recovered, where a loud error was expected"
        return Verdict.RECOVERED, ""
    named = loud_error(log)
    if named is None:
        return Verdict.CRASHED, f"ended with {code} and without an error of holdfast's: {_tail(log)}"
    if expect == "recovered":
        return Verdict.UNEXPECTED, f"it was expected to recover: {named}"
    return Verdict.LOUD, named


def falsehoods(seen: Testimony, reference: Testimony | None) -> list[str]:
    """Every state that should not exist: restored and never seen before, mixed from two steps, or not the reference's."""
    found = []
    together: dict[str, set[int]] = defaultdict(set)
    for start in seen.starts:
        together[start["start"]].add(start["step"])
        if not start["rung"]:
            continue
        rank, step = start["rank"], start["step"]
        if start["digest"] + start["rng"] not in seen.exact.get((rank, step), frozenset()):
            found.append(f"rank {rank} went on from a state at step {step} (from {start['rung']}) that it never was in")
    found += [
        f"ranks of one start went on from different steps {sorted(steps)}" for steps in together.values() if len(steps) > 1
    ]
    for (rank, step), digests in sorted(seen.steps.items()):
        wrong = digests - reference.steps.get((rank, step), digests) if reference else frozenset()
        if wrong:
            found.append(f"rank {rank} was after step {step} in a state that the undisturbed run was never in")
    return found


def _frozen(found: Mapping[tuple[int, int], set[str]]) -> dict[tuple[int, int], frozenset[str]]:
    return {place: frozenset(digests) for place, digests in found.items()}


def _incomplete(seen: Testimony, reference: Testimony | None) -> str:
    """A run that says it ended well has trained every step to the end, on every rank."""
    expected = reference.ends if reference else seen.ends
    short = [rank for rank, step in expected.items() if seen.ends.get(rank) != step]
    if short or not expected:
        return f"the run ended with 0, and rank {short[0] if short else 0} did not train to its end"
    ranks, last = set(expected), max(expected.values())
    gap = next((step for step in range(1, last + 1) for rank in ranks if (rank, step) not in seen.steps), None)
    return f"step {gap} was never trained" if gap is not None else ""


_UNCAUGHT = re.compile(r"\b(holdfast(?:\.\w+)+: .*)$", re.MULTILINE)
"""The last line of a traceback names the class of the error with its module."""


def loud_error(log: str) -> str | None:
    """The error of holdfast's that a run ended with, as its reader sees it."""
    found = _UNCAUGHT.findall(log)
    return str(found[-1]) if found else None


def _tail(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
