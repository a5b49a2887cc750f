"""A protected run over gloo says which rank holds it up, with nothing put into the loop; and a healthy one says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.elastic.chronicle import Before, Chronicle, words_here, words_of_all
from holdfast.elastic.incidents import read_incidents, read_verdicts, write_verdict
from holdfast.elastic.journal import Begin, Recorder
from holdfast.elastic.team import Team
from holdfast.environment import Environment
from holdfast.snapshot.verdicts import Trouble, Verdict

WATCHED = Path(__file__).with_name("watched.py")


def test_who_holds_a_run_up_is_said_with_evidence_and_of_a_healthy_one_nothing(job):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*torchrun, str(WATCHED), str(job.place)], env=job.env, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    said, *others = [json.loads((job.place / f"said-{rank}.json").read_text()) for rank in range(3)]
    assert others == [[], []], "the lowest rank that is not guilty speaks for all"
    found = [(verdict["trouble"], verdict["guilty"]) for verdict in said]
    assert found == [("straggler", [1]), ("loss", [2]), ("hang", [1]), ("hang", [2]), ("silent corruption", [1])], "no more"
    slow, jumped, stopped, stuck, flipped = (" | ".join(verdict["evidence"]) for verdict in said)
    assert "rank 1 computes" in slow
    assert "the mean loss is 3334, " in jumped
    assert "is stopped: SIGCONT wakes it" in stopped
    assert "is in stuck_in_my_own_code" in stuck
    assert "model/weight: rank 1 differs from 2 others" in flipped
    for evidence in (stopped, stuck):
        assert "default_pg (0) of ranks 0 to 2: collective" in evidence
        assert "rank 0 waits in" in evidence
    written = read_verdicts(job.place / "runtime" / "records" / "w", 1)
    told = ["straggler: rank 1", "loss: rank 2", "hang: rank 1", "hang: rank 2", "silent corruption: rank 1"]
    assert [line.partition(" (")[0] for line in written] == told
    assert written[2] in done.stderr, "the log says it in the same words"


def test_an_incident_tells_what_was_found_before_it(tmp_path):
    records = tmp_path / "records"
    Recorder(records, Begin(1, 0, 1, step=0, time_s=1.0, born_s=1.0, entered_s=1.0), fsync_every_s=None)  # killed: no last word
    write_verdict(records, 1, Verdict(Trouble.HANG, (3,), 0.9, ("it did not come",)))
    file = records / "verdicts" / "000001.log"
    file.write_bytes(file.read_bytes() + b'{"text": "torn')
    before = Before(1, words_of_all([words_here(records, 1, 0, 1)]), born_s=2.0, entered_s=2.0)
    opened = {"objects": {}, "step": 0, "entered_s": 2.0, "recovery": None, "phases": {}, "before": before}
    chronicle = Chronicle.open(Team(Environment.read()), job="j", checkpoints=str(tmp_path), **opened)
    chronicle.close(0, None)
    (incident,) = read_incidents(records)
    assert incident.notes == ("hang: rank 3 (90% sure); it did not come",)


@pytest.mark.parametrize("value", [0.5, True, "on", -1, float("nan")])
def test_a_patience_that_is_none_is_refused(value):
    with pytest.raises(holdfast.ConfigError, match="diagnose takes a number of seconds from 1 up to a day, 'auto' or 'off'"):
        holdfast.protect({"model": None}, diagnose=value)
