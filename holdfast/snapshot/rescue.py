"""When so many nodes of a group are gone that another loss would lose data, what is left is written as a checkpoint at once.

Every keeper asks the others of its group, now and then, whether they are there. A keeper that dies alone is back within seconds and
rescues nobody; one that stays away has lost its node. Then the lowest one left has the lost bytes rebuilt from parity among the
survivors and writes the newest whole step, without any trainer, and without the coordinator if that is among the lost.

Once somebody here has been told to end, nobody is waited for so long: a trainer waits in vain for a checkpoint that a lost node
has a part in, and a keeper has no more time than its grace.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.coding import Group
from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.events import crash_point, emit
from holdfast.snapshot import spill
from holdfast.snapshot.peers import ask, reach
from holdfast.snapshot.plan import Survey, plan_restore
from holdfast.snapshot.regroup import make_whole, newest_checkpoint
from holdfast.snapshot.view import Member, View
from holdfast.snapshot.wire import Connection

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

PING_S = 2.0
PATIENCE_S = 15.0
"""How long a keeper may be away before its node counts as lost; one that is restarted is back in about a second."""

URGENT_PING_S = 0.1
URGENT_PATIENCE_S = 2.0
"""The same two once a trainer or keeper of this node has been told to end."""

ANSWER_S = 5.0
AGAIN_S = 30.0
"""Between two attempts at a rescue that failed."""


class Rescue:
    """Watches the group's other keepers for as long as this one lives."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members = keeper, keeper.members
        self._connections: dict[int, Connection] = {}
        self._away: dict[int, float] = {}
        self._next = 0.0
        self._urgent = threading.Event()
        threading.Thread(target=self._watch, name="holdfast-rescue", daemon=True).start()

    def hurry(self) -> None:
        """Somebody here has been told to end, and has to know soon which nodes are lost. Lasts as long as the epoch."""
        self._urgent.set()

    def reset(self) -> None:
        """A new epoch."""
        self._urgent.clear()

    def _is_over(self) -> bool:
        """True once the keeper is closing; waits until it is time for another look."""
        return self._keeper.wait_closed(URGENT_PING_S) if self._urgent.wait(PING_S) else self._keeper.is_closed

    def _watch(self) -> None:
        epoch = 0
        while not self._is_over():
            view = self._members.known()  # the last one where this keeper is adrift: who waits for a dead peer rescues as well
            if view is None or view.checkpoints is None or self._keeper.has_ended:
                continue
            if view.epoch != epoch:
                epoch, self._next = view.epoch, 0.0
                self._away.clear()
                self._hang_up()
            try:
                self._look(view)
            except Exception:  # a watch that fails must not end the watching
                logger.exception("node %d could not look after its group", self._keeper.node)
        self._hang_up()

    def _look(self, view: View) -> None:
        group = next(group for group in view.groups() if self._keeper.node in group.nodes)
        now = time.monotonic()
        for node in group.nodes:
            if node == self._keeper.node or self._answers(view.member(node)):
                self._away.pop(node, None)
            else:
                self._away.setdefault(node, now)
        preempt, short = self._keeper.preempt, URGENT_PATIENCE_S if self._urgent.is_set() else PATIENCE_S
        for node in self._lost(now - short):
            preempt.node_lost(node)
        lost = self._lost(now - (short if preempt.is_ending else PATIENCE_S))
        if is_endangered(group, lost) and self._keeper.node == min(set(group.nodes) - lost) and now > self._next:
            self._next = now + AGAIN_S
            self._rescue(view, sorted(lost))

    def _lost(self, before: float) -> set[int]:
        """The nodes that have been away since before then."""
        return {node for node, since in self._away.items() if since < before}

    def _rescue(self, view: View, lost: list[int]) -> None:
        """Write the newest step that the survivors can put together, unless it is a checkpoint already."""
        logger.warning("nodes %s are gone and another loss would lose data; the newest snapshot is written now", lost)
        try:
            members, surveys = [], []
            for member in view.members:
                try:
                    surveys.append(Survey.from_json(ask(member, "survey", timeout_s=ANSWER_S)))
                    members.append(member)
                except KeeperUnreachable:
                    continue
            newest, _ = plan_restore(surveys)
            if newest is not None and newest.step <= newest_checkpoint(view.checkpoints):
                return
            plan, reasons = make_whole(surveys, {member.node: member for member in members})
            if plan is None:
                logger.error("nothing can be written from the nodes that are left: %s", "; ".join(reasons) or "no snapshot")
                return
            crash_point("rescue.rebuilt")
            left = replace(view, members=tuple(members))
            # Some of them may be adrift. Slots that were refilled meanwhile would show in their CRCs.
            path, nbytes = spill.write_checkpoint(
                left, plan.step, plan.index, lambda: self._members.known() is view, fenced=False
            )
        except (HoldfastError, OSError) as error:
            logger.error("the survivors of node(s) %s could not write a checkpoint: %s: %s", lost, type(error).__name__, error)
            emit("rescue.failed", job=view.job, lost=lost, error=str(error))
            return
        logger.warning("step %d is safe without node(s) %s: %s, %.1f MiB", plan.step, lost, path, nbytes / 2**20)
        with self._keeper.lock:
            self._members.broadcast("checkpointed", step=plan.step)
        emit("rescue.done", job=view.job, lost=lost, step=plan.step, path=str(path), nbytes=nbytes)

    def _answers(self, member: Member) -> bool:
        try:
            connection = self._connections.get(member.node)
            if connection is None:
                connection = self._connections[member.node] = reach(member, timeout_s=ANSWER_S)
            connection.ask("ping")
        except HoldfastError:
            self._connections.pop(member.node, None)
            return False
        return True

    def _hang_up(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


def is_endangered(group: Group, lost: set[int]) -> bool:
    """Everything can still be rebuilt, and after one more loss it could not."""
    return 0 < len(lost) == group.layout.m
