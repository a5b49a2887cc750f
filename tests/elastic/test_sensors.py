"""Sensors in three real processes over gloo: the wrong replica, the bad loss, the slow and the stuck rank are all found."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from holdfast.elastic.sensors import probe_links
from holdfast.snapshot.verdicts import judge_links

SCRIPT = Path(__file__).with_name("sensing.py")


def test_three_ranks_find_what_is_wrong_with_one_of_them(job):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(SCRIPT)]
    env = {**job.env, "SENSING": str(job.place), "SENSING_PORT": str(port)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((job.place / f"{rank}.json").read_text()) for rank in range(3)]
    for found in told:
        assert found["replicas fine"] is None
        assert found["replicas"] == ["silent corruption", [2], ["w: rank 2 differs from 2 others"]]
        assert found["loss fine"] is None
        assert found["loss"] == ["loss", [1], ["the loss of rank 1 is nan"]]
        assert found["pace"][:2] == ["straggler", [0]]
    trouble, guilty, evidence = told[0]["hang"]
    assert (trouble, guilty) == ("hang", [1])
    assert any("rank 1 is in stuck_in_my_own_code" in line for line in evidence)


def test_addresses_that_accept_are_told_from_those_that_do_not():
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        reached = probe_links(0, {0: ("127.0.0.1", 1), 1: listening.getsockname(), 2: bound.getsockname()})
    assert reached == {(0, 1): True, (0, 2): False}
    assert judge_links(reached).guilty == ()
