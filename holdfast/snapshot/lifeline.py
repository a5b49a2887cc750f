"""A trainer's eye on its keeper: where that dies or hangs, the trainer has it started again and trains on.

Ray restarts its actors by itself; a keeper in a plain process has nobody but the trainers of its node. The thread hears of the end
at once, because the socket that it holds is closed with the process. A keeper that lives and says nothing is asked now and then.

A keeper's memory outlives it, and its successor takes it over. Where the memory is gone as well, the trainers still know which run
and which epoch it was: their node gets a keeper that begins with nothing but that, each trainer takes a place with it anew, and it
returns into the run like one that only died. What it held is rebuilt from parity, or replaced by the next snapshot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from holdfast.errors import HoldfastError, KeeperUnreachable, StaleEpoch
from holdfast.events import emit
from holdfast.snapshot.birth import leave_address
from holdfast.snapshot.client import Endpoint, Link, ask_once, connect

logger = logging.getLogger(__name__)

PAUSE_S = (0.1, 5.0)
"""Between two attempts to bring a keeper back, from the first to the longest; they double."""

LOOKED_EVERY_S = 1.0
"""Between two looks whether there is a new epoch, whose members have to be known."""

REMOVING_S = 0.3
"""Left to whoever is just removing the memory to come to an end."""

ASKED_EVERY_S = 10.0
PATIENCE_S = 30.0
"""How long a keeper may leave the question unanswered whether it is there."""


class Lifeline:
    """Watches from the moment it is built until `close`. `revive` has the node's keeper started again where it does not answer."""

    def __init__(self, link: Link, revive: Callable[[], None]) -> None:
        self._link, self._memory, self._rank, self._revive = link, link.memory, link.rank, revive
        self._closed = threading.Event()
        self._endpoint: Endpoint | None = None
        self._view: dict[str, Any] | None = None
        self.is_lost = False
        """The keeper does not come back: only a new start of the run brings this node back into it."""
        self._thread = threading.Thread(target=self._watch, name="holdfast-lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        try:
            self._keep_watch()
        except ValueError:  # the link was closed, and its page with it
            if not self._closed.is_set():
                raise

    def _keep_watch(self) -> None:
        pause_s = PAUSE_S[0]
        while not self._closed.is_set():
            try:
                self._stay_connected()
                pause_s = PAUSE_S[0]
            except KeeperUnreachable:
                pass
            except StaleEpoch as error:
                self._give_up(f"it is not watched any more: {error}")
                return
            except (HoldfastError, OSError) as error:
                logger.error("rank %d: no place with its new keeper yet, next attempt soon: %s", self._rank, error)
                self._closed.wait(PAUSE_S[1])
                continue
            if self._closed.is_set() or self._link.is_over():
                return
            if self._link.page["gone"]:
                self._give_up("it was told to end and gave its memory back; no snapshot is committed until the run starts anew")
                return
            self._bring_back()
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])

    def _stay_connected(self) -> None:
        """Returns, or raises KeeperUnreachable, when the keeper is not there any more."""
        endpoint = Endpoint.read(self._memory)
        watched = connect(self._memory, timeout_s=PATIENCE_S)
        try:
            self._endpoint = endpoint
            if not self._link.page.is_current():
                self._reattach()
            self._learn()
            asked = time.monotonic()
            while not watched.has_ended(self._closed, min(LOOKED_EVERY_S, ASKED_EVERY_S)):
                self._learn()
                if time.monotonic() - asked >= ASKED_EVERY_S:
                    # Answered in every state, and without the keeper's lock, which it may hold for long.
                    ask_once(self._memory, "adrift", timeout_s=PATIENCE_S)
                    asked = time.monotonic()
        finally:
            watched.close()

    def _learn(self) -> None:
        """Know the members of the present epoch, for a keeper that would know nobody."""
        if self._view is None or self._view["epoch"] != self._link.page["epoch"]:
            self._view = ask_once(self._memory, "membership", timeout_s=PATIENCE_S)["view"] or self._view

    def _reattach(self) -> None:
        if self._view is None:
            raise StaleEpoch("its memory is gone, and of which run it was is not known")
        self._link.reattach(self._view)
        logger.warning("rank %d: has a place with its new keeper, which begins without memory", self._rank)
        emit("keeper.reattached", rank=self._rank)

    def _bring_back(self) -> None:
        is_gone = not self._link.page.is_current()
        if is_gone and self._closed.wait(REMOVING_S):
            return
        what = f"and its memory in {self._memory} are gone" if is_gone else "has died or hangs"
        logger.warning("rank %d: its keeper %s; it is started again, and snapshots are skipped meanwhile", self._rank, what)
        started = time.monotonic()
        try:
            if is_gone and self._endpoint is not None:
                leave_address(self._memory, self._endpoint.member, self._endpoint.pid)
            self._revive()
        except (HoldfastError, OSError) as error:
            logger.error("rank %d: its keeper could not be started again, next attempt soon: %s", self._rank, error)
            return
        logger.info("rank %d: its keeper is back after %.1f s", self._rank, time.monotonic() - started)
        emit("keeper.revived", rank=self._rank, seconds=time.monotonic() - started)

    def _give_up(self, why: str) -> None:
        self.is_lost = True
        logger.error("rank %d: the keeper that serves %s is away for good: %s", self._rank, self._memory, why)
