"""Memory that dead runs left behind: found, named where room is short, and removed when nobody can want it any more.

A run that died keeps its slots on purpose, because its next start recovers from them. Only what has had neither keeper nor trainer
for a day is taken for forgotten.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.snapshot.birth import LOCK, is_alive
from holdfast.snapshot.membership import JOURNAL

logger = logging.getLogger(__name__)

FORGOTTEN_S = 24 * 3600.0
"""How long memory waits for a new start of its run."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The memory of a node of a dead run; `age_s` since its last commit, or since it was last joined."""

    job: str
    path: Path
    nbytes: int
    age_s: float

    def __str__(self) -> str:
        return f"{self.job} ({self.nbytes / 2**20:.1f} MiB in {self.path}, {self.age_s / 3600:.1f} h old)"


def leftovers(home: Path) -> list[Leftover]:
    """Every node's memory below `home` that no living keeper or trainer uses, the largest first."""
    found = [_look(place) for place in home.glob("*/node-*") if place.is_dir() and not _is_used(place)]
    return sorted(found, key=lambda leftover: -leftover.nbytes)


def sweep(home: Path, *, but: str) -> list[Leftover]:
    """Remove what has been forgotten, of all runs `but` the one that is about to start; says what."""
    gone = [leftover for leftover in leftovers(home) if leftover.job != but and leftover.age_s > FORGOTTEN_S]
    for leftover in gone:
        logger.warning("removed what a dead run left in memory: %s", leftover)
        shutil.rmtree(leftover.path, ignore_errors=True)
        try:
            leftover.path.parent.rmdir()
        except OSError:
            continue  # another node of it is in use
    return gone


def words_for(home: Path) -> str:
    """What could be freed below `home`, for an error that says that room is short; empty when nothing could."""
    found = leftovers(home)
    if not found:
        return ""
    return f". Dead runs hold {', '.join(map(str, found[:4]))}: start them again, or remove these directories"


def _look(place: Path) -> Leftover:
    files = [path for path in place.iterdir() if path.is_file()]
    marks = [path.stat().st_mtime for path in (place / JOURNAL, place / LOCK) if path.exists()]
    newest = max(marks, default=place.stat().st_mtime)
    return Leftover(place.parent.name, place, sum(path.stat().st_size for path in files), max(0.0, time.time() - newest))


def _is_used(place: Path) -> bool:
    return _has_keeper(place) or any(is_alive(pid) for pid in _trainers(place))


def _has_keeper(place: Path) -> bool:
    try:
        fd = os.open(place / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _trainers(place: Path) -> list[int]:
    try:
        return [int(trainer["pid"]) for trainer in json.loads((place / JOURNAL).read_text())["trainers"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
