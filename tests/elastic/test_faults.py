"""Schedules are data, the oracle can say no, and real jobs that are really broken come back or fail loudly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast import snapshot
from holdfast.elastic.faults import Fault, Faults, Job, Plan, Schedule, Verdict, load_plan, rehearse, report_lines, save_plan
from holdfast.elastic.faults import verdict as oracle
from holdfast.elastic.faults.report import as_json, counts, is_good
from holdfast.elastic.faults.schedule import POINTS
from holdfast.elastic.faults.verdict import Outcome, judge
from holdfast.errors import ConfigError

SCHEDULES = Path(__file__).parents[1] / "schedules"
LYING = Path(__file__).with_name("lying.py")


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_builder_returns_a_longer_schedule_and_keeps_the_old_one() -> None:
    first = Faults().kill(rank=3, at="snapshot.encoded")
    second = first.flip("slot", rank=1, bit=7).fill("/dev/shm").stop(rank=0, seconds=1.0).garbage(keeper=1)
    assert [fault.do for fault in first.faults] == ["kill"]
    assert [fault.do for fault in second.faults] == ["kill", "flip", "fill", "stop", "garbage"]


def test_faults_that_wait_for_the_same_thing_strike_together() -> None:
    found = Faults().flip("slot", rank=1, committed=4).kill(rank=0, committed=4).kill(rank=1, at="capture.begun").faults
    assert found[0].waits_for == found[1].waits_for != found[2].waits_for


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"do": "explode", "rank": 1}, "a fault does one of kill, stop"),
        ({"do": "kill", "rank": 1, "at": "capture.start"}, "there is no crash point 'capture.start'; there are capture.begun"),
        ({"do": "kill"}, r"kill: name its victim: rank=…, keeper=… or nodes=\[…\]"),
        ({"do": "delay", "keeper": 1, "at": "snapshot.filled"}, "for how long"),
        ({"do": "flip", "rank": 1, "place": "tail"}, "a slot has slot, meta, parity, header; 'tail'"),
        ({"do": "kill", "rank": 1, "at": "capture.begun", "committed": 3}, "a fault has one cause"),
        ({"do": "kill", "rank": 1, "nth": 0}, "nth counts from 1"),
    ],
)
def test_an_impossible_fault_is_refused_in_words(fault: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Fault(**fault)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[[schedule]]\nname = 'x'\n[[schedule.fault]]\ndo = 'kill'\nnode = 1",
            "schedule 'x': there is no 'node'; there are at",
        ),
        ("[job]\nrank = 3", r"\[job\]: there is no 'rank'"),
        ("[jobs]\nranks = 3", "it has no 'jobs'"),
        ("[[schedule]]\nname = 'x'\nfault = [{ do = 'kill', rank = 2 }]", "2 ranks on 2 nodes has no rank 2"),
        ("[[schedule]]\nname = 'x'\nexpect = 'luck'\nfault = []", "expect is one of recovered, loud, either"),
        ("[[sweep]]\nvictims = ['cat']", "'cat' is none of them"),
        ("[job]\nnodes = 3", "need|1 <= nodes <= ranks"),
        ("[job", "is not a schedule that can be read"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_plan(path)


@pytest.mark.parametrize("name", ["smoke.toml", "campaign.toml"])
def test_a_plan_that_is_saved_is_the_plan_that_is_loaded(tmp_path: Path, name: str) -> None:
    plan = load_plan(SCHEDULES / name)
    save_plan(plan, tmp_path / "again.toml")
    assert load_plan(tmp_path / "again.toml") == plan


def test_every_crash_point_of_snapshots_can_be_named_in_a_schedule() -> None:
    named: set[str] = set()
    for path in Path(snapshot.__file__).parent.glob("*.py"):
        named |= set(re.findall(r'crash_point\("([^"]+)"\)', path.read_text()))
    assert named == {point for points in POINTS.values() for point in points}


def test_the_campaign_kills_every_kind_of_victim_at_every_point() -> None:
    plan = load_plan(SCHEDULES / "campaign.toml")
    swept = {(schedule.name.split(" at ")[0], fault.at) for schedule in plan.schedules for fault in schedule.faults if fault.at}
    sets = ["node 0", "node 1", "node 2", "nodes 0, 1", "nodes 0, 2", "nodes 1, 2"]
    points = [point for who in ("trainer", "keeper", "coordinator") for point in POINTS[who]]
    missing = {(who, point) for who in ("trainer", "keeper", "both", *sets) for point in points} - swept
    assert not missing
    assert {point for _, point in swept} >= set(POINTS["rebuild"])


# -- the oracle --------------------------------------------------------------------------------------------------------


def life(*facts: tuple[Any, ...], rank: int = 0) -> list[dict[str, Any]]:
    """("step", 3, "abc"), ("start", 3, "abc", "parity", first start = "0"), ("end", 3)."""
    lines = []
    for kind, step, *more in facts:
        line: dict[str, Any] = {"fact": kind, "step": step, "rank": rank, "start": "0", "rng": "r"}
        if kind != "end":
            line["digest"] = more[0]
        if kind == "start":
            line |= {"rung": more[1], "start": more[2]}
        lines.append(line)
    return lines


BEGUN = ("start", 0, "s0", None, "0")
WHOLE = [BEGUN, ("step", 1, "s1"), ("step", 2, "s2"), ("step", 3, "s3"), ("end", 3)]
DIED = [BEGUN, ("step", 1, "s1"), ("step", 2, "s2")]
BACK = ("start", 2, "s2", "parity", "1")


def verdict(*facts: tuple[Any, ...], code: int | None = 0, log: str = "", expect: str = "either", missed: Any = ()) -> Verdict:
    found, _ = judge(
        oracle.Testimony.of(life(*facts)), oracle.Testimony.of(life(*WHOLE)), code=code, log=log, missed=missed, expect=expect
    )
    return found


def test_a_run_that_goes_on_from_a_state_it_was_in_and_ends_like_the_other_has_recovered() -> None:
    assert verdict(*DIED, BACK, ("step", 3, "s3"), ("end", 3)) is Verdict.RECOVERED


@pytest.mark.parametrize(
    "facts",
    [
        [*DIED, ("start", 2, "s1", "parity", "1"), ("step", 3, "s3"), ("end", 3)],  # the bytes of another step
        [*DIED, ("start", 2, "zz", "parity", "1"), ("step", 3, "s3"), ("end", 3)],  # bytes of no step
        [*DIED, BACK, ("step", 3, "zz"), ("end", 3)],  # trained on to somewhere else
        [*DIED, BACK, ("end", 2)],  # says it is done, and is not
        [BEGUN, ("step", 1, "s1"), ("step", 3, "s3"), ("end", 3)],  # left a step out
        [],  # ended well without having trained
    ],
)
def test_whatever_is_wrong_without_a_word_is_a_silent_error(facts: list[tuple[Any, ...]]) -> None:
    assert verdict(*facts) is Verdict.SILENT


def test_a_wrong_state_is_a_silent_error_even_if_the_run_fails_loudly_later() -> None:
    facts = [*DIED, ("start", 2, "zz", "parity", "1")]
    assert verdict(*facts, code=1, log="holdfast.errors.SnapshotLost: all is lost") is Verdict.SILENT


def test_the_random_generators_count_as_state() -> None:
    lines = life(*DIED, BACK, ("step", 3, "s3"), ("end", 3))
    lines[3]["rng"] = "another"
    found, reason = judge(oracle.Testimony.of(lines), None, code=0, log="", missed=(), expect="either")
    assert found is Verdict.SILENT
    assert reason == "rank 0 went on from a state at step 2 (from parity) that it never was in"


def test_ranks_that_go_on_from_different_steps_are_a_silent_error() -> None:
    lines = [*life(*DIED, BACK), *life(*DIED, ("start", 1, "s1", "parity", "1"), rank=1)]
    found, reason = judge(oracle.Testimony.of(lines), None, code=None, log="", missed=(), expect="either")
    assert found is Verdict.SILENT
    assert reason == "ranks of one start went on from different steps [1, 2]"


def test_a_failure_is_loud_only_with_an_error_of_ours() -> None:
    ours = "[rank0]: holdfast.errors.SnapshotLost: snapshots exist and none can be restored"
    assert verdict(*DIED, code=1, log=ours) is Verdict.LOUD
    assert verdict(*DIED, code=1, log="ValueError: cannot reshape") is Verdict.CRASHED
    assert verdict(*DIED, code=1, log="") is Verdict.CRASHED


def test_what_was_not_expected_never_came_or_never_ended_is_a_failure() -> None:
    ours = "holdfast.errors.SnapshotLost: gone"
    assert verdict(*WHOLE, expect="loud") is Verdict.UNEXPECTED
    assert verdict(*DIED, code=1, log=ours, expect="recovered") is Verdict.UNEXPECTED
    assert verdict(*WHOLE, missed=["kill rank 1"]) is Verdict.MISSED
    assert verdict(*DIED, code=None) is Verdict.HUNG
    assert all(
        found.is_failure for found in (Verdict.UNEXPECTED, Verdict.MISSED, Verdict.HUNG, Verdict.CRASHED, Verdict.SILENT)
    )


def test_the_report_names_silent_errors_even_when_there_are_none() -> None:
    outcomes = [Outcome("a", ("kill rank 1",), Verdict.RECOVERED, "", ((4, "parity"),), 9.0)]
    assert list(report_lines(outcomes))[-1] == "1 schedule: 1 recovered, 0 loud errors, 0 silent errors"
    assert counts(outcomes) == {"recovered": 1, "loud_error": 0, "silent_error": 0}
    assert is_good(outcomes)
    assert not is_good([])
    assert not is_good([*outcomes, Outcome("b", (), Verdict.SILENT, "why")])
    assert json.loads(json.dumps(as_json(outcomes)))["schedules"][0]["restores"] == [{"step": 4, "rung": "parity"}]


# -- real jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.campaign
def test_a_restore_with_one_wrong_bit_is_found_out() -> None:
    """The oracle's own test: the script falsifies a parameter in its second restore, as a broken release might."""
    job = Job(script=f"{LYING} 14", deterministic=False, timeout_s=240)
    faults = Faults().kill(rank=1, committed=3).kill(rank=1, committed=9).faults
    (outcome,) = rehearse(Plan((Schedule(name="lying", faults=faults, job=job),)))
    assert outcome.verdict is Verdict.SILENT
    (honest, _), (lied, _) = outcome.restores
    assert 3 <= honest < 9 <= lied
    assert outcome.detail == f"rank 0 went on from a state at step {lied} (from own keeper) that it never was in"


def rehearsal(*words: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "holdfast.elastic.faults", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=dict(os.environ))
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return report


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["smoke.toml", "campaign.toml"])
def test_no_schedule_ends_in_a_silent_error(name: str) -> None:
    report = rehearsal("--schedule", str(SCHEDULES / name), timeout_s=3500)
    bad = [row for row in report["schedules"] if row["verdict"] not in ("recovered", "loud error", "skipped")]
    assert not bad
    assert report["counts"]["silent_error"] == 0
