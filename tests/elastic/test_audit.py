"""The proof that every sample was used exactly once: it holds where it should, and breaks where anything is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from holdfast.elastic.audit import audit, uses_of
from holdfast.elastic.batching import StepPlan
from holdfast.elastic.faults.job import state_of
from holdfast.elastic.journal import (
    Begin,
    Data,
    End,
    Journal,
    Recorder,
    Step,
    find_records,
    last_words,
    read_journal,
    read_journals,
)
from holdfast.elastic.order import samples_at
from holdfast.errors import CorruptData, NotACheckpoint

SCRIPT = Path(__file__).with_name("train_on_data.py")
BATCH = 8


def attempt(number: int, world: int, first: int, last: int, *, why: str = "killed", size: int = 50) -> list[Journal]:
    """The journals of an attempt that restored step `first - 1` and did the steps `first` … `last`."""
    found = []
    for rank in range(world):
        plan = StepPlan(2, BATCH // 2, world)
        data = {"data": Data(size, 11, True, (first - 1) * BATCH, rank, plan, epochs=None)}
        begin = Begin(number, rank, world, first - 1, 100.0 * number, 0.0, 0.0, data=data)
        steps = [Step(s, 100.0 * number + s, 0.0, {"data": [((s - 1) * BATCH, BATCH, "")]}) for s in range(first, last + 1)]
        found.append(Journal(begin, tuple(steps), None if why == "killed" else End(100.0 * number + last, last, why)))
    return found


def without_step(journal: Journal, step: int) -> Journal:
    return replace(journal, steps=tuple(found for found in journal.steps if found.step != step))


def test_faults_and_resizes_leave_every_sample_used_once():
    found = audit([*attempt(1, 4, 1, 9), *attempt(2, 2, 7, 12), *attempt(3, 3, 12, 25, why="done")])
    assert found.is_proved
    assert found.worlds == (4, 2, 3)
    assert found.rolled_back == 3 + 1
    (data,) = found.data
    assert (data.steps, data.samples, data.epochs, data.counted) == (25, 200, 4.0, True)


def test_a_finished_run_of_the_same_name_is_not_counted():
    assert audit([*attempt(1, 2, 1, 9, why="done"), *attempt(2, 2, 1, 5, why="done")]).data[0].steps == 5


def test_a_run_continued_after_its_end_is_one_run():
    assert audit([*attempt(1, 2, 1, 9, why="done"), *attempt(2, 2, 10, 12, why="done")]).data[0].steps == 12


def test_a_lost_journal_breaks_the_proof_and_is_named():
    found = audit([attempt(1, 2, 1, 9)[0], *attempt(2, 2, 8, 12, why="done")])
    assert not found.is_proved
    assert "7 step(s) from 1 to 7 are in no journal of data rank 1 (attempt 1)" in found.data[0].problems[0]


def test_a_step_that_nobody_wrote_down_breaks_the_proof():
    found = audit([without_step(journal, 4) for journal in attempt(1, 2, 1, 9, why="done")])
    assert found.data[0].problems == ("step 4 is in no journal", "step 5: positions 24…31 of the stream were never used")


def test_samples_used_twice_break_the_proof():
    journals = attempt(1, 1, 1, 9, why="done")
    again = replace(journals[0].steps[5], uses={"data": [(32, BATCH, "")]})
    found = audit([replace(journals[0], steps=(*journals[0].steps[:5], again, *journals[0].steps[6:]))])
    assert "step 6: positions 32…39 of the stream were used twice" in found.data[0].problems
    assert any("8 sample(s) were used more than once" in problem for problem in found.data[0].problems)


def test_ranks_that_used_different_samples_break_the_proof():
    one, two = attempt(1, 2, 1, 3, why="done")
    other = replace(two.steps[1], uses={"data": [(64, BATCH, "")]})
    found = audit([one, replace(two, steps=(two.steps[0], other, two.steps[2]))])
    assert found.data[0].problems[0] == "step 2: rank 1 used 64…71, others used 8…15 in the same step"


def test_a_recovery_that_forgot_the_cursor_breaks_the_proof():
    late = [
        replace(journal, begin=replace(journal.begin, data={"data": replace(journal.begin.data["data"], position=0)}))
        for journal in attempt(2, 2, 7, 9, why="done")
    ]
    found = audit([*attempt(1, 2, 1, 6), *late])
    assert "a recovery to step 6 went on at position 0, and the step had ended at 48" in found.data[0].problems


def test_skipped_samples_are_told_and_do_not_break_the_proof():
    (journal,) = attempt(1, 1, 1, 4, why="done")
    skipping = replace(journal.steps[2], uses={"data": [(16, BATCH, "loss spike"), (24, BATCH, "")]})
    later = replace(journal.steps[3], uses={"data": [(32, BATCH, "")]})
    found = audit([replace(journal, steps=(*journal.steps[:2], skipping, later))])
    assert found.is_proved
    assert [(item.step, item.samples, item.why) for item in found.data[0].skipped] == [(3, 8, "loss spike")]


def test_ranks_that_are_one_step_apart_while_the_run_lives_are_no_problem():
    ahead, behind = attempt(1, 2, 1, 9)
    found = audit([ahead, without_step(behind, 9)])
    assert found.is_proved
    assert found.last_step == 8


def test_the_steps_of_one_sample_are_found():
    journals = attempt(1, 2, 1, 25, why="done")
    uses = uses_of(journals, "data", 17)
    assert [epoch for epoch, _ in uses] == [0, 1, 2, 3]
    for epoch, step in uses:
        assert (
            17
            in samples_at(range((step - 1) * BATCH, step * BATCH), 50, 11)[
                [place // 50 == epoch for place in range((step - 1) * BATCH, step * BATCH)]
            ]
        )


# -- journals on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    begin = attempt(3, 2, 5, 4)[1].begin
    recorder = Recorder(tmp_path, begin)
    recorder.step(5, 0.001, {"data": [(32, 8, "")]})
    recorder.step(6, 0.001, {"data": [(40, 8, "")]})
    recorder.end(6, "done")
    return recorder.path, begin


def test_a_journal_reads_back_as_it_was_written(written):
    path, begin = written
    journal = read_journal(path)
    assert journal.begin == begin
    assert [step.step for step in journal.steps] == [5, 6]
    assert journal.steps[1].uses == {"data": [(40, 8, "")]}
    assert journal.end.why == "done"
    words = last_words(path)
    assert (words.rank, words.step, words.why) == (1, 6, "done")


def test_a_line_cut_short_by_a_kill_is_passed_over(written):
    path, _ = written
    path.write_bytes(path.read_bytes()[:-12])
    assert read_journal(path).end is None
    assert last_words(path).why == ""


@pytest.mark.parametrize("line", [0, 1, 2])
def test_damage_anywhere_else_is_refused_with_its_place(written, line):
    path, _ = written
    lines = path.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b"5", b"4", 1) if line == 1 else lines[line][:-3] + b"000"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(CorruptData, match=f"line {line + 1}: crc32c"):
        read_journal(path)


def test_a_disk_that_refuses_costs_the_journal_and_not_the_training(tmp_path, caplog):
    (tmp_path / "journal").write_text("a file where the folder should be")
    recorder = Recorder(tmp_path, attempt(1, 1, 1, 1)[0].begin)
    recorder.step(1, 0.0, {})
    recorder.end(1, "done")
    assert "training goes on" in caplog.text


def test_a_run_without_records_is_named(tmp_path):
    with pytest.raises(NotACheckpoint, match="no journal in"):
        find_records(str(tmp_path))


# -- a real run --------------------------------------------------------------------------------------------------------------


def test_a_kill_and_a_resize_of_a_real_run_use_every_sample_once(job):
    """Three ranks, the middle one is killed, two go on; the model ends where an undisturbed loop over the same data ends."""
    # It dies with its step in the journal and not yet in a snapshot: that step is done again, and counts once.
    fault = [{"at": "journal.written", "role": "trainer", "place": 1, "nth": 8}]
    died = job.run(ranks=3, restarts=0, ok=False, script=SCRIPT, HOLDFAST_FAULTS=json.dumps(fault))
    assert died.code != 0
    ended = job.run("--workers", "1", ranks=2, out=died.out, script=SCRIPT)
    records = find_records(str(died.out / "run"))
    journals = read_journals([records])
    found = audit(journals)
    assert found.is_proved, found.data
    assert found.worlds == (3, 2)
    assert found.rolled_back >= 1
    assert (found.data[0].steps, found.data[0].samples) == (20, 160)

    command = [sys.executable, "-m", "holdfast.cli", "audit", str(died.out / "run"), "--json"]
    done = subprocess.run(command, env=job.env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["proved"] is True

    for path in (records / "journal").glob("000001-rank-00001.log"):
        path.unlink()
    done = subprocess.run(command[:-1], env=job.env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "are in no journal of data rank 1" in done.stdout

    undisturbed = trained_alone()
    for state in ended.states:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, undisturbed[name], rtol=1e-4, atol=1e-6)


def trained_alone() -> dict[str, torch.Tensor]:
    from tests.elastic.train_on_data import samples

    inputs, targets = samples().tensors
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(20):
        ids = torch.from_numpy(samples_at(range(step * BATCH, step * BATCH + BATCH), 50, 11))
        (model(inputs[ids]) - targets[ids]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)
