"""Snapshots in memory beside what else there is: what a save costs the trainer, when it is safe, what comes back and how fast.

    python benchmarks/snapshot.py [--json] [--quick]

Real keepers as plain processes, real slots in /dev/shm, real sockets. 256 MiB of model and Adam state per rank; 2 and 4 ranks.
Every round runs every system once in the same processes. nvidia-resiliency-ext, torch-checkpointing and torchft are measured
where they can be imported. 4 ranks and their keepers on fewer cores share them: compare systems, not seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import Report, arguments, ratios, say
from _snapshot_keepers import committing

from holdfast.errors import HoldfastError
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.cluster import down, node_memory

REPORT = Report()
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "nvidia-resiliency-ext", "torch-checkpointing", "torchft-nightly")
PEERS = ("dcp thread", "dcp async staging", "dcp process", "torch-checkpointing", "nvrx local, F=2", "torchft http")
PEERS_OF_FOUR = tuple(peer for peer in PEERS if peer != "dcp process")
"""Four more processes that import torch do not start within DCP's 30 s where cores are few."""

METRICS = {"call": ("ms", 1e3), "fence": ("ms", 1e3), "stall": ("ms", 1e3), "safe": ("s", 1.0)}
"""`safe`: holdfast committed with parity; DCP and torch-checkpointing written; NVRx replicated and written; torchft received."""


def main() -> None:
    args = arguments(__doc__)
    n, nbytes = (1, 32 << 20) if args.quick else (3, 256 << 20)
    base = Path(os.environ.get("HOLDFAST_MEMORY") or "/dev/shm")
    memory = Path(tempfile.mkdtemp(prefix="hfb-", dir=base))
    runtime = tempfile.mkdtemp(prefix="hfb-")
    os.environ |= {"HOLDFAST_MEMORY": str(memory), "HOLDFAST_RUNTIME": runtime, "HOLDFAST_KEEPERS": "process"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    bench = Bench(memory, nbytes, n)
    try:
        part("save, 2 ranks, m=1", lambda: bench.saves(2, 1, PEERS, steps=2 if args.quick else 8))
        part("commit", lambda: committing(REPORT, memory, nbytes, n))
        part("recovery, 4 ranks", lambda: bench.recoveries(4))
        part("save, 4 ranks, m=2", lambda: bench.saves(4, 2, (), steps=0))
        part("save, 4 ranks, m=1", lambda: bench.saves(4, 1, PEERS_OF_FOUR, steps=0))
    finally:
        down(memory=memory)
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
    REPORT.show(as_json=args.json, packages=PACKAGES)


def part(case: str, run: Callable[[], None]) -> None:
    """One part of the benchmark; where it cannot be run, its row says why, and the others are still worth having."""
    try:
        run()
    except (HoldfastError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"{case}: {error!r}")
        REPORT.absent(case, "all", "time", "s", f"{type(error).__name__}: {error}")


class Bench:
    def __init__(self, memory: Path, nbytes: int, n: int) -> None:
        self.memory, self.nbytes, self.n, self.jobs = memory, nbytes, n, 0

    def run(self, world: int, **options: Any) -> dict[str, Any]:
        """Start `world` ranks of _snapshot_ranks.py; what rank 0 found."""
        place = Path(tempfile.mkdtemp(prefix="run-", dir=self.memory))
        out = place / "found.json"
        known = {"nbytes": self.nbytes, "n": self.n, "place": str(place), "out": str(out), "parity": 1, "steps": 0, "peers": []}
        command = [sys.executable, str(Path(__file__).with_name("_snapshot_ranks.py")), json.dumps({**known, **options})]
        shared = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "TORCHELASTIC_RUN_ID": place.name,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        ranks = [
            subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=sys.stderr)
            for r in range(world)
        ]
        try:
            for rank in ranks:
                if rank.wait(1800):
                    raise RuntimeError(f"a rank ended with {rank.returncode}")
            found: dict[str, Any] = json.loads(out.read_text())
            return found
        finally:
            for rank in ranks:
                rank.kill()
            shutil.rmtree(place, ignore_errors=True)

    # -- saving --

    def saves(self, world: int, parity: int, peers: tuple[str, ...], steps: int) -> None:
        case = f"save, {world} ranks, m={parity}"
        say(f"{case}: memcpy, holdfast{', ' if peers else ''}{', '.join(peers)}")
        self.jobs += 1
        found = self.run(world, mode="save", parity=parity, peers=peers, steps=steps, name=f"save{self.jobs}")
        say(f"  holdfast: {found['stats']}")
        times = found["times"]
        memcpy = times.pop("memcpy")["call"]
        REPORT.row(case, "memcpy", "time", "ms", [1e3 * value for value in memcpy])
        for name, metrics in times.items():
            for metric, (unit, scale) in METRICS.items():
                REPORT.row(case, name, metric, unit, [scale * value for value in metrics[metric]])
            REPORT.row(case, name, "fence/memcpy", "×", ratios(metrics["fence"], memcpy))
            REPORT.row(case, name, "stall/memcpy", "×", ratios(metrics["stall"], memcpy))
        for name, reason in found["missing"].items():
            REPORT.absent(case, name, "stall", "ms", reason)
        for name, seconds in found["overhead"].items():
            REPORT.row(f"step, {world} ranks", name, "time", "ms", [1e3 * value for value in seconds])
            if name != "bare":
                ratio = ratios(seconds, found["overhead"]["bare"])
                REPORT.row(f"step, {world} ranks", name, "step/bare", "×", ratio)
        if (world, parity) == (2, 1):
            self.goals(times, memcpy)

    def goals(self, times: dict[str, dict[str, list[float]]], memcpy: list[float]) -> None:
        ours = times["holdfast"]
        REPORT.goal("call_ms", 1.0, 1e3 * statistics.median(ours["call"]), at_most=True)
        REPORT.goal("fence_vs_memcpy", 1.3, statistics.median(ratios(ours["fence"], memcpy)), at_most=True)
        best = min((name for name in times if name.startswith("dcp")), key=lambda name: statistics.median(times[name]["stall"]))
        REPORT.goal("stall_vs_dcp", 0.3, statistics.median(ratios(ours["stall"], times[best]["stall"])), at_most=True)
        if "nvrx local, F=2" in times:
            stall = statistics.median(ratios(ours["stall"], times["nvrx local, F=2"]["stall"]))
            REPORT.goal("stall_vs_nvrx", 0.1, stall, at_most=True)

    # -- recovering --

    def recoveries(self, world: int) -> None:
        """From entering `protect` to the state restored: after dead trainers, after a lost node, after losing all memory."""
        say(f"recovery, {world} ranks")
        found: dict[str, list[dict[str, Any]]] = {}
        checkpoints = tempfile.mkdtemp(prefix="hfb-")
        for number in range(min(self.n, 2)):
            options = {"mode": "train", "name": f"recover{number}", "checkpoints": f"{checkpoints}/{number}"}
            self.run(world, **options)
            for lost in ((), (world - 1,), tuple(range(world))):
                self.lose(options["name"], lost)
                recovery = self.run(world, **options)["recovery"]
                found.setdefault(recovery["rung"], []).append(recovery)
            self.lose(options["name"], tuple(range(world)))
            shutil.rmtree(f"{checkpoints}/{number}")
        shutil.rmtree(checkpoints)
        for rung, recoveries in found.items():
            case = f"recovery, {world} ranks"
            REPORT.row(case, rung, "time", "s", [recovery["seconds"] for recovery in recoveries])
            for phase in ("rebuild", "load"):
                values = [recovery["phases"][phase] for recovery in recoveries if phase in recovery["phases"]]
                if values:
                    REPORT.row(case, rung, phase, "s", values)

    def lose(self, name: str, nodes: tuple[int, ...]) -> None:
        """These nodes' keepers are killed and their memory is gone."""
        for node in nodes:
            place = node_memory(self.memory, name, node)
            os.kill(Endpoint.read(place).pid, 9)
            shutil.rmtree(place)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    main()
