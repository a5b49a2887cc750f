"""What the keeper of the lowest node does beside its own slots: it feeds the coordinator and carries out what that decides.

Everything here can die at any moment. The next epoch's coordinator starts from what the slots' headers and the checkpoints on
disk say.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError, KeeperUnreachable, LayoutMismatch, StaleEpoch
from holdfast.events import crash_point, emit
from holdfast.snapshot import spill
from holdfast.snapshot.coordinator import (
    Acknowledged,
    Action,
    Announce,
    Begin,
    Commit,
    Coordinator,
    Encoded,
    Finishing,
    GivenUp,
    Hurry,
    Input,
    Phase,
    Protect,
    Spill,
    SpillEnded,
    Stop,
)
from holdfast.snapshot.interval import ASSUMED_CHECKPOINT_S, Intervals, Pace, checkpoint_seconds, is_news
from holdfast.snapshot.peers import ask
from holdfast.snapshot.view import Member, View
from holdfast.snapshot.wire import Header

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

LINGER_S = 30.0
"""How long a keeper whose run has ended goes on telling a peer that does not answer."""

_EVENTS: dict[str, type[Input]] = {
    kind.__name__: kind for kind in (Encoded, GivenUp, Acknowledged, SpillEnded, Finishing, Hurry)
}


class Lead:
    """Idle on every node but the lowest of the epoch."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members, self._lock = keeper, keeper.members, keeper.lock
        self.coordinator: Coordinator | None = None
        self._guests: tuple[Member, ...] = ()
        self._checked: tuple[tuple[int, str], ...] = ()
        self._spill_problem = ""
        self._writing = threading.Lock()
        self._pace = Pace()
        self._checkpoint_s = 0.0
        self._began = time.monotonic()
        self.intervals: Intervals | None = None
        self._said: Intervals | None = None

    def reset(self, view: View) -> None:
        """Lead the epoch of `view`, or do not. Called with the lock held."""
        self._guests, self._checked, self.coordinator = view.guests, (), None
        self._began, self.intervals, self._said = time.monotonic(), None, None
        if view.coordinator == self._keeper.node:
            self.coordinator = Coordinator(
                (member.node for member in view.members),
                every=view.every,
                checkpoint_every=view.checkpoint_every if view.checkpoints else 0,
                committed=view.committed,
                index=view.index,
                protected=view.protected,
                overdue=view.cut_anew,
                spilled=view.spilled,
            )

    # -- verbs --

    def verb_begin(self, progress: int = 0) -> None:
        """Told to the coordinator's keeper once every keeper has joined."""
        self.tell(Begin(progress))

    def verb_coordinate(self, event: str, fields: Header) -> None:
        self.tell(_EVENTS[event](**fields))

    # -- events and actions --

    def tell(self, event: Input) -> None:
        """Have the coordinator hear of an event, wherever it is."""
        with self._lock:
            view = self._members.current()
            if view.coordinator != self._keeper.node:
                self._members.post(view.coordinator, "coordinate", event=type(event).__name__, fields=asdict(event))
                return
            self._feed(self.coordinator, event)

    def _feed(self, coordinator: Coordinator | None, event: Input) -> None:
        with self._lock:
            if coordinator is None or coordinator is not self.coordinator:
                return  # of an epoch that is over
            for action in coordinator.feed(event):
                self._act(action, coordinator)

    def _act(self, action: Action, coordinator: Coordinator) -> None:
        match action:
            case Announce(step, index, number):
                look = self._keeper.diagnosis.look()
                self._members.broadcast("announce", step=step, index=index, round=number, look=look)
            case Protect(delay_s=0):
                self._protect(action)
            case Protect():
                threading.Thread(
                    target=self._protect_later, args=(action, coordinator), name="holdfast-again", daemon=True
                ).start()
            case Commit(step, index):
                self._members.broadcast("commit", step=step, index=index)
            case Stop(saved):
                problem = "" if saved else self._spill_problem or "the last step could not be captured on all ranks"
                self._keeper.begin_to_end(problem)
            case Spill():
                view = self._members.current()
                threading.Thread(
                    target=self._spill, args=(action, view, coordinator), name="holdfast-spill", daemon=True
                ).start()

    def _protect(self, action: Protect) -> None:
        crash_point("lead.protecting")
        self._members.broadcast("protect", step=action.step, index=action.index, round=action.round)

    def _protect_later(self, action: Protect, coordinator: Coordinator) -> None:
        if self._keeper.wait_closed(action.delay_s):
            return
        with self._lock:
            is_due = (coordinator.phase, coordinator.round) == (Phase.FILLING, action.round)
            if is_due and coordinator is self.coordinator and self._members.view is not None:
                self._protect(action)

    # -- checkpoints --

    def _spill(self, action: Spill, view: View, coordinator: Coordinator) -> None:
        """Write the committed step as a universal checkpoint, all nodes in parallel. A failure is said and tried again."""

        def is_current() -> bool:
            return self._members.epoch == view.epoch and self._members.view is not None

        ok = False
        time.sleep(action.delay_s)
        try:
            started = time.perf_counter()
            with self._writing:  # one of an epoch that is over may still be ending
                path, nbytes = spill.write_checkpoint(view, action.step, action.index, is_current)
            seconds, ok = time.perf_counter() - started, True
            self._checkpoint_s = seconds
            logger.info("checkpoint of step %d: %s, %.1f MiB in %.2f s", action.step, path, nbytes / 2**20, seconds)
            emit("checkpoint.committed", job=view.job, step=action.step, path=str(path), nbytes=nbytes, seconds=seconds)
            with self._lock:
                self._members.broadcast("checkpointed", step=action.step)
        except StaleEpoch as error:
            logger.error("checkpoint of step %d is dropped, its epoch %d is over: %s", action.step, view.epoch, error)
            emit("checkpoint.failed", job=view.job, step=action.step, error=str(error))
        except (HoldfastError, OSError) as error:
            self._spill_failed(view, action.step, error)
        except Exception as error:
            logger.exception("checkpoint of step %d failed", action.step)
            self._spill_failed(view, action.step, error)
        self._feed(coordinator, SpillEnded(action.index, ok))

    def _spill_failed(self, view: View, step: int, error: Exception) -> None:
        self._spill_problem = f"the checkpoint of step {step} could not be written: {type(error).__name__}: {error}"
        logger.error("%s; training goes on and it is tried again", self._spill_problem)
        emit("checkpoint.failed", job=view.job, step=step, error=str(error))

    # -- after a commit --

    def committed(self, step: int, index: int) -> None:
        if self.coordinator is not None:
            self._adapt(self.coordinator)
            self._release_guests()
            self._check_layout(step, index)

    def _adapt(self, coordinator: Coordinator) -> None:
        """Where "auto" was asked for: once enough snapshots have been seen, as often as they, and checkpoints, are worth it."""
        view, trainers = self._members.current(), self._keeper.trainers
        exchange_s = time.monotonic() - self._keeper.rounds.filled_at
        self._pace.add(exchange_s, [trainers.pages[rank] for rank in self._members.local_ranks])
        mtbf_s, measured = view.mtbf_s(time.monotonic() - self._began), self._pace.measured()
        if view.adaptive:
            coordinator.every = self._pace.steps(1 / mtbf_s)
        if measured is None or measured.step_s <= 0:
            return
        if view.checkpoint_adaptive and coordinator.checkpoint_every:
            wanted_s = checkpoint_seconds(self._checkpoint_s or ASSUMED_CHECKPOINT_S, mtbf_s)
            wanted = max(1, round(wanted_s / measured.step_s))
            # Every change may bring one checkpoint more than needed, because multiples of the new interval are others.
            if is_news(wanted, coordinator.checkpoint_every):
                coordinator.checkpoint_every = wanted
        self._say_intervals(
            Intervals(
                snapshot_every=coordinator.every,
                checkpoint_every=coordinator.checkpoint_every,
                mtbf_s=mtbf_s,
                checkpoint_s=self._checkpoint_s,
                **asdict(measured),
            ),
            is_chosen=view.adaptive or view.checkpoint_adaptive,
        )

    def _say_intervals(self, now: Intervals, *, is_chosen: bool) -> None:
        self.intervals = now
        if is_chosen and (self._said is None or now.differs(self._said)):
            self._said = now
            logger.info("%s: %s", self._keeper.job, now)
            emit("snapshot.intervals", job=self._keeper.job, **asdict(now))

    def _release_guests(self) -> None:
        """Keepers of an earlier membership are no longer needed once this one has committed a step."""
        guests, self._guests = self._guests, ()

        def release() -> None:
            for guest in guests:
                try:
                    ask(guest, "shutdown", timeout_s=60)
                except KeeperUnreachable as error:
                    logger.info("node %d, no longer a member, is gone already: %s", guest.node, error)

        if guests:
            threading.Thread(target=release, name="holdfast-release", daemon=True).start()

    def _check_layout(self, step: int, index: int) -> None:
        """When the layout has changed: every array is whole over all ranks, or the snapshots are worth nothing and we say so."""
        layouts = tuple(sorted((rank, layout) for rank, (layout, _) in self._keeper.rounds.tables.items()))
        if layouts == self._checked:
            return
        self._checked = layouts
        view = self._members.current()

        def check() -> None:
            try:
                spill.check_table(spill.gather(view, step, index)[0])
            except LayoutMismatch as error:
                logger.error("snapshots of %s cannot be restored as they are: %s", view.job, error)
                emit("snapshot.incomplete", job=view.job, step=step, error=str(error))
            except HoldfastError as error:
                logger.warning("the layout of step %d could not be checked: %s", step, error)
                self._checked = ()

        threading.Thread(target=check, name="holdfast-check", daemon=True).start()

    # -- the end --

    def end(self, view: View, problem: str) -> None:
        """The run has ended: every member hears of it, and one that is just being restarted is waited for a while.

        It would wait for its coordinator for ever otherwise, and its trainers with it.
        """
        left = [member for member in view.members if member.node != self._keeper.node]
        with ThreadPoolExecutor(max(1, len(left))) as pool:
            told = list(pool.map(lambda member: _tell_the_end(member, view.epoch, problem), left))
        crash_point("keeper.stopped")
        self._keeper.release_trainers(problem)
        left = [member for member, heard in zip(left, told, strict=True) if not heard]
        deadline = time.monotonic() + LINGER_S
        while left and time.monotonic() < deadline and not self._keeper.is_closed:
            time.sleep(0.1)
            left = [member for member in left if not _tell_the_end(member, view.epoch, problem)]
        if left:
            logger.warning("node(s) %s did not hear that the run has ended", [member.node for member in left])
        self._keeper.give_back(problem)


def _tell_the_end(member: Member, epoch: int, problem: str) -> bool:
    """True when the member has heard of it, or belongs to a newer epoch."""
    try:
        ask(member, "ended", timeout_s=10, epoch=epoch, problem=problem)
    except KeeperUnreachable:
        return False
    except HoldfastError as error:
        logger.info("node %d does not hear of the end of epoch %d: %s", member.node, epoch, error)
    return True
