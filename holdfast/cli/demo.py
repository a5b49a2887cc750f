"""`holdfast demo`: train, die twice, recover bit for bit, and go on elsewhere from a checkpoint.

A small GPT is trained once undisturbed and once under protection, while a trainer is killed and later a whole node with its
memory. Both have to end with the same bits. Then a checkpoint written on the way is verified, restored for another number of
ranks and trained on. Whatever happens, every process started here has ended when `run_demo` returns, and it always returns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, HoldfastError
from holdfast.redundancy import Redundancy

NEAR_NATS = 0.3
"""How far the mean loss may lie from the reference's after a restore on other ranks, whose dropout differs. Measured: 0.02;
a model that was not restored lies 2 away."""


# -- the command -------------------------------------------------------------------------------------------------------


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="train, kill a trainer and a node, and show that not a bit is lost")
    defaults = DemoSettings()
    parser.add_argument("--ranks", type=int, default=defaults.ranks, help="trainers to start")
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help="nodes that this machine plays")
    parser.add_argument("--parity", type=int, default=defaults.parity, help="nodes that may die, memory and all")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps to train")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs, final states and checkpoints in this new folder")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = DemoSettings(
        ranks=args.ranks, nodes=args.nodes, parity=args.parity, steps=args.steps, seed=args.seed, keep=args.keep
    )
    report = run_demo(settings)
    print(json.dumps(asdict(report), indent=2) if args.json else report_text(report), flush=True)
    return 0 if report.is_success else 1


# -- what goes in and what comes out -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """What to rehearse; `deadline_s` bounds all of it."""

    ranks: int = 4
    nodes: int = 4
    parity: int = 1
    steps: int = 45
    seed: int = 0
    keep: Path | None = None
    deadline_s: float = 240.0

    def __post_init__(self) -> None:
        Redundancy(parity=self.parity, nodes_per_host=self.nodes)
        if not 2 <= self.nodes <= self.ranks or self.steps < 12 or self.seed < 0:
            raise ConfigError(
                "the demo needs 2 <= nodes <= ranks, steps >= 12 and seed >= 0; got "
                f"nodes={self.nodes}, ranks={self.ranks}, steps={self.steps}, seed={self.seed}"
            )
        if self.keep is not None and self.keep.exists() and (not self.keep.is_dir() or any(self.keep.iterdir())):
            raise ConfigError(f"--keep {self.keep}: give a new or an empty folder")

    @property
    def checkpoint_every(self) -> int:
        return self.steps // 3

    @property
    def restored_ranks(self) -> int:
        return 1 if self.ranks == 2 else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """One kill and what came after it. `seconds` runs from the kill to the first new step; `phases` are its parts.

    `steps_lost` counts finished steps that had to be trained again; `restore_phases` is what holdfast itself measured.
    """

    kind: str
    rung: str
    step: int
    steps_lost: int
    seconds: float
    phases: dict[str, float]
    restore_phases: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReport:
    """The checkpoint written on the way, and how the job went on from it. `seconds` is from its first file to its COMMIT."""

    step: int
    path: str
    nbytes: int
    seconds: float
    verified: bool
    verify_seconds: float
    restored_ranks: int
    restore_seconds: float
    resumed_steps: int
    loss_difference: float

    @property
    def goes_on(self) -> bool:
        return self.verified and self.resumed_steps > 0 and self.loss_difference <= NEAR_NATS


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    bit_identical: bool
    differences: list[str]
    steps_lost: int
    recoveries: list[Recovery]
    stall_ms_per_step: float
    step_ms: dict[str, float]
    checkpoint: CheckpointReport
    seconds: float
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def is_success(self) -> bool:
        return self.bit_identical and self.checkpoint.goes_on


class DemoFailed(HoldfastError):
    """The demo could not be brought to its end; the message holds the last lines of the process that failed."""


# -- the story ---------------------------------------------------------------------------------------------------------


def run_demo(settings: DemoSettings) -> DemoReport:
    """Rehearse everything; blocks for a minute or two. Raises DemoFailed when a part does not come to its end."""
    started = time.monotonic()
    with _folder(settings.keep) as folder, _Stage(settings, folder) as stage:
        stage.say(f"{settings.ranks} ranks on {settings.nodes} nodes, parity {settings.parity}; everything is in {folder}")
        reference = stage.train("reference", settings.ranks, "--bare")
        recoveries, protected = _train_and_kill(stage)
        stage.say("comparing parameters, optimizer state and losses with the reference")
        differences = _differences(reference, protected)
        checkpoint = _go_on_elsewhere(stage, reference)
        return DemoReport(
            bit_identical=not differences,
            differences=differences,
            steps_lost=sum(recovery.steps_lost for recovery in recoveries),
            recoveries=recoveries,
            stall_ms_per_step=round(protected.stall_ms_per_step(), 3),
            step_ms={"bare": round(reference.step_ms(), 1), "protected": round(protected.step_ms(), 1)},
            checkpoint=checkpoint,
            seconds=round(time.monotonic() - started, 1),
            settings={**asdict(settings), "keep": str(settings.keep) if settings.keep else None},
            machine=_machine(),
        )


def _train_and_kill(stage: _Stage) -> tuple[list[Recovery], _Training]:
    settings = stage.settings
    training = stage.start(
        "protected",
        settings.ranks,
        *("--checkpoints", str(stage.checkpoints), "--checkpoint-every", str(settings.checkpoint_every)),
        *("--parity", str(settings.parity), "--nodes", str(settings.nodes), "--snapshot-every", "1", "--name", stage.name),
        restarts=3,
    )
    recoveries = []
    for kind, node, from_step in (("trainer", 1, settings.steps // 3), ("node", settings.nodes - 1, 2 * settings.steps // 3)):
        job = stage.wait_for_commit(training, from_step)
        stage.say(f"step {job.committed_step} is committed: killing {_described(kind, node)}")
        starts, killed_s, others = len(training.read().starts), time.time(), _kill(job, kind, node)
        recovery = stage.watch_recovery(training, kind, starts, killed_s, others)
        stage.say(
            f"recovered step {recovery.step} by {recovery.rung}: {recovery.steps_lost} steps lost, "
            f"{recovery.seconds:.1f} s from the kill to a new step"
        )
        recoveries.append(recovery)
    stage.finish(training)
    return recoveries, training


def _described(kind: str, node: int) -> str:
    return f"a trainer of node {node}" if kind == "trainer" else f"keeper, memory and trainers of node {node}"


def _kill(job: Any, kind: str, node: int) -> list[int]:
    """Kill -9 one trainer of the node, or its keeper and all its trainers, memory erased; returns the other trainers.

    The keeper goes first and the trainers last, so that nobody is left who could write the memory again.
    """
    victim = next(status for status in job.nodes if status.node == node)
    trainers = [pid for _, pid in sorted(victim.ranks.items())]
    if kind == "trainer":
        trainers = trainers[:1]
    else:
        os.kill(victim.pid, signal.SIGKILL)
        for path in Path(victim.memory).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pid in trainers:
        os.kill(pid, signal.SIGKILL)
    return [pid for status in job.nodes for pid in status.ranks.values() if pid not in trainers]


def _differences(reference: _Training, protected: _Training) -> list[str]:
    """Every way in which the protected run did not end as the reference did; empty when all bits are equal."""
    import torch

    found = []
    expected = {step["step"]: step for step in reference.read().steps}
    trained = protected.read().steps
    found += [
        f"step {step['step']}: loss {step['loss']} ≠ {expected[step['step']]['loss']}"
        for step in trained
        if step["loss_hex"] != expected[step["step"]]["loss_hex"]
    ]
    found += [f"step {step}: never trained" for step in sorted(expected.keys() - {step["step"] for step in trained})]
    names = sorted(path.name for path in reference.out.iterdir())
    for name in names:
        if not (protected.out / name).exists():
            found.append(f"{name}: missing")
            continue
        one, other = (torch.load(out / name, weights_only=True)["arrays"] for out in (reference.out, protected.out))
        found += [f"{name}: {array} is on one side only" for array in sorted(one.keys() ^ other.keys())]
        found += [
            f"{name}: {array} differs"
            for array in sorted(one.keys() & other.keys())
            if one[array].dtype != other[array].dtype or not torch.equal(one[array], other[array])
        ]
    return found if names else ["the reference saved no final state"]


def _go_on_elsewhere(stage: _Stage, reference: _Training) -> CheckpointReport:
    """Verify the newest checkpoint from before the end, restore it with the command line for other ranks, and train on."""
    from holdfast.ckpt import list_steps, open_checkpoint

    settings = stage.settings
    usable = [info for info in list_steps(stage.checkpoints) if info.step < settings.steps]
    if not usable:
        raise DemoFailed(f"the run left no checkpoint in {stage.checkpoints}")
    info = usable[-1]
    stage.say(f"verifying the checkpoint of step {info.step}")
    verify_s, verdict = _timed(lambda: open_checkpoint(info.path).verify())
    stage.say(f"restoring it with the command line for {settings.restored_ranks} ranks, and training on")
    restored = stage.folder / "restored"
    command = ["restore", f"{stage.checkpoints}@{info.step}", "--mesh", f"dp={settings.restored_ranks}", "--format", "torch"]
    restore_s, _ = _timed(lambda: stage.command("restore", *command, "--out", str(restored)))
    resumed = stage.train("resumed", settings.restored_ranks, "--bare", "--resume", str(restored), start=info.step)
    expected = {step["step"]: step["loss"] for step in reference.read().steps}
    pairs = [(step["loss"], expected[step["step"]]) for step in resumed.read().steps]
    return CheckpointReport(
        step=info.step,
        path=str(info.path),
        nbytes=info.nbytes,
        seconds=round(_writing_s(info.path), 3),
        verified=verdict.is_whole,
        verify_seconds=round(verify_s, 3),
        restored_ranks=settings.restored_ranks,
        restore_seconds=round(restore_s, 3),
        resumed_steps=len(pairs),
        loss_difference=_mean_difference(pairs),
    )


def _mean_difference(pairs: list[tuple[float, float]]) -> float:
    """Between the mean losses of two runs; infinite when one of them is not finite or there is nothing to compare."""
    if not pairs or not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return math.inf
    return abs(statistics.fmean(one - other for one, other in pairs))


def _writing_s(checkpoint: Path) -> float:
    committed = (checkpoint / "COMMIT").stat().st_mtime
    return max(0.0, committed - min(path.stat().st_mtime for path in checkpoint.rglob("*")))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = call()
    return time.monotonic() - began, result


def _machine() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


# -- one training and its log ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Log:
    """The lines that rank 0 has written so far: one dictionary for every start of the script and every step."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Training:
    """A torchrun of the example, with everything it writes in a folder of its own."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def out(self) -> Path:
        return self.folder / "final"

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    def read(self) -> _Log:
        path, log = self.folder / "steps.jsonl", _Log()
        text = path.read_text() if path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # a line being written now is left for the next look
            record = json.loads(line)
            (log.starts if record["event"] == "start" else log.steps).append(record)
        return log

    def step_ms(self) -> float:
        return 1000 * statistics.median(step["step_s"] for step in self.read().steps)

    def stall_ms_per_step(self) -> float:
        """Time the training thread spent in holdfast per step; what a start costs is not part of it."""
        log, stalled_s, steps = self.read(), 0.0, 0
        for start, end in zip(log.starts, [*(s["time_s"] for s in log.starts[1:]), math.inf], strict=True):
            stalls = [step["stall_s"] for step in log.steps if start["time_s"] <= step["time_s"] < end]
            stalled_s += stalls[-1] - stalls[0] if stalls else 0.0
            steps += max(0, len(stalls) - 1)
        return 1000 * stalled_s / max(1, steps)


# -- processes, with an end in sight -----------------------------------------------------------------------------------


class _Stage:
    """Starts processes, waits for them with one deadline, shows progress, and ends all of them when it is left."""

    def __init__(self, settings: DemoSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.name = f"demo-{uuid.uuid4().hex[:8]}"
        self.checkpoints = folder / "checkpoints"
        self._deadline = time.monotonic() + settings.deadline_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._show = _Show()
        self._keepers_before = False

    def __enter__(self) -> _Stage:
        from holdfast.snapshot.cluster import status

        self._keepers_before = bool(status())
        self._show.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._show.stop()
        for process in self._processes:
            _end_tree(process)
        if self._keepers_before:
            self.say(f"other runs have keepers here: those of {self.name} stay too, until `holdfast down`")
        else:
            from holdfast.snapshot.cluster import down

            down()

    def say(self, text: str) -> None:
        self._show.say(text)

    def train(self, name: str, ranks: int, *options: str, start: int = 0) -> _Training:
        training = self.start(name, ranks, *options, start=start)
        self.finish(training)
        return training

    def start(self, name: str, ranks: int, *options: str, restarts: int = 0, start: int = 0) -> _Training:
        folder = self.folder / name
        folder.mkdir(parents=True)
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        command += [str(examples() / "train_gpt.py"), "--steps", str(self.settings.steps), "--seed", str(self.settings.seed)]
        command += ["--batch", str(2 * self.settings.ranks), "--out", str(folder / "final")]
        command += ["--log-file", str(folder / "steps.jsonl"), *options]
        self._show.begin(name, start, self.settings.steps)
        return _Training(name, folder, self._spawn(command, folder / "console.log"))

    def finish(self, training: _Training) -> None:
        self._wait(training, lambda: training.process.poll() is not None, "its end")
        if training.process.returncode:
            raise DemoFailed(_with_tail(f"the {training.name} run ended with {training.process.returncode}", training.console))

    def command(self, name: str, *arguments: str) -> None:
        """Run a `holdfast` verb in a process of its own."""
        console = self.folder / f"{name}.log"
        process = self._spawn(["-m", "holdfast.cli", *arguments], console)
        try:
            code = process.wait(max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(_with_tail(f"holdfast {name} did not end in time", console)) from error
        if code:
            raise DemoFailed(_with_tail(f"holdfast {name} ended with {code}", console))

    def wait_for_commit(self, training: _Training, step: int) -> Any:
        """The job's status once `step` is committed and every keeper knows its trainers."""
        from holdfast.snapshot.cluster import status

        jobs: list[Any] = []

        def committed() -> bool:
            jobs[:] = status(self.name)
            return (
                bool(jobs)
                and jobs[0].committed_step >= step
                and sum(len(n.ranks) for n in jobs[0].nodes) == self.settings.ranks
            )

        self._wait(training, committed, f"step {step} to be committed", until_end=True)
        return jobs[0]

    def watch_recovery(self, training: _Training, kind: str, starts: int, killed_s: float, others: list[int]) -> Recovery:
        """Time the way from a kill to the first new step."""
        detected_s: list[float] = []
        spawned_s: list[float] = []

        def stepping() -> bool:
            if not detected_s and not all(map(_alive, others)):
                detected_s.append(time.time())
            log = training.read()
            if len(log.starts) <= starts:
                return False
            if not spawned_s:
                spawned_s.append(_started_s(log.starts[starts]["pid"]))
            return log.steps[-1]["time_s"] > log.starts[starts]["time_s"]

        self._wait(training, stepping, f"a new step after a {kind} was killed", until_end=True)
        log = training.read()
        start = log.starts[starts]
        before = [step["step"] for step in log.steps if step["time_s"] < start["time_s"]]
        first_new = next(step for step in log.steps if step["time_s"] > start["time_s"])
        recovery = start["recovery"]
        if recovery is None:
            raise DemoFailed(_with_tail(f"training began anew after a {kind} was killed", training.console))
        moments = {
            "detected": detected_s[0] if detected_s else spawned_s[0],
            "restarted": spawned_s[0],
            "rebuilt": start["time_s"] - recovery["seconds"],
            "restored": start["time_s"],
            "first_step": first_new["time_s"],
        }
        since = [killed_s, *moments.values()]
        return Recovery(
            kind=kind,
            rung=recovery["rung"],
            step=recovery["step"],
            steps_lost=before[-1] - recovery["step"],
            seconds=round(first_new["time_s"] - killed_s, 3),
            phases={name: round(max(0.0, at - last), 3) for (name, at), last in zip(moments.items(), since, strict=False)},
            restore_phases={name: round(seconds, 3) for name, seconds in recovery["phases"].items()},
        )

    def _wait(self, training: _Training, done: Callable[[], bool], what: str, until_end: bool = False) -> None:
        while not done():
            if until_end and training.process.poll() is not None:
                code = training.process.returncode
                raise DemoFailed(_with_tail(f"the {training.name} run ended with {code} before {what}", training.console))
            if time.monotonic() > self._deadline:
                message = (
                    f"the {training.name} run: no sign of {what}, and the demo's {self.settings.deadline_s:.0f} s are over"
                )
                raise DemoFailed(_with_tail(message, training.console))
            steps = training.read().steps
            self._show.reach(training.name, steps[-1]["step"] if steps else 0)
            time.sleep(0.02)
        self._show.reach(training.name, (training.read().steps or [{"step": 0}])[-1]["step"])

    def _spawn(self, arguments: list[str], console: Path) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with console.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for us to handle: torchrun would end before it has ended its workers
            )
        self._processes.append(process)
        return process


def examples() -> Path:
    """The folder with the training script: beside the package in a checkout, inside of it when installed from a wheel."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "examples", package / "examples"):
        if (folder / "train_gpt.py").is_file():
            return folder
    raise DemoFailed(f"the demo's training script is neither in {package.parent / 'examples'} nor in {package / 'examples'}")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _with_tail(message: str, console: Path, lines: int = 30) -> str:
    tail = console.read_text(errors="replace").splitlines()[-lines:] if console.exists() else []
    return "\n".join([f"{message}; the last lines of {console}:", *(f"  | {line}" for line in tail)])


def _end_tree(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """End a process and its descendants: politely, then for certain. torchrun's workers have sessions of their own."""
    family = _descendants(process.pid) if process.poll() is None else []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in filter(_alive, family):
        os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(_stat_fields(path)[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _alive(pid: int) -> bool:
    try:
        return _stat_fields(Path(f"/proc/{pid}/stat"))[0] not in ("Z", "X")
    except OSError:
        return False


def _started_s(pid: int) -> float:
    """When a process began, in seconds of time.time()."""
    ticks = int(_stat_fields(Path(f"/proc/{pid}/stat"))[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _stat_fields(path: Path) -> list[str]:
    return path.read_text().rpartition(")")[2].split()  # the name before may hold spaces and brackets


# -- what is seen ------------------------------------------------------------------------------------------------------


class _Show:
    """Progress on stderr: a moving bar for each run on a terminal, and a line for each incident everywhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def begin(self, name: str, start: int, stop: int) -> None:
        if not self._console.is_terminal:
            self.say(f"{name} run: training from step {start + 1} to step {stop}")
        self._tasks[name] = self._progress.add_task(name, completed=start, total=stop)

    def reach(self, name: str, step: int) -> None:
        if step:
            self._progress.update(self._tasks[name], completed=step)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def report_text(report: DemoReport) -> str:
    """The report as a short table for people."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    faults = Table("killed", "back from", "steps lost", "total", title="recoveries, seconds")
    for phase in report.recoveries[0].phases if report.recoveries else ():
        faults.add_column(phase.replace("_", " "), justify="right")
    for recovery in report.recoveries:
        parts = [f"{seconds:.2f}" for seconds in recovery.phases.values()]
        faults.add_row(recovery.kind, recovery.rung, str(recovery.steps_lost), f"{recovery.seconds:.2f}", *parts)
    out = Console(file=StringIO(), width=110, highlight=False)
    out.print(faults)
    out.print("\n".join(_facts(report)), markup=False, soft_wrap=True)
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def _facts(report: DemoReport) -> Iterator[str]:
    checkpoint, step_ms = report.checkpoint, report.step_ms
    megabytes = checkpoint.nbytes / 1e6
    yield (
        f"training thread held for {report.stall_ms_per_step:.2f} ms per step; a step took {step_ms['protected']:.0f} ms, "
        f"{step_ms['bare']:.0f} ms bare"
    )
    yield (
        f"checkpoint of step {checkpoint.step}: {megabytes:.1f} MB in {checkpoint.seconds:.2f} s "
        f"({megabytes / max(checkpoint.seconds, 1e-3):.0f} MB/s), {'verified' if checkpoint.verified else 'DAMAGED'} "
        f"in {checkpoint.verify_seconds:.2f} s"
    )
    yield (
        f"restored for {checkpoint.restored_ranks} ranks in {checkpoint.restore_seconds:.1f} s and trained on for "
        f"{checkpoint.resumed_steps} steps; mean loss {checkpoint.loss_difference:.3f} from the reference's "
        f"({'near' if checkpoint.goes_on else f'NOT within {NEAR_NATS}'})"
    )
    yield f"bit-identical: {'yes' if report.bit_identical else 'NO'}"
    yield from (f"  {difference}" for difference in report.differences[:10])
    if len(report.differences) > 10:
        yield f"  and {len(report.differences) - 10} more"
