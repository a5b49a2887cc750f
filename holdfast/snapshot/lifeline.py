"""A trainer's eye on its keeper: where that dies or hangs, the trainer has it started again and trains on.

Ray restarts its actors by itself; a keeper in a plain process has nobody but the trainers of its node. The thread hears of the end
at once, because the socket that it holds is closed with the process. A keeper that lives and says nothing is asked now and then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.events import emit
from holdfast.snapshot.client import ask_once, connect

logger = logging.getLogger(__name__)

PAUSE_S = (0.1, 5.0)
"""Between two attempts to bring a keeper back, from the first to the longest; they double."""

ASKED_EVERY_S = 10.0
PATIENCE_S = 30.0
"""How long a keeper may leave the question unanswered whether it is there."""


class Lifeline:
    """Watches from the moment it is built until `close`. `revive` has the node's keeper started again where it does not answer."""

    def __init__(self, memory: Path, rank: int, revive: Callable[[], None], is_over: Callable[[], bool]) -> None:
        self._memory, self._rank, self._revive, self._is_over = memory, rank, revive, is_over
        self._closed = threading.Event()
        self.is_lost = False
        """The keeper's memory is gone with it: only a new start of the run brings this node back."""
        self._thread = threading.Thread(target=self._watch, name="holdfast-lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        pause_s = PAUSE_S[0]
        while not self._closed.is_set():
            try:
                watched = connect(self._memory, timeout_s=PATIENCE_S)
                try:
                    while not watched.has_ended(self._closed, ASKED_EVERY_S):
                        # Answered in every state, and without the keeper's lock, which it may hold for long.
                        ask_once(self._memory, "adrift", timeout_s=PATIENCE_S)
                finally:
                    watched.close()
                pause_s = PAUSE_S[0]
            except KeeperUnreachable:
                pass
            if self._closed.is_set() or self._is_over():
                return
            if not self._memory.exists():
                self.is_lost = True
                logger.error(
                    "rank %d: the keeper and its memory in %s are gone; no snapshot is committed until the run starts anew",
                    self._rank,
                    self._memory,
                )
                return
            self._bring_back()
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])

    def _bring_back(self) -> None:
        logger.warning(
            "rank %d: its keeper has died or hangs; it is started again, and snapshots are skipped meanwhile", self._rank
        )
        started = time.monotonic()
        try:
            self._revive()
        except (HoldfastError, OSError) as error:
            logger.error("rank %d: its keeper could not be started again, next attempt soon: %s", self._rank, error)
            return
        logger.info("rank %d: its keeper is back after %.1f s", self._rank, time.monotonic() - started)
        emit("keeper.revived", rank=self._rank, seconds=time.monotonic() - started)
