"""How long a job of four gloo ranks stands still when a trainer, or a node with its memory, is killed.

    python benchmarks/elastic.py [--json] [--quick]

Seconds from the kill -9 to the end of the first new step on the slowest rank, with 64 MB of state on every rank. "in place" is
`torchrun -m holdfast.elastic.run` with a spare that waits at `protect`; "restart" is holdfast under torchrun alone; "torchrun" is
the same script without holdfast, which begins again at step 1, with its cure for stale rendezvous keys
(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1). "torchft" goes on with three ranks (_elastic_torchft.py), where it is installed.
The floor of a restart is torchrun's own time to a new process group in the same round; "built" is when the script, without
holdfast, has built its model as well. All nodes are on one machine and share its cores, so that what starts processes takes longer
than on a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from _harness import Report, arguments, ratios, say

JOB = Path(__file__).with_name("_elastic_job.py")
RANKS = 4
PACKAGES = ["torch", "numpy", "torchft", "torchft-nightly"]
REPORT = Report()


def main() -> None:
    options = arguments(__doc__)
    count = 1 if options.quick else 5
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    torchft: list[float] = []
    obstacle = why_no_torchft()
    for number in range(count):
        for layout in ("ddp", "fsdp"):
            for fault in ("worker", "node"):
                systems = ("in place", "restart", *(("torchrun",) if fault == "worker" else ()))
                for system in systems if number % 2 else reversed(systems):
                    outcome = run(system, layout, fault)
                    say(f"round {number + 1}/{count}: {layout} {fault} {system}: {outcome.first_step_s:.2f} s")
                    found.setdefault((layout, fault, system), []).append(outcome)
        if not obstacle:
            torchft.append(run_torchft())
            say(f"round {number + 1}/{count}: ddp worker torchft: {torchft[-1]:.2f} s")
    for (layout, fault, system), outcomes in found.items():
        case = f"{layout}, {fault} killed"
        REPORT.row(case, system, "first new step", "s", [outcome.first_step_s for outcome in outcomes])
        REPORT.row(case, system, "ready", "s", [outcome.ready_s for outcome in outcomes])
        if system == "torchrun":
            REPORT.row(case, system, "built", "s", [outcome.built_s for outcome in outcomes])
        for phase in outcomes[0].phases:
            REPORT.row(case, system, phase, "s", [outcome.phases[phase] for outcome in outcomes])
    row = ("ddp, worker killed", "torchft, 3 ranks go on", "first new step", "s")
    if obstacle:
        REPORT.absent(*row, obstacle)
    else:
        REPORT.row(*row, torchft)
    goals(found)
    REPORT.show(as_json=options.json, packages=PACKAGES)


def goals(found: dict[tuple[str, str, str], list[Outcome]]) -> None:
    """The slower layout counts."""

    def slowest(fault: str) -> float:
        medians = [_median([o.first_step_s for o in found[layout, fault, "in place"]]) for layout in ("ddp", "fsdp")]
        return max(medians)

    def over_floor(fault: str) -> float:
        per_layout = []
        for layout in ("ddp", "fsdp"):
            ours = [outcome.first_step_s for outcome in found[layout, fault, "restart"]]
            floor = [outcome.ready_s for outcome in found[layout, "worker", "torchrun"]]
            per_layout.append(_median(ratios(ours, floor)))
        return max(per_layout)

    REPORT.goal("inprocess_worker_s", 0.5, slowest("worker"), at_most=True)
    REPORT.goal("inprocess_node_s", 1.0, slowest("node"), at_most=True)
    REPORT.goal("restart_worker_vs_floor", 1.25, over_floor("worker"), at_most=True)
    REPORT.goal("restart_node_vs_floor", 1.25, over_floor("node"), at_most=True)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@dataclass(frozen=True)
class Outcome:
    """Seconds after the kill: when the slowest rank could begin its next step, and when it had done it; and when the last of those
    that started anew had built its model."""

    ready_s: float
    first_step_s: float
    built_s: float
    phases: dict[str, float]


def run(system: str, layout: str, fault: str) -> Outcome:
    """One job, one fault; the processes and memory of each are its own and are gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="hf-bench-"))
    memory = Path(tempfile.mkdtemp(prefix="hf-bench-", dir="/dev/shm"))
    env = {
        **os.environ,
        "HOLDFAST_KEEPERS": "process",
        "HOLDFAST_RUNTIME": str(place / "runtime"),
        "HOLDFAST_MEMORY": str(memory),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=2"]
    command += ["-m", "holdfast.elastic.run", "--spares", "ready"] if system == "in place" else []
    command += [str(JOB), "--layout", layout, "--fault", fault, "--out", str(place)]
    command += ["--bare"] if system == "torchrun" else []
    try:
        with (place / "log").open("w") as log:
            done = subprocess.run(command, env=env, stdout=log, stderr=log, timeout=300, check=False)
        if done.returncode:
            sys.exit(f"{system}, {layout}, {fault} ended with {done.returncode}:\n{(place / 'log').read_text()[-3000:]}")
        return outcome(place)
    finally:
        for endpoint in memory.glob("*/*/*/keeper.json"):
            with suppress(ProcessLookupError):
                os.kill(json.loads(endpoint.read_text())["pid"], signal.SIGKILL)
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)


def why_no_torchft() -> str:
    """Empty where it can be measured."""
    tried = subprocess.run([sys.executable, "-c", "import torchft"], capture_output=True, text=True, check=False)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def run_torchft() -> float:
    """Seconds to the first new step of torchft's survivors."""
    with tempfile.TemporaryDirectory(prefix="hf-bench-") as place:
        command = [sys.executable, str(JOB.with_name("_elastic_torchft.py")), "--out", place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        sys.exit(f"torchft ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return float(done.stdout)


def outcome(place: Path) -> Outcome:
    """What the ranks noted, as seconds after the kill."""
    notes = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(place.glob("rank-*"))]
    killed = next(note["at"] for rank in notes for note in rank if note["what"] == "kill")
    after = [[note for note in rank if note["at"] > killed] for rank in notes]
    restored = [[note for note in rank if note["what"] == "restored"] for rank in after]
    ready = [
        rank[0] if rank else next(n for n in late if n["what"] == "group") for rank, late in zip(restored, after, strict=True)
    ]
    steps = [
        next(note["at"] for note in late if note["what"] == "step" and note["at"] > then["at"])
        for late, then in zip(after, ready, strict=True)
    ]
    slowest = max(ready, key=lambda note: note["at"])
    phases = dict(slowest["recovery"]["phases"]) if "recovery" in slowest else {}
    built = [note["at"] for late in after for note in late if note["what"] == "built"]
    return Outcome(max(note["at"] for note in ready) - killed, max(steps) - killed, max(built, default=killed) - killed, phases)


if __name__ == "__main__":
    main()
