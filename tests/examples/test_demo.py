"""What the demo concludes from logs and files, that it ends what it started, and, in the campaign, the whole demo."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.cli._stage import DemoFailed, Log, Stage, Training, end_tree, examples, is_alive, process_start_s
from holdfast.cli.demo import (
    CheckpointReport,
    DemoReport,
    DemoSettings,
    Kill,
    Recovery,
    loss_difference,
    loss_differences,
    recovery_of,
    report_lines,
    state_differences,
)
from holdfast.errors import ConfigError


def step(number: int, at_s: float = 0.0, loss: float | None = None, stall_s: float = 0.0) -> dict[str, Any]:
    loss = float(number) if loss is None else loss
    return {"time_s": at_s, "step": number, "loss": loss, "loss_hex": loss.hex(), "step_s": 0.25, "stall_s": stall_s}


def start(at_s: float, recovered: int | None = None) -> dict[str, Any]:
    found = {"rung": "parity", "step": recovered, "seconds": 0.5, "phases": {"load": 0.25}}
    return {"time_s": at_s, "pid": 1, "recovery": None if recovered is None else found}


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it never came true")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [{"nodes": 1}, {"ranks": 3}, {"steps": 11}, {"seed": -1}, {"parity": -1}, {"nodes": 0}, {"parity": 8}]
)
def test_settings_that_cannot_be_rehearsed_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        DemoSettings(**setting)


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    DemoSettings(keep=tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="new or an empty folder"):
        DemoSettings(keep=tmp_path)


def test_a_checkpoint_is_restored_for_another_number_of_ranks() -> None:
    for ranks in (2, 3, 4, 7):
        settings = DemoSettings(ranks=ranks, nodes=2)
        assert settings.restored_ranks != ranks
        assert 2 * ranks % settings.restored_ranks == 0  # the batch


# -- what is concluded from logs ---------------------------------------------------------------------------------------


def test_equal_runs_have_no_differences_even_where_steps_were_trained_twice() -> None:
    reference = Log(steps=[step(1), step(2), step(3)])
    assert loss_differences(reference, Log(steps=[step(1), step(2), step(2), step(3)])) == []


def test_a_loss_that_differs_in_its_last_bit_is_found_and_so_is_a_step_left_out() -> None:
    reference = Log(steps=[step(1), step(2), step(3)])
    protected = Log(steps=[step(1), step(2, loss=math.nextafter(2.0, 3.0)), step(2)])
    found = loss_differences(reference, protected)
    assert [line.split(":")[0] for line in found] == ["step 2", "step 3 was never trained"]


def test_a_recovery_is_told_from_the_kill_to_the_first_new_step() -> None:
    log = Log(
        starts=[start(0.0), start(20.0, recovered=3)],
        steps=[step(1, 1.0), step(2, 2.0), step(3, 3.0), step(4, 4.0), step(4, 21.0), step(5, 22.0)],
    )
    recovery = recovery_of(log, 1, Kill("node", 4.5, detected_s=5.0, restarted_s=7.0))
    assert recovery == Recovery(
        kind="node",
        rung="parity",
        step=3,
        steps_lost=1,
        seconds=16.5,
        phases={"detected": 0.5, "restarted": 2.0, "rebuilt": 12.5, "restored": 0.5, "first_step": 1.0},
        restore_phases={"load": 0.25},
    )
    assert sum(recovery.phases.values()) == recovery.seconds


def test_a_start_from_nothing_is_no_recovery() -> None:
    log = Log(starts=[start(0.0), start(20.0)], steps=[step(1, 1.0), step(1, 21.0)])
    assert recovery_of(log, 1, Kill("trainer", 2.0)) is None


def test_stall_per_step_leaves_out_what_a_start_costs() -> None:
    log = Log(
        starts=[start(0.0), start(10.0, recovered=2)],
        steps=[step(1, 1.0, stall_s=5.0), step(2, 2.0, stall_s=5.01), step(3, 11.0, stall_s=7.0), step(4, 12.0, stall_s=7.03)],
    )
    assert log.stall_ms_per_step() == pytest.approx(20.0)


def test_a_resumed_run_is_near_when_its_mean_loss_is() -> None:
    reference = Log(steps=[step(1), step(2), step(3)])
    assert loss_difference(reference, Log(steps=[step(2, loss=2.5), step(3, loss=2.5)])) == 0.0
    assert loss_difference(reference, Log(steps=[step(2, loss=4.0), step(3, loss=4.0)])) == 1.5
    assert loss_difference(reference, Log(steps=[step(2, loss=math.nan)])) is None
    assert loss_difference(reference, Log()) is None


# -- what is concluded from files --------------------------------------------------------------------------------------


def save(folder: Path, arrays: dict[str, torch.Tensor], rank: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"step": 9, "arrays": arrays}, folder / f"rank-{rank:05d}.pt")
    return folder


def test_equal_states_have_no_differences(tmp_path: Path) -> None:
    arrays = {"model/w": torch.arange(4.0), "optim/w/step": torch.tensor(9.0)}
    assert state_differences(save(tmp_path / "one", arrays), save(tmp_path / "other", arrays)) == []


@pytest.mark.parametrize(
    ("arrays", "difference"),
    [
        ({"model/w": torch.tensor([0.0, 1.0]).nextafter(torch.ones(2))}, "model/w differs"),
        ({"model/w": torch.tensor([0.0, 1.0], dtype=torch.float64)}, "model/w differs"),
        ({"model/w": torch.zeros(3)}, "model/w differs"),
        ({"model/v": torch.tensor([0.0, 1.0])}, "model/w is in one run only"),
    ],
)
def test_every_array_that_differs_is_named(tmp_path: Path, arrays: dict[str, torch.Tensor], difference: str) -> None:
    one = save(tmp_path / "one", {"model/w": torch.tensor([0.0, 1.0])})
    found = state_differences(one, save(tmp_path / "other", arrays))
    assert f"rank-00000.pt: {difference}" in found


def test_a_rank_that_saved_nothing_is_found(tmp_path: Path) -> None:
    arrays = {"model/w": torch.zeros(2)}
    one, other = save(tmp_path / "one", arrays), save(tmp_path / "other", arrays)
    save(one, arrays, rank=1)
    assert state_differences(one, other) == ["rank-00001.pt: model/w is in one run only"]
    assert state_differences(tmp_path / "nothing", tmp_path / "nowhere") == ["no run saved its final state"]


# -- the report --------------------------------------------------------------------------------------------------------


def report(**changes: Any) -> DemoReport:
    checkpoint = {"step": 30, "path": "c", "nbytes": 38_000_000, "seconds": 0.5, "verified": True, "verify_seconds": 0.25}
    checkpoint |= {"restored_ranks": 2, "restore_seconds": 2.0, "resumed_steps": 15, "loss_difference": 0.002}
    recovery = recovery_of(Log([start(0.0), start(9.0, recovered=1)], [step(1, 1.0), step(2, 10.0)]), 1, Kill("node", 2.0))
    assert recovery is not None
    facts = {"bit_identical": True, "differences": [], "steps_lost": 0, "recoveries": [recovery], "stall_ms_per_step": 1.5}
    facts |= {"step_ms": {"bare": 300.0, "protected": 310.0}, "seconds": 90.0, "settings": {}, "machine": {}}
    known = {name: changes.pop(name) for name in list(changes) if name in facts}
    return DemoReport(**{**facts, **known, "checkpoint": CheckpointReport(**{**checkpoint, **changes})})


def test_a_demo_that_kept_every_promise_says_so() -> None:
    assert report().is_success
    text = "\n".join(report_lines(report()))
    assert "bit-identical: yes" in text
    assert "parity" in text
    assert "36.2 MiB in 0.50 s" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bit_identical": False, "differences": [f"step {n}: the loss" for n in range(12)]}, "bit-identical: NO"),
        ({"bit_identical": False, "differences": [f"step {n}: the loss" for n in range(12)]}, "and 2 more"),
        ({"verified": False}, "DAMAGED"),
        ({"loss_difference": 2.0}, "NOT WITHIN"),
        ({"loss_difference": None}, "NO LOSSES TO COMPARE"),
    ],
)
def test_a_broken_promise_is_a_failure_and_is_said_loudly(changes: dict[str, Any], said: str) -> None:
    assert not report(**changes).is_success
    assert said in "\n".join(report_lines(report(**changes)))


# -- processes ---------------------------------------------------------------------------------------------------------


def test_the_example_is_found_beside_the_package() -> None:
    assert (examples() / "train_gpt.py").is_file()


def test_a_process_is_ended_with_descendants_that_have_sessions_of_their_own(tmp_path: Path) -> None:
    grandchild = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    )
    child = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)\n"
        "print(process.pid, flush=True)\n"
        "process.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    pid = int((lines - {"ready"}).pop())
    assert is_alive(pid)
    end_tree(parent)
    eventually(lambda: not is_alive(pid))
    parent.stdout.close()
    assert parent.returncode is not None
    end_tree(parent)


def test_a_process_start_is_told_in_the_clock_of_the_log() -> None:
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert before - 0.1 <= process_start_s(process.pid) <= time.time() + 0.1
    finally:
        process.kill()
        process.wait()


def test_a_training_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    (tmp_path / "console.log").write_text("first\n" * 100 + "ValueError: out of cheese\n")
    training = Training("protected", tmp_path, process)
    with pytest.raises(DemoFailed, match=r"the protected run ended with 3 before step 9(.|\n)*\| ValueError: out of cheese"):
        Stage(tmp_path, deadline_s=60).wait(training, lambda: False, "step 9")
    with pytest.raises(DemoFailed, match="the protected run ended with 3;"):
        Stage(tmp_path, deadline_s=60).finish(training)


def test_a_training_that_hangs_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    training = Training("protected", tmp_path, process)
    try:
        with pytest.raises(DemoFailed, match="no sign of its end"):
            Stage(tmp_path, deadline_s=0).finish(training)
        with pytest.raises(DemoFailed, match="no sign of step 9"):
            Stage(tmp_path, deadline_s=0).wait(training, lambda: False, "step 9")
    finally:
        end_tree(process)


def test_a_line_that_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lines = [json.dumps({"event": "start", **start(0.0)}), json.dumps({"event": "step", **step(1)})]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    log = Training("protected", tmp_path, process).read()
    assert (len(log.starts), log.last_step) == (1, 1)


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.timeout(400)
@pytest.mark.parametrize("options", [["--ranks", "4", "--nodes", "2"], ["--parity", "2", "--seed", "3"]])
def test_the_demo_keeps_every_promise(options: list[str]) -> None:
    command = [sys.executable, "-m", "holdfast.cli", "demo", "--json", "--steps", "24", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bit_identical"] is True
    assert [recovery["kind"] for recovery in found["recoveries"]] == ["trainer", "node"]
    assert found["checkpoint"]["verified"] is True
