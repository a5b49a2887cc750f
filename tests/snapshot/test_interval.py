"""The interval is the one that loses least, unless keepers need longer or a shorter one costs nothing worth mentioning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.snapshot.interval import AFFORDABLE, Measured, Pace, lost_per_s, steps_between
from tests.snapshot.nodes import Nodes


@given(
    stall_s=st.floats(0.05, 5), step_s=st.floats(0.05, 5), failures_per_s=st.floats(1e-5, 1e-2), exchange_s=st.floats(0, 0.01)
)
def test_an_expensive_snapshot_is_taken_as_often_as_loses_least(
    stall_s: float, step_s: float, failures_per_s: float, exchange_s: float
) -> None:
    steps = steps_between(Measured(stall_s=stall_s, exchange_s=exchange_s, step_s=step_s), failures_per_s)
    lost = lost_per_s(steps * step_s, stall_s, failures_per_s)
    longer = lost_per_s((steps + 1) * step_s, stall_s, failures_per_s)
    shorter = lost_per_s((steps - 1) * step_s, stall_s, failures_per_s) if steps > 1 else lost
    is_affordable = stall_s / (steps * step_s) <= 2 * AFFORDABLE
    # Rounding to whole steps is within a hair of the best whole step.
    assert is_affordable or lost <= 1.06 * min(longer, shorter)


@example(stall_s=0.0, exchange_s=1.0, step_s=1.0, rate=2e-309)
@given(stall_s=st.floats(0, 1), exchange_s=st.floats(0, 100), step_s=st.floats(0.01, 10), rate=st.floats(0, 0.1))
def test_it_is_never_faster_than_keepers_can_follow(stall_s: float, exchange_s: float, step_s: float, rate: float) -> None:
    steps = steps_between(Measured(stall_s=stall_s, exchange_s=exchange_s, step_s=step_s), rate)
    assert steps >= 1
    assert steps * step_s >= exchange_s * 0.999999


def test_a_snapshot_that_costs_nothing_is_taken_after_every_step() -> None:
    assert steps_between(Measured(stall_s=0.0005, exchange_s=0.1, step_s=0.4), 1e-7) == 1


def test_more_failures_mean_more_snapshots() -> None:
    cost = Measured(stall_s=1.0, exchange_s=0.0, step_s=1.0)
    assert [steps_between(cost, rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1)] == [141, 45, 14, 4]


def test_before_anything_is_known_every_step_is_taken() -> None:
    assert steps_between(Measured(stall_s=0.0, exchange_s=0.0, step_s=0.0), 0.0) == 1


def test_the_pace_is_every_step_until_enough_snapshots_have_been_seen() -> None:
    pace = Pace()
    for seen in range(Pace.ENOUGH):
        assert pace.steps(1e-7) == 1, seen
        pace.add(2.0, [{"capture_us": 400, "step_us": 500_000}, {"capture_us": 300, "step_us": 400_000}])
    assert pace.steps(1e-7) == 4, "the keepers need two seconds, a step takes half a one"
    for _ in range(Pace.ENOUGH):
        pace.add(0.1, [{"capture_us": 1_000_000, "step_us": 500_000}])
    assert pace.steps(1e-3) == 89


@pytest.mark.parametrize("adaptive", [True, False])
def test_keepers_ask_for_snapshots_as_often_as_is_worth_it_only_when_they_may_choose(
    shm: Path, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch, adaptive: bool
) -> None:
    monkeypatch.setattr(Pace, "ENOUGH", 2)
    monkeypatch.setattr("holdfast.snapshot.interval.steps_between", lambda measured, failures_per_s: 7)
    nodes = Nodes(shm, 2, 1, mapped=True)
    try:
        nodes.enter(adaptive=adaptive)
        for _ in range(3):
            nodes.commit(wait_until)
        wait_until(lambda: nodes.links[0].page.target[0] > nodes.step, "the next step is asked for")
        asked = nodes.links[0].page.target[0]
        assert asked in (7, 14) if adaptive else asked == 4
    finally:
        nodes.close()
