"""Snapshots against a dictionary that cannot fail: whatever is changed, committed and lost, what comes back is what was committed.

A failing run ends with the calls that led to it, as a script to paste.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from holdfast.snapshot.exchange import slot_name
from holdfast.snapshot.keeper import Keeper
from holdfast.snapshot.plan import RestorePlan, Survey, plan_restore
from holdfast.snapshot.slots import Slot, SlotState
from tests.snapshot.nodes import Nodes

NODES = st.integers(0, 3)


def wait_until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.002)


class Snapshots(RuleBasedStateMachine):
    """`model` is what the newest committed step has to hold: node to bytes."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.place = Path(tempfile.mkdtemp(prefix="hft-", dir=base))
        self.model: dict[int, bytes] = {}

    @initialize(m=st.integers(1, 2), mapped=st.booleans())
    def begin(self, m: int, mapped: bool) -> None:
        self.nodes = Nodes(self.place, 4, m, mapped=mapped)
        self.nodes.enter()

    @rule(node=NODES, start=st.integers(0, 45_000), nbytes=st.sampled_from([1, 60, 30_000]))
    def train(self, node: int, start: int, nbytes: int) -> None:
        self.nodes.change(node, start, nbytes)

    @rule()
    def commit(self) -> None:
        self.nodes.commit(wait_until)
        self.model = {node: data.tobytes() for node, data in self.nodes.data.items()}

    @rule(node=NODES)
    def give_up(self, node: int) -> None:
        """A capture that its rank could not deliver leaves what is committed alone, and another one is asked for."""
        pages = {other: link.page for other, link in self.nodes.links.items()}
        wait_until(lambda: all(page.target[0] > self.nodes.step for page in pages.values()), "the next step is asked for")
        orders = {other: page.target[2] for other, page in pages.items()}
        self.nodes.links[node].give_up(pages[node].target[0], "busy")
        wait_until(lambda: all(page.target[2] != orders[other] for other, page in pages.items()), "another order everywhere")

    @precondition(lambda self: self.model)
    @rule(lost=st.sets(NODES, min_size=0, max_size=3))
    def lose_and_recover(self, lost: set[int]) -> None:
        """These nodes go, memory and all, and empty ones come in their place."""
        self.crash(lost)
        plan, reasons = plan_restore([Survey.from_json(self.nodes.ask(node, "survey")) for node in self.nodes.keepers])
        if len(lost) > self.nodes.m:
            assert plan is None, "more was lost than parity covers"
            assert reasons
            self.start_anew()
            return
        assert plan is not None, reasons
        assert plan.step == self.nodes.step
        self.repair(plan)
        assert {node: self.held(plan, node) for node in self.nodes.keepers} == self.model
        self.nodes.data = {node: np.frombuffer(data, np.uint8).copy() for node, data in self.model.items()}
        self.nodes.enter(index=plan.index, protected=plan.protected)
        for node in lost:
            wait_until(lambda node=node: self.nodes.ask(node, "health")["parity"], "its parity")

    def crash(self, lost: set[int]) -> None:
        for link in self.nodes.links.values():
            link.close()
        self.nodes.links.clear()
        for node in lost:
            self.nodes.keepers[node].close()
        for node in sorted(lost):
            self.nodes.keepers[node] = Keeper("job", node, self.nodes.place(node), mapped=self.nodes.mapped)

    def repair(self, plan: RestorePlan) -> None:
        members = {node: keeper.member for node, keeper in self.nodes.keepers.items()}
        for item in plan.rebuilds:
            told = [members[node].to_json() for node in sorted({*item.survivors, *item.with_parity})]
            whole = {"with_data": list(item.survivors), "with_parity": list(item.with_parity)}
            self.nodes.ask(item.host, "rebuild", group=item.group.to_json(), lost=item.lost, survivors=told, **whole)

    def held(self, plan: RestorePlan, node: int) -> bytes:
        slot = Slot.open(self.nodes.place(plan.holders[node]) / slot_name(node, plan.index))
        assert slot.header.step == plan.step
        assert slot.header.state is SlotState.COMMITTED
        data = bytes(slot.body[: slot.header.payload_nbytes])
        slot.close()
        return data

    def start_anew(self) -> None:
        m, mapped = self.nodes.m, self.nodes.mapped
        self.nodes.close()
        self.model = {}
        self.nodes = Nodes(self.place, 4, m, mapped=mapped)
        self.nodes.enter()

    def teardown(self) -> None:
        if hasattr(self, "nodes"):
            self.nodes.close()
        shutil.rmtree(self.place, ignore_errors=True)


Snapshots.TestCase.settings = settings(
    max_examples=6, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestSnapshots = Snapshots.TestCase


@pytest.mark.campaign
def test_the_same_for_longer() -> None:
    machine = type("Longer", (Snapshots,), {})
    machine.TestCase.settings = settings(
        max_examples=300, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase("runTest").runTest()
