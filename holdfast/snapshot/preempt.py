"""Told to end: the newest snapshot becomes a checkpoint before the memory goes, as far as the grace time allows.

The word comes as SIGTERM, to the keeper itself or to a trainer, which passes it on. A launcher also sends SIGTERM to healthy
trainers when another one has died, or a whole node; then the run starts again from memory, and no trainer has to wait for a
checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from holdfast.errors import StaleEpoch
from holdfast.events import crash_point, emit
from holdfast.snapshot.coordinator import Hurry
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.wire import Header

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)


class Preempt:
    """What is left to do when this node, or the whole run, has been told to end."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members, self._lock = keeper, keeper.members, keeper.lock
        self._told: set[int] = set()
        self._died: set[int] = set()
        self._ending: set[int] = set()
        self._hurried = 0

    def reset(self) -> None:
        """A new epoch. Called with the lock held."""
        self._told.clear()
        self._died.clear()
        self._ending.clear()
        self._hurried = 0

    # -- who has gone, and how --

    def left(self, rank: int) -> None:
        """A trainer has hung up. Unless it was told to end, or had ended its loop, it died. Called with the lock held."""
        view = self._members.view
        if view is None or rank in self._told or self._keeper.trainers.pages[rank].finished:
            return
        if rank in view.member(self._keeper.node).ranks:
            self._members.broadcast("died", rank=rank)

    def verb_died(self, rank: int) -> None:
        """A trainer of this epoch, here or elsewhere, has died of itself: whoever is told to end now is being restarted."""
        self._died.add(rank)

    def node_lost(self, node: int) -> None:
        """The keeper of `node` stays away, and can tell nobody that its trainers have died with it."""
        with self._lock:
            view = self._members.view
            if view is None:
                return
            for rank in set(view.member(node).ranks) - self._died:
                self._members.broadcast("died", rank=rank)

    def verb_terminated(self, rank: int, attachment: str, grace_s: float) -> Header:
        """The trainer of `rank` was told to end. Returns when it may: the newest snapshot is a checkpoint, or there is no time."""
        with self._lock:
            self._keeper.trainers.check(rank, attachment)
            self._told.add(rank)
        self._keeper.rescue.hurry()
        return {"saved": self.save(grace_s, is_vain=lambda: bool(self._died))}

    def verb_going(self, node: int) -> None:
        """The keeper of `node` was told to end, and its memory goes with it: nothing can be put off any more."""
        self._ending.add(node)
        self._keeper.rescue.hurry()

    @property
    def is_ending(self) -> bool:
        """This node, or another of the epoch, is about to go."""
        return bool(self._ending)

    # -- doing it --

    def told_to_end(self) -> None:
        """Save what can be saved, then end. Returns at once."""
        threading.Thread(target=self._end, name="holdfast-preempt", daemon=True).start()

    def _end(self) -> None:
        view = self._members.view
        logger.info("node %d was told to end", self._keeper.node)
        saved = view is None
        try:
            if view is not None:
                self._members.broadcast("going", node=self._keeper.node)
                saved = self.save(view.grace_s)
            crash_point("preempt.saved")
        finally:
            # What is nowhere else is left where a new start on this host finds it.
            self._keeper.close(free=saved)

    def save(self, grace_s: float, is_vain: Callable[[], bool] = lambda: False) -> bool:
        """Have the newest committed step written as a checkpoint within `grace_s`; True when it is one.

        Gives up as soon as `is_vain`.
        """
        started = time.monotonic()
        while not is_vain():
            with self._lock:
                view = self._members.view
                committed, written = self._committed(), self._keeper.checkpointed
                if committed <= written or self._keeper.is_closed:
                    return True
                if view is None or view.checkpoints is None:
                    return False
                try:
                    if committed > self._hurried:
                        self._hurried = committed
                        self._keeper.tell(Hurry())
                except StaleEpoch:
                    return False
            if time.monotonic() - started > grace_s:
                logger.error(
                    "step %d is not a checkpoint after the %.0f s of grace; the newest one is of step %d",
                    committed,
                    grace_s,
                    written,
                )
                emit("preempt.unsaved", job=self._keeper.job, node=self._keeper.node, step=committed, checkpoint=written)
                return False
            time.sleep(0.02)
        return False

    def _committed(self) -> int:
        found = (slot.header.step for slot in self._keeper.slots.values() if slot.header.state is SlotState.COMMITTED)
        return max(found, default=0)
