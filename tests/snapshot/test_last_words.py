"""Keepers in processes of their own that are killed while they save what is left: another one finishes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zarr

from holdfast import ckpt
from holdfast.errors import HoldfastError
from holdfast.snapshot.client import Endpoint, connect
from holdfast.snapshot.view import View
from tests.snapshot.test_keeper import Rank, wait_until

HOST = """
import sys
from holdfast.snapshot import host, rescue
rescue.PING_S, rescue.PATIENCE_S = 0.05, 0.5
sys.exit(host.main(sys.argv[1:]))
"""


class Processes:
    """One keeper process and one rank for each node; `faults` arms every keeper that is started."""

    def __init__(self, shm: Path, nodes: int, faults: list[dict[str, object]]) -> None:
        self.checkpoints = shm / "ckpt"
        self.places = [shm / "job" / f"node-{node}" for node in range(nodes)]
        self.env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOLDFAST_FAULTS": json.dumps(faults)}
        self.running = {node: self.start(node) for node in range(nodes)}
        self.ranks = [Rank(place, node, 3000 + 777 * node) for node, place in enumerate(self.places)]
        members = tuple(replace(Endpoint.read(place).member, ranks=(node,)) for node, place in enumerate(self.places))
        view = View("job", 1, nodes, members, 1, 8, 1, 1000, str(self.checkpoints), 0, 1, True, True)
        for node in range(nodes):
            self.ask(node, "join", view=view.to_json())
        self.ask(0, "begin")

    def start(self, node: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", HOST, "job", str(node), str(self.places[node])]
        process = subprocess.Popen(arguments, env=self.env, stderr=subprocess.DEVNULL, text=True)

        def answers() -> bool:
            with suppress(HoldfastError):
                if Endpoint.read(self.places[node]).pid == process.pid:
                    self.ask(node, "ping")
                    return True
            return False

        wait_until(answers, f"the keeper of node {node}")
        return process

    def ask(self, node: int, verb: str, **fields: object) -> object:
        connection = connect(self.places[node])
        try:
            return connection.ask(verb, **fields)
        finally:
            connection.close()

    def train(self, step: int) -> int:
        """Train until something is committed from `step` on, and then until nothing is under way."""

        def committed() -> bool:
            nonlocal step
            step += 1
            for rank in self.ranks:
                rank.complete(step)
            return min(rank.link.committed_step for rank in self.ranks) >= 3

        wait_until(committed, "a commit")
        wait_until(
            lambda: len({(rank.link.page.target[0] > step, rank.link.committed_step) for rank in self.ranks}) == 1, "calm"
        )
        return step

    def steps(self) -> list[int]:
        return [info.step for info in ckpt.list_steps(self.checkpoints)] if self.checkpoints.is_dir() else []

    def check(self, step: int) -> None:
        assert ckpt.open_checkpoint(self.checkpoints, step).verify().is_whole
        for rank in self.ranks:
            found = zarr.open_array(self.checkpoints / f"step-{step:08d}" / f"model/w{rank.rank}", mode="r")[:]
            assert found.tobytes() == rank.bytes_at(step)

    def close(self) -> None:
        for rank in self.ranks:
            rank.link.close()
        for process in self.running.values():
            process.kill()
            process.communicate()


@pytest.fixture
def processes(shm: Path) -> Iterator[list[Processes]]:
    made: list[Processes] = []
    yield made
    for each in made:
        each.close()


def test_a_keeper_killed_between_saving_and_leaving_has_saved(shm: Path, processes: list[Processes]) -> None:
    cluster = Processes(shm, 2, [{"at": "preempt.saved", "role": "keeper", "place": 1}])
    processes.append(cluster)
    cluster.train(0)
    told = cluster.running[1]
    told.send_signal(signal.SIGTERM)
    assert told.wait(90) == -signal.SIGKILL
    (saved,) = cluster.steps()
    assert saved >= 3
    cluster.check(saved)
    assert cluster.places[1].exists(), "it had no time to give its memory back"
    cluster.running[1] = cluster.start(1)
    assert cluster.ask(1, "status")["committed_step"] >= saved  # type: ignore[index]


def test_a_keeper_killed_while_it_rescues_is_followed_by_another_attempt(shm: Path, processes: list[Processes]) -> None:
    mark = shm / "killed"
    cluster = Processes(shm, 3, [{"at": "rescue.rebuilt", "role": "keeper", "place": 0, "once": str(mark)}])
    processes.append(cluster)
    cluster.train(0)
    cluster.running[2].kill()
    cluster.running[2].communicate()
    shutil.rmtree(cluster.places[2])
    assert cluster.running[0].wait(90) == -signal.SIGKILL
    assert mark.exists()
    assert cluster.steps() == []
    cluster.running[0] = cluster.start(0)
    wait_until(lambda: bool(cluster.steps()), "the checkpoint of those who are left")
    (saved,) = cluster.steps()
    assert saved >= 3
    cluster.check(saved)
