"""A folder in shared memory of the test's own, and an environment that points nowhere else."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder with a short path (UNIX sockets must fit), removed afterwards whatever happened."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    place = Path(tempfile.mkdtemp(prefix="hft-", dir=base))
    (place / "run").mkdir()
    monkeypatch.setenv("HOLDFAST_MEMORY", str(place))
    monkeypatch.setenv("HOLDFAST_RUNTIME", str(place / "run"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Wait for a claim to come true, generously."""

    def wait(claim: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not claim():
            assert time.monotonic() < deadline, f"in vain: {what}"
            time.sleep(0.002)

    return wait
