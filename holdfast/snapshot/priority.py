"""How far a keeper's process stands back for the trainers beside it.

Nice 19, for every thread, from the start. Where the kernel shares the cores out by session (autogroup), niceness counts within a
session only and a keeper has one of its own; there the session is what is nice. A session can also be hurried: on a machine whose
cores are all busy a nice one gets a hundredth of a core, and neither a recovery that trainers wait for nor a snapshot may take
minutes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

NICE, HURRIED = 19, 0
HURRY_S = 5.0
"""How long a process stays hurried after the last time it was told to hurry."""

PATIENCE_S = 2.0
"""A piece of background work that takes longer is starved of processor time."""

_SESSION = Path("/proc/self/autogroup")


class Priority:
    """The priority of this process. Does nothing until `lower`, so that keepers inside other processes leave those alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lowered = False
        self._hurried_until = 0.0
        self._busy_since: float | None = None
        self._now = NICE

    def lower(self) -> None:
        """Stand back, from now on. Before any thread is started: niceness is a thread's, and inherited by those it starts."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
            if _SESSION.exists() and _leads_session():
                _SESSION.write_text(str(NICE))
                self._lowered = True
                threading.Thread(target=self._keep, name="holdfast-priority", daemon=True).start()
        except OSError:
            logger.warning("the keeper's priority could not be lowered; it may slow the trainers")

    def hurry(self) -> None:
        """Somebody waits for this process."""
        self._hurried_until = time.monotonic() + HURRY_S
        if self._lowered and self._now != HURRIED:
            self._set(HURRIED)

    def busy(self, *, since: float | None) -> None:
        """A piece of background work was begun at `since` (monotonic seconds), or is done."""
        self._busy_since = since

    def _keep(self) -> None:
        while True:
            time.sleep(PATIENCE_S / 4)
            now, since = time.monotonic(), self._busy_since
            starved = since is not None and now - since > PATIENCE_S
            wanted = HURRIED if starved or now < self._hurried_until else NICE
            self._now = _niceness()  # others may have hurried this process
            if wanted != self._now:
                self._set(wanted)

    def _set(self, niceness: int) -> None:
        # The kernel takes a few changes a second; one that it refuses is tried again by `_keep`.
        with self._lock, suppress(OSError):
            _SESSION.write_text(str(niceness))
            self._now = niceness


def hurry_other(pid: int) -> None:
    """Have another process of this user hurry before it is asked: on busy cores one that stands back may hear only after seconds.

    It calms down by itself.
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(HURRIED))


def _niceness() -> int:
    return int(_SESSION.read_text().rpartition(" ")[2])


def _leads_session() -> bool:
    """Whether this process has a session of its own by now. Who leads a process group, as Ray's workers do, cannot have one."""
    with suppress(OSError):
        if os.getsid(0) != os.getpid():
            os.setsid()
    return os.getsid(0) == os.getpid()


priority = Priority()
"""This process's."""
