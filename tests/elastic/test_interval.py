"""How often to save: the formulas against the model that they minimize, and beliefs against what was seen."""

from __future__ import annotations

import math

import pytest

from holdfast.elastic.interval import FailureRate, daly, efficiency, steps_between, young
from holdfast.errors import ConfigError


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


def test_an_interval_in_steps_is_at_least_one():
    assert steps_between(0.0, 3600, 1.0) == 1
    assert steps_between(0.001, 10.0, 5.0) == 1
    assert steps_between(20.0, 11_000.0, 10.0) == 65


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
