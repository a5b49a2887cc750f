"""Keepers as Ray actors: a local Ray is started as a daemon, restarts a killed keeper, is reused, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.environment import home


def holdfast(job, *words: str) -> Any:
    """The real command, in the test's own place."""
    env = {**job.env, "HOLDFAST_KEEPERS": "ray"}
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.cli", *words, "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processes_of(job) -> list[str]:
    """Every process that was started in the test's own place: Ray's and the keepers'."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ, words = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        ours = (
            f"HOLDFAST_RUNTIME={job.env['HOLDFAST_RUNTIME']}".encode() in environ
            or job.env["HOLDFAST_RUNTIME"].encode() in words
        )
        if ours and int(path.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode()[:100])
    return found


@pytest.mark.timeout(300)
def test_a_run_in_ray_survives_a_killed_node_and_down_leaves_nothing(job, references):
    before = {path.name for path in Path("/dev/shm").iterdir()}
    try:
        # The keeper is killed with its memory and its trainer; Ray starts it again, empty, and parity fills it.
        # Later the coordinator's keeper alone is killed: Ray brings it back, and with `--keep-up` it must be heard of again.
        lost = {"step": 6, "kind": "node", "ranks": [1], "committed": 3}
        alone = {"step": 9, "kind": "keeper", "ranks": [0], "committed": 7}
        arguments = ("--nodes", "3", "--keep-up", "--die", json.dumps([lost, alone]))
        died = job.run(*arguments, ranks=3, restarts=1, timeout_s=200, HOLDFAST_KEEPERS="ray")
        died.assert_equals(references.of("fsdp", 3))
        assert "its keeper has died or hangs; it is started again" in died.log
        assert {facts["recovery"]["rung"] for facts in died.facts} == {"parity"}

        # A run that ends by an exception leaves its snapshots in the same Ray, and status tells of them.
        first = holdfast(job, "up")
        failed = {"step": 5, "kind": "exception", "ranks": [0], "committed": 3}
        job.run("--nodes", "2", "--die", json.dumps([failed]), restarts=0, ok=False, HOLDFAST_KEEPERS="ray")
        assert holdfast(job, "up")["pid"] == first["pid"]
        (run,) = holdfast(job, "status")["runs"]
        assert run["committed_step"] >= 3
        assert [node["alive"] for node in run["nodes"]] == [True, True]

        # Ray starts a killed keeper again, and it takes its slots over.
        os.kill(run["nodes"][1]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            (again,) = holdfast(job, "status")["runs"]
            if again["nodes"][1]["alive"] and again["nodes"][1]["pid"] != run["nodes"][1]["pid"]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert again["nodes"][1]["committed_step"] >= 3
    finally:
        cleared = holdfast(job, "down", "--yes")
    assert cleared["ray"]
    assert cleared["keepers"] == 2
    assert not home(job.memory).exists()
    assert not Path(job.env["HOLDFAST_RUNTIME"]).exists()
    assert processes_of(job) == []
    left = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not {name for name in left if "plasma" in name or "ray" in name}
