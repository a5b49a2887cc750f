"""Faults as data: what breaks, whom it hits and when, built in Python or read from TOML.

    Faults().kill(rank=3, at="snapshot.encoded").flip("slot", rank=0, committed=5).fill()

A fault strikes when a process passes a named crash point (`at`), or once a step is committed (`committed`). Faults that wait for
the same thing strike together, in the order in which they are written, while all trainers stand still.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError

POINTS = {
    "trainer": ("capture.begun", "capture.copied", "capture.filled"),
    "keeper": (
        "keeper.attaching",
        "keeper.joined",
        "keeper.announced",
        "snapshot.filled",
        "snapshot.verified",
        "snapshot.exchanged",
        "snapshot.encoded",
        "keeper.committing",
        "keeper.committed",
    ),
    "coordinator": ("spill.begun", "spill.written"),
    "rebuild": ("rebuild.decoded", "rebuild.checked", "rebuild.encoded"),
    "again": ("lead.protecting",),
    "return": ("keeper.reattached", "keeper.returned", "keeper.fenced", "regroup.fenced", "regroup.joined"),
    "end": ("keeper.stopping", "keeper.stopped", "preempt.saved", "rescue.rebuilt"),
}
"""Every crash point of snapshots, by who passes it. "rebuild" ones are passed by a keeper that gets its lost memory back, "again"
ones by the coordinator's where parity is made without a new capture, "return" ones when a keeper comes back, and
"end" ones when a run ends, is told to, or saves what is left of it."""

AT_THE_START = ("keeper.attaching", "keeper.joined")

DEEDS = ("kill", "stop", "cont", "delay", "flip", "tear", "fill", "garbage")
PLACES = ("slot", "meta", "parity", "header")
VERDICTS = ("recovered", "loud", "either")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that goes wrong. Build it with the methods of `Faults`.

    The victims are a trainer (`rank`), the process of a node's `keeper` (its memory stays), whole `nodes` (keeper, memory and
    trainers) and the local `ray`; several may be named. `by` is the rank or node whose passing of `at` counts, when that is not
    the first victim's.
    """

    do: str
    rank: int | None = None
    keeper: int | None = None
    nodes: tuple[int, ...] = ()
    ray: bool = False
    at: str | None = None
    nth: int = 1
    times: int = 1
    by: int | None = None
    committed: int | None = None
    place: str = "slot"
    bit: int = 320
    seconds: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        _check_fault(self)

    @property
    def waits_for(self) -> tuple[Any, ...]:
        """Equal for faults that strike together."""
        return (self.at, self.nth, self.role, self.passer) if self.at else (self.committed or 1,)

    @property
    def role(self) -> str:
        """Who passes the point: a "trainer" or a "keeper"."""
        return "trainer" if self.at in POINTS["trainer"] else "keeper"

    @property
    def passer(self) -> int | None:
        """The rank or the node whose passing counts, where the fault says; a rank's node is found by the job."""
        if self.by is not None:
            return self.by
        if self.role == "trainer":
            return self.rank
        return self.keeper if self.keeper is not None else (self.nodes[0] if self.nodes else None)

    def text(self) -> str:
        """The fault in a few words, for tables."""
        named = {"rank": self.rank, "keeper": self.keeper, "node": ", ".join(map(str, self.nodes)) or None}
        victims = " + ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        what = f"{self.do} {self.place} of" if self.do in ("flip", "tear") else self.do
        when = f"at {self.at}" if self.at else f"after step {self.committed or 1}"
        return " ".join(filter(None, [what, victims, "ray" if self.ray else "", self.path or "", when]))


def _check_fault(fault: Fault) -> None:
    if fault.do not in DEEDS:
        raise ConfigError(f"a fault does one of {', '.join(DEEDS)}; {fault.do!r} is none of them")
    points = [point for named in POINTS.values() for point in named]
    if fault.at is not None and fault.at not in points:
        raise ConfigError(f"there is no crash point {fault.at!r}; there are {', '.join(points)}")
    if fault.at is not None and fault.committed is not None:
        raise ConfigError(f"{fault.do}: either at={fault.at!r} or committed={fault.committed}, a fault has one cause")
    if fault.place not in PLACES:
        raise ConfigError(f"{fault.do}: a slot has {', '.join(PLACES)}; {fault.place!r} is none of them")
    if fault.do == "delay" and (fault.at is None or not fault.seconds):
        raise ConfigError("delay: say at which point (at=…) and for how long (seconds=…)")
    victims = [fault.rank, fault.keeper, *fault.nodes, *([0] if fault.ray or fault.do == "fill" else [])]
    if all(victim is None for victim in victims):
        raise ConfigError(f"{fault.do}: name its victim: rank=…, keeper=… or nodes=[…]")
    if fault.nth < 1 or fault.times < 0 or fault.bit < 0 or any(victim is not None and victim < 0 for victim in victims):
        raise ConfigError(f"{fault.do}: nth counts from 1; times, bit, ranks and nodes from 0; got {_said(fault)}")


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in one run, in order. Every method returns a longer schedule; this one stays as it is."""

    faults: tuple[Fault, ...] = ()

    def kill(self, **who_and_when: Any) -> Faults:
        """SIGKILL: to a trainer (rank=), a keeper's process (keeper=) or whole nodes with their memory (nodes=[…])."""
        return self._and("kill", **who_and_when)

    def stop(self, **who_and_when: Any) -> Faults:
        """SIGSTOP; continued after `seconds`, or by `cont`."""
        return self._and("stop", **who_and_when)

    def cont(self, **who_and_when: Any) -> Faults:
        """SIGCONT."""
        return self._and("cont", **who_and_when)

    def delay(self, *, at: str, seconds: float, times: int = 0, **who: Any) -> Faults:
        """Make a process slow: it sleeps every time it passes the point, or `times` times."""
        return self._and("delay", at=at, seconds=seconds, times=times, **who)

    def flip(self, place: str = "slot", *, bit: int = 320, **who_and_when: Any) -> Faults:
        """Turn one bit of what a rank's slots hold ("slot"), of their "meta" or "header", or of a node's "parity"."""
        return self._and("flip", place=place, bit=bit, **who_and_when)

    def tear(self, place: str = "header", **who_and_when: Any) -> Faults:
        """Zero the second half of what was written last, as a torn write leaves it."""
        return self._and("tear", place=place, **who_and_when)

    def fill(self, path: str | None = None, **when: Any) -> Faults:
        """Leave no room where slots live, or at `path`. Taken back when the rehearsal ends."""
        return self._and("fill", path=path, **when)

    def garbage(self, **who_and_when: Any) -> Faults:
        """Put another process in a keeper's place, at its address, that answers everything with noise."""
        return self._and("garbage", **who_and_when)

    def _and(self, do: str, **fields_: Any) -> Faults:
        return Faults((*self.faults, Fault(do=do, **fields_)))


# -- a plan: one job, many schedules -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The job that is broken: `ranks` trainers on one machine that plays `nodes` nodes.

    `script` is what torchrun starts (with its arguments); None takes the small model that comes with holdfast, to which the
    other settings are given. `deterministic` says that two undisturbed runs end with the same bits, so that a disturbed one
    has to as well. `room_mib` gives the slots a file system of that size (needs the right to mount).
    """

    ranks: int = 2
    nodes: int = 2
    parity: int = 1
    steps: int = 24
    layout: str = "fsdp"
    checkpoint_every: int = 0
    keepers: str = "process"
    transport: str = "mapped"
    restarts: int = 4
    timeout_s: float = 180.0
    pace_s: float = 0.03
    room_mib: int | None = None
    script: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= self.ranks or self.steps < 4 or self.restarts < 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"a job needs 1 <= nodes <= ranks, steps >= 4, restarts >= 0 and timeout_s > 0; got {_said(self)}"
            )
        if self.keepers not in ("process", "ray") or self.transport not in ("mapped", "tcp"):
            raise ConfigError('keepers are "process" or "ray", and transport is "mapped" or "tcp"')

    def node_of(self, rank: int) -> int:
        return rank * self.nodes // self.ranks

    def ranks_of(self, node: int) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.ranks) if self.node_of(rank) == node)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One run with its faults. `expect` is how it has to end: "recovered", "loud" (a clear error), or "either"."""

    name: str
    faults: tuple[Fault, ...]
    expect: str = "either"
    job: Job = field(default_factory=Job)

    def __post_init__(self) -> None:
        if self.expect not in VERDICTS:
            raise ConfigError(f"schedule {self.name!r}: expect is one of {', '.join(VERDICTS)}; got {self.expect!r}")
        for fault in self.faults:
            _check_victims(self, fault)


def _check_victims(schedule: Schedule, fault: Fault) -> None:
    job = schedule.job
    nodes = [*fault.nodes, *([fault.keeper] if fault.keeper is not None else [])]
    wrong = [f"node {node}" for node in nodes if node >= job.nodes]
    wrong += [f"rank {fault.rank}"] if fault.rank is not None and fault.rank >= job.ranks else []
    if wrong:
        raise ConfigError(
            f"schedule {schedule.name!r}: {fault.text()}: a job of {job.ranks} ranks on {job.nodes} nodes has no {wrong[0]}"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Every schedule of a file, in order."""

    schedules: tuple[Schedule, ...]

    def only(self, word: str) -> Plan:
        """The schedules whose name contains `word`. Raises ConfigError when there are none."""
        found = tuple(schedule for schedule in self.schedules if word in schedule.name)
        if not found:
            raise ConfigError(f"no schedule is called like {word!r}; there are: {'; '.join(s.name for s in self.schedules)}")
        return Plan(found)


# -- TOML --------------------------------------------------------------------------------------------------------------


def load_plan(path: Path | str, **job: Any) -> Plan:
    """The plan in a TOML file; `job` overrides its [job] table. Raises ConfigError with the place of what is wrong."""
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a schedule that can be read: {error}") from error
    try:
        return _plan_of(found, job)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _plan_of(found: Mapping[str, Any], overrides: Mapping[str, Any]) -> Plan:
    unknown = found.keys() - {"job", "schedule", "sweep"}
    if unknown:
        raise ConfigError(f"a plan has [job], [[schedule]] and [[sweep]]; it has no {sorted(unknown)[0]!r}")
    base = Job(**_known(Job, found.get("job", {}), "[job]"))
    schedules = [_schedule_of(entry, base, overrides) for entry in found.get("schedule", [])]
    for entry in found.get("sweep", []):
        schedules += _sweep_of(entry, replace(base, **_known(Job, entry.get("job", {}), "[[sweep]]") | dict(overrides)))
    return Plan(tuple(schedules))


def _schedule_of(entry: Mapping[str, Any], base: Job, overrides: Mapping[str, Any]) -> Schedule:
    named = _known(Schedule, {k: v for k, v in entry.items() if k not in ("fault", "job")}, "[[schedule]]")
    where = f"schedule {named.get('name')!r}"
    job = replace(base, **_known(Job, entry.get("job", {}), where) | dict(overrides))
    faults = tuple(Fault(**_known(Fault, fault, where)) for fault in entry.get("fault", []))
    return Schedule(**named, job=job, faults=faults)


def _sweep_of(entry: Mapping[str, Any], job: Job) -> list[Schedule]:
    """Every point times every kind of victim: trainer, keeper, both, and every set of up to `parity` + 1 nodes."""
    unknown = entry.keys() - {"points", "victims", "job", "nth"}
    if unknown:
        raise ConfigError(f"a sweep has points, victims, nth and job; it has no {sorted(unknown)[0]!r}")
    points = entry.get("points", [*POINTS["trainer"], *POINTS["keeper"], *POINTS["coordinator"]])
    kinds = entry.get("victims", ["trainer", "keeper", "both", "nodes"])
    nth = entry.get("nth", 3)
    found = []
    for point, victims in itertools.product(points, _victims(kinds, job)):
        # The first node leads the commit and writes checkpoints; a checkpoint's points are passed by it alone.
        node = 0 if point in POINTS["coordinator"] else job.nodes - 1
        by = job.ranks_of(node)[0] if point in POINTS["trainer"] else node
        first = 1 if point in (*POINTS["coordinator"], *AT_THE_START) else nth
        named = {name: (value(node) if callable(value) else value) for name, value in victims[1].items()}
        fault = Fault(do="kill", at=point, nth=first, by=by, **named)
        lost = len(named.get("nodes", ()))
        expect = "recovered" if lost <= job.parity and point not in AT_THE_START else "either"
        found.append(Schedule(name=f"{victims[0]} at {point}", faults=(fault,), expect=expect, job=job))
    return found


def _victims(kinds: Sequence[str], job: Job) -> list[tuple[str, dict[str, Any]]]:
    def first_rank(node: int) -> int:
        return job.ranks_of(node)[0]

    def itself(node: int) -> int:
        return node

    one = {"trainer": {"rank": first_rank}, "keeper": {"keeper": itself}, "both": {"rank": first_rank, "keeper": itself}}
    found: list[tuple[str, dict[str, Any]]] = []
    for kind in kinds:
        if kind in one:
            found.append((kind, dict(one[kind])))
        elif kind == "nodes":
            sets = [c for size in range(1, job.parity + 2) for c in itertools.combinations(range(job.nodes), size)]
            found += [(f"node{'s' * (len(c) > 1)} {', '.join(map(str, c))}", {"nodes": c}) for c in sets]
        else:
            raise ConfigError(f'victims of a sweep are "trainer", "keeper", "both" and "nodes"; {kind!r} is none of them')
    return found


def _known(kind: type, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    unknown = entry.keys() - names
    if unknown:
        raise ConfigError(f"{where}: there is no {sorted(unknown)[0]!r}; there are {', '.join(sorted(names))}")
    return dict(entry)


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write a plan so that `load_plan` gives it back."""
    Path(path).write_text("\n".join(_lines(plan.schedules)))


def _lines(schedules: Iterable[Schedule]) -> Iterable[str]:
    for schedule in schedules:
        yield f"[[schedule]]\nname = {_toml(schedule.name)}\nexpect = {_toml(schedule.expect)}"
        job = _changed(schedule.job, Job())
        yield f"job = {{ {', '.join(f'{name} = {_toml(value)}' for name, value in job.items())} }}" if job else ""
        for fault in schedule.faults:
            yield "[[schedule.fault]]"
            yield from (f"{name} = {_toml(value)}" for name, value in _changed(fault, None).items())
        yield ""


def _changed(thing: Any, usual: Any) -> dict[str, Any]:
    """The fields that differ from what they are when nothing is said."""
    defaults = asdict(usual) if usual is not None else {item.name: item.default for item in fields(thing)}
    return {name: value for name, value in asdict(thing).items() if value is not None and value != defaults[name]}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a TOML basic string escapes as JSON does
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _said(thing: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in asdict(thing).items() if value not in (None, ()))
