"""A keeper that died alone comes back into its run, and its trainers notice nothing but skipped snapshots.

Restarted, it finds its slots, its trainers' pages and the last membership in its memory, and tells the coordinator's keeper. That
one fences every member off the epoch, so that no header changes any more, decides from their headers what is newest and whole, has
rebuilt what is not, and lets all of them join a new epoch. Trainers keep their pages and slots; a capture that was under way is
not taken. When the coordinator's keeper was the one that died, it does the same by itself.

A regrouping is for trainers that live on. Where one has gone, or a new one has come, the start of the job decides instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast import ckpt
from holdfast.errors import HoldfastError, KeeperUnreachable, StaleEpoch
from holdfast.events import crash_point, emit
from holdfast.snapshot.peers import ask
from holdfast.snapshot.plan import Distrusted, RestorePlan, Survey, lies_as, plan_restore
from holdfast.snapshot.view import Member, View
from holdfast.snapshot.wire import Header

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

PAUSE_S = (0.05, 2.0)
"""Between two attempts, from the first to the longest; they double."""

GUEST_S = 5.0
"""How long a keeper may take to answer that may have been released."""

REPORTED_S = 10.0
"""How long a keeper waits for an epoch after it has told the coordinator's that it is back, before it says so again."""


class Regroup:
    """The verbs of a return, and the thread that carries one out."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members, self._lock = keeper, keeper.members, keeper.lock
        self._addresses: dict[int, Member] = {}
        self._thread: threading.Thread | None = None
        self._again = False

    def verb_returned(self, member: Header) -> None:
        """A member of this epoch was started again and knows nothing of its rounds. Told to the coordinator's keeper."""
        found = Member.from_json(member)
        with self._lock:
            view = self._members.known()
            if view is None or view.coordinator != self._keeper.node or found.node not in view.nodes:
                raise StaleEpoch(f"node {self._keeper.node} does not lead a membership with node {found.node}")
            self._addresses[found.node] = found
            self.start()

    def verb_adrift(self) -> Header:
        """Whether this keeper belongs to no epoch at the moment, and once did."""
        return {"adrift": self._members.is_adrift}

    def verb_fence(self, epoch: int, nodes: list[int]) -> Header:
        """Leave the present epoch for one that is being formed; what this node holds, after which it changes no more."""
        with self._lock:
            view = self._members.known()
            if view is None or sorted(view.nodes) != nodes:
                raise StaleEpoch(f"node {self._keeper.node} belongs to another membership than nodes {nodes}")
            self._refuse_unless_steady(view)
            self._members.fence(epoch)
            self._keeper.leave_epoch()
            crash_point("keeper.fenced")
            return {
                "survey": self._keeper.survey(),
                "progress": self._keeper.trainers.progress(view.member(self._keeper.node).ranks),
            }

    def _refuse_unless_steady(self, view: View) -> None:
        """Raise StaleEpoch when the trainers of this node are not, all of them, those that `view` was formed with."""
        if not self._keeper.trainers.are_of(view.member(self._keeper.node).ranks, view.epoch):
            raise StaleEpoch(
                f"node {self._keeper.node} has lost trainers or has new ones; a new start of the run will regroup it"
            )

    # -- coming back --

    def start(self) -> None:
        """Work on a return until this keeper is in an epoch again. Called with the lock held, any number of times."""
        self._again = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="holdfast-regroup", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        pause_s = PAUSE_S[0]
        while not self._keeper.is_closed:
            with self._lock:
                view = self._members.known()
                if view is None or not (self._again or self._members.is_adrift):
                    self._thread = None
                    return
                leads, self._again = view.coordinator == self._keeper.node, False
            try:
                self._regroup(view) if leads else self._report(view)
            except StaleEpoch as error:
                logger.warning("node %d stays out of its epoch until the run starts anew: %s", self._keeper.node, error)
                with self._lock:
                    self._thread = None
                return
            except (HoldfastError, OSError) as error:
                logger.info("node %d cannot regroup yet: %s", self._keeper.node, error)
                self._again = leads
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])

    def _report(self, view: View) -> None:
        """Tell the coordinator's keeper that we are here again, until it has taken us into an epoch."""
        ranks = view.member(self._keeper.node).ranks
        with self._lock:
            self._refuse_unless_steady(view)
        ask(view.member(view.coordinator), "returned", member=replace(self._keeper.member, ranks=ranks).to_json())
        deadline = time.monotonic() + REPORTED_S
        while self._members.is_adrift and time.monotonic() < deadline and not self._keeper.is_closed:
            time.sleep(0.02)

    def _regroup(self, view: View) -> None:
        members = tuple(self._present(member) for member in view.members)
        # Nobody is fenced off for a member that is not back yet, or for one that has been taken in meanwhile.
        adrift = [ask(member, "adrift")["adrift"] for member in members]
        if not any(adrift):
            return
        epoch = max(ask(member, "survey")["epoch"] for member in members) + 1
        told = {member.node: ask(member, "fence", epoch=epoch, nodes=sorted(view.nodes)) for member in members}
        crash_point("regroup.fenced")
        surveys = [Survey.from_json(answer["survey"]) for answer in told.values()] + _of_guests(view)
        plan, reasons = make_whole(surveys, {member.node: member for member in (*view.guests, *members)})
        fresh = formed(view, epoch, members, plan, newest_checkpoint(view.checkpoints))
        # Ours first: what the others have to say to the coordinator as soon as they have joined must find it there.
        for member in sorted(members, key=lambda member: member.node != self._keeper.node):
            ask(member, "join", view=fresh.to_json(), regrouped=True)
        crash_point("regroup.joined")
        self._keeper.lead.verb_begin(max(answer["progress"] for answer in told.values()))
        lost = f"; lost: {'; '.join(reasons)}" if plan is None and reasons else ""
        logger.warning("keepers regrouped in epoch %d with step %d committed%s", epoch, fresh.committed, lost)
        emit("keepers.regrouped", job=view.job, epoch=epoch, step=fresh.committed)

    def _present(self, member: Member) -> Member:
        """How a member is reached now: it may listen at another port than before it died."""
        if member.node == self._keeper.node:
            return replace(self._keeper.member, ranks=member.ranks)
        return self._addresses.get(member.node, member)


def formed(view: View, epoch: int, members: Sequence[Member], plan: RestorePlan | None, spilled: int) -> View:
    """The next epoch of the same nodes, which goes on from what `plan` found."""
    fresh = replace(view, epoch=epoch, members=tuple(members), in_memory=True, spilled=spilled)
    if plan is None:
        return replace(fresh, committed=0, index=1, protected=True, cut_anew=True)
    here = lies_as(plan, fresh)
    return replace(fresh, committed=plan.step, index=plan.index, protected=plan.protected or not here, cut_anew=not here)


def _of_guests(view: View) -> list[Survey]:
    """What keepers of an earlier membership still hold of the step that this one was restored from."""
    found = []
    for guest in view.guests:
        with suppress(KeeperUnreachable):
            found.append(Survey.from_json(ask(guest, "survey", timeout_s=GUEST_S)))
    return found


def make_whole(surveys: Sequence[Survey], members: Mapping[int, Member]) -> tuple[RestorePlan | None, list[str]]:
    """The newest step that these nodes can put together, with what was lost of it rebuilt; and why a newer one is not it."""
    distrusted: Distrusted = frozenset()
    notes: list[str] = []
    while True:
        plan, reasons = plan_restore(surveys, distrusted)
        damaged = _carry_out(plan, members) if plan is not None else {}
        if plan is None or not damaged:
            return plan, reasons + notes
        notes += [f"step {plan.step}: {', '.join(names)} of node {node} rotted" for node, names in damaged.items()]
        distrusted |= {(node, plan.step) for node in damaged}


def _carry_out(plan: RestorePlan, members: Mapping[int, Member]) -> dict[int, list[str]]:
    """Have every keeper that is named in the plan rebuild what was lost; the slots that turned out damaged, by node."""
    damaged: dict[int, list[str]] = {}
    for item in plan.rebuilds:
        answer = ask(members[item.host], "rebuild", **item.to_json(members))
        damaged |= {int(node): names for node, names in answer.get("damaged", {}).items()}
    return damaged


def newest_checkpoint(checkpoints: str | None) -> int:
    """The newest step that is a sound checkpoint, or 0."""
    if checkpoints is None or not Path(checkpoints).is_dir():
        return 0
    return max((info.step for info in ckpt.list_steps(checkpoints) if ckpt.is_sound(info)), default=0)
