"""Two hundred deaths in one run: trainers and whole nodes, at random moments, and not one bit or sample is different at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

KILLS = int(os.environ.get("HOLDFAST_CAMPAIGN_KILLS", "200"))
STEPS = 15 * KILLS


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_random_kills_leave_no_trace(job, references):
    reference = references.of("fsdp", 3, steps=STEPS)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    out = job.start("--nodes", "3", "--in-place", "--steps", str(STEPS), ranks=3, restarts=1000, spares="import")
    process = job.processes[-1]
    kills = 0
    while process.poll() is None and kills < KILLS:
        time.sleep(chance.uniform(0.2, 4.0))
        kills += _kill_one(job.memory, chance)
    assert process.wait(3000) == 0, (out / "log").read_text()[-5000:]
    assert kills == KILLS, "the run was over before everybody had been killed: make it longer"
    job.result(out).assert_equals(reference)


def _kill_one(memory: Path, chance: random.Random) -> int:
    """Kill a trainer, or a keeper together with the trainers of its node; 0 when nobody was there to be killed."""
    places = sorted(memory.glob("*/*/node-*"))
    if not places:
        return 0
    place = chance.choice(places)
    with suppress(OSError, ValueError, KeyError):
        keeper = json.loads((place / "keeper.json").read_text())["pid"]
        trainers = _trainers(place)
        if not trainers:
            return 0
        if chance.random() < 0.25:
            os.kill(keeper, signal.SIGKILL)
        for pid in trainers:
            os.kill(pid, signal.SIGKILL)
        return 1
    return 0


def _trainers(place: Path) -> list[int]:
    """The processes that the control pages of a node name."""
    pids = [int.from_bytes(path.read_bytes()[:8], "little") for path in place.glob("control-*")]
    return [pid for pid in pids if pid and Path(f"/proc/{pid}").exists()]
