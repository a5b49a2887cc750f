"""Two hundred deaths in one run: trainers, keepers and whole nodes, at random moments and at points of the protocol. At the end not
one bit is different, and every sample was used once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from holdfast import ckpt
from holdfast.elastic.audit import audit
from holdfast.elastic.faults.schedule import POINTS
from holdfast.elastic.journal import find_records, read_journals
from holdfast.snapshot.cluster import status

SCRIPT = Path(__file__).with_name("train_on_data.py")
KILLS = int(os.environ.get("HOLDFAST_CAMPAIGN_KILLS", "200"))
STEPS = 25 * KILLS
RANKS = 3


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_random_kills_leave_no_trace(job):
    undisturbed = job.run("--bare", *arguments(pace=0), ranks=RANKS, script=SCRIPT, timeout_s=600)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    marks = job.place / "marks"
    marks.mkdir()
    faults = json.dumps(at_points(chance, marks))
    options = {"ranks": RANKS, "restarts": KILLS, "spares": "import", "script": SCRIPT, "HOLDFAST_FAULTS": faults}
    out = job.start("--nodes", str(RANKS), "--in-place", "--checkpoint-every", "10", *arguments(pace=0.08), **options)
    process = job.processes[-1]
    kills = 0
    while process.poll() is None and kills < KILLS:
        time.sleep(chance.uniform(0.0, 3.0))
        if chance.random() < 0.7:  # else in the middle of a recovery, if there is one
            wait_for_progress(job.memory)
        kills += kill_one(job.memory, chance, takes_memory=(out / "run").is_dir() and bool(ckpt.list_steps(str(out / "run"))))
    assert process.wait(3000) == 0, (out / "log").read_text()[-5000:]
    struck = len(list(marks.iterdir()))
    print(f"{kills} deaths at random moments, {struck} at points of the protocol")
    assert kills == KILLS, "the run was over before everybody had been killed: make it longer"
    assert struck > 0
    for mine, theirs in zip(job.result(out).states, undisturbed.states, strict=True):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    found = audit(read_journals([find_records(str(out / "run"))]))
    assert found.is_proved, found.data
    assert found.data[0].steps == STEPS


def arguments(pace: float) -> list[str]:
    return ["--layout", "fsdp", "--steps", str(STEPS), "--pace", str(pace)]


def at_points(chance: random.Random, marks: Path) -> list[dict[str, object]]:
    """One death for every four at random moments, each once, of a trainer or keeper that passes a point of the protocol."""
    points = [("trainer", at) for at in POINTS["trainer"]]
    points += [("keeper", at) for kind in ("keeper", "coordinator", "rebuild", "return") for at in POINTS[kind]]
    found: list[dict[str, object]] = []
    for number in range(KILLS // 4):
        role, at = chance.choice(points)
        place = chance.randrange(RANKS)
        often = at not in (*POINTS["coordinator"], *POINTS["rebuild"], *POINTS["return"], "keeper.attaching", "keeper.joined")
        nth = chance.randrange(1, 60) if often else 1
        found.append({"do": "kill", "at": at, "role": role, "place": place, "nth": nth, "once": str(marks / str(number))})
    return found


def wait_for_progress(memory: Path) -> None:
    """Wait until a step is committed that was not when this was called, or until that takes too long."""
    before, deadline = committed(memory), time.monotonic() + 30
    while committed(memory) == before and time.monotonic() < deadline:
        time.sleep(0.05)


def committed(memory: Path) -> int:
    return max((run.committed_step for run in status(memory=memory)), default=0)


def kill_one(memory: Path, chance: random.Random, *, takes_memory: bool) -> int:
    """Kill the trainers of a node, perhaps with its keeper, perhaps with its memory; 0 when nobody was there to be killed.

    Two memories that go at the same time are more than parity covers: then there has to be a checkpoint.
    """
    places = sorted(memory.glob("*/*/node-*"))
    if not places:
        return 0
    place = chance.choice(places)
    with suppress(OSError, ValueError, KeyError):
        keeper = json.loads((place / "keeper.json").read_text())["pid"]
        trainers = _trainers(place)
        if not trainers:
            return 0
        worse = chance.random()
        if worse < 0.25:
            os.kill(keeper, signal.SIGKILL)
        for pid in trainers:
            os.kill(pid, signal.SIGKILL)
        if worse < 0.12 and takes_memory:
            shutil.rmtree(place)
        return 1
    return 0


def _trainers(place: Path) -> list[int]:
    """The processes that the control pages of a node name."""
    pids = [int.from_bytes(path.read_bytes()[:8], "little") for path in place.glob("control-*")]
    return [pid for pid in pids if pid and Path(f"/proc/{pid}").exists()]
