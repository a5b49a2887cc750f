"""The small job of `holdfast.elastic.faults`, and the deaths that a test can ask of it from inside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.elastic.faults.job import arguments, train
from holdfast.elastic.session import Run
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.cluster import node_memory


def die(death: dict[str, Any], name: str, memory: Path, model: nn.Module) -> None:
    """What the schedule of the test asks for: this process, its keeper alone, or whole nodes with keepers and memory."""
    if death["kind"] == "keeper":
        os.kill(Endpoint.read(node_memory(memory, name, death["ranks"][0])).pid, signal.SIGKILL)
        return
    if death["kind"] == "memory":  # its keeper and all that this node held, while this process lives on
        place = node_memory(memory, name, death["ranks"][0])
        os.kill(Endpoint.read(place).pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
        return
    if death["kind"] == "exception":
        raise RuntimeError("the test asked for an exception")
    if death["kind"] == "backward":  # of the next step, while the other ranks wait in its collectives
        layer = [part for part in model.modules() if isinstance(part, nn.Linear)][1]
        layer.register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return
    if death["kind"] == "node":
        places = [node_memory(memory, name, rank) for rank in death["ranks"]]  # one rank for each node
        for place in places:
            os.kill(Endpoint.read(place).pid, signal.SIGKILL)
        for place in places:
            shutil.rmtree(place)
    os.kill(os.getpid(), signal.SIGKILL)


class Deaths:
    """What `asked` for in JSON is done in its step, once over all attempts of the run whose results go to `out`."""

    def __init__(self, asked: str, out: Path, name: str) -> None:
        self._deaths, self._name = json.loads(asked), name
        self._marks = out / "deaths"
        self._marks.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, run: Run, model: nn.Module) -> None:
        for number, death in enumerate(self._deaths):
            mark = self._marks / str(number)
            if int(os.environ.get("RANK", 0)) != death["ranks"][0] or step < death["step"] or mark.exists():
                continue
            if catches_up(run, death["committed"]):
                mark.touch()
                die(death, self._name, Path(os.environ.get("HOLDFAST_MEMORY", "/dev/shm")), model)


def main() -> None:
    parser = arguments()
    parser.add_argument("--die", default="[]", help='JSON: [{"step": 5, "kind": "node", "ranks": [1], "committed": 3}]')
    parser.add_argument("--follow-keeper", action="store_true", help="die when the node's keeper does, as a node would")
    parser.add_argument("--progress", action="store_true", help="leave in the results how far this rank is")
    parser.add_argument("--keep-up", action="store_true", help="wait for the keepers where they have ordered nothing")
    args = parser.parse_args()

    def after_step(step: int, run: Run, model: nn.Module) -> None:
        if args.progress:
            say_progress(step, run, args.out)
        if args.keep_up:
            wait_for_keepers(run, step)
        if args.follow_keeper and not _alive(keeper_pid(run)):
            os.kill(os.getpid(), signal.SIGKILL)

    train(args, Deaths(args.die, args.out, args.name), after_step)


def say_progress(step: int, run: Run, out: Path) -> None:
    part = out / f"progress.{os.environ['RANK']}.{os.getpid()}"
    part.write_text(json.dumps({"step": step, "committed": run.committed_step, "pid": os.getpid()}))
    part.rename(out / f"progress-{os.environ['RANK']}.json")


def catches_up(run: Run, committed: int) -> bool:
    """Whether the step is committed, soon: keepers are nicer than trainers, and these steps are short. It may need a later step."""
    deadline = time.monotonic() + 2
    while run.committed_step < committed and time.monotonic() < deadline:
        time.sleep(0.01)
    return run.committed_step >= committed


def wait_for_keepers(run: Run, step: int) -> None:
    """Return once this step or a later one is ordered; snapshots that have stopped for good end the run."""
    link = run._running().link
    deadline = time.monotonic() + 90
    while link.page.target[0] < step and run.committed_step < step:
        if time.monotonic() > deadline:
            raise RuntimeError(f"step {step} is done and nothing from there on is ordered; committed is {run.committed_step}")
        time.sleep(0.01)


_pids: dict[str, int] = {}


def keeper_pid(run: Run) -> int:
    """The keeper of this rank's node, as it was when this process started."""
    place = str(run._running().link.memory)
    if place not in _pids:
        _pids[place] = Endpoint.read(Path(place)).pid
    return _pids[place]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
