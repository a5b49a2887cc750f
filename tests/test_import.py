"""`import holdfast` is free: no thread, no torch, no Ray, no GPU, nothing but names."""

from __future__ import annotations

import subprocess
import sys

import holdfast


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_holdfast_loads_no_heavy_package() -> None:
    code = "import sys, holdfast; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(in_a_fresh_interpreter(code).split())
    assert "holdfast" in loaded
    assert not loaded & {"torch", "ray", "numpy", "pyarrow", "zarr", "triton", "rich", "reedsolo", "pyeclib"}


def test_a_rank_that_starts_again_does_not_load_what_only_checkpoints_need() -> None:
    """It would be a quarter of what a rank imports of holdfast, while all wait for the slowest."""
    code = "import sys, holdfast.elastic.session; print(*(name for name in sys.modules if name.startswith('holdfast.ckpt')))"
    assert in_a_fresh_interpreter(code) == ""


def test_importing_holdfast_starts_no_thread_and_opens_no_socket() -> None:
    code = (
        "import os\n"
        "before = set(os.listdir('/proc/self/fd'))\n"
        "import holdfast\n"
        "print(len(os.listdir('/proc/self/task')), len(set(os.listdir('/proc/self/fd')) - before))"
    )
    assert in_a_fresh_interpreter(code) == "1 0"


def test_importing_holdfast_reads_no_environment() -> None:
    code = (
        "import os\n"
        "class Watched(type(os.environ)):\n"
        "    def __getitem__(self, name):\n"
        "        raise AssertionError(f'{name} was read')\n"
        "os.environ.__class__ = Watched\n"
        "import holdfast\n"
        "print('ok')"
    )
    assert in_a_fresh_interpreter(code) == "ok"


def test_every_public_name_is_there() -> None:
    assert [name for name in holdfast.__all__ if not hasattr(holdfast, name)] == []
    assert len(set(holdfast.__all__)) == len(holdfast.__all__)


def test_errors_end_the_command_line_with_the_code_of_who_can_act() -> None:
    codes = {
        holdfast.HoldfastError: 1,
        holdfast.CallerError: 2,
        holdfast.StateError: 2,
        holdfast.NotACheckpoint: 3,
        holdfast.MissingData: 5,
        holdfast.CorruptData: 5,
        holdfast.SnapshotLost: 5,
    }
    assert {error: error.exit_code for error in codes} == codes
