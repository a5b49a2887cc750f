"""A place of their own for every test that starts keepers, and a way to run the small job under the real torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("train.py")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """Runs tests/elastic/train.py; `finish` waits for it and hands its results over."""

    place: Path
    env: dict[str, str]
    results: int = 0
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def memory(self) -> Path:
        return Path(self.env["HOLDFAST_MEMORY"])

    def start(
        self,
        *arguments: str,
        ranks: int = 2,
        restarts: int = 3,
        out: Path | None = None,
        script: Path = SCRIPT,
        spares: str = "",
        agents: int = 1,
        **env: str,
    ) -> Path:
        """`spares`: under the launcher that replaces single ranks, with this choice of spares; else under torchrun alone.

        `agents`: so many torchruns that meet on this machine, with `ranks` and memory of its own for each, as on so many hosts.
        """
        self.results += 1
        out = out or self.place / f"out-{self.results}"
        out.mkdir(exist_ok=True)
        command = [sys.executable, str(script)]
        if ranks:
            meeting = ["--standalone"] if agents == 1 else _meet(agents)
            torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={ranks}"]
            launcher = ["-m", "holdfast.elastic.run", "--spares", spares] if spares else []
            command = [*torchrun, f"--max-restarts={restarts}", *launcher, str(script)]
        log = (out / "log").open("w")
        for agent in range(agents):
            place = self._host(agent) if agents > 1 else {}
            process = subprocess.Popen(
                [*command, "--out", str(out), *arguments],
                env={**self.env, **place, **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
            self.processes.append(process)
        log.close()
        return out

    def run(self, *arguments: str, timeout_s: float = 200, ok: bool = True, **options: Any) -> Result:
        out = self.start(*arguments, **options)
        code = self.processes[-1].wait(timeout_s)
        result = Result(out, code)
        if ok:
            assert code == 0, result.log
        return result

    def result(self, out: Path) -> Result:
        """What the job that was started last has left in `out`."""
        return Result(out, self.processes[-1].wait())

    def _host(self, number: int) -> dict[str, str]:
        """Memory and runtime folder of a host of its own."""
        memory = self.memory / f"host-{number}"
        memory.mkdir(exist_ok=True)
        return {"HOLDFAST_MEMORY": str(memory), "HOLDFAST_RUNTIME": str(self.place / f"runtime-{number}")}

    def kill_keepers(self, memory: Path) -> None:
        """End every keeper that serves below `memory`."""
        for path in memory.rglob("keeper.json"):
            with suppress(ProcessLookupError):
                os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)

    def lose_memory(self) -> None:
        """Every node is lost: keepers, and all that they held."""
        self.kill_keepers(self.memory)
        for path in self.memory.iterdir():
            shutil.rmtree(path)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _meet(agents: int) -> list[str]:
    """Arguments for torchruns that find each other here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint = f"--rdzv-endpoint=127.0.0.1:{port}"
    return [f"--nnodes={agents}", "--rdzv-backend=c10d", endpoint, "--rdzv-id=two", "--local-addr=127.0.0.1"]


@dataclass
class Result:
    """What a run left: final state and facts of every rank, and all that it said."""

    out: Path
    code: int

    @property
    def log(self) -> str:
        return (self.out / "log").read_text()

    @property
    def states(self) -> list[dict[str, torch.Tensor]]:
        return [torch.load(path, weights_only=True) for path in sorted(self.out.glob("state-*.pt"))]

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.out.glob("facts-*.json"))]

    def assert_equals(self, other: Result) -> None:
        """Every tensor, every common loss and every plain value, bit for bit, on every rank."""
        assert len(self.states) == len(other.states) > 0
        for mine, theirs in zip(self.states, other.states, strict=True):
            assert mine.keys() == theirs.keys()
            different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
            assert not different
        for mine, theirs in zip(self.facts, other.facts, strict=True):
            assert {key: mine[key] for key in ("seen", "lr")} == {key: theirs[key] for key in ("seen", "lr")}
            common = mine["losses"].keys() & theirs["losses"].keys()
            assert common
            assert {step: mine["losses"][step] for step in common} == {step: theirs["losses"][step] for step in common}


def isolated_environment(place: Path, memory: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "RAY_", "TORCH", "MASTER_"))}
    return {
        **keep,
        "HOLDFAST_KEEPERS": "process",
        "HOLDFAST_SCRUB_EVERY_S": "0",  # damage that a test does stays until the test's own restore finds it
        "HOLDFAST_RUNTIME": str(place / "runtime"),
        "HOLDFAST_MEMORY": str(memory),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def job() -> Iterator[Job]:
    place = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="hf-", dir="/dev/shm"))
    found = Job(place, isolated_environment(place, memory))
    yield found
    found.end()
    found.kill_keepers(memory)
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(memory, ignore_errors=True)


@pytest.fixture(scope="session")
def references() -> Iterator[References]:
    place = Path(tempfile.mkdtemp(prefix="hf-ref-", dir="/tmp"))
    yield References(place)
    shutil.rmtree(place, ignore_errors=True)


class References:
    """Uninterrupted runs without holdfast, each done once for all tests."""

    def __init__(self, place: Path) -> None:
        self._job = Job(place, isolated_environment(place, place))
        self._known: dict[tuple[str, int, int], Result] = {}

    def of(self, layout: str, ranks: int, steps: int = 18) -> Result:
        key = (layout, ranks, steps)
        if key not in self._known:
            self._known[key] = self._job.run("--bare", "--layout", layout, "--steps", str(steps), "--pace", "0", ranks=ranks)
        return self._known[key]
