"""A trainer's side of its keeper: the socket, the control page and the slots it writes into."""

from __future__ import annotations

import json
import logging
import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.arrays import FragmentTable
from holdfast.errors import HoldfastError, KeeperUnreachable, MissingData, StaleEpoch
from holdfast.snapshot.birth import ENDPOINT, SOCKET
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.exchange import slot_name
from holdfast.snapshot.slots import HEADER_NBYTES
from holdfast.snapshot.view import Member
from holdfast.snapshot.wire import Connection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How processes of this host find the keeper of a node: by the file it leaves in the node's memory."""

    member: Member
    pid: int

    @classmethod
    def read(cls, memory: Path) -> Endpoint:
        try:
            fields = json.loads((memory / ENDPOINT).read_text())
            return cls(pid=fields.pop("pid"), member=Member.from_json(fields))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeeperUnreachable(f"no keeper has left its address in {memory} ({error})") from error


def connect(memory: Path, *, timeout_s: float = 60.0) -> Connection:
    """A connection to the keeper that serves `memory` on this host. Raises KeeperUnreachable."""
    endpoint = Endpoint.read(memory)
    return Connection(str(memory / SOCKET), endpoint.member.token, timeout_s=timeout_s)


def ask_once(memory: Path, verb: str, /, *, timeout_s: float = 60.0, **fields: Any) -> Any:
    """One question to the keeper that serves `memory` on this host. Raises KeeperUnreachable, or what the keeper answers with."""
    connection = connect(memory, timeout_s=timeout_s)
    try:
        return connection.ask(verb, **fields)
    finally:
        connection.close()


class Link:
    """What one rank needs of its keeper while it trains. Not for two threads at once, but for the words of `page`.

    A keeper that was started again is found again with the next question. Slots and page outlive it; where they do not, `reattach`
    takes a place anew.
    """

    def __init__(self, memory: Path, rank: int, launch: str, body_nbytes: int) -> None:
        self.memory, self.rank = memory, rank
        self._launch, self._room_nbytes = launch, body_nbytes
        self._connection = connect(memory)
        try:
            answer = self._connection.ask("attach", rank=rank, pid=os.getpid(), launch=launch, body_nbytes=body_nbytes)
        except HoldfastError:
            self._connection.close()
            raise
        self._who = {"rank": rank, "attachment": answer["attachment"]}
        self.page = ControlPage(Path(answer["control"]))
        self.page["pid"] = os.getpid()
        self._former_pages: list[ControlPage] = []
        self._next_attachment = secrets.token_hex(8)
        self._bodies: dict[int, _SlotBody] = {}
        self._known_layout = ""
        self._guard: tuple[str, bytes] | None = None
        self._closed = False
        self._committed = 0
        self.before_unmap: Callable[[memoryview], None] = lambda body: None
        """Called with a slot's body before its mapping goes, by the one who has told a device about that memory."""

    @property
    def who(self) -> dict[str, Any]:
        """What a keeper knows this trainer by, on connections that others of its threads open."""
        return dict(self._who)

    @property
    def committed_step(self) -> int:
        """The newest step that all nodes have committed; after `close`, what it was then."""
        if not self._closed:
            self._committed = self.page["committed"]
        return self._committed

    def body(self, index: int, nbytes: int) -> memoryview:
        """The writable body of slot `index` with room for `nbytes`; the keeper makes a larger one where it is too small.

        Raises StaleEpoch when another process has taken this one's place: its slots are not ours to write into.
        """
        found = self._bodies.get(index)
        if found is None or not found.is_current():
            found = self._open(index)
        if len(found.body) < nbytes:
            self.ask("reserve", index=index, body_nbytes=nbytes, **self._who)
            found = self._open(index)
        return found.body

    def _open(self, index: int) -> _SlotBody:
        old = self._bodies.pop(index, None)
        if old is not None:
            self.before_unmap(old.body)
            old.close()
        fresh = _SlotBody(self.memory / slot_name(self.rank, index))
        # In this order: a keeper that lets another process in replaces the page before the slots, so the slot that was just
        # opened can only be a successor's if the page is no longer ours by now.
        if not self.page.is_current():
            fresh.close()
            raise StaleEpoch(f"another process has taken the place of rank {self.rank}; this one was replaced and must stop")
        self._bodies[index] = fresh
        return fresh

    def filled(self, step: int, index: int, nbytes: int, layout: str, table: FragmentTable, objects: dict[str, str]) -> bool:
        """Hand a captured snapshot to the keeper; False when its round has been given up meanwhile."""
        who, body = self._who, self._bodies.get(index)
        # What was copied into a file that nobody finds any more is not what its successor of the same name holds.
        if body is not None and not body.is_current():
            raise StaleEpoch(f"{slot_name(self.rank, index)} was replaced while step {step} was captured into it")
        for _ in range(2):
            head = b"" if layout == self._known_layout else table.to_bytes()
            payload = len(head).to_bytes(8, "little") + head + json.dumps(objects).encode()
            fields: dict[str, Any] = {
                "step": step,
                "index": index,
                "payload_nbytes": nbytes,
                "layout": layout,
            }
            answer = self.ask("filled", payload, **fields, **who)
            self._known_layout = "" if answer.get("table") else layout
            if not answer.get("table"):
                return bool(answer["taken"])
        return False

    def give_up(self, step: int, reason: str) -> None:
        self.ask("give_up", step=step, reason=reason, **self._who)

    def guard(self, policy: str, arrays: list[str]) -> None:
        """Have the keeper look at these arrays for NaN and infinity in every snapshot from now on.

        One that is just being started again hears of it before anything else that it is asked.
        """
        self._guard = (policy, json.dumps(arrays).encode())
        try:
            self.ask("guard", self._guard[1], policy=policy, **self._who)
        except KeeperUnreachable as error:
            logger.warning("rank %d: its keeper is away and will hear on its return what to look at: %s", self.rank, error)

    def is_over(self) -> bool:
        """The run has ended on all nodes, saved or not."""
        page = self.page
        return self._closed or (page["stopped"] == page["epoch"] != 0)

    def finishing(self, step: int, keep: bool) -> None:
        """Say that the loop has ended. The page says it as well, to a keeper that is just being started again."""
        page = self.page
        page.set_finished(step, keep=keep)
        if self.page is not page:  # it has just been replaced
            self.page.set_finished(step, keep=keep)
        try:
            self.ask("finishing", **self._who)
        except KeeperUnreachable as error:
            logger.warning("rank %d: its keeper is away and will read of the end on its return: %s", self.rank, error)

    def reattach(self, view: dict[str, Any]) -> None:
        """Take this rank's place with a keeper that has nothing of what its predecessor, a member of `view`, held.

        May be called from any one thread beside the others: those go on with the former page and slots, of which nothing is taken
        any more, until they come to the new ones. Raises StaleEpoch when another process has this rank's place.
        """
        former, room = self.page, max([self._room_nbytes, *(len(body.body) for body in self._bodies.copy().values())])
        fields: dict[str, Any] = {
            "rank": self.rank,
            "pid": os.getpid(),
            "launch": self._launch,
            "attachment": self._next_attachment,
        }
        answer = ask_once(self.memory, "reattach", **fields, body_nbytes=room, words=former.words(), view=view)
        page = ControlPage(Path(answer["control"]))
        self._former_pages.append(former)
        self.page, self._who = page, {"rank": self.rank, "attachment": self._next_attachment}
        page.catch_up(former)
        self._next_attachment = secrets.token_hex(8)

    def terminated(self, grace_s: float) -> None:
        """This process was told to end: blocks until the newest snapshot is a checkpoint, `grace_s` have passed, or it is clear
        that the run only starts again. May be called from any thread."""
        ask_once(self.memory, "terminated", timeout_s=grace_s + 5, grace_s=grace_s, **self._who)

    def ask(self, verb: str, payload: bytes = b"", **fields: Any) -> Any:
        """Ask the keeper, over a new connection where the last one is broken."""
        try:
            return self._connection.ask(verb, payload, **fields)
        except KeeperUnreachable:
            self._connection = connect(self.memory)
            self._connection.ask("hello", **self._who)
            if self._guard is not None:  # a keeper that was started again has never heard of it
                self._connection.ask("guard", self._guard[1], policy=self._guard[0], **self._who)
            return self._connection.ask(verb, payload, **fields)

    def close(self) -> None:
        for body in self._bodies.values():
            self.before_unmap(body.body)
            body.close()
        self._bodies.clear()
        self._committed, self._closed = self.committed_step, True
        for page in (self.page, *self._former_pages):
            page.close()
        self._connection.close()


class _SlotBody:
    """The trainer's writable mapping of a slot's body; the header page stays the keeper's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise MissingData(f"slot {path} is gone ({error.strerror})") from error
        try:
            self._inode = os.fstat(fd).st_ino
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(fd)
        self.body = memoryview(self._map)[HEADER_NBYTES:]

    def is_current(self) -> bool:
        """False once the keeper has put another file in this one's place."""
        try:
            return os.stat(self._path).st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        try:
            self.body.release()
            self._map.close()
        except BufferError:
            pass  # a view is still held; the mapping goes with it
