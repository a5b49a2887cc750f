"""SIGTERM to the launcher: the newest snapshot becomes a checkpoint in the time of grace, and nothing else need survive."""

from __future__ import annotations

import shutil
import signal
import time

from holdfast import ckpt
from holdfast.snapshot.cluster import status


def test_a_preempted_run_goes_on_from_its_last_snapshot_though_all_memory_is_lost(job, references):
    place = job.place / "ckpt"
    arguments = ("--nodes", "2", "--steps", "60", "--checkpoints", str(place))
    out = job.start(*arguments)
    launcher = job.processes[-1]
    deadline = time.monotonic() + 60
    while not (runs := status(memory=job.memory)) or runs[0].committed_step < 3:
        assert launcher.poll() is None, (out / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    (saved,) = (info.step for info in ckpt.list_steps(place))
    assert saved >= 3
    assert ckpt.open_checkpoint(place, saved).verify().is_whole
    job.kill_keepers(job.memory)
    for node in job.memory.glob("*/*/*"):
        shutil.rmtree(node)
    again = job.run(*arguments, out=out)
    again.assert_equals(references.of("fsdp", 2, steps=60))
    assert {facts["recovery"]["rung"] for facts in again.facts} == {"universal checkpoint"}
    assert {facts["recovery"]["step"] for facts in again.facts} == {saved}
