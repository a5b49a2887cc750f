"""A crash anywhere leaves the older checkpoint whole and the new one either invisible or whole; disks that refuse are told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import ckpt, events
from holdfast.ckpt.steps import unfinished
from holdfast.errors import NotACheckpoint, StorageError
from tests.ckpt.saving import assert_holds, cut, model, save, write

POINTS = [
    "ckpt.begun",
    "ckpt.fragments_written",
    "ckpt.fragments_synced",
    "ckpt.journal_written",
    "ckpt.coverage_checked",
    "ckpt.files_completed",
    "ckpt.metadata_written",
    "ckpt.tables_written",
    "ckpt.synced",
    "ckpt.renamed",
    "ckpt.committed",
    "ckpt.latest_written",
]
VISIBLE = {"ckpt.committed", "ckpt.latest_written"}


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> dict[str, Path]:
    """For every crash point a run that has step 1 and whose save of step 2 was killed there."""
    base = tmp_path_factory.mktemp("died")
    save(base / "step1", model(seed=1))
    roots = [base / f"at-{number:02}" for number in range(len(POINTS))]
    for root in roots:
        shutil.copytree(base / "step1", root)
    script = Path(__file__).with_name("dying.py")
    house = str(Path(ckpt.__file__).parents[2])
    command = [sys.executable, str(script), str(base / "rehearsal"), *map(str, roots)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": house}, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == POINTS
    return dict(zip(POINTS, roots, strict=True))


@pytest.mark.parametrize("point", POINTS)
def test_a_save_killed_at(died, point):
    root = died[point]
    assert_holds(root, model(seed=1), step=1)
    assert ckpt.open_checkpoint(root, 1).verify().is_whole
    newest = ckpt.latest(root)
    assert newest is not None
    if point in VISIBLE:
        assert newest.step == 2
        assert_holds(root, model(seed=2))
        assert ckpt.open_checkpoint(root).verify().is_whole
    else:
        assert newest.step == 1
        assert [info.step for info in ckpt.list_steps(root)] == [1]
        assert_holds(root, model(seed=1))
        with pytest.raises(NotACheckpoint):
            ckpt.open_checkpoint(root, 2)


@pytest.mark.parametrize("point", [point for point in POINTS if point not in VISIBLE])
def test_the_step_can_be_saved_again_after_a_save_killed_at(died, point, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(died[point], root)
    write(root, cut(model(seed=2), ((0, 4),)), step=2, token="again")
    assert_holds(root, model(seed=2))
    assert ckpt.open_checkpoint(root).verify().is_whole
    assert len(unfinished(root)) == 1


def test_the_directory_of_a_save_that_died_after_its_rename_is_no_checkpoint(died):
    with pytest.raises(NotACheckpoint, match="its save never finished"):
        ckpt.open_checkpoint(died["ckpt.renamed"] / "step-00000002")


def fail_on(monkeypatch, function: str, number: int) -> None:
    """From its second call on, an operating system call fails as a full or a forbidden disk does."""
    real, calls = getattr(os, function), []

    def failing(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("function", ["pwrite", "fsync"])
@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, r"no space left .* are free"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails_is_told_and_the_older_step_stays(tmp_path, monkeypatch, function, number, words):
    save(tmp_path, model(seed=1))
    with monkeypatch.context() as patch:
        fail_on(patch, function, number)
        with pytest.raises(StorageError, match=words):
            write(tmp_path, cut(model(seed=2), ((0, 4),)), step=2)
    newest = ckpt.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert_holds(tmp_path, model(seed=1))


def test_a_directory_that_may_not_be_written_is_told(tmp_path):
    """A file where the run's directory should be: refused to root as well, unlike a mode."""
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match="beginning a checkpoint in"):
        write(tmp_path / "run", cut(model(), ((0, 4),)))


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"the save needs .* bytes, 1000 are free"):
        write(tmp_path / "run", cut(model(), ((0, 4),)))
    assert not (tmp_path / "run").exists()


def test_a_file_size_limit_is_told(tmp_path):
    """A real limit of the kernel, in a real process."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from tests.ckpt.saving import cut, model, write; from pathlib import Path;"
        "write(Path(sys.argv[1]), cut(model(), ((0, 4),)))"
    )
    house = str(Path(ckpt.__file__).parents[2])
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": house})
    assert done.returncode == 1
    assert "StorageError: writing a checkpoint to" in done.stderr
    assert "File too large" in done.stderr
    assert ckpt.latest(tmp_path / "run") is None


def test_a_commit_is_told_to_subscribers(tmp_path):
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append)
    save(tmp_path, model(), step=9)
    unsubscribe()
    assert [(event.name, event.fields["step"]) for event in told] == [("ckpt.committed", 9)]


def test_latest_names_the_newest_step(tmp_path):
    save(tmp_path, model(), step=3)
    save(tmp_path, model(), step=12)
    assert (tmp_path / "LATEST").read_text() == "step-00000012\n"
    assert [info.step for info in ckpt.list_steps(tmp_path)] == [3, 12]
