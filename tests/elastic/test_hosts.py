"""Several hosts with a network between them, one of which loses its power or its cable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.elastic.conftest import SCRIPT, Result, isolated_environment
from tests.elastic.hosts import Host, Network, why_not

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(400)]

STEPS = 60


class Cluster:
    """The small job under one torchrun for each host, which meet at the first three hosts."""

    def __init__(self, place: Path, hosts: int) -> None:
        self.network = Network(place, hosts)
        self.hosts = self.network.hosts
        self.out = place / "out"
        self.out.mkdir()
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._command: list[str] = []
        self._env = isolated_environment(Path("/dev/shm"), Path("/dev/shm"))
        """Runtime folder and slots are in the host's own memory, and go when it does."""

    def start(self, on: list[Host], *, nodes: str, spares: str = "", steps: int = STEPS, **env: str) -> None:
        self._env |= env
        listed = ",".join(f"host{number}:29400" for number in range(3))
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=holdfast", f"--rdzv-endpoint={listed}", "--rdzv-id=job"]
        launcher = ["-m", "holdfast.elastic.run", "--spares", spares] if spares else []
        script = [str(SCRIPT), "--out", str(self.out), "--steps", str(steps), "--pace", "0.1", "--progress"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]
        self._command = [*torchrun, *meeting, *launcher, *script, *(["--in-place"] if spares else [])]
        for host in on:
            self.join(host)

    def join(self, host: Host) -> None:
        self._agents[host.number] = host.start(self._command, self._env, self.out / "log")

    def start_ray(self, host: Host, rack: str) -> None:
        """The first host's is the head."""
        head = ["--head", "--port=6379", "--include-dashboard=false", "--temp-dir=/dev/shm/ray"]
        words = head if host is self.hosts[0] else [f"--address={self.hosts[0].address}:6379"]
        small = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *small]
        labels = [f"--node-ip-address={host.address}", f"--labels=holdfast-domain={rack}"]
        assert host.start([*ray, *labels], self._env, self.out / "ray").wait(100) == 0, (self.out / "ray").read_text()

    def reach_step(self, rank: int, step: int, committed: int) -> int:
        """Wait until that rank has done the step; its process."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = self.progress(rank)
            if found.get("step", 0) >= step and found["committed"] >= committed:
                return int(found["pid"])
            time.sleep(0.02)
        raise AssertionError(f"rank {rank} is at {self.progress(rank)}: {(self.out / 'log').read_text()}")

    def progress(self, rank: int) -> dict[str, int]:
        path = self.out / f"progress-{rank}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def lose(self, host: Host) -> None:
        host.lose_power()
        self._agents.pop(host.number).wait()

    def result(self) -> Result:
        codes = {number: agent.wait(200) for number, agent in self._agents.items()}
        found = Result(self.out, max(codes.values()))
        assert not any(codes.values()), found.log
        return found

    def close(self) -> None:
        for agent in self._agents.values():
            agent.kill()
        self.network.close()


@pytest.fixture
def cluster() -> Any:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    place = Path(tempfile.mkdtemp(prefix="hf-hosts-", dir="/var/tmp"))
    found = Cluster(place, hosts=4)
    yield found
    found.close()
    shutil.rmtree(place, ignore_errors=True)


def recovery(result: Result) -> dict[str, Any]:
    return dict(result.facts[0]["recovery"])


@pytest.mark.parametrize("spares", ["", "ready"])
def test_a_host_that_loses_its_power_is_left_behind_and_its_memory_rebuilt(cluster, spares):
    first, second, third, _ = cluster.hosts
    cluster.start([first, second, third], nodes="2:3", spares=spares)
    cluster.reach_step(0, 10, committed=5)
    cluster.lose(second)
    result = cluster.result()
    assert len(result.facts) == 4
    assert (recovery(result)["rung"], recovery(result)["kind"]) == ("parity", "node")
    assert recovery(result)["step"] >= 5
    assert re.search(r"lease lost: ranks 2, 3|the launcher of rank [23] is gone", result.log), result.log


@pytest.mark.parametrize("spares", ["", "ready"])
def test_the_first_host_is_a_host_like_any_other(cluster, references, spares):
    """It has rank 0, the board, the keeper that leads, and what used to be torchrun's only store."""
    first, second, third, fresh = cluster.hosts
    cluster.start([first, second, third], nodes="3", spares=spares)
    cluster.reach_step(2, 10, committed=5)
    cluster.lose(first)
    cluster.join(fresh)
    result = cluster.result()
    assert recovery(result)["rung"] == "parity"
    result.assert_equals(references.of("fsdp", 6, STEPS))


@pytest.mark.parametrize("spares", ["", "ready"])
def test_another_host_takes_the_place_of_one_without_power(cluster, references, spares):
    first, second, third, fresh = cluster.hosts
    cluster.start([first, second, third], nodes="3", spares=spares)
    cluster.reach_step(0, 10, committed=5)
    cluster.lose(second)
    cluster.join(fresh)
    result = cluster.result()
    assert recovery(result)["rung"] == "parity"
    result.assert_equals(references.of("fsdp", 6, STEPS))


def test_a_trainer_of_another_host_is_replaced_in_place(cluster, references):
    first, second, *_ = cluster.hosts
    cluster.start([first, second], nodes="2", spares="ready")
    second.kill(cluster.reach_step(3, 10, committed=5))
    result = cluster.result()
    assert "a spare takes over" in result.log
    result.assert_equals(references.of("fsdp", 4, STEPS))


def test_a_cable_that_is_plugged_again_soon_costs_nothing_but_time(cluster, references):
    first, second, *_ = cluster.hosts
    cluster.start([first, second], nodes="2")
    cluster.reach_step(0, 10, committed=5)
    second.pull()
    time.sleep(8)
    second.plug()
    result = cluster.result()
    assert "recovery" not in result.facts[0]
    result.assert_equals(references.of("fsdp", 4, STEPS))


def test_a_host_that_was_cut_off_comes_back_into_the_run(cluster, references):
    first, second, *_ = cluster.hosts
    cluster.start([first, second], nodes="2")
    cluster.reach_step(0, 10, committed=5)
    second.pull()
    time.sleep(30)
    second.plug()
    result = cluster.result()
    assert recovery(result)["rung"] == "own keeper"
    result.assert_equals(references.of("fsdp", 4, STEPS))


def test_another_host_takes_over_in_a_ray_cluster_and_labels_say_which_fail_together(cluster, references):
    first, second, fresh, _ = cluster.hosts
    for host, rack in ((first, "rack-a"), (second, "rack-b")):
        cluster.start_ray(host, rack)
    ray = {"HOLDFAST_KEEPERS": "ray", "RAY_ADDRESS": f"{first.address}:6379"}
    cluster.start([first, second], nodes="2", **ray)
    cluster.reach_step(0, 10, committed=5)
    endpoint = second.read("/dev/shm/holdfast-0/t/node-1/keeper.json")
    assert json.loads(endpoint)["domain"] == "rack-b"
    cluster.lose(second)
    cluster.start_ray(fresh, "rack-b")
    cluster.join(fresh)
    result = cluster.result()
    assert recovery(result)["rung"] == "parity"
    assert "RayUnreachable" not in result.log
    result.assert_equals(references.of("fsdp", 4, STEPS))
