"""Which epoch a keeper is in, who else is, and whom it still listens to.

A message carries the epoch of its sender. A keeper that has been fenced, or that has just been started again, is *adrift*: it
knows the members of its last epoch, refuses every message of it, and waits to be taken into a newer one. The membership is
written down beside the slots, so that a keeper that dies alone knows after its restart whom to ask.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from holdfast.errors import StaleEpoch
from holdfast.snapshot.outbox import Outbox
from holdfast.snapshot.view import View
from holdfast.snapshot.wire import Handler, Header

logger = logging.getLogger(__name__)

JOURNAL = "membership.json"


class Membership:
    """The epoch of one keeper. Whoever changes or relies on more than one of its fields holds `lock`."""

    def __init__(self, node: int, memory: Path, lock: threading.RLock, deliver: Handler) -> None:
        self.node, self.lock = node, lock
        self._journal, self._deliver = memory / JOURNAL, deliver
        self._outboxes: dict[int, Outbox] = {}
        self.epoch = 0
        self.promised = 0
        """The newest epoch that this keeper has been told of; it joins none before that."""
        self.view: View | None = None
        self.former: View | None = None
        """The members it knew when it was fenced or died, until it joins again."""

    @property
    def is_adrift(self) -> bool:
        return self.view is None and self.former is not None

    def known(self) -> View | None:
        """The view, or the last one there was."""
        return self.view or self.former

    def current(self) -> View:
        if self.view is None:
            raise StaleEpoch(f"the keeper of node {self.node} has joined no epoch yet")
        return self.view

    def check(self, verb: str, epoch: int) -> None:
        """Raise StaleEpoch unless a message of `epoch` is one of ours."""
        if epoch != self.epoch or self.view is None:
            raise StaleEpoch(
                f"node {self.node} is in epoch {self.epoch}{'' if self.view else ', which is over'}, {verb!r} came from epoch "
                f"{epoch}: its sender was replaced"
            )

    def fence(self, epoch: int) -> None:
        """Leave the epoch: from now on nothing of it is heard, and only `epoch` or a newer one is joined."""
        if epoch <= self.promised:
            raise StaleEpoch(f"node {self.node} has promised itself to epoch {self.promised}; epoch {epoch} comes too late")
        self.promised = epoch
        self.view, self.former = None, self.known()
        self._hang_up()

    def join(self, view: View) -> None:
        if view.epoch <= self.epoch or view.epoch < self.promised:
            raise StaleEpoch(
                f"node {self.node} is already in epoch {max(self.epoch, self.promised)}; epoch {view.epoch} comes too late"
            )
        self.view, self.former, self.epoch, self.promised = view, None, view.epoch, view.epoch
        self._hang_up()
        self._outboxes = {member.node: Outbox(member, self.node, self.epoch, self._deliver) for member in view.members}

    def post(self, node: int, verb: str, /, **fields: Any) -> None:
        """One message, in order with the others to that node; lost when the node is not there, or in another epoch."""
        outbox = self._outboxes.get(node)
        if outbox is not None:
            outbox.put({"verb": verb, **fields})

    def broadcast(self, verb: str, /, **fields: Any) -> None:
        for node in tuple(self._outboxes):
            self.post(node, verb, **fields)

    def close(self) -> None:
        """Say what is still to be said, and no more."""
        outboxes, self._outboxes = self._outboxes, {}
        for outbox in outboxes.values():
            outbox.close(drain=True)

    def _hang_up(self) -> None:
        for outbox in self._outboxes.values():
            outbox.close()
        self._outboxes = {}

    # -- what of it is this node's own --

    @property
    def local_ranks(self) -> tuple[int, ...]:
        return self.current().member(self.node).ranks

    @property
    def group_nodes(self) -> tuple[int, ...]:
        return self.current().group_of(self.node)

    # -- over a restart --

    def write_down(self, trainers: Header, ended: Header | None) -> None:
        """Keep for a successor of this process: the view, this node's trainers, and how the run ended if it did."""
        view = self.known()
        fields = {"view": view.to_json() if view else None, "promised": self.promised, "trainers": trainers, "ended": ended}
        fresh = self._journal.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(fields))
        fresh.rename(self._journal)

    def learn(self, view: View) -> None:
        """A keeper that begins without memory hears of the epoch that its predecessor was in, and is adrift from now on."""
        if self.view is not None:
            raise StaleEpoch(f"the keeper of node {self.node} is in epoch {self.epoch} already")
        if self.node not in view.nodes:
            raise StaleEpoch(f"node {self.node} was no member of epoch {view.epoch}")
        if view.epoch > self.epoch:
            self.former, self.epoch, self.promised = view, view.epoch, max(self.promised, view.epoch)

    def touch(self) -> None:
        """Note that the run is alive; the age of what it leaves counts from here."""
        try:
            os.utime(self._journal)
        except OSError as error:
            logger.warning("node %d: %s cannot be touched: %s", self.node, self._journal, error)

    def take_over(self) -> tuple[Header, Header | None]:
        """What a predecessor wrote down: this keeper is adrift where that one was a member. Its trainers, and how its run ended."""
        try:
            fields = json.loads(self._journal.read_text())
            self.former = View.from_json(fields["view"]) if fields["view"] else None
            self.promised = int(fields["promised"])
            self.epoch = self.former.epoch if self.former else 0
            return fields["trainers"], fields["ended"]
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "node %d: what its last keeper wrote down cannot be read (%s); it waits for a new start", self.node, error
            )
            self.former = None
            return {}, None
