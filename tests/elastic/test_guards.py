"""Stale snapshots are said once and again while they last; a poisoned run goes back to the last clean snapshot."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.elastic.guards import Staleness
from holdfast.events import Event, subscribe

GUARDED = Path(__file__).with_name("poisoned.py")


def looks(staleness: Staleness, committed: int, seconds: range, *, step_s: float = 1.0) -> list[int]:
    """The seconds at which it was said, with one step each `step_s`."""
    return [second for second in seconds if staleness.look(committed, int(second / step_s), float(second))]


def test_nothing_is_said_while_snapshots_are_committed(caplog: pytest.LogCaptureFixture) -> None:
    staleness = Staleness("run")
    for second in range(5000):
        assert not staleness.look(second - second % 30, second, float(second))


def test_a_gap_is_said_after_a_minute_and_then_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []
    end = subscribe(heard.append)
    staleness = Staleness("run")
    with caplog.at_level(logging.WARNING):
        assert looks(staleness, 0, range(1, 200)) == [62, 122, 182]
    end()
    assert "no snapshot has been committed for 61 s, since step 0, now at 62" in caplog.text
    assert [event.name for event in heard] == ["snapshot.stale"] * 3


def test_a_run_that_commits_every_ten_minutes_is_not_stale_after_one() -> None:
    staleness = Staleness("run")
    for commit in range(1, 6):
        staleness.look(commit * 600, commit * 600, commit * 600.0)
    assert looks(staleness, 3000, range(3001, 3000 + 6000)) == []
    assert looks(staleness, 3000, range(9000, 9050)) == [9001]


def test_few_steps_are_not_many_however_long_they_take() -> None:
    assert looks(Staleness("run"), 0, range(1, 1000), step_s=100.0) == []


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(holdfast.ConfigError, match="on_nan takes one of 'warn', 'refuse', 'step_back'; got 'ignore'"):
        holdfast.protect({"model": None}, on_nan="ignore")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("policy", ["step_back", pytest.param("refuse", marks=pytest.mark.campaign)])
def test_a_run_that_turns_nan_restarts_from_its_last_clean_step(job, policy: str) -> None:
    """The parameters turn NaN after step 8, once: a stray bit and not the training's own doing."""
    out = job.place / "out"
    out.mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(GUARDED), str(out), policy, *words]
        return subprocess.run(command, env=job.env, capture_output=True, text=True, timeout=100, check=False)

    first = run("--spoil")
    if policy == "step_back":
        assert first.returncode != 0
        assert "PoisonedState: parameters were NaN or infinite after step" in first.stderr
        assert "is the last clean snapshot, and the next start goes on from there" in first.stderr
    else:
        assert first.returncode == -9, first.stderr  # it went on, until the script killed itself
    again = run()
    assert again.returncode == 0, again.stderr
    facts = json.loads((out / "facts.json").read_text())
    assert 0 < facts["restored"] <= 8
    assert facts["finite"]
