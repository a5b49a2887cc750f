"""One-way messages from a keeper to a node: queued, sent in order, and lost with a word in the log when nobody is there."""

from __future__ import annotations

import logging
import queue
import threading

from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.snapshot.peers import reach
from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import Connection, Handler, Header

logger = logging.getLogger(__name__)


class Outbox:
    """Ordered messages to one node, sent from a thread of their own so that nobody waits for a slow or dead peer.

    A keeper's messages to itself are handed to `deliver`, on the same kind of thread. All are of one epoch.
    """

    def __init__(self, member: Member, node: int, epoch: int, deliver: Handler) -> None:
        self._member, self._node, self._epoch, self._deliver = member, node, epoch, deliver
        self._queue: queue.SimpleQueue[Header | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=f"holdfast-to-{member.node}", daemon=True)
        self._thread.start()

    def put(self, message: Header) -> None:
        self._queue.put(message)

    def close(self, *, drain: bool = False) -> None:
        self._queue.put(None)
        if drain and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _send(self) -> None:
        connection: Connection | None = None
        while (message := self._queue.get()) is not None:
            message["epoch_of_sender"] = self._epoch
            try:
                if self._member.node == self._node:
                    self._deliver(message.pop("verb"), {**message, "connection": 0}, memoryview(b""))
                else:
                    connection = connection or reach(self._member)
                    connection.ask(message.pop("verb"), **message)
            except KeeperUnreachable as error:
                connection = None
                logger.warning("node %d cannot reach node %d: %s", self._node, self._member.node, error)
            except HoldfastError as error:
                logger.warning("node %d was refused by node %d: %s", self._node, self._member.node, error)
            except Exception:
                logger.exception("node %d: a message to node %d failed", self._node, self._member.node)
        if connection is not None:
            connection.close()
