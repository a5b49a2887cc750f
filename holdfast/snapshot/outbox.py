"""One-way messages from a keeper to a node: queued, and sent in order for as long as their epoch lasts.

A peer that cannot be reached for a moment, or a connection that was cut, costs time and no message: without the one that is missing
its round would wait for ever. One that was on its way when the connection broke is sent again, so it may be heard twice.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.snapshot.peers import reach
from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import Connection, Handler, Header

logger = logging.getLogger(__name__)

FLEETING = frozenset({"pulses"})
"""Verbs that say how things are now: one that is lost is made up for by the next, and worth nothing later."""

PAUSE_S = (0.05, 2.0)
"""Between two attempts to reach a node, from the first to the longest; they double."""


class Outbox:
    """Ordered messages to one node, sent from a thread of their own so that nobody waits for a slow or dead peer.

    A keeper's messages to itself are handed to `deliver`, on the same kind of thread. All are of one epoch.
    """

    def __init__(self, member: Member, node: int, epoch: int, deliver: Handler) -> None:
        self._member, self._node, self._epoch, self._deliver = member, node, epoch, deliver
        self._queue: queue.SimpleQueue[Header | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"holdfast-to-{member.node}", daemon=True)
        self._thread.start()

    def put(self, message: Header) -> None:
        self._queue.put(message)

    def close(self, *, drain: bool = False) -> None:
        """What is queued is tried once more, and no longer insisted on."""
        self._closed.set()
        self._queue.put(None)
        if drain and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _send(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._insist({**message, "epoch_of_sender": self._epoch})
            except HoldfastError as error:
                logger.warning("node %d was refused by node %d: %s", self._node, self._member.node, error)
            except Exception:
                logger.exception("node %d: a message to node %d failed", self._node, self._member.node)
        if self._connection is not None:
            self._connection.close()

    def _insist(self, message: Header) -> None:
        """Deliver it, however long that takes, unless the epoch ends meanwhile."""
        pause_s, is_said = 0.0, False
        while True:
            try:
                self._deliver_once(**message)
                return
            except KeeperUnreachable as error:
                self._connection = None
                if not is_said:
                    logger.warning("node %d cannot reach node %d: %s", self._node, self._member.node, error)
                is_said = True
            if message["verb"] in FLEETING or self._closed.wait(pause_s):
                return
            pause_s = min(max(2 * pause_s, PAUSE_S[0]), PAUSE_S[1])

    def _deliver_once(self, verb: str, **fields: Any) -> None:
        if self._member.node == self._node:
            self._deliver(verb, {**fields, "connection": 0}, memoryview(b""))
            return
        self._connection = self._connection or reach(self._member)
        self._connection.ask(verb, **fields)
