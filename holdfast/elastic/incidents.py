"""One record for each incident: what was lost, how the run came back, and where the seconds went.

Put together from the last words that the ranks of the attempt before left in their journals, and from what restoring found and
did. The record is written when training can go on and again, whole, when the first new step is complete.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.elastic.journal import DONE, LastWords, decode_line, encode_line
from holdfast.errors import CorruptData
from holdfast.snapshot.verdicts import Verdict

SCHEMA = 1

NOTICED = ("detected", "restarted", "started")
"""The phases before `protect` is entered again: until the first survivor notices, until a new process is born, until it is ready
to restore. Those of restoring follow, and `first_step` at last."""


@dataclass(frozen=True, slots=True)
class Incident:
    """`silent` are ranks that left no last word, so were killed; `said` is what the others left with. Phases are in seconds and
    in order; they begin at the last step that was completed before the fault."""

    job: str
    attempt: int
    time_s: float
    kind: str
    rung: str
    world_before: int
    world_after: int
    reached_step: int
    restored_step: int
    silent: tuple[int, ...]
    said: Mapping[str, str]
    phases: Mapping[str, float]
    notes: tuple[str, ...] = ()
    choice: tuple[str, ...] = ()
    schema: int = field(default=SCHEMA)

    @property
    def steps_lost(self) -> int:
        return self.reached_step - self.restored_step

    @property
    def who(self) -> str:
        """Who left no last word: "rank 1 ended", "ranks 1, 2 ended", "no rank ended"."""
        ranks = ", ".join(map(str, self.silent))
        return f"rank{'s' if len(self.silent) > 1 else ''} {ranks} ended" if self.silent else "no rank ended"

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def with_first_step(self, seconds: float) -> Incident:
        return replace(self, phases={**self.phases, "first_step": round(seconds, 4)})

    def __str__(self) -> str:
        return (
            f"incident before attempt {self.attempt}: {self.who} without a word after step {self.reached_step}; "
            f"back at step {self.restored_step} from {self.rung or 'nothing'} in {self.seconds:.2f} s"
        )


def is_incident(words: Sequence[LastWords]) -> bool:
    """Whether the attempt before ended in any other way than well."""
    return any(word.why != DONE for word in words)


def describe(
    words: Sequence[LastWords],
    *,
    job: str,
    attempt: int,
    world: int,
    born_s: float,
    entered_s: float,
    restored_step: int,
    kind: str,
    rung: str,
    restoring: Mapping[str, float],
    notes: Sequence[str] = (),
    choice: Sequence[str] = (),
) -> Incident:
    """The incident that lies between those last words and a run that has just restored `restored_step`. Pure.

    born_s, entered_s: when the last of the new processes was born and had reached `protect`. Clocks of several hosts are compared
    as they are, so a phase shorter than their difference is shown as zero.
    """
    last_s = max(word.time_s for word in words)
    noticed_s = min((word.ended_s for word in words if word.why and word.ended_s >= last_s), default=last_s)
    before = (noticed_s - last_s, born_s - noticed_s, entered_s - born_s)
    phases = {name: round(max(0.0, seconds), 4) for name, seconds in zip(NOTICED, before, strict=True)}
    return Incident(
        job=job,
        attempt=attempt,
        time_s=noticed_s,
        kind=kind,
        rung=rung,
        world_before=len(words),
        world_after=world,
        reached_step=max(word.step for word in words),
        restored_step=restored_step,
        silent=tuple(word.rank for word in words if not word.why),
        said={str(word.rank): word.why for word in words if word.why},
        phases={**phases, **{name: round(seconds, 4) for name, seconds in restoring.items()}},
        notes=tuple(notes),
        choice=tuple(choice),
    )


def write_incident(place: Path, incident: Incident) -> Path:
    """Durable and whole, or not there at all."""
    folder = place / "incidents"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{incident.attempt:06d}.json"
    fresh = path.with_suffix(".tmp")
    with fresh.open("w") as file:
        json.dump(asdict(incident), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    return path


def read_incidents(place: Path) -> list[Incident]:
    """All incidents of a run, oldest first. Raises CorruptData for a file that is no incident record."""
    return [_read(path) for path in sorted((place / "incidents").glob("*.json"))]


def _read(path: Path) -> Incident:
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        for name in ("silent", "notes", "choice"):
            fields[name] = tuple(fields[name])
        return Incident(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{path}: not an incident record ({error}); move it away to see the others") from error


def write_verdict(place: Path, attempt: int, verdict: Verdict) -> None:
    """Append what was found of a running attempt; if it ends badly, its incident says so."""
    folder = place / "verdicts"
    folder.mkdir(parents=True, exist_ok=True)
    line = encode_line({"time_s": round(time.time(), 3), **asdict(verdict), "text": str(verdict)})
    file = os.open(folder / f"{attempt:06d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read_verdicts(place: Path, attempt: int) -> list[str]:
    """What was found of an attempt while it ran, in words. A damaged line costs that line."""
    path = place / "verdicts" / f"{attempt:06d}.log"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [str(value["text"]) for line in lines if (value := decode_line(line)) is not None]
