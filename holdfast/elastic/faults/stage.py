"""Runs jobs for a rehearsal: each in a place of its own, broken as its schedule says, ended whatever happens, and judged."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.elastic.faults.havoc import Scene
from holdfast.elastic.faults.schedule import Fault, Job, Plan, Schedule
from holdfast.elastic.faults.verdict import Outcome, Testimony, Verdict, judge
from holdfast.elastic.witness import VARIABLE
from holdfast.errors import ConfigError

Say = Callable[[str], None]


def rehearse(plan: Plan, *, keep: Path | None = None, say: Say = lambda text: None) -> list[Outcome]:
    """Run every schedule; one after the other, because they share the machine. Blocks for about 15 s each.

    `keep`: a new folder for the logs and testimonies of all runs. Raises ConfigError when the undisturbed run does not succeed.
    """
    if not plan.schedules:
        raise ConfigError("the plan has no schedule; nothing would be rehearsed")
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise ConfigError(f"{keep} is not empty; name a new folder")
    known: dict[str, Testimony] = {}
    outcomes: list[Outcome] = []
    for number, schedule in enumerate(plan.schedules):
        outcomes.append(_rehearse_one(schedule, known, _kept(keep, f"{number:03d}"), say))
        say(
            f"[{number + 1}/{len(plan.schedules)}] {schedule.name}: {outcomes[-1].verdict.value} ({outcomes[-1].seconds:.1f} s)"
        )
    return outcomes


def _rehearse_one(schedule: Schedule, known: dict[str, Testimony], keep: Path | None, say: Say) -> Outcome:
    started = time.monotonic()
    faults = tuple(fault.text() for fault in schedule.faults)
    try:
        reference = _reference(schedule.job, known, say)
        with _room(schedule.job) as memory, _place(keep) as place:
            run = Run(schedule.job, place, memory)
            code, missed = run.play(schedule.faults)
            verdict, detail = judge(run.testimony(), reference, code=code, log=run.log(), missed=missed, expect=schedule.expect)
            restores = run.testimony().restores
    except _CannotMount as error:
        return Outcome(schedule.name, faults, Verdict.SKIPPED, str(error), seconds=time.monotonic() - started)
    return Outcome(schedule.name, faults, verdict, detail, restores, time.monotonic() - started)


def _reference(job: Job, known: dict[str, Testimony], say: Say) -> Testimony | None:
    """What the job does undisturbed, run once for all schedules to which it is the same."""
    if not job.deterministic:
        return None
    same = {"keepers": "process", "transport": "mapped", "restarts": 0, "timeout_s": 0, "room_mib": None}
    key = json.dumps({**asdict(job), **same})
    if key not in known:
        say("training undisturbed, for comparison")
        with _place(None) as place, _room(None) as memory:
            run = Run(job, place, memory, restarts=0)
            code, _ = run.play(())
            if code != 0:
                raise ConfigError(
                    f"the undisturbed run ended with {code}, so nothing can be compared with it:\n{run.log()[-2000:]}"
                )
            known[key] = run.testimony()
        if not known[key].ends:
            raise ConfigError("the undisturbed run never entered holdfast.protect, so nothing of it can be rehearsed")
    return known[key]


def _kept(keep: Path | None, name: str) -> Path | None:
    return None if keep is None else keep / name


@contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="hf-faults-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class _CannotMount(Exception):
    pass


@contextmanager
def _room(job: Job | None) -> Iterator[Path]:
    """A folder for slots, in memory where there is such; of a limited size where the job wants that."""
    base = os.environ.get("HOLDFAST_MEMORY") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    if base is not None:
        Path(base).mkdir(parents=True, exist_ok=True)
    memory = Path(tempfile.mkdtemp(prefix="hf-", dir=base))
    limited = job is not None and job.room_mib is not None
    try:
        if job is not None and limited:
            _mount(memory, job.room_mib or 0)
        yield memory
    finally:
        if limited:
            subprocess.run(["umount", "-l", str(memory)], check=False, capture_output=True)
        shutil.rmtree(memory, ignore_errors=True)


def _mount(memory: Path, mib: int) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(memory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _CannotMount(f"a file system of {mib} MiB cannot be mounted here: {error}") from error
    if done.returncode:
        raise _CannotMount(f"a file system of {mib} MiB cannot be mounted here: {done.stderr.strip()}")


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Faults that strike together, and whether they have."""

    faults: list[Fault]
    mark: Path | None
    struck: bool = False
    later: list[tuple[float, Fault]] = field(default_factory=list)


class Run:
    """One run of a job under torchrun, in `place`, with its slots in `memory`."""

    def __init__(self, job: Job, place: Path, memory: Path, *, restarts: int | None = None) -> None:
        self.job, self.place, self.memory = job, place, memory
        self._restarts = job.restarts if restarts is None else restarts
        self._scene = Scene(memory, place / "runtime")
        (place / "marks").mkdir(parents=True)

    def play(self, faults: Sequence[Fault]) -> tuple[int | None, list[str]]:
        """Run to the end; the exit code (None when it had to be ended), and the faults that never struck."""
        groups = self._groups(faults)
        armed = [self._armed(fault, group.mark) for group in groups for fault in group.faults[:1] if group.mark is not None]
        with (self.place / "log").open("wb") as log:
            process = subprocess.Popen(
                self._command(), stdout=log, stderr=subprocess.STDOUT, env=self._environment(armed), start_new_session=True
            )
        deadline = time.monotonic() + self.job.timeout_s
        try:
            while process.poll() is None and time.monotonic() < deadline:
                self._look(groups)
                time.sleep(0.01)
        finally:
            self._end(process)
        code = None if process.returncode == -signal.SIGKILL else process.returncode
        return code, [fault.text() for group in groups if not group.struck for fault in group.faults]

    # -- faults --

    def _groups(self, faults: Sequence[Fault]) -> list[_Group]:
        together: dict[Any, list[Fault]] = {}
        for fault in faults:
            together.setdefault(fault.waits_for, []).append(fault)
        return [
            _Group(found, self.place / "marks" / str(number) if found[0].at else None)
            for number, found in enumerate(together.values())
        ]

    def _armed(self, fault: Fault, mark: Path | None) -> dict[str, Any]:
        """What the process that passes the point is told: to suffer it itself, or to stop there for us."""
        place = fault.passer
        if place is None and fault.rank is not None and fault.role == "keeper":
            place = self.job.node_of(fault.rank)
        told: dict[str, Any] = {"at": fault.at, "role": fault.role, "nth": fault.nth, "do": "stop"}
        if fault.do == "delay":
            # Every pass is slow: a mark for the first would make it the only one.
            told |= {"do": "delay", "seconds": fault.seconds, "times": fault.times}
        else:
            told["once"] = str(mark)
        return told | ({"place": place} if place is not None else {})

    def _look(self, groups: list[_Group]) -> None:
        for group in groups:
            if not group.struck and self._is_due(group):
                group.struck = True
                self._strike(group)
            for at_s, fault in list(group.later):
                if time.monotonic() >= at_s:
                    group.later.remove((at_s, fault))
                    self._scene.strike(fault, self.job.ranks_of)

    def _is_due(self, group: _Group) -> bool:
        first = group.faults[0]
        if first.do == "delay":
            return self._scene.committed() > 0  # it is slow from the start, and goes on being so
        if group.mark is not None:
            return group.mark.exists()
        return self._scene.committed() >= (first.committed or 1)

    def _strike(self, group: _Group) -> None:
        """All of the group's deeds while the trainers stand still; then let go whom the point has stopped."""
        if group.faults[0].do == "delay":
            return
        needs_calm = any(fault.do in ("flip", "tear", "garbage", "fill") for fault in group.faults)
        still = self._scene.freeze() if needs_calm else []
        halted = int(group.mark.read_text()) if group.mark is not None else None
        stopped: list[Fault] = []
        for fault in group.faults:
            self._scene.strike(fault, self.job.ranks_of)
            if fault.do == "stop":
                stopped.append(fault)
                if fault.seconds is not None:
                    waking = Fault(do="cont", rank=fault.rank, keeper=fault.keeper, nodes=fault.nodes)
                    group.later.append((time.monotonic() + fault.seconds, waking))
        asleep = {self._scene.trainers().get(fault.rank) for fault in stopped if fault.rank is not None}
        asleep |= {self._scene.keeper(fault.keeper) for fault in stopped if fault.keeper is not None}
        self._scene.thaw([pid for pid in {*still, *([halted] if halted else [])} if pid not in asleep])

    # -- processes --

    def _command(self) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.job.ranks}"]
        words = [*torchrun, f"--max-restarts={self._restarts}"]
        if self.job.script is not None:
            return [*words, *shlex.split(self.job.script)]
        own = ["--layout", self.job.layout, "--steps", str(self.job.steps), "--nodes", str(self.job.nodes)]
        own += ["--parity", str(self.job.parity), "--pace", str(self.job.pace_s), "--out", str(self.place)]
        if self.job.checkpoint_every:
            own += ["--checkpoints", str(self.place / "ckpt"), "--checkpoint-every", str(self.job.checkpoint_every)]
        return [*words, str(Path(__file__).with_name("job.py")), *own]

    def _environment(self, armed: list[dict[str, Any]]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "TORCHELASTIC_"))}
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HOLDFAST_MEMORY": str(self.memory),
            "HOLDFAST_RUNTIME": str(self.place / "runtime"),
            "HOLDFAST_KEEPERS": self.job.keepers,
            "HOLDFAST_TRANSPORT": self.job.transport,
            **({"HOLDFAST_FAULTS": json.dumps(armed)} if armed else {}),
            VARIABLE: str(self.place / "testimony"),
        }

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Nothing that was started is left: not the stopped, not the keepers, not their Ray."""
        self._scene.close()
        marker = f"HOLDFAST_RUNTIME={self.place / 'runtime'}".encode()
        if process.poll() is None:
            process.kill()
        process.wait()
        for _ in range(3):  # what is being born while we look is found by the next look
            for path in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if marker in (path / "environ").read_bytes().split(b"\0") and int(path.name) != os.getpid():
                        os.kill(int(path.name), signal.SIGKILL)

    # -- what it left --

    def log(self) -> str:
        return (self.place / "log").read_text(errors="replace")

    def testimony(self) -> Testimony:
        return Testimony.of(_lines(self.place / "testimony"))


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the last line of one that was killed while it wrote
                yield json.loads(line)
