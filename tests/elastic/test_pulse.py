"""A protected run over gloo says which rank holds it up, with nothing put into the loop; and a healthy one says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import holdfast
from holdfast.elastic.incidents import read_verdicts

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
    assert found == [("straggler", [1]), ("hang", [1]), ("hang", [2])], "and not one word more"
    slow, stopped, stuck = (" | ".join(verdict["evidence"]) for verdict in said)
    assert "rank 1 computes" in slow
    assert "is stopped: SIGCONT wakes it" in stopped
    assert "is in stuck_in_my_own_code" in stuck
    for evidence in (stopped, stuck):
        assert "default_pg (0) of ranks 0 to 2: collective" in evidence
        assert "rank 0 waits in" in evidence
    written = read_verdicts(job.place / "run" / "records", 1)
    assert [line.partition(" (")[0] for line in written] == ["straggler: rank 1", "hang: rank 1", "hang: rank 2"]
    assert written[1] in done.stderr, "the log says it in the same words"


@pytest.mark.parametrize("value", [0.5, True, "on", -1, float("nan")])
def test_a_patience_that_is_none_is_refused(value):
    with pytest.raises(holdfast.ConfigError, match="diagnose takes a number of seconds from 1 up to a day, 'auto' or 'off'"):
        holdfast.protect({"model": None}, diagnose=value)
