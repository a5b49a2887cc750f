"""The journal of a run: what each rank did, step by step, in lines that survive its death.

Every rank of every attempt (a stretch of training between two starts) appends to a file of its own, so nobody waits for anybody and
nothing is ever rewritten. A line is JSON, a tab and the CRC32C of the JSON in hexadecimal. A last line that is cut short is what
a kill leaves and is passed over; any other damage is an error. The audit, the accounting and the report read nothing else.

    RUN/records/journal/000002-rank-00001.log
    {"begin": 1, "attempt": 2, "rank": 1, "world": 4, "step": 1200, …}      once, after restoring
    [1201, 1763725177.12, 0.0008, {"data": [[76800, 64, ""]]}]               every step: when, seconds stalled, samples used
    {"end": 1763725190.4, "step": 1207, "why": "done"}                       unless it was killed
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.coding import crc32c
from holdfast.elastic.batching import StepPlan
from holdfast.environment import runtime_dir
from holdfast.errors import CorruptData, NotACheckpoint

logger = logging.getLogger(__name__)

SCHEMA = 1
DONE = "done"
_NAME = re.compile(r"(\d{6,})-rank-(\d{5,})\.log")


# -- what is in it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Data:
    """One loader of one rank: the order it follows, and the rank's place in the data-parallel world."""

    size: int
    seed: int
    shuffle: bool
    position: int
    rank: int
    plan: StepPlan
    epochs: int | None = None

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> Data:
        kept = {name: about[name] for name in ("size", "seed", "shuffle", "position", "rank", "epochs")}
        return cls(**kept, plan=StepPlan(**about["plan"]))


@dataclass(frozen=True, slots=True)
class Begin:
    """An attempt of one rank: when its process was born, when `protect` was entered, when training could go on, and from where."""

    attempt: int
    rank: int
    world: int
    step: int
    time_s: float
    born_s: float
    entered_s: float
    host: str = ""
    pid: int = 0
    rung: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, Data] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """A completed step: when it was complete, how long snapshots held the training thread, and (first position, samples, why
    they were skipped) of every loader."""

    step: int
    time_s: float
    stall_s: float
    uses: Mapping[str, Sequence[tuple[int, int, str]]]


@dataclass(frozen=True, slots=True)
class End:
    """How the rank left: `why` is "done" or the exception. A killed rank leaves none."""

    time_s: float
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class Journal:
    begin: Begin
    steps: tuple[Step, ...]
    end: End | None = None

    @property
    def last_s(self) -> float:
        """The last sign of life."""
        times = [self.begin.time_s, *(step.time_s for step in self.steps[-1:]), *([self.end.time_s] if self.end else [])]
        return max(times)

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else self.begin.step


# -- writing -----------------------------------------------------------------------------------------------------------------


class Recorder:
    """Appends one rank's journal. A line is in the kernel's hands when a call returns, so a killed process loses none.

    fsync_every_s: how often a thread of its own makes the lines durable against a lost host; 0 for at every step, before
    it counts; None for never. A disk that refuses is said once and costs the journal, never the training.
    """

    def __init__(self, place: Path, begin: Begin, *, fsync_every_s: float | None = 1.0) -> None:
        self._fsync_every_s = fsync_every_s
        self._dirty, self._closed = False, threading.Event()
        self._file: int | None = None
        self.path = journal_path(place, begin.attempt, begin.rank)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            self._give_up(error)
        self._write({"begin": SCHEMA, **asdict(begin)})
        if self._file is not None and fsync_every_s:
            threading.Thread(target=self._flush_often, name="holdfast-journal", daemon=True).start()

    def step(self, step: int, stall_s: float, uses: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        self._write([step, round(time.time(), 4), round(stall_s, 6), uses])

    def end(self, step: int, why: str) -> None:
        """The last line; flushed and closed."""
        self._write({"end": round(time.time(), 4), "step": step, "why": why})
        self._closed.set()
        if self._file is not None:
            file, self._file = self._file, None
            try:
                if self._fsync_every_s is not None:
                    os.fsync(file)
            except OSError as error:
                logger.error("the journal %s may not be durable: %s", self.path, error)
            finally:
                os.close(file)

    def _write(self, value: Any) -> None:
        if self._file is None:
            return
        try:
            os.write(self._file, encode_line(value))
            if self._fsync_every_s == 0:
                os.fsync(self._file)
        except OSError as error:
            self._give_up(error)
        self._dirty = True  # looked at by the thread: waking it up would cost the step more than its line

    def _flush_often(self) -> None:
        while not self._closed.wait(self._fsync_every_s):
            dirty, self._dirty = self._dirty, False
            file = self._file
            try:
                if file is not None and dirty:
                    os.fsync(file)
            except OSError as error:
                if not self._closed.is_set():
                    self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.error(
            "the journal %s cannot be written (%s); training goes on, audit and report will lack this rank", self.path, error
        )
        if self._file is not None:
            os.close(self._file)
            self._file = None


_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode_line(value: Any) -> bytes:
    text = _encode(value).encode()
    return b"%b\t%08x\n" % (text, crc32c(text))


# -- reading -----------------------------------------------------------------------------------------------------------------


def journal_path(place: Path, attempt: int, rank: int) -> Path:
    return place / "journal" / f"{attempt:06d}-rank-{rank:05d}.log"


def records_of(checkpoints: str | None, name: str) -> Path:
    """Where a run's records live: with its checkpoints, else in this host's runtime directory until `holdfast down`.

    An object store cannot be appended to, so records of a run that keeps its checkpoints in one stay on its hosts.
    """
    if checkpoints is None:
        return runtime_dir() / "records" / name
    if "://" not in checkpoints:
        return Path(checkpoints) / "records"
    from holdfast.ckpt.storage import place  # here: see `restore.look`

    where = place(checkpoints)
    return where / "records" if isinstance(where, Path) else runtime_dir() / "records" / name


def find_records(run: str) -> Path:
    """The records of a run, given its directory of checkpoints, the directory of the records, or its name on this machine."""
    for found in (Path(run) / "records", Path(run), runtime_dir() / "records" / run):
        if (found / "journal").is_dir():
            return found
    raise NotACheckpoint(
        f"{run}: no journal in {Path(run) / 'records'}, nor of a run of that name in {runtime_dir() / 'records'}; name the "
        "directory given as checkpoints=, or protect(name=…)"
    )


def last_attempt(place: Path) -> int:
    """The number of the newest attempt with a journal here; 0 when there is none."""
    names = (_NAME.fullmatch(path.name) for path in (place / "journal").glob("*.log"))
    return max((int(match[1]) for match in names if match), default=0)


def read_journals(places: Iterable[Path], attempt: int | None = None) -> list[Journal]:
    """All journals of a run, or those of one attempt, by attempt and rank. One that died with its first line is left out."""
    stem = "*" if attempt is None else f"{attempt:06d}-*"
    paths = {
        path.name: path for place in places for path in (place / "journal").glob(f"{stem}.log") if _NAME.fullmatch(path.name)
    }
    return [journal for name in sorted(paths) if (journal := read_journal(paths[name])) is not None]


def read_journal(path: Path) -> Journal | None:
    """Raises CorruptData for a damaged line that is not the torn last one."""
    begin: Begin | None = None
    end: End | None = None
    steps: list[Step] = []
    for value in _lines(path):
        if isinstance(value, list):
            steps.append(
                Step(value[0], value[1], value[2], {name: [tuple(use) for use in uses] for name, uses in value[3].items()})
            )
        elif "begin" in value:
            begin = _begin(path, value)
        else:
            end = End(value["end"], value["step"], value["why"])
    return None if begin is None else Journal(begin, tuple(steps), end)


def _begin(path: Path, value: dict[str, Any]) -> Begin:
    if value.pop("begin") != SCHEMA:
        raise CorruptData(f"{path}: a journal of another release of holdfast; read it with that release")
    data = {name: Data(**{**about, "plan": StepPlan(**about["plan"])}) for name, about in value.pop("data").items()}
    return Begin(**value, data=data)


def _lines(path: Path) -> Iterable[Any]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        value = decode_line(line)
        if value is not None:
            yield value
        elif number < len(lines):  # what follows the last newline is torn, or nothing
            text, _, told = line.rpartition(b"\t")
            raise CorruptData(
                f"{path} line {number}: crc32c {crc32c(text):08x} ≠ {told[:16].decode(errors='replace')}; the line is not what was "
                "written, and what this rank did from there on cannot be told"
            )


@dataclass(frozen=True, slots=True)
class LastWords:
    """How one rank's journal ends: the last completed step and its time, and why it left; `why` is empty for a killed rank."""

    rank: int
    step: int
    time_s: float
    ended_s: float = 0.0
    why: str = ""


def last_words(path: Path, *, tail_nbytes: int = 1 << 16) -> LastWords | None:
    """From the head and the tail of a journal only, however long it is; None for one without a sound line."""
    head, tail = _ends(path, tail_nbytes)
    values = [value for value in (head, *tail) if value is not None]
    begins = [value for value in values if isinstance(value, dict) and "begin" in value]
    steps = [value for value in values if isinstance(value, list)]
    ends = [value for value in values if isinstance(value, dict) and "end" in value]
    if not begins:
        return None
    step, time_s = (steps[-1][0], steps[-1][1]) if steps else (begins[0]["step"], begins[0]["time_s"])
    end = (ends[-1]["end"], ends[-1]["why"]) if ends else (0.0, "")
    return LastWords(begins[0]["rank"], step, time_s, *end)


def words_of_last_attempt(place: Path) -> list[LastWords]:
    """What the ranks of the attempt before left, as far as their journals are here."""
    return [word for path in _of_last_attempt(place) if (word := last_words(path, tail_nbytes=1 << 12)) is not None]


def _of_last_attempt(place: Path) -> list[Path]:
    attempt = last_attempt(place)
    return sorted((place / "journal").glob(f"{attempt:06d}-rank-*.log")) if attempt else []


def pace(place: Path, *, tail_nbytes: int = 1 << 14) -> float:
    """Seconds of a step in the attempt before, by one rank's last lines; 0 where there are none."""
    paths = _of_last_attempt(place)
    times = [value[1] for value in _ends(paths[0], tail_nbytes)[1] if isinstance(value, list)] if paths else []
    return median(later - sooner for sooner, later in pairwise(times)) if len(times) > 1 else 0.0


def taken_s(place: Path, *, tail_nbytes: int = 1 << 12) -> float:
    """Seconds that all ranks of all attempts took together, by the head and tail of one journal of each attempt."""
    first: dict[str, Path] = {}
    for path in sorted((place / "journal").glob("*-rank-*.log")):
        first.setdefault(path.name.split("-")[0], path)
    return sum(_taken_s(*_ends(path, tail_nbytes)) for path in first.values())


def _taken_s(head: Any, tail: Sequence[Any]) -> float:
    if head is None:
        return 0.0
    times = [value["end"] if isinstance(value, dict) else value[1] for value in tail]
    return float(max(0.0, max([head["time_s"], *times]) - head["entered_s"]) * head["world"])


def _ends(path: Path, tail_nbytes: int) -> tuple[Any, list[Any]]:
    """The first line of a journal, or None, and the sound ones of its last bytes."""
    with path.open("rb") as file:
        head = file.readline()
        file.seek(max(len(head), path.stat().st_size - tail_nbytes))
        tail = [value for line in file.read().split(b"\n") if (value := decode_line(line)) is not None]
    return decode_line(head.rstrip(b"\n")), tail


def decode_line(line: bytes) -> Any:
    """What `encode_line` was given; None for a line that is torn or damaged."""
    text, _, told = line.rpartition(b"\t")
    return json.loads(text) if text and told == b"%08x" % crc32c(text) else None


def histories(journals: Sequence[Journal]) -> list[list[Journal]]:
    """The journals of each attempt of the present run, oldest first. What an earlier run of the same name did, and ended well,
    is left out: a run that starts at step 0 after all ranks were done owes nothing to it."""
    attempts: list[list[Journal]] = []
    for journal in journals:
        if not attempts or attempts[-1][0].begin.attempt != journal.begin.attempt:
            attempts.append([])
        attempts[-1].append(journal)
    first = 0
    for number in range(1, len(attempts)):
        ended = all(journal.end is not None and journal.end.why == DONE for journal in attempts[number - 1])
        if ended and all(journal.begin.step == 0 for journal in attempts[number]):
            first = number
    return attempts[first:]
