"""Train, die twice, recover bit for bit, and go on elsewhere from a checkpoint: all of it in about two minutes.

A small GPT is trained once undisturbed and once under protection, while a trainer is killed and later a whole node with its
memory. Both have to end with the same bits. Then a checkpoint written on the way is verified, restored for another number of
ranks and trained on. Ends with 0 when everything was as promised and with 1 otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli._stage import DemoFailed, Log, Stage, Training, is_alive, process_start_s
from holdfast.cli.talk import add_json, print_json, size, table
from holdfast.errors import ConfigError
from holdfast.redundancy import Redundancy

if TYPE_CHECKING:
    from holdfast.snapshot import JobStatus

CHECKPOINTS = "checkpoints"

NEAR_NATS = 0.1
"""How far the mean loss may lie from the reference's after a restore on other ranks, whose dropout differs. Measured on 2 cores
with 12 to 45 steps: 0.0001 to 0.002. A model that was not restored lies 2 away."""


# -- the command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = DemoSettings()
    parser.add_argument("--ranks", type=int, default=usual.ranks, help=f"trainers to start; default: {usual.ranks}")
    parser.add_argument("--nodes", type=int, default=usual.nodes, help=f"nodes this machine plays; default: {usual.nodes}")
    parser.add_argument("--parity", type=int, default=usual.parity, help=f"nodes that may die; default: {usual.parity}")
    parser.add_argument("--steps", type=int, default=usual.steps, help=f"steps to train; default: {usual.steps}")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs, final states and checkpoints in this new folder")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = DemoSettings(
        **{name: getattr(arguments, name) for name in ("ranks", "nodes", "parity", "steps", "seed", "keep")}
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # by way of every `finally`, which ends the trainers
    report = run_demo(settings)
    if arguments.json:
        print_json(report)
    else:
        print("\n".join(report_lines(report)))
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
    def all_steps(self) -> range:
        return range(1, self.steps + 1)

    @property
    def options(self) -> list[str]:
        """What every run of the example is given: the same batch for any number of ranks."""
        return ["--steps", str(self.steps), "--seed", str(self.seed), "--batch", str(2 * self.ranks)]

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
    loss_difference: float | None

    @property
    def goes_on(self) -> bool:
        return self.verified and self.loss_difference is not None and self.loss_difference <= NEAR_NATS


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


# -- the story ---------------------------------------------------------------------------------------------------------


def run_demo(settings: DemoSettings) -> DemoReport:
    """Rehearse everything; blocks for a minute or two. Raises DemoFailed when a part does not come to its end."""
    started = time.monotonic()
    with _folder(settings.keep) as folder, Stage(folder, deadline_s=settings.deadline_s) as stage:
        stage.say(f"{settings.ranks} ranks on {settings.nodes} nodes, parity {settings.parity}; files are in {folder}")
        reference = stage.train("reference", settings.all_steps, settings.ranks, *settings.options, "--bare")
        protected, recoveries = _train_and_kill(stage, settings)
        stage.say("comparing parameters, optimizer state and losses with the reference")
        bare, log = reference.read(), protected.read()
        found = [*loss_differences(bare, log), *state_differences(reference.final, protected.final)]
        checkpoint = _go_on_elsewhere(stage, settings, bare)
    return DemoReport(
        bit_identical=not found,
        differences=found,
        steps_lost=sum(recovery.steps_lost for recovery in recoveries),
        recoveries=recoveries,
        stall_ms_per_step=round(log.stall_ms_per_step(), 3),
        step_ms={"bare": round(bare.step_ms(), 1), "protected": round(log.step_ms(), 1)},
        checkpoint=checkpoint,
        seconds=round(time.monotonic() - started, 1),
        settings={**asdict(settings), "keep": str(settings.keep) if settings.keep else None},
        machine=_machine(),
    )


def _train_and_kill(stage: Stage, settings: DemoSettings) -> tuple[Training, list[Recovery]]:
    redundancy = ["--parity", str(settings.parity), "--nodes", str(settings.nodes), "--snapshot-every", "1"]
    checkpoints = ["--checkpoints", str(stage.folder / CHECKPOINTS), "--checkpoint-every", str(settings.steps // 3)]
    options = [*settings.options, *redundancy, *checkpoints, "--name", stage.name]
    training = stage.start("protected", settings.all_steps, settings.ranks, *options, restarts=3)
    third = settings.steps // 3
    soon = third // 3  # after a checkpoint, so that it is there to go on from
    recoveries = [
        _kill_and_watch(stage, training, settings, "trainer", node=1, at_step=third + soon),
        _kill_and_watch(stage, training, settings, "node", node=settings.nodes - 1, at_step=2 * third + soon),
    ]
    stage.finish(training)
    return training, recoveries


def _kill_and_watch(
    stage: Stage, training: Training, settings: DemoSettings, kind: str, *, node: int, at_step: int
) -> Recovery:
    """Kill once `at_step` is committed, and wait for the first new step."""
    job: JobStatus | None = None

    def is_committed() -> bool:
        nonlocal job
        job = stage.job()
        return job is not None and job.committed_step >= at_step and sum(len(n.ranks) for n in job.nodes) == settings.ranks

    stage.wait(training, is_committed, f"step {at_step} to be committed")
    assert job is not None
    whom = f"a trainer of node {node}" if kind == "trainer" else f"keeper, memory and trainers of node {node}"
    stage.say(f"step {job.committed_step} is committed: killing {whom}")
    earlier, kill = len(training.read().starts), Kill(kind, time.time())
    survivors = _kill(job, kind, node)

    def is_stepping() -> bool:
        log, now = training.read(), time.time()
        if kill.detected_s is None and not all(map(is_alive, survivors)):
            kill.detected_s = now
        if len(log.starts) == earlier:
            return False
        if kill.restarted_s is None:
            kill.restarted_s = process_start_s(log.starts[earlier]["pid"])
        return bool(log.steps[-1]["time_s"] > log.starts[earlier]["time_s"])

    stage.wait(training, is_stepping, f"a new step after a {kind} was killed")
    recovery = recovery_of(training.read(), earlier, kill)
    if recovery is None:
        raise training.failure(f"began anew after a {kind} was killed")
    stage.say(
        f"back at step {recovery.step} from {recovery.rung}: {recovery.steps_lost} steps lost, "
        f"{recovery.seconds:.1f} s from the kill to a new step"
    )
    return recovery


def _kill(job: JobStatus, kind: str, node: int) -> list[int]:
    """Kill -9 one trainer of the node, or its keeper and all its trainers, memory erased; returns the trainers that are left.

    The keeper goes first and the trainers last, so that nobody is left who could write the memory again.
    """
    victim = next(status for status in job.nodes if status.node == node)
    trainers = [pid for _, pid in sorted(victim.ranks.items())]
    if kind == "trainer":
        trainers = trainers[:1]
    else:
        os.kill(victim.pid, signal.SIGKILL)
        for path in Path(victim.memory).iterdir():
            path.unlink()
    for pid in trainers:
        os.kill(pid, signal.SIGKILL)
    return [pid for status in job.nodes for pid in status.ranks.values() if pid not in trainers]


def _go_on_elsewhere(stage: Stage, settings: DemoSettings, reference: Log) -> CheckpointReport:
    """Verify the newest checkpoint from before the end, restore it with the command line for other ranks, and train on."""
    from holdfast.ckpt import list_steps, open_checkpoint

    checkpoints, restored, ranks = stage.folder / CHECKPOINTS, stage.folder / "restored", settings.restored_ranks
    usable = [info for info in list_steps(checkpoints) if info.step < settings.steps]
    if not usable:
        raise DemoFailed(f"the run left no checkpoint from before its end in {checkpoints}")
    info = usable[-1]
    stage.say(f"verifying the checkpoint of step {info.step}")
    began = time.monotonic()
    verdict = open_checkpoint(info.path).verify()
    verified = time.monotonic()
    stage.say(f"restoring it with the command line for {ranks} ranks, and training on")
    where = ["--mesh", f"dp={ranks}", "--format", "torch", "--out", str(restored)]
    stage.command("restore", "restore", f"{checkpoints}@{info.step}", *where)
    ended = time.monotonic()
    rest = range(info.step + 1, settings.steps + 1)
    resumed = stage.train("resumed", rest, ranks, *settings.options, "--bare", "--resume", str(restored))
    return CheckpointReport(
        step=info.step,
        path=str(info.path),
        nbytes=info.nbytes,
        seconds=round(_writing_s(Path(str(info.path))), 3),
        verified=verdict.is_whole,
        verify_seconds=round(verified - began, 3),
        restored_ranks=ranks,
        restore_seconds=round(ended - verified, 3),
        resumed_steps=len(resumed.read().steps),
        loss_difference=loss_difference(reference, resumed.read()),
    )


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _writing_s(checkpoint: Path) -> float:
    first = min(path.stat().st_mtime for path in checkpoint.rglob("*"))
    return (checkpoint / "COMMIT").stat().st_mtime - first


def _machine() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


# -- what is concluded -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kill:
    """A kill, and what was seen from outside: torchrun ending another trainer, and the new process of rank 0."""

    kind: str
    time_s: float
    detected_s: float | None = None
    restarted_s: float | None = None


def recovery_of(log: Log, earlier: int, kill: Kill) -> Recovery | None:
    """The way from `kill` to the first new step, out of a log that had `earlier` starts before; None for a start from nothing."""
    start = log.starts[earlier]
    found = start["recovery"]
    if found is None:
        return None
    lost = [step["step"] for step in log.steps if step["time_s"] < start["time_s"]]
    first_new = next(step for step in log.steps if step["time_s"] > start["time_s"])
    restarted_s = kill.restarted_s or start["time_s"] - found["seconds"]
    ends = {
        "detected": kill.detected_s or restarted_s,
        "restarted": restarted_s,
        "rebuilt": start["time_s"] - found["seconds"],
        "restored": start["time_s"],
        "first_step": first_new["time_s"],
    }
    begins = [kill.time_s, *ends.values()]
    return Recovery(
        kind=kill.kind,
        rung=found["rung"],
        step=found["step"],
        steps_lost=(lost[-1] if lost else 0) - found["step"],
        seconds=round(first_new["time_s"] - kill.time_s, 3),
        phases={phase: round(max(0.0, end - begin), 3) for begin, (phase, end) in zip(begins, ends.items(), strict=False)},
        restore_phases={phase: round(seconds, 3) for phase, seconds in found["phases"].items()},
    )


def loss_differences(reference: Log, protected: Log) -> list[str]:
    """Every step whose loss is not the reference's, bit for bit, however often it was trained; and every step left out."""
    expected = {step["step"]: step["loss_hex"] for step in reference.steps}
    trained = {step["step"] for step in protected.steps}
    wrong = [step for step in protected.steps if step["loss_hex"] != expected.get(step["step"])]
    return [
        *(f"step {step['step']}: the loss was {step['loss_hex']}, not {expected.get(step['step'])}" for step in wrong),
        *(f"step {step} was never trained" for step in sorted(expected.keys() - trained)),
    ]


def state_differences(reference: Path, protected: Path) -> list[str]:
    """Every array of the final states, rank by rank, that is not the reference's, bit for bit."""
    import torch

    def load(path: Path) -> dict[str, torch.Tensor]:
        return dict(torch.load(path, weights_only=True)["arrays"]) if path.exists() else {}

    names = {path.name for folder in (reference, protected) for path in folder.glob("*.pt")}
    if not names:
        return ["no run saved its final state"]
    found = []
    for name in sorted(names):
        one, other = load(reference / name), load(protected / name)
        for array in sorted(one.keys() | other.keys()):
            if array not in one or array not in other:
                found.append(f"{name}: {array} is in one run only")
            elif one[array].dtype != other[array].dtype or not torch.equal(one[array], other[array]):
                found.append(f"{name}: {array} differs")
    return found


def loss_difference(reference: Log, resumed: Log) -> float | None:
    """Between the mean losses over the steps that were trained again; None when there are none or one is not finite."""
    expected = {step["step"]: step["loss"] for step in reference.steps}
    differences = [step["loss"] - expected[step["step"]] for step in resumed.steps]
    if not differences or not all(map(math.isfinite, differences)):
        return None
    return abs(float(statistics.fmean(differences)))


# -- what is printed ---------------------------------------------------------------------------------------------------


def report_lines(report: DemoReport) -> Iterator[str]:
    """The report for people: a table of the recoveries, then one line per fact."""
    checkpoint, step_ms = report.checkpoint, report.step_ms
    phases = list(report.recoveries[0].phases) if report.recoveries else []
    headings = ("KILLED", "BACK FROM", "STEPS LOST", *(phase.upper().replace("_", " ") for phase in phases), "TOTAL")
    rows = [
        (found.kind, found.rung, str(found.steps_lost), *(f"{s:.2f} s" for s in [*found.phases.values(), found.seconds]))
        for found in report.recoveries
    ]
    yield table(headings, rows, right=range(2, len(headings)))
    yield ""
    yield (
        f"stall       {report.stall_ms_per_step:.2f} ms per step in the training thread; "
        f"a step took {step_ms['protected']:.0f} ms, and {step_ms['bare']:.0f} ms without holdfast"
    )
    yield (
        f"checkpoint  step {checkpoint.step}: {size(checkpoint.nbytes)} in {checkpoint.seconds:.2f} s "
        f"({size(checkpoint.nbytes / max(checkpoint.seconds, 1e-3))}/s), "
        f"{'verified' if checkpoint.verified else 'DAMAGED: verified'} in {checkpoint.verify_seconds:.2f} s"
    )
    yield (
        f"resharded   for {checkpoint.restored_ranks} ranks in {checkpoint.restore_seconds:.1f} s, trained on for "
        f"{checkpoint.resumed_steps} steps; {_loss_verdict(checkpoint)}"
    )
    yield ""
    yield f"bit-identical: {'yes' if report.bit_identical else 'NO'}"
    yield from (f"  {difference}" for difference in report.differences[:10])
    if len(report.differences) > 10:
        yield f"  and {len(report.differences) - 10} more"


def _loss_verdict(checkpoint: CheckpointReport) -> str:
    if checkpoint.loss_difference is None:
        return "NO LOSSES TO COMPARE"
    verdict = "" if checkpoint.loss_difference <= NEAR_NATS else f", NOT WITHIN {NEAR_NATS}"
    return f"mean loss {checkpoint.loss_difference:.3f} from the reference's{verdict}"
