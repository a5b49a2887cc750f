"""The keeper's watch: are its peers there, are its bytes still the ones that were written, could they really be rebuilt?

A thread of the keeper's, at the keeper's low priority. Every few seconds it asks the peers of its group how they are, and once in
a while it scrubs the committed slots and drills a rebuild. What comes of it is in `holdfast status`, in events and in the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError
from holdfast.events import emit
from holdfast.snapshot.exchange import SlotReader
from holdfast.snapshot.peers import ask
from holdfast.snapshot.scrub import Drilled, Scrubbed, Scrubber
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.view import GroupRecord, Member, View, effective_parity

if TYPE_CHECKING:
    from holdfast.snapshot.keeper import Keeper

logger = logging.getLogger(__name__)

PEERS_EVERY_S = 5.0
PEER_PATIENCE_S = 5.0
SCRUB_NBYTES_PER_S = 128 << 20
"""Bytes that a scrub or a drill reads per second. A hundredth of what memory gives, and 8 GiB are through in a minute."""


@dataclass(frozen=True, slots=True)
class Health:
    """What a keeper says of itself: in which epoch it is, what it has committed, how many slots it could not repair, and whether
    it has its group's parity of what is committed."""

    epoch: int
    committed: int
    damaged: int
    parity: bool = True

    def protects(self, epoch: int) -> bool:
        """Its blocks can be counted on in a rebuild."""
        return self.epoch == epoch and self.committed > 0 and not self.damaged and self.parity


def survivable_losses(view: View | None, node: int, known: Mapping[int, Health | None]) -> int:
    """How many more nodes of this node's group may be lost now: its parity, less those that are lost or damaged already.

    `known` is what was last heard of each node; None is a node that does not answer, and one that was not asked yet is believed.
    """
    if view is None:
        return 0
    group = view.group_of(node)
    gone = [other for other in group if other in known and not _is_well(known[other], view.epoch)]
    return max(0, effective_parity(view.parity, len(group)) - len(gone))


def _is_well(health: Health | None, epoch: int) -> bool:
    return health is not None and health.protects(epoch)


class Watch:
    """Watches one keeper. Until `start`, and with `every_s` 0, it does nothing by itself; everything has its method."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper, self._members = keeper, keeper.members
        self._known: dict[int, Health | None] = {}
        self._said: int | None = None
        self._random = Random()
        self._scrubber = Scrubber(keeper.slots, self._readers, self._pace)
        self._last_scrub: dict[str, Any] | None = None
        self._last_drill: dict[str, Any] | None = None

    def start(self, every_s: float) -> None:
        if every_s > 0:
            threading.Thread(target=self._run, args=(every_s,), name="holdfast-watch", daemon=True).start()

    def verb_health(self) -> dict[str, Any]:
        """How this node is, asked by its peers."""
        return asdict(self.health())

    # -- what is known --

    def health(self) -> Health:
        with self._keeper.lock:  # a commit changes data and parity one after the other
            held = [slot.header for slot in self._keeper.slots.values() if slot.header.state is SlotState.COMMITTED]
            view = self._members.view
        committed = max((header.step for header in held), default=0)
        # Damage counts while the slot that has it is the newest: nothing older is what recovery returns to.
        damaged = sum(step == committed for _, step in self._scrubber.damaged)
        wanted = view is not None and effective_parity(view.parity, len(view.group_of(self._keeper.node))) > 0
        # What was restored from another layout has the parity of groups that are no more.
        foreign = view is not None and view.cut_anew and committed <= view.committed
        parity = not wanted or (not foreign and any(header.rank < 0 and header.step == committed for header in held))
        return Health(self._members.epoch, committed, damaged, parity)

    def survivable_losses(self) -> int:
        own = self.health()
        if not own.committed:
            return 0
        return survivable_losses(self._members.view, self._keeper.node, {**self._known, self._keeper.node: own})

    def status(self) -> dict[str, Any]:
        """For `holdfast status`: times are seconds since the epoch."""
        view = self._members.view
        group = view.group_of(self._keeper.node) if view is not None else ()
        return {
            "group": list(group),
            "parity": effective_parity(view.parity, len(group)) if view is not None else 0,
            "survivable_losses": self.survivable_losses(),
            "last_scrub": self._last_scrub,
            "last_drill": self._last_drill,
            "damaged": len(self._scrubber.damaged),
        }

    # -- what is done --

    def _run(self, every_s: float) -> None:
        peers_s = scrub_s = time.monotonic()
        while not self._keeper.wait_closed(min(PEERS_EVERY_S, every_s)):
            try:
                now = time.monotonic()
                if now - peers_s >= PEERS_EVERY_S:
                    peers_s = now
                    self.look_round()
                if now - scrub_s >= every_s:
                    self.scrub()
                    self.drill()
                    scrub_s = time.monotonic()
            except Exception:  # whatever goes wrong while watching, the keeper keeps
                logger.exception("node %d: the watch failed and goes on", self._keeper.node)

    def look_round(self) -> None:
        """Ask every peer of the group how it is, and say when more or fewer losses can be survived than before."""
        view = self._members.view
        if view is None:
            return
        peers = [view.member(node) for node in view.group_of(self._keeper.node) if node != self._keeper.node]
        self._known = {peer.node: _ask(peer) for peer in peers}
        losses = self.survivable_losses()
        if losses != self._said and self.health().committed:
            absent = [node for node, health in self._known.items() if not _is_well(health, view.epoch)]
            if self._said is not None or losses < effective_parity(view.parity, len(peers) + 1):
                level = logging.WARNING if self._said is None or losses < self._said else logging.INFO
                what = f"; not protecting: {absent}" if absent else ""
                logger.log(level, "node %d: %d more node(s) of its group may be lost%s", self._keeper.node, losses, what)
            emit("snapshot.survivable_losses", job=self._keeper.job, node=self._keeper.node, losses=losses, absent=absent)
            self._said = losses

    def scrub(self) -> Scrubbed:
        """One pass over all committed slots of the node."""
        done = self._scrubber.scrub()
        fields = {
            "nbytes": done.nbytes,
            "seconds": done.seconds,
            "rotten": len(done.rot),
            "repaired": done.repaired,
            "slots": done.slots,
            "left": done.left,
        }
        self._last_scrub = {"time_s": time.time(), **fields}
        emit("scrub.done", job=self._keeper.job, node=self._keeper.node, **fields)
        for rot in done.rot:
            where = {"slot": rot.slot, "step": rot.step, "region": rot.region}
            emit("scrub.rot", job=self._keeper.job, node=self._keeper.node, repaired=not rot.problem, **where)
        return done

    def drill(self) -> Drilled | None:
        """Rebuild a random block from the peers' blocks and compare; when they differ, look for the reason at once."""
        for _ in range(3):  # a step that was committed and replaced within milliseconds is no fault
            done = self._scrubber.drill(self._keeper.node, self._random)
            if done is not None:
                break
        else:
            return None
        fields = {"step": done.step, "nbytes": done.nbytes, "seconds": done.seconds, "agrees": done.agrees}
        self._last_drill = {"time_s": time.time(), **fields}
        emit("drill.done", job=self._keeper.job, node=self._keeper.node, **fields)
        if not done.agrees:
            logger.error(
                "node %d: a block of step %d, rebuilt from its peers, is not the block that is here; scrubbing now",
                self._keeper.node,
                done.step,
            )
            self.scrub()
        return done

    # -- helpers --

    def _readers(self, group: GroupRecord) -> dict[int, SlotReader]:
        """A reader for every node of the group that answers, this one included."""
        view = self._members.view
        members = {member.node: member for member in view.members} if view is not None else {}
        found: dict[int, SlotReader] = {}
        for record in group.records:
            member = self._keeper.member if record.node == self._keeper.node else members.get(record.node)
            if member is not None and (record.node == self._keeper.node or _ask(member) is not None):
                found[record.node] = self._keeper.reader(member)
        return found

    def _pace(self, nbytes: int) -> None:
        self._keeper.wait_closed(nbytes / SCRUB_NBYTES_PER_S)


def _ask(member: Member) -> Health | None:
    """What a peer says of itself, or None."""
    with suppress(HoldfastError, TypeError, KeyError, ValueError):
        return Health(**ask(member, "health", timeout_s=PEER_PATIENCE_S))
    return None
