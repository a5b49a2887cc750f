"""What keepers cost: their CPU time from filled slots to committed ones, a rebuilt node, and a trainer beside them.

Real keepers in processes of their own and slots of the full size. The ranks are stand-ins that say "filled" as soon as they are
asked, over slots whose two contents differ everywhere, so the keepers work without a pause.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Report, ratios, say

from holdfast.arrays import Fragment, FragmentTable
from holdfast.snapshot.client import Endpoint, Link, connect
from holdfast.snapshot.cluster import ensure_keepers, node_memory
from holdfast.snapshot.exchange import PIECE_NBYTES, SlotReader, slot_name
from holdfast.snapshot.plan import Survey, plan_restore
from holdfast.snapshot.view import Member, View

FRAGMENTS = 48
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Filler:
    """A rank in small: its slots were filled long ago, and `turn` hands the one that is asked for in."""

    def __init__(self, memory: Path, rank: int, nbytes: int, noise: np.ndarray[Any, Any]) -> None:
        self.rank, self.nbytes = rank, nbytes
        self.link = Link(memory, rank, "benchmark", nbytes)
        self.handled = (0, 0)
        size = nbytes // FRAGMENTS // 64 * 64
        rows = [
            Fragment(f"model/{place}-{rank}", "uint8", (size,), (0,), (size,), rank, place * size, size)
            for place in range(FRAGMENTS)
        ]
        self.table, self.payload = FragmentTable.from_rows(rows), FRAGMENTS * size
        for index in (0, 1):
            shift = 4096 * (1 + 2 * rank + index)
            np.frombuffer(self.link.body(index, nbytes), np.uint8)[:nbytes] = np.roll(noise, shift)[:nbytes]

    def attach(self, memory: Path) -> None:
        """To the keeper that serves the node now."""
        self.link.close()
        self.link = Link(memory, self.rank, "benchmark", self.nbytes)

    def turn(self) -> None:
        page = self.link.page
        step, index, order = page.target
        if step and (step, order) != self.handled:
            self.handled = step, order
            page["completed"] = step
            self.link.filled(step, index, self.payload, "layout", self.table, {})


class Cluster:
    """`nodes` keepers, one filler each, over TCP or through mappings."""

    def __init__(self, memory: Path, job: str, nodes: int, parity: int, nbytes: int, *, tcp: bool) -> None:
        self.job, self.memory, self.nodes, self.tcp = job, memory, list(range(nodes)), tcp
        self.start(self.nodes)
        noise = np.random.default_rng(1).integers(0, 256, nbytes + (1 << 20), np.uint8)
        self.fillers = [Filler(self.place(node), node, nbytes, noise) for node in self.nodes]
        members = [replace(Endpoint.read(self.place(node)).member, ranks=(node,)) for node in self.nodes]
        self.parity = parity
        view = view_of(self, members, epoch=1, committed=0, index=1)
        for node in self.nodes:
            self.ask(node, "join", view=view.to_json())
        self.ask(0, "begin")
        self._going = threading.Event()
        self._over = threading.Event()
        self.thread = threading.Thread(target=self._turn, daemon=True)
        self.thread.start()

    def start(self, nodes: list[int]) -> None:
        os.environ["HOLDFAST_TRANSPORT"] = "tcp" if self.tcp else "mapped"
        ensure_keepers(self.job, nodes, self.memory, kind="process", ray_address=None, bind="127.0.0.1")

    def place(self, node: int) -> Path:
        return node_memory(self.memory, self.job, node)

    def ask(self, node: int, verb: str, **fields: Any) -> Any:
        connection = connect(self.place(node), timeout_s=300)
        try:
            return connection.ask(verb, **fields)
        finally:
            connection.close()

    def _turn(self) -> None:
        while not self._over.is_set():
            self._going.wait(0.1)
            for filler in self.fillers if self._going.is_set() else ():
                filler.turn()
            time.sleep(0.001)

    def exchange(self, commits: int) -> tuple[float, float]:
        """CPU seconds of all keepers, and seconds, for each of that many commits."""
        self.go()
        goal = self.wait_for(self.committed() + 1) + commits
        cpu, started = self.cpu_s(), time.perf_counter()
        self.wait_for(goal)
        found = (self.cpu_s() - cpu) / commits, (time.perf_counter() - started) / commits
        self.rest()
        return found

    def go(self) -> None:
        self._going.set()

    def rest(self) -> None:
        """No new step is handed in; the one under way may be given up."""
        self._going.clear()
        before = -1.0
        while before != (before := self.cpu_s()):
            time.sleep(0.1)

    def wait_for(self, step: int) -> int:
        deadline = time.monotonic() + 120
        while self.committed() < step:
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} was not committed")
            time.sleep(0.0005)
        return self.committed()

    def committed(self) -> int:
        return min(filler.link.page["committed"] for filler in self.fillers)

    def cpu_s(self) -> float:
        return sum(cpu_s(Endpoint.read(self.place(node)).pid) for node in self.nodes)

    def close(self) -> None:
        self._over.set()
        self.thread.join()
        for filler in self.fillers:
            filler.link.close()
        for node in self.nodes:
            self.ask(node, "shutdown")
        while any(self.place(node).exists() for node in self.nodes):
            time.sleep(0.05)


def view_of(cluster: Cluster, members: list[Member], epoch: int, committed: int, index: int) -> View:
    known = {"committed": committed, "index": index, "protected": True, "in_memory": committed > 0}
    none = {"group_size": 8, "every": 1, "checkpoint_every": 0, "checkpoints": None}
    return View(
        job=cluster.job, epoch=epoch, world=len(members), members=tuple(members), parity=cluster.parity, **known, **none
    )


def cpu_s(pid: int) -> float:
    """User and system time of a process with all threads it ever had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


# -- committing ----------------------------------------------------------------------------------------------------------------


def committing(report: Report, memory: Path, nbytes: int, n: int, parities: tuple[int, ...] = (1, 2)) -> None:
    """n=4: CPU of all keepers from filled to committed, by that of as many copies of the same bytes side by side."""
    for parity in parities:
        say(f"keepers: 4 nodes, m={parity}, {nbytes >> 20} MiB each, over TCP and through mappings")
        clusters = {
            "TCP": Cluster(memory, f"tcp{parity}", 4, parity, nbytes, tcp=True),
            "mappings": Cluster(memory, f"local{parity}", 4, parity, nbytes, tcp=False),
        }
        try:
            _committing(report, clusters, parity, nbytes, n)
            if parity == 1:
                beside_a_trainer(report, clusters, n)
                lost_node(report, clusters["TCP"], nbytes, n)
        finally:
            for cluster in clusters.values():
                cluster.close()


def _committing(report: Report, clusters: dict[str, Cluster], parity: int, nbytes: int, n: int) -> None:
    copy, stream = Copies(4, nbytes), Stream(nbytes)
    copied: list[float] = []
    streamed: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in clusters}
    seconds: dict[str, list[float]] = {name: [] for name in clusters}
    for number in range(n + 1):
        cpu = copy.cpu_s(4)
        for name in list(clusters) if number % 2 else list(reversed(clusters)):
            used, took = clusters[name].exchange(3)
            if number:
                spent[name].append(used)
                seconds[name].append(took)
        if number:
            copied.append(cpu)
            streamed.append(4 * stream.cpu_s())
    stream.close()
    case = f"commit, n=4, m={parity}"
    report.row(case, "memcpy", "cpu", "s", copied)
    report.row(case, "raw TCP", "cpu", "s", streamed)
    report.row(case, "holdfast, TCP", "cpu/raw TCP", "×", ratios(spent["TCP"], streamed))
    for name in clusters:
        ratio = ratios(spent[name], copied)
        report.row(case, f"holdfast, {name}", "cpu", "s", spent[name])
        report.row(case, f"holdfast, {name}", "cpu/memcpy", "×", ratio)
        report.row(case, f"holdfast, {name}", "time", "s", seconds[name])
    if parity == 1:
        for goal, name, most in (("committed_cpu_vs_memcpy", "TCP", 5.0), ("committed_cpu_vs_memcpy_local", "mappings", 1.8)):
            report.goal(goal, most, median(ratios(spent[name], copied)), at_most=True)


class Copies:
    """The same bytes, copied by as many threads at once as there are keepers: memory is as busy as it is for them."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.pairs = [(np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)) for _ in range(count)]
        self.pool = ThreadPoolExecutor(count)

    def cpu_s(self, times: int) -> float:
        """CPU seconds for all bytes once, the mean of `times`."""
        started = time.process_time()
        for _ in range(times):
            list(self.pool.map(lambda pair: np.copyto(pair[1], pair[0]), self.pairs))
        return (time.process_time() - started) / times


class Stream:
    """The same bytes over a TCP connection of this host, `sendfile` to `recv`, 8 MiB at a time: what an exchange costs at least."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.piece = nbytes, memoryview(bytearray(PIECE_NBYTES))
        self.file = os.memfd_create("stream")
        os.write(self.file, np.ones(nbytes, np.uint8).data)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.receiver = socket.create_connection(listener.getsockname())
            self.sender, _ = listener.accept()
        self.pool = ThreadPoolExecutor(1)

    def cpu_s(self) -> float:
        started = time.process_time()
        sending = self.pool.submit(self._send)
        left = self.nbytes
        while left:
            left -= self.receiver.recv_into(self.piece[: min(left, PIECE_NBYTES)], 0, socket.MSG_WAITALL)
        sending.result()
        return time.process_time() - started

    def _send(self) -> None:
        sent = 0
        while sent < self.nbytes:
            sent += os.sendfile(self.sender.fileno(), self.file, sent, min(PIECE_NBYTES, self.nbytes - sent))

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        os.close(self.file)


# -- beside a trainer ------------------------------------------------------------------------------------------------------------

TRAINER = """
import sys, time, torch
torch.set_num_threads(1)
a, b = torch.randn(768, 768), torch.randn(768, 768)
for line in sys.stdin:
    until, steps, started = time.perf_counter() + float(line), 0, time.perf_counter()
    while time.perf_counter() < until:
        a @ b
        steps += 1
    print((time.perf_counter() - started) / steps, flush=True)
"""


def beside_a_trainer(report: Report, clusters: dict[str, Cluster], n: int) -> None:
    """A matmul step of one thread while keepers exchange without pause, by the same before and after."""
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdin is not None
    assert trainer.stdout is not None

    def step_s(seconds: float) -> float:
        trainer.stdin.write(f"{seconds}\n")
        trainer.stdin.flush()
        return float(trainer.stdout.readline())

    step_s(1)
    worst = 0.0
    for name, cluster in clusters.items():
        say(f"a trainer beside keepers over {name}")
        slower, steps = [], []
        before = step_s(1)
        for _ in range(n):
            cluster.go()
            beside = step_s(2)
            cluster.rest()
            after = step_s(1)
            slower.append(beside / ((before + after) / 2))
            steps.append(1e3 * beside)
            before = after
        report.row("trainer beside keepers", f"holdfast, {name}", "step", "ms", steps)
        report.row("trainer beside keepers", f"holdfast, {name}", "slowdown", "×", slower)
        worst = max(worst, median(slower))
    report.goal("trainer_slowdown", 1.05, worst, at_most=True)
    trainer.stdin.close()
    trainer.wait()


# -- a lost node -----------------------------------------------------------------------------------------------------------------


def lost_node(report: Report, cluster: Cluster, nbytes: int, n: int) -> None:
    """The last node is killed, memory and all; a new keeper rebuilds its bytes over TCP, which is what trainers wait for, and then
    its parity. By reading as many bytes from one peer."""
    say("a lost node")
    cluster.exchange(1)
    rebuilt, reading, protected = [], [], []
    for number in range(n + 1):
        loss = Loss(cluster)
        times = [loss.read(nbytes), loss.rebuild()] if number % 2 else [loss.rebuild(), loss.read(nbytes)][::-1]
        whole = loss.protect()
        if number:
            reading.append(times[0])
            rebuilt.append(times[1])
            protected.append(whole)
    report.row("lost node, n=4, m=1", "read its bytes", "time", "s", reading)
    report.row("lost node, n=4, m=1", "holdfast rebuild", "time", "s", rebuilt)
    report.row("lost node, n=4, m=1", "holdfast rebuild", "its parity, behind training", "s", protected)
    report.goal("lost_node_recovery_vs_read", 3.0, median(ratios(rebuilt, reading)), at_most=True)


class Loss:
    """One loss of the last node: its keeper killed, its memory gone, and an empty keeper in its place."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.lost = cluster, cluster.nodes[-1]
        place = cluster.place(self.lost)
        os.kill(Endpoint.read(place).pid, 9)
        shutil.rmtree(place)
        cluster.start([self.lost])
        surveys = [Survey.from_json(cluster.ask(node, "survey")) for node in cluster.nodes]
        plan, reasons = plan_restore(surveys)
        assert plan is not None, reasons
        (self.item,) = plan.rebuilds
        self.plan, self.epoch = plan, max(survey.epoch for survey in surveys) + 1
        self.members = {survey.member.node: replace(survey.member, ranks=(survey.member.node,)) for survey in surveys}

    def read(self, nbytes: int) -> float:
        plan, scratch = self.plan, memoryview(bytearray(PIECE_NBYTES))
        started = time.perf_counter()
        reader = SlotReader(self.members[0], mapped=False)
        for offset in range(0, nbytes, PIECE_NBYTES):
            reader.read(slot_name(0, plan.index), plan.epoch, plan.step, offset, min(PIECE_NBYTES, nbytes - offset), scratch)
        reader.close()
        return time.perf_counter() - started

    def rebuild(self) -> float:
        survivors = [self.members[node].to_json() for node in self.item.survivors]
        whole = {"with_data": list(self.item.survivors), "with_parity": list(self.item.with_parity)}
        fields = {"group": self.item.group.to_json(), "lost": self.lost, "survivors": survivors, **whole}
        started = time.perf_counter()
        answer = self.cluster.ask(self.item.host, "rebuild", **fields)
        assert not answer.get("damaged"), answer
        return time.perf_counter() - started

    def protect(self) -> float:
        """All enter a new epoch, where trainers would go on; seconds until the node has its parity again."""
        view = view_of(self.cluster, list(self.members.values()), self.epoch, self.plan.step, self.plan.index)
        self.cluster.fillers[-1].attach(self.cluster.place(self.lost))
        started = time.perf_counter()
        for node in self.cluster.nodes:
            self.cluster.ask(node, "join", view=view.to_json())
        while not self.cluster.ask(self.lost, "health")["parity"]:
            time.sleep(0.005)
        return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
