"""A keeper that lives and says nothing is ended, and another one takes over its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.snapshot import cluster, lifeline
from holdfast.snapshot.birth import ENDPOINT, holds_lock, is_alive
from holdfast.snapshot.client import Endpoint
from holdfast.snapshot.lifeline import Lifeline
from tests.snapshot.test_keeper import Rank, wait_until

HOW = {"kind": "process", "ray_address": None, "bind": "127.0.0.1"}


@pytest.fixture
def place(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The memory of a node whose keeper runs in a process of its own."""
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0)
    monkeypatch.setattr(cluster, "SILENCE_S", 1.0)
    monkeypatch.setattr(lifeline, "PATIENCE_S", 1.0)
    monkeypatch.setattr(lifeline, "ASKED_EVERY_S", 0.1)
    cluster.ensure_keepers("job", [0], shm, **HOW)
    place = cluster.node_memory(shm, "job", 0)
    first = Endpoint.read(place).pid
    yield place
    if holds_lock(first, place):  # where the test has failed
        os.kill(first, signal.SIGKILL)
    cluster.down(memory=shm)


def test_a_start_ends_a_keeper_that_hangs_and_its_successor_has_the_slots(place: Path, shm: Path) -> None:
    rank = Rank(place, 0, 5000)
    rank.link.close()
    slots = {path.name: path.stat().st_ino for path in place.glob("slot-*")}
    assert slots
    hung = Endpoint.read(place).pid
    os.kill(hung, signal.SIGSTOP)
    cluster.ensure_keepers("job", [0], shm, **HOW)
    wait_until(lambda: Endpoint.read(place).pid != hung, "the address of another keeper")
    wait_until(lambda: not is_alive(hung), "the end of the keeper that hung")
    assert {path.name: path.stat().st_ino for path in place.glob("slot-*")} == slots


def test_a_start_waits_for_a_keeper_that_is_only_slow(place: Path, shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Endpoint.read(place).pid
    monkeypatch.setattr(cluster, "SILENCE_S", 60.0)
    os.kill(slow, signal.SIGSTOP)
    waking = subprocess.Popen(["/bin/sh", "-c", f"sleep 3; kill -CONT {slow}"])
    cluster.ensure_keepers("job", [0], shm, **HOW)
    waking.wait()
    assert Endpoint.read(place).pid == slow
    assert is_alive(slow)


def test_trainers_notice_that_their_keeper_hangs(place: Path, shm: Path) -> None:
    hung = Endpoint.read(place).pid
    eye = Lifeline(place, 0, partial(cluster.revive_keeper, "job", 0, shm, **HOW), lambda: False)
    try:
        os.kill(hung, signal.SIGSTOP)
        wait_until(lambda: Endpoint.read(place).pid != hung, "another keeper")
        wait_until(lambda: not is_alive(hung), "the end of the keeper that hung")
        assert not eye.is_lost
    finally:
        eye.close()


def test_memory_that_is_removed_under_a_living_keeper_is_noticed(place: Path) -> None:
    keeper = Endpoint.read(place).pid
    eye = Lifeline(place, 0, lambda: pytest.fail("there is nothing to bring back"), lambda: False)
    try:
        place.rename(place.with_name("elsewhere"))
        wait_until(lambda: eye.is_lost, "the word that the memory is gone")
    finally:
        eye.close()
        place.with_name("elsewhere").rename(place)
    assert is_alive(keeper)


def test_a_process_that_only_has_a_dead_keepers_number_is_left_alone(place: Path) -> None:
    keeper = Endpoint.read(place).pid
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not holds_lock(keeper, place), "the end of the keeper")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        fields = json.loads((place / ENDPOINT).read_text())
        (place / ENDPOINT).write_text(json.dumps({**fields, "pid": other.pid}))
        assert not cluster._comes_to(0, place)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
