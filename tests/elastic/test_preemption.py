"""SIGTERM to the launcher: the newest snapshot becomes a checkpoint in the time of grace, and nothing else need survive."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest

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
    # A step that was on its way when the word came may have been committed, and saved, after the first that was saved.
    saved = max(info.step for info in ckpt.list_steps(place))
    assert saved >= 3
    assert ckpt.open_checkpoint(place, saved).verify().is_whole
    job.kill_keepers(job.memory)
    for node in job.memory.glob("*/*/*"):
        shutil.rmtree(node)
    again = job.run(*arguments, out=out)
    again.assert_equals(references.of("fsdp", 2, steps=60))
    assert {facts["recovery"]["rung"] for facts in again.facts} == {"universal checkpoint"}
    assert {facts["recovery"]["step"] for facts in again.facts} == {saved}


STUCK = """
import hashlib, signal, sys
from holdfast.elastic.preemption import Preemption

if sys.argv[1] == "own":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("my own handler"))
told = Preemption(lambda: print("saved", flush=True), 60.0)
if sys.argv[1] == "closed":
    told.close()
print("ready", flush=True)
if sys.argv[1] == "stuck":
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # hears no signal for many minutes
signal.pause()
"""


@pytest.mark.parametrize(
    ("case", "says", "ends"),
    [("waiting", "saved\n", -15), ("stuck", "saved\n", -15), ("own", "saved\n", 1), ("closed", "", -15)],
)
def test_a_process_that_is_told_to_end_saves_first_and_ends_as_it_would_have(job, case, says, ends):
    told = subprocess.Popen([sys.executable, "-c", STUCK, case], env=job.env, stdout=subprocess.PIPE, text=True)
    try:
        assert told.stdout is not None
        assert told.stdout.readline() == "ready\n"
        told.send_signal(signal.SIGTERM)
        assert told.communicate(timeout=60)[0] == says
        assert told.returncode == ends
    finally:
        told.kill()
        told.communicate()
