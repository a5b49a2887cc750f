"""The launcher between torchrun and a trainer: `torchrun … -m holdfast.elastic.run train.py …`.

torchrun starts one for each rank and sees a process that does not die when its trainer does. It starts the trainer and a spare,
learns of the trainer's death from the kernel within milliseconds, publishes it on the board, and calls the spare. When that is not
possible it ends with the trainer's exit code, and torchrun restarts all processes as it always did. Knows nothing of torch.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.elastic.board import Address, Board, board_address, board_token, cradle_name, reach
from holdfast.elastic.post import RESTART
from holdfast.environment import BERTH, Berth, Environment
from holdfast.errors import ConfigError, HoldfastError
from holdfast.snapshot.wire import Connection

logger = logging.getLogger("holdfast.elastic.run")

STRIKES = 3
"""A rank that dies this often without completing a new step is left to torchrun: the fault is in what it does."""


NOT_ENTERED = "it had not entered protect() yet"

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""For a process that is going to fork: a child has none of the other threads, and whatever they held is held for ever."""

HEAD_START_S = 5.0
"""A spare is started once the trainer has done a step, or after this time: importing torch takes seconds of a core, which the first
step after a recovery may need."""


# -- deciding --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a trainer that has ended: "leave" with `code`, or "replace" it."""

    action: str
    code: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a rank's trainers so far: the furthest step any completed, and deaths since it got further."""

    step: int = 0
    strikes: int = 0

    def after_death_at(self, step: int) -> Record:
        return Record(step, 1) if step > self.step else replace(self, strikes=self.strikes + 1)


def judge(code: int, record: Record, *, stopping: bool, obstacle: str) -> Verdict:
    """What a trainer's exit `code` means (negative: the signal that ended it). An `obstacle` says why nobody can take its place."""
    if code == 0:
        return Verdict("leave", 0, "it has completed")
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    shell_code = 128 - code if code < 0 else code
    if stopping or code in (-signal.SIGTERM, -signal.SIGINT):
        return Verdict("leave", shell_code, f"{ended}: the job is being stopped")
    if code == RESTART or obstacle:
        return Verdict("leave", shell_code, f"{ended}, and cannot be replaced in place{obstacle and ': ' + obstacle}")
    if record.strikes >= STRIKES:
        return Verdict("leave", shell_code, f"{ended}: {record.strikes} deaths without a step beyond {record.step}")
    return Verdict("replace", reason=ended)


# -- doing -----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Child:
    """A trainer or a spare: its process, the descriptor that becomes readable when it ends, and the socket to it."""

    process: subprocess.Popen[bytes]
    pidfd: int
    channel: socket.socket
    is_ready: bool = False
    lines: bytes = field(default=b"")

    def call(self, epoch: int) -> None:
        self.channel.sendall(f"{epoch}\n".encode())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()


class Launcher:
    """Runs one rank until it has completed, is stopped, or cannot be helped here; `run` returns the exit code."""

    def __init__(self, arguments: list[str], spares: str, board: Address, token: str) -> None:
        self._arguments, self._spares = arguments, spares
        self._board, self._token = board, token
        self._seat: Connection | None = None
        self._rank = int(os.environ["RANK"])
        self._selector = selectors.DefaultSelector()
        self._pulse = os.memfd_create("holdfast-pulse")
        os.ftruncate(self._pulse, mmap.PAGESIZE)
        self._transcript = os.memfd_create("holdfast-transcript")
        self._steps = memoryview(mmap.mmap(self._pulse, mmap.PAGESIZE)).cast("Q")
        self._trainer: Child | None = None
        self._spare: Child | None = None
        self._spare_due_s: float | None = None
        self._epoch = 0
        self._record = Record()
        # Until it has entered protect(), a spare would not know what it heard from others; and nothing is lost by a restart.
        self._obstacle = NOT_ENTERED
        self._stopping = False
        self._code: int | None = None

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._trainer = self._start("trainer")
        while self._code is None:
            for key, _ in self._selector.select(self._patience_s()):
                key.data()
            if self._patience_s() == 0:
                self._start_spare()
        for child in (self._trainer, self._spare):
            if child is not None:
                child.kill()
                child.process.wait()
        self._depart()
        return self._code

    def _stop(self, number: int, _: Any) -> None:
        self._stopping = True
        if self._trainer is not None:
            with suppress(ProcessLookupError):
                self._trainer.process.send_signal(number)

    def _start(self, role: str) -> Child:
        ours, theirs = socket.socketpair()
        lines = (theirs.fileno(), self._pulse, self._transcript)
        berth = Berth(role, self._board, self._token, *lines, os.getpid(), cradle_name(os.environ))
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "holdfast.elastic.trainer", *self._arguments],
            env={**os.environ, BERTH: berth.to_text()},
            pass_fds=lines,
        )
        theirs.close()
        child = Child(process, os.pidfd_open(process.pid), ours)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._ended(child))
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._heard(child))
        return child

    def _heard(self, child: Child) -> None:
        data = child.channel.recv(4096)
        if not data:
            self._selector.unregister(child.channel)
            return
        *lines, child.lines = (child.lines + data).split(b"\n")
        for line in lines:
            if line == b"ready":
                child.is_ready = True
                if child is self._trainer:
                    child.call(self._epoch)  # it was needed before it was ready
            elif line == b"running" and child is self._trainer:
                self._entered()
            elif line == b"stepping" and child is self._trainer:
                self._start_spare()

    def _entered(self) -> None:
        """The trainer has entered protect(), and everything is there that another one needs to take its place."""
        if self._obstacle == NOT_ENTERED:
            self._obstacle = ""
            self._attend()
        self._spare_due_s = time.monotonic() + HEAD_START_S

    def _attend(self) -> None:
        """Where this launcher ends without a word, with its host perhaps, the board sees its seat empty."""
        try:
            self._seat = reach(self._board, self._token, patience_s=5)
            self._seat.ask("attend", rank=self._rank)
        except HoldfastError as error:
            logger.warning("rank %d: the board cannot be attended: %s", self._rank, error)

    def _depart(self) -> None:
        if self._seat is None:
            return
        if self._code == 0:
            with suppress(HoldfastError):
                self._seat.ask("depart")
        self._seat.close()

    def _start_spare(self) -> None:
        self._spare_due_s = None
        if self._spare is None and self._spares != "none" and not self._obstacle:
            self._spare = self._start(self._spares)

    def _patience_s(self) -> float | None:
        """How long to wait for somebody's word; None for ever."""
        return None if self._spare_due_s is None else max(0.0, self._spare_due_s - time.monotonic())

    def _ended(self, child: Child) -> None:
        code = child.process.wait()
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        with suppress(KeyError, ValueError):
            self._selector.unregister(child.channel)
        child.channel.close()
        if child is self._spare:
            self._spare_ended(child, code)
        elif child is self._trainer:
            self._trainer_ended(code)

    def _spare_ended(self, spare: Child, code: int) -> None:
        self._spare = None
        if spare.is_ready:
            self._spare = self._start(self._spares)
        elif not self._stopping:
            self._obstacle = "its spare has failed"
            logger.warning(
                "rank %d: its spare ended with code %d before it was ready, so a death restarts all processes", self._rank, code
            )

    def _trainer_ended(self, code: int) -> None:
        self._spare_due_s = None
        self._record = self._record.after_death_at(self._steps[0])
        verdict = judge(code, self._record, stopping=self._stopping, obstacle=self._obstacle)
        if verdict.action == "replace":
            self._replace(verdict.reason)
        else:
            if verdict.code:
                logger.warning("rank %d: its trainer was %s", self._rank, verdict.reason)
            self._code = verdict.code

    def _replace(self, reason: str) -> None:
        """Publish first: the survivors wake up while the spare gets going."""
        try:
            board = reach(self._board, self._token, patience_s=5)
            self._epoch = board.ask("advance", reason=f"rank {self._rank} was {reason}")["epoch"]
            board.close()
        except HoldfastError as error:
            logger.error("rank %d: its trainer was %s, and the board is gone (%s)", self._rank, reason, error)
            self._code = RESTART
            return
        logger.warning(
            "rank %d: its trainer was %s; %s takes over", self._rank, reason, "a spare" if self._spare else "a new one"
        )
        self._trainer, self._spare = self._spare or self._start("late"), None
        if self._trainer.is_ready:
            self._trainer.call(self._epoch)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun … -m holdfast.elastic.run", description="Run a script so that its ranks can be replaced while it runs."
    )
    parser.add_argument(
        "--spares",
        choices=("auto", "ready", "import", "none"),
        default="auto",
        help="what waits beside every trainer: a process that has run the script up to protect() (ready: fastest, and holds a "
        "second copy of the model), one that has imported torch (import), or nothing; auto: ready without GPUs, else import",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, help="the training script (or -m module) and its arguments")
    options = parser.parse_args(arguments)
    if not options.script or options.script == ["-m"]:
        parser.error("which script? e.g. torchrun --nproc-per-node 4 -m holdfast.elastic.run train.py")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if "RANK" not in os.environ or "MASTER_PORT" not in os.environ:
        parser.error("this is started by torchrun: torchrun --nproc-per-node 4 -m holdfast.elastic.run train.py")
    spares = options.spares
    if spares == "auto":
        spares = "import" if Path("/proc/driver/nvidia").exists() else "ready"
    try:
        address, token = board_address(os.environ), board_token(os.environ)
        cradle = _start_cradle()
        board = Board(address, token) if os.environ["RANK"] == "0" else None
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return error.exit_code
    try:
        return Launcher(options.script, spares, address, token).run()
    finally:
        if cradle is not None:
            cradle.kill()
            cradle.wait()
        if board is not None:
            board.close()


def _start_cradle() -> subprocess.Popen[bytes] | None:
    """One for each host, where keepers are plain processes; Ray starts its own."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or Environment.read().keepers != "process":
        return None
    command = [sys.executable, "-m", "holdfast.snapshot.cradle", cradle_name(os.environ), str(os.getpid())]
    return subprocess.Popen(command, env={**os.environ, **ONE_THREAD})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
