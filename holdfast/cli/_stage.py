"""Where the demo plays: processes with one deadline and a certain end, the logs they write, and progress for who watches."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from holdfast.environment import Environment
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.snapshot import JobStatus


class DemoFailed(HoldfastError):
    """The demo could not be brought to its end; the message holds the last lines of the process that failed."""


class Stage:
    """Starts processes, waits for them with one deadline, shows progress, and ends all of them when it is left."""

    def __init__(self, folder: Path, *, deadline_s: float) -> None:
        self.folder, self.deadline_s = folder, deadline_s
        self.name = f"demo-{uuid.uuid4().hex[:8]}"
        self._deadline = time.monotonic() + deadline_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._show = _Show()
        self._environment = Environment.read()
        self._ray_before = False

    def __enter__(self) -> Self:
        from holdfast.snapshot.cluster import local_ray

        self._ray_before = self._environment.ray_address is not None or local_ray() is not None
        self._show.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._show.stop()
        for process in self._processes:
            end_tree(process)
        self._end_keepers()

    def job(self) -> JobStatus | None:
        """What the keepers of the demo's run say."""
        from holdfast.snapshot import status

        return next(iter(status(self.name, memory=self._environment.memory)), None)

    def _end_keepers(self) -> None:
        """Leave the machine as it was, where nobody else has a run on it."""
        from holdfast.snapshot import down, status

        if not self._ray_before and all(job.name == self.name for job in status(memory=self._environment.memory)):
            down(memory=self._environment.memory)
        elif self.job() is not None:
            self.say(f"holdfast was in use here before, so the keepers of {self.name} stay until `holdfast down`")

    # -- runs of the example --

    def train(self, name: str, steps: range, ranks: int, *options: str) -> Training:
        """The example's training from start to end, which has to succeed."""
        training = self.start(name, steps, ranks, *options)
        self.finish(training)
        return training

    def start(self, name: str, steps: range, ranks: int, *options: str, restarts: int = 0) -> Training:
        folder = self.folder / name
        folder.mkdir()
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        script = [str(examples() / "train_gpt.py"), "--log-file", str(folder / "steps.jsonl"), "--out", str(folder / "final")]
        self._show.begin(name, steps)
        return Training(name, folder, self._spawn(["-m", *torchrun, *script, *options], folder / "console.log"))

    def finish(self, training: Training) -> None:
        while training.process.poll() is None:
            self._look_again(training, "its end")
        self._show.reach(training.name, training.read().last_step)
        if training.process.returncode:
            raise training.failure(f"ended with {training.process.returncode}")

    def wait(self, training: Training, done: Callable[[], bool], what: str) -> None:
        """Look again and again until `done` says so. Raises DemoFailed when the training or the demo's time ends first."""
        while not done():
            if training.process.poll() is not None:
                raise training.failure(f"ended with {training.process.returncode} before {what}")
            self._look_again(training, what)

    def _look_again(self, training: Training, what: str) -> None:
        if time.monotonic() > self._deadline:
            raise training.failure(f"shows no sign of {what}, and the demo's {self.deadline_s:.0f} s are over")
        time.sleep(0.02)
        self._show.reach(training.name, training.read().last_step)

    # -- everything else --

    def command(self, name: str, *arguments: str) -> None:
        """Run a `holdfast` verb in a process of its own, which has to succeed."""
        console = self.folder / f"{name}.log"
        process = self._spawn(["-m", "holdfast.cli", *arguments], console)
        try:
            code = process.wait(max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(_with_tail(f"holdfast {name} did not end in time", console)) from error
        if code:
            raise DemoFailed(_with_tail(f"holdfast {name} ended with {code}", console))

    def say(self, text: str) -> None:
        self._show.say(text)

    def _spawn(self, arguments: list[str], console: Path) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with console.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **environment},
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


# -- one training and its log ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Log:
    """The lines that rank 0 has written so far: one dictionary for every start of the script and every step."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def step_ms(self) -> float:
        return 1000 * float(statistics.median(step["step_s"] for step in self.steps))

    def stall_ms_per_step(self) -> float:
        """Time the training thread spent in holdfast per step; what a start costs is not part of it."""
        stalled_s: float = 0.0
        steps = 0
        ends = [*(start["time_s"] for start in self.starts[1:]), math.inf]
        for start, end in zip(self.starts, ends, strict=True):
            stalls = [step["stall_s"] for step in self.steps if start["time_s"] <= step["time_s"] < end]
            if stalls:
                stalled_s, steps = stalled_s + stalls[-1] - stalls[0], steps + len(stalls) - 1
        return 1000 * stalled_s / max(1, steps)


@dataclass(frozen=True, slots=True)
class Training:
    """A torchrun of the example, with everything it writes in a folder of its own."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def final(self) -> Path:
        return self.folder / "final"

    def read(self) -> Log:
        path, log = self.folder / "steps.jsonl", Log()
        text = path.read_text() if path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # a line that is being written is left for the next look
            record = json.loads(line)
            (log.starts if record["event"] == "start" else log.steps).append(record)
        return log

    def failure(self, what: str) -> DemoFailed:
        return DemoFailed(_with_tail(f"the {self.name} run {what}", self.folder / "console.log"))


def _with_tail(message: str, console: Path, lines: int = 30) -> str:
    tail = console.read_text(errors="replace").splitlines()[-lines:] if console.exists() else []
    return "\n".join([f"{message}; the last lines of {console}:", *(f"  | {line}" for line in tail)])


# -- processes by their number -----------------------------------------------------------------------------------------


def end_tree(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """End a process and its descendants, politely and then for certain. torchrun's workers have sessions of their own."""
    if process.poll() is not None:
        return
    family = _descendants(process.pid)
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in filter(is_alive, family):
        os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(int(_stat_fields(int(path.name))[1]), []).append(int(path.name))
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return _stat_fields(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def process_start_s(pid: int) -> float:
    """When a process began, in seconds of time.time()."""
    ticks = int(_stat_fields(pid)[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _stat_fields(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()  # the name before may hold spaces and brackets


# -- what is seen ------------------------------------------------------------------------------------------------------


class _Show:
    """Progress on stderr: a moving bar for each run on a terminal, and a line for each incident everywhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._bars: dict[str, Any] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def begin(self, name: str, steps: range) -> None:
        if not self._console.is_terminal:
            self.say(f"{name} run: training steps {steps.start} to {steps.stop - 1}")
        self._bars[name] = self._progress.add_task(name, completed=steps.start - 1, total=steps.stop - 1)

    def reach(self, name: str, step: int) -> None:
        if step:
            self._progress.update(self._bars[name], completed=step)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
