"""How often to save: the formulas against the model that they minimize, and beliefs against what was seen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.elastic.interval import FailureRate, efficiency
from holdfast.elastic.journal import Begin, Recorder, taken_s
from holdfast.errors import ConfigError
from holdfast.snapshot.interval import LEAST_S, MOST_S, Intervals, checkpoint_seconds, daly, is_news, young


@pytest.mark.parametrize("cost_s", [0.01, 1.0, 20.0, 100.0, 600.0])
def test_no_other_interval_is_more_efficient_than_dalys(cost_s):
    mtbf_s = 3600.0
    best = max(efficiency(interval_s, cost_s, mtbf_s) for interval_s in (mtbf_s * 1.01**power for power in range(-1200, 200)))
    assert efficiency(daly(cost_s, mtbf_s), cost_s, mtbf_s) == pytest.approx(best, rel=2e-4)


def test_young_is_the_limit_of_daly_where_saves_are_cheap():
    assert daly(0.001, 1e6) == pytest.approx(young(0.001, 1e6), rel=1e-3)
    assert young(2.0, 900.0) == 60.0


def test_a_save_that_costs_more_than_twice_the_time_between_failures_is_made_once_in_between():
    assert daly(500.0, 200.0) == 200.0


def test_checkpoints_are_written_at_dalys_interval_within_bounds():
    assert checkpoint_seconds(20.0, 11_000.0) == daly(20.0, 11_000.0)
    assert checkpoint_seconds(20.0, 1e9) == MOST_S
    assert checkpoint_seconds(0.01, 60.0) == LEAST_S
    assert checkpoint_seconds(500.0, 200.0) == 500.0, "never before the last one is written"


@pytest.mark.parametrize(("chosen", "before", "news"), [(1, 1, False), (2, 1, True), (100, 110, False), (125, 100, True)])
def test_an_interval_that_only_wavers_is_not_changed(chosen, before, news):
    assert is_news(chosen, before) is news


def test_what_was_chosen_is_said_with_its_reasons():
    known = {"stall_s": 0.002, "exchange_s": 0.05, "step_s": 0.5, "mtbf_s": 36_000.0}
    text = str(Intervals(snapshot_every=2, checkpoint_every=1200, checkpoint_s=4.2, **known))
    assert "a snapshot every 2 step(s)" in text
    assert "a checkpoint every 1200 steps (600 s), writing one takes 4.2 s" in text
    assert "a failure is expected every 10 h" in text
    assert "checkpoint" not in str(Intervals(snapshot_every=2, checkpoint_every=0, checkpoint_s=0.0, **known))


def test_a_hopeless_efficiency_is_zero_and_no_overflow():
    assert efficiency(1e6, 1.0, 1.0) == 0.0


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(-1.0, 10.0), (1.0, 0.0)])
def test_impossible_costs_are_refused(cost_s, mtbf_s):
    with pytest.raises(ConfigError, match="got"):
        young(cost_s, mtbf_s)


def test_a_job_that_has_seen_nothing_believes_what_was_published():
    assert FailureRate().mtbf_s(16_384) == pytest.approx(3.0945 * 3600, rel=1e-3)


def test_a_jobs_own_failures_outweigh_what_was_published():
    rate = FailureRate().observe(50, 50 * 1000.0)
    assert rate.mtbf_s(1) / 3600 == pytest.approx(1000, rel=1.0)
    assert FailureRate().observe(500, 500 * 1000.0).mtbf_s(1) / 3600 == pytest.approx(1000, rel=0.11)


def test_a_small_job_learns_from_its_own_failures_within_a_day():
    """Four GPUs that fail every two hours; what was published would say 1153 hours after the first ten."""
    learned = FailureRate.learned(10, 4 * 20.0)
    assert learned.mtbf_s(4) / 3600 == pytest.approx(2.0, rel=0.5)
    low, high = learned.mtbf_range_s(4)
    assert low < 2 * 3600 < high


def test_one_failure_proves_nothing_and_none_leaves_what_was_published():
    assert FailureRate.learned(0, 1000.0) == FailureRate().observe(0, 1000.0)
    assert FailureRate.learned(1, 1000.0) == FailureRate().observe(1, 1000.0)


def test_the_failures_of_a_large_job_are_weighed_as_they_were():
    assert FailureRate.learned(50, 2.7e6) == FailureRate().observe(50, 2.7e6)


def test_the_time_that_ranks_took_is_read_from_one_journal_of_each_attempt(tmp_path):
    for attempt, (world, seconds) in enumerate([(4, 100.0), (3, 50.0)], start=1):
        for rank in range(world):
            begin = Begin(attempt, rank, world, step=0, time_s=1002.0, born_s=990.0, entered_s=1000.0)
            recorder = Recorder(tmp_path, begin, fsync_every_s=None)
            recorder._write([1, 1000.0 + seconds, 0.0, {}])
            recorder._write({"end": 0.0, "step": 1, "why": "killed"} if attempt == 2 else [2, 1000.0 + seconds, 0.0, {}])
    assert taken_s(tmp_path) == 4 * 100.0 + 3 * 50.0


def test_the_credible_range_has_the_probability_it_claims():
    """The distribution function of a gamma of whole shape is a Poisson sum: an independent way to the same number."""
    rate = FailureRate(failures=7.0, gpu_hours=1000.0)
    shortest_s, longest_s = rate.mtbf_range_s(10, probability=0.9)
    for mtbf_s, below in ((longest_s, 0.05), (shortest_s, 0.95)):
        mean = 3600 / (mtbf_s * 10) * 1000.0
        poisson = math.fsum(math.exp(-mean) * mean**count / math.factorial(count) for count in range(7))
        assert 1 - poisson == pytest.approx(below, abs=1e-9)


def test_more_seen_is_more_sure():
    few, many = FailureRate().observe(3, 3000.0).mtbf_range_s(8), FailureRate().observe(300, 300_000.0).mtbf_range_s(8)
    assert few[1] / few[0] > 3 * many[1] / many[0] > 3


def test_impossible_observations_are_refused():
    with pytest.raises(ConfigError, match="-1 failures"):
        FailureRate().observe(-1, 10)


def test_a_run_whose_earlier_starts_failed_writes_checkpoints_more_often(job):
    script = Path(__file__).with_name("choosing.py")
    command = [sys.executable, str(script), str(job.place)]
    done = subprocess.run(command, env=job.env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    chosen = Intervals(**json.loads((job.place / "chosen.json").read_text()))
    assert chosen.mtbf_s == pytest.approx(3600 / 20, rel=0.2), "and not twenty years, as for one GPU that has not failed yet"
    wanted_s = checkpoint_seconds(30.0, chosen.mtbf_s)
    assert chosen.checkpoint_every * chosen.step_s == pytest.approx(wanted_s, rel=0.3), "or it wavers by less"
    assert wanted_s < MOST_S / 20
