"""The protocol under random faults: it holds, and where it is broken on purpose the checks see it and the schedule shrinks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from holdfast.elastic import simkeepers
from holdfast.elastic.ettr import Input, Way, forecast, published_job, restart_way
from holdfast.elastic.interval import efficiency
from holdfast.elastic.membership import Node, Timing
from holdfast.elastic.simulation import Fault, cut_down, random_faults, script, shrink, simulate, timing_of
from holdfast.errors import ConfigError


@pytest.mark.parametrize("seed", range(12))
def test_random_faults_break_nothing(seed):
    found = simulate(16, random_faults(seed, 15, gap_s=12, widest=4), seed=seed)
    assert found.broken == ()
    assert found.views > 1


def test_a_hundred_members_live_through_faults_and_rebuild_the_lost():
    found = simulate(100, random_faults(4, 40, gap_s=25), seed=4)
    assert found.broken == ()
    assert found.rebuilt > 20
    assert found.commits > 100


def test_a_run_without_faults_commits_in_one_view():
    found = simulate(9, ())
    assert (found.broken, found.views, found.fell_back, found.rebuilt) == ((), 1, 0, 0)
    assert found.commits > 10


def test_the_same_seed_is_the_same_run():
    faults = random_faults(3, 10, gap_s=10)
    assert simulate(12, faults, seed=3) == simulate(12, faults, seed=3)


def test_more_losses_than_parity_fall_back_and_are_counted():
    together = tuple(Fault(30.0, "kill", place, 5.0) for place in (0.7, 0.7, 0.7))
    assert simulate(12, together, parity=1).fell_back == 1
    assert simulate(12, together, parity=3).fell_back == 0


class Forgetful(Node):
    """Promises whoever asks, whatever it has promised the leader."""

    def feed(self, event, now_s):
        self._bound_until_s = -1.0
        return super().feed(event, now_s)


def test_electors_that_forget_their_promise_are_caught_and_the_schedule_shrinks():
    """The others go on without a leader that still holds its lease."""
    timing = Timing(beat_s=1.0, lease_s=10.0, silent_s=10.0, takeover_s=10.0, retry_s=1.0, settle_s=0.5)

    class Hasty(Forgetful):
        def _patience(self):
            return 2.0 + 0.5 * self._seat()

    options = {"timing": timing, "make": Hasty}
    for seed in range(30):
        faults = random_faults(seed, 12, gap_s=6, widest=4, kinds=("cut", "pause", "kill"))
        found = simulate(12, faults, seed=seed, **options)
        if found.broken:
            break
    assert "is left out of epoch" in found.broken[0]
    left = cut_down(found, faults, **options)
    assert len(left) <= 3
    assert simulate(12, left, seed=seed, **options).broken
    assert simulate(12, left, seed=seed, timing=timing).broken == ()


def test_keepers_that_commit_too_early_are_caught(monkeypatch):
    """A coordinator that does not wait for all parities."""

    def early(self, event):
        self._waiting.clear()
        return Encoded(self, event)

    table = simkeepers.Coordinator.feed.__globals__["_TABLE"]
    key = next(key for key in table if key[0].value == "filling" and key[1].__name__ == "Encoded")
    Encoded = table[key]
    monkeypatch.setitem(table, key, early)
    (broken,) = simulate(12, ()).broken
    assert "told to commit step 1 and has not encoded it" in broken


def test_a_script_replays_the_same_failure(tmp_path):
    faults = tuple(Fault(30.0, "kill", place, 5.0) for place in (0.1, 0.1))
    found = simulate(12, faults, seed=5)
    text = script(found, faults)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "()\n"


def test_shrinking_leaves_what_is_needed():
    faults = random_faults(0, 40, gap_s=1)
    needed = {faults[7], faults[31]}
    assert set(shrink(faults, lambda some: needed <= set(some))) == needed


# -- forecasts ---------------------------------------------------------------------------------------------------------------


def plain_way(every_s: float, cost_s: float, restart_s: float) -> Way:
    none = Input(0.0, "test")
    return Way(
        name="plain",
        save_every_s=Input(every_s, "test"),
        save_cost_s=Input(cost_s, "test"),
        lag_s=none,
        detection_s=none,
        hang_detection_s=none,
        recovery_s={kind: Input(restart_s, "test") for kind in ("trainer", "node", "more")},
    )


@pytest.mark.parametrize(("every_s", "cost_s", "restart_s"), [(600, 20, 60), (3600, 60, 300)])
def test_the_forecast_agrees_with_dalys_model(every_s, cost_s, restart_s):
    job = published_job(16_384, days=60)
    found = forecast(job, plain_way(every_s, cost_s, restart_s), runs=40)
    assert found.ettr == pytest.approx(efficiency(every_s, cost_s, job.mtbf_s, restart_s), abs=0.01)


def test_all_time_of_a_forecast_is_accounted_for():
    found = forecast(published_job(8192), restart_way(), runs=20)
    assert sum(found.shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert found.ettr_low <= found.ettr <= found.ettr_high


def test_a_job_of_no_gpus_is_refused():
    with pytest.raises(ConfigError, match="0 GPUs"):
        published_job(0)


def test_the_command_reports_every_input_with_its_source():
    command = [sys.executable, "-m", "holdfast.elastic.simulate", "--gpus", "16384", "--runs", "20", "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["job"]["gpus"] == 16_384
    for item in told["forecasts"]:
        assert 0 < item["ettr"] < 1
        assert all(cost["source"] for cost in item["way"]["recovery_s"].values())


@pytest.mark.campaign
def test_ten_thousand_members_live_through_a_thousand_faults():
    found = simulate(10_000, random_faults(1, 1000, gap_s=40, burst=100), seed=1, timing=timing_of(3.0))
    assert found.broken == ()
    assert found.faults == 1000
    assert found.rebuilt > 0
    assert not found.events["quorum lost"]


@pytest.mark.campaign
@pytest.mark.parametrize("gap_s", [4, 10, 20])
def test_many_seeds_break_nothing(gap_s):
    broken = {}
    for seed in range(300):
        found = simulate(14, random_faults(seed, 20, gap_s=gap_s, widest=4), seed=seed)
        if found.broken:
            broken[seed] = found.broken
    assert broken == {}
