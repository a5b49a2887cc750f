"""What dead runs left in memory is found and named, and removed only when it is forgotten."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from holdfast.environment import home
from holdfast.errors import ConfigError, OutOfSharedMemory
from holdfast.snapshot import cluster, slots
from holdfast.snapshot.janitor import FORGOTTEN_S, leftovers, sweep
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.slots import Slot, SlotHeader


def dead_run(shm: Path, name: str, *, age_s: float, pid: int = 0) -> Path:
    """The memory of a node whose keeper is gone, last alive so long ago."""
    place = home(shm) / name / "node-0"
    place.mkdir(parents=True)
    (place / "slot-0-0").write_bytes(bytes(5000))
    (place / "keeper.lock").touch()
    (place / "membership.json").write_text(json.dumps({"trainers": {"0": {"pid": pid}} if pid else {}}))
    for path in place.iterdir():
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    return place


def test_what_nobody_has_used_for_a_day_is_removed_and_nothing_else(shm: Path) -> None:
    forgotten = dead_run(shm, "forgotten", age_s=FORGOTTEN_S + 60)
    recent = dead_run(shm, "recent", age_s=FORGOTTEN_S - 60)
    own = dead_run(shm, "own", age_s=FORGOTTEN_S * 9)
    training = dead_run(shm, "training", age_s=FORGOTTEN_S * 9, pid=os.getpid())
    keeper = Keeper("kept", 0, home(shm) / "kept" / "node-0")
    try:
        for path in keeper.memory.iterdir():
            os.utime(path, (1, 1))
        assert [leftover.job for leftover in sweep(home(shm), but="own")] == ["forgotten"]
        assert not forgotten.parent.exists()
        assert recent.exists()
        assert own.exists()
        assert training.exists()
        assert keeper.memory.exists()
        assert {leftover.job for leftover in leftovers(home(shm))} == {"recent", "own"}
    finally:
        keeper.close()


def test_the_start_of_a_run_removes_what_was_forgotten(shm: Path) -> None:
    forgotten = dead_run(shm, "forgotten", age_s=FORGOTTEN_S + 60)
    try:
        cluster.ensure_keepers("new", [0], shm, kind="process", ray_address=None, bind="127.0.0.1")
        assert not forgotten.exists()
    finally:
        cluster.down(memory=shm)


def test_an_error_of_too_little_memory_names_the_dead_runs_that_hold_some(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_run(shm, "old", age_s=7200)
    place = home(shm) / "new" / "node-0"
    place.mkdir(parents=True)

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slots.os, "posix_fallocate", full)
    with pytest.raises(OutOfSharedMemory, match=r"--ipc=host.*Dead runs hold old \(0\.0 MiB in .*old/node-0, 2\.0 h old\)"):
        Slot.create(place / "slot-0-0", SlotHeader("new", 0, 0, 0), 5000)


def test_down_ends_a_keeper_at_once_and_does_not_save_first(shm: Path) -> None:
    cluster.ensure_keepers("new", [0], shm, kind="process", ray_address=None, bind="127.0.0.1")
    assert cluster.down(memory=shm).keepers == 1
    assert not home(shm).exists()


def test_a_keeper_that_ends_at_once_is_said_at_once(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cluster._start_daemon
    monkeypatch.setattr(
        cluster, "_start_daemon", lambda command, *rest: real([sys.executable, "-c", "raise SystemExit(3)"], *rest)
    )
    with pytest.raises(cluster.KeeperUnreachable, match="was started and ended with code 3; its log is in"):
        cluster.ensure_keepers("new", [0], shm, kind="process", ray_address=None, bind="127.0.0.1")


def test_why_a_keeper_refused_to_start_is_said_in_its_own_words(shm: Path) -> None:
    far = shm / ("d" * 90)
    far.mkdir()
    with pytest.raises(ConfigError, match=r"the keeper of node 0 could not start: cannot listen at .* choose a shorter one"):
        cluster.ensure_keepers("new", [0], far, kind="process", ray_address=None, bind="127.0.0.1")
