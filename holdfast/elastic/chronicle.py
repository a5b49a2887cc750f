"""What a running attempt writes down about itself: its journal, and on rank 0 the incident that it recovered from."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.elastic.data import Loader
from holdfast.elastic.incidents import Incident, describe, is_incident, read_verdicts, write_incident, write_verdict
from holdfast.elastic.journal import (
    DONE,
    Begin,
    Data,
    LastWords,
    Recorder,
    journal_path,
    last_words,
    records_of,
)
from holdfast.elastic.restore import Recovery
from holdfast.elastic.team import Team
from holdfast.events import crash_point, emit
from holdfast.snapshot.verdicts import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Before:
    """What the ranks told each other of the attempt before this one: its number (0: there was none) and its last words; and when
    the last of them was started now, and entered."""

    attempt: int
    words: Sequence[LastWords]
    born_s: float
    entered_s: float


class Chronicle:
    """Begun by all ranks together when training can go on; from then on each rank writes alone."""

    def __init__(self, place: Path, begin: Begin, loaders: Mapping[str, Loader], incident: Incident | None) -> None:
        self._place, self._loaders, self._incident = place, loaders, incident
        self._began_s, self._attempt = begin.time_s, begin.attempt
        self._stalled_s = 0.0
        self._recorder = Recorder(place, begin)
        self._note_incident()

    @classmethod
    def open(
        cls,
        team: Team,
        *,
        job: str,
        checkpoints: str | None,
        objects: Mapping[str, Any],
        step: int,
        entered_s: float,
        recovery: Recovery | None,
        phases: Mapping[str, float],
        before: Before,
        in_place: bool = False,
    ) -> Chronicle:
        """Number the attempt, and begin a journal.

        in_place: no process was started for this attempt; survivors and spares were there.
        """
        place, born_s = records_of(checkpoints, job), entered_s if in_place else process_born_s()
        attempt = 1 + before.attempt
        loaders = {name: item for name, item in objects.items() if isinstance(item, Loader)}
        incident = None
        if team.rank == 0 and is_incident(before.words):
            incident = describe(
                before.words,
                job=job,
                attempt=attempt,
                world=team.world,
                born_s=before.entered_s if in_place else before.born_s,
                entered_s=before.entered_s,
                restored_step=step,
                kind=recovery.kind if recovery else "everything",
                rung=recovery.rung if recovery else "",
                restoring=phases,
                notes=(*(recovery.notes if recovery else ()), *read_verdicts(place, attempt - 1)),
                choice=recovery.choice if recovery else (),
            )
        begin = Begin(
            attempt=attempt,
            rank=team.rank,
            world=team.world,
            step=step,
            time_s=time.time(),
            born_s=born_s,
            entered_s=entered_s,
            host=socket.gethostname(),
            pid=os.getpid(),
            rung=recovery.rung if recovery else "",
            phases=dict(phases),
            data={name: Data.from_about(loader.about()) for name, loader in loaders.items()},
        )
        return cls(place, begin, loaders, incident)

    def step_done(self, step: int, stalled_s: float) -> None:
        """Write the step down before it can be snapshotted: a step that can be restored is in the journal.

        stalled_s: seconds so far in which snapshots held the training thread.
        """
        uses = {
            name: [(use.position, use.samples, use.skipped) for use in loader.take_uses()]
            for name, loader in self._loaders.items()
        }
        self._recorder.step(step, stalled_s - self._stalled_s, uses)
        crash_point("journal.written")
        self._stalled_s = stalled_s
        if self._incident is not None:
            self._incident = self._incident.with_first_step(time.time() - self._began_s)
            self._note_incident()
            emit("incident.closed", **asdict(self._incident))
            self._incident = None

    def note(self, verdict: Verdict) -> None:
        """Keep a verdict for the incident that may come of it. On any thread."""
        try:
            write_verdict(self._place, self._attempt, verdict)
        except OSError as error:
            logger.error("a verdict could not be written down: %s", error)

    def close(self, step: int, error: BaseException | None) -> None:
        self._recorder.end(step, DONE if error is None else f"{type(error).__name__}: {error}"[:500])

    def _note_incident(self) -> None:
        if self._incident is None:
            return
        try:
            write_incident(self._place, self._incident)
        except OSError as error:
            logger.error("the record of this incident could not be written: %s", error)


def words_here(place: Path, attempt: int, rank: int, world: int) -> list[dict[str, Any]]:
    """What the ranks of an attempt left, as this rank finds it: its own, and its share of the others'."""
    paths = sorted((place / "journal").glob(f"{attempt:06d}-rank-*.log")) if attempt else []
    own = {path.name for path in paths[rank::world]} | {journal_path(place, attempt, rank).name}
    return [asdict(found) for path in paths if path.name in own and (found := last_words(path)) is not None]


def words_of_all(told: Iterable[list[dict[str, Any]]]) -> list[LastWords]:
    """Each rank's last words once, in the order of ranks."""
    found = {item["rank"]: LastWords(**item) for words in told for item in words}
    return [found[rank] for rank in sorted(found)]


def process_born_s() -> float:
    """When this process was started, by the wall clock; to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    alive_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - alive_s
