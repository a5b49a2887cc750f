"""Real torchrun agents that meet on three hosts: the loss of the first one, and an end that is an end for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

import pytest

HERE = Path(__file__).parent
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1"


@dataclass
class Agents:
    """torchruns that are given the same three endpoints, each with one rank that adds up ones."""

    place: Path
    processes: list[subprocess.Popen] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)

    def start(self, count: int, *, steps: int) -> None:
        with ExitStack() as held:
            self.ports = [held.enter_context(create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        meeting = ["--rdzv-backend=holdfast", "--rdzv-endpoint=" + ",".join(f"127.0.0.1:{port}" for port in self.ports)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3"]
        command = [*torchrun, *meeting, "--rdzv-id=three", "--local-addr=127.0.0.1", f"--rdzv-conf={QUICK}"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "MASTER_", "HOLDFAST_"))}
        for number in range(count):
            with (self.place / f"log-{number}").open("w") as log:
                process = subprocess.Popen(
                    [*command, str(HERE / "all_reduce.py"), str(self.place), str(steps)],
                    env={**clean, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def steps(self, world: int) -> list[tuple[int, float]]:
        """Step and time of each that ranks of a round of so many have completed."""
        lines = [line.split() for path in self.place.glob("attempt-*") for line in path.read_text().splitlines()]
        return [(int(line[2]), float(line[3])) for line in lines if len(line) == 4 and int(line[1]) == world]

    def first_listed(self) -> subprocess.Popen:
        """The agent that serves the first endpoint: whichever came first."""
        (found,) = [process for process in self.processes if self.ports[0] in _listening(process.pid)]
        return found

    def lose(self, process: subprocess.Popen) -> None:
        """The agent and its workers, which have sessions of their own, at one stroke."""
        for pid in [process.pid, *_children(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.lose(process)
            process.wait()

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.place.glob("log-*")))


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _listening(pid: int) -> set[int]:
    """The TCP ports at which a process listens."""
    inodes = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.fixture
def agents(tmp_path) -> Iterator[Agents]:
    found = Agents(tmp_path)
    yield found
    found.end()


def test_agents_go_on_without_the_first_listed_host(agents):
    agents.start(3, steps=15)
    deadline = time.monotonic() + 90
    while sum(step >= 2 for step, _ in agents.steps(3)) < 3:
        assert time.monotonic() < deadline, agents.log
        time.sleep(0.05)
    lost = agents.first_listed()
    agents.lose(lost)
    for process in agents.processes:
        assert (process.wait(90) == 0) == (process is not lost), agents.log
    assert {step for step, _ in agents.steps(2)} == set(range(15))


@pytest.mark.campaign
def test_a_job_ends_promptly_on_all_hosts_time_after_time(agents):
    for _ in range(15):
        agents.start(3, steps=5)
        codes = [process.wait(90) for process in agents.processes]
        took = time.time() - max(when for _, when in agents.steps(3))
        assert codes == [0, 0, 0], agents.log
        assert took < 10, agents.log  # a replica that waits for nobody would stay for ten seconds more
        assert "Error" not in agents.log
        agents.processes.clear()
