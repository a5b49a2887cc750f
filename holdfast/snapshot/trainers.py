"""The trainers of one node, as their keeper knows them: who is attached, what each may still do, and who has left.

A rank's place is held by one attachment at a time. A trainer that was stopped, replaced and woken up again finds its control
page gone stale and its slot files replaced, and whatever it asks for carries an attachment that is no longer the rank's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, KeeperUnreachable, StaleEpoch
from holdfast.events import crash_point
from holdfast.snapshot.birth import is_alive
from holdfast.snapshot.control import ControlPage
from holdfast.snapshot.exchange import slot_name
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.store import META_ROOM, NodeSlots
from holdfast.snapshot.wire import Header

logger = logging.getLogger(__name__)


class Trainers:
    """Control pages and attachments by rank. Callers hold the keeper's lock."""

    def __init__(self, job: str, memory: Path, slots: NodeSlots, known: Header) -> None:
        self._job, self._memory, self._slots = job, memory, slots
        self._attached: dict[int, Header] = {}
        self._connections: dict[int, int] = {}
        self.pages: dict[int, ControlPage] = {}
        for text, trainer in known.items():
            path = self._page(int(text))
            if path.exists():
                self._attached[int(text)], self.pages[int(text)] = trainer, ControlPage(path)

    def attach(self, rank: int, pid: int, launch: str, body_nbytes: int, connection: int) -> Header:
        """Make room for two snapshots of `rank`; from now on this trainer speaks for it, and no other."""
        self._refuse_second_run(rank, launch)
        # The page first: a predecessor that wakes up between the two must not take the new slots for its own.
        self._replace_page(rank)
        crash_point("keeper.attaching")
        former = self._attached.get(rank)
        # Where not even the one who asks can be seen, in containers that share memory only, nobody's end can.
        may_be_written = (
            former is not None
            and former["pid"] != pid
            and (is_alive(former["pid"], or_zombie=True) or not is_alive(pid, or_zombie=True))
        )
        for index in (0, 1):
            name = slot_name(rank, index)
            slot = self._slots.get(name)
            if slot is not None and slot.header.state < SlotState.VERIFIED and may_be_written:
                self._slots.discard(name)  # the predecessor has it mapped and may be about to write into it
                slot = None
            # A slot of about the right size is kept: taking and touching memory anew costs more than restoring what is in it.
            if slot is None or slot.capacity < body_nbytes + META_ROOM // 2:
                self._slots.room(name, rank, index, body_nbytes + META_ROOM)
        attachment = secrets.token_hex(8)
        self._attached[rank] = {"pid": pid, "launch": launch, "attachment": attachment, "epoch": -1}
        self._connections[rank] = connection
        return {"control": str(self._page(rank)), "attachment": attachment}

    def reattach(self, rank: int, pid: int, launch: str, attachment: str, body_nbytes: int, words: Mapping[str, int]) -> Header:
        """As `attach`, for a trainer that lives on while all that its node held is gone: its page goes on from these words."""
        found = self._attached.get(rank)
        if found is None:
            self._replace_page(rank)
            self.pages[rank].take_over(words)
            for index in (0, 1):
                self._slots.room(slot_name(rank, index), rank, index, body_nbytes + META_ROOM)
            self._attached[rank] = {"pid": pid, "launch": launch, "attachment": attachment, "epoch": -1}
        else:
            self.check(rank, attachment)  # asked once more: the answer was lost
        return {"control": str(self._page(rank))}

    def knows(self, rank: int, attachment: str) -> bool:
        found = self._attached.get(rank)
        return found is not None and found["attachment"] == attachment

    def are_all_here(self, ranks: Iterable[int]) -> bool:
        return all(rank in self._attached for rank in ranks)

    def check(self, rank: int, attachment: str) -> None:
        """Raise StaleEpoch unless `attachment` is the rank's present one; KeeperUnreachable where nobody has ever had its place."""
        found = self._attached.get(rank)
        if found is None:
            raise KeeperUnreachable(f"this keeper begins without memory and has not heard of rank {rank} yet")
        if found["attachment"] != attachment:
            raise StaleEpoch(f"another process has taken the place of rank {rank}; this one was replaced and must stop")

    def reconnected(self, rank: int, connection: int) -> None:
        self._connections[rank] = connection

    def disconnected(self, connection: int) -> list[int]:
        """The ranks that spoke over this connection, and are gone with it if their processes are."""
        gone = [rank for rank, own in self._connections.items() if own == connection]
        for rank in gone:
            del self._connections[rank]
        return gone

    def any_alive(self) -> bool:
        return any(is_alive(trainer["pid"]) for trainer in self._attached.values())

    def pids(self) -> dict[int, int]:
        return {rank: trainer["pid"] for rank, trainer in self._attached.items()}

    def belong(self, ranks: Iterable[int], epoch: int) -> None:
        """Note that the present trainers of these ranks are those that `epoch` was formed with."""
        for rank in ranks:
            self._attached[rank]["epoch"] = epoch

    def are_of(self, ranks: Iterable[int], epoch: int) -> bool:
        """All of these ranks are alive, and none has been replaced since `epoch` was formed."""
        found = [self._attached.get(rank) for rank in ranks]
        return all(trainer is not None and trainer["epoch"] == epoch and is_alive(trainer["pid"]) for trainer in found)

    def to_json(self) -> Header:
        return {str(rank): trainer for rank, trainer in self._attached.items()}

    # -- pages --

    def say(self, ranks: Iterable[int], **words: int) -> None:
        """Set words on the pages of these ranks."""
        for rank in ranks:
            for word, value in words.items():
                self.pages[rank][word] = value

    def progress(self, ranks: Iterable[int]) -> int:
        return max((self.pages[rank]["completed"] for rank in ranks), default=0)

    def finished(self, ranks: Iterable[int]) -> tuple[int, bool] | None:
        """The step at which all these ranks ended their loops, and whether one wants it kept; None while one still trains."""
        ends = [self.pages[rank].finished for rank in ranks]
        if not ends or any(end is None for end in ends):
            return None
        known = [end for end in ends if end is not None]
        return max(step for step, _ in known), any(keep for _, keep in known)

    def _page(self, rank: int) -> Path:
        return self._memory / f"control-{rank}"

    def _replace_page(self, rank: int) -> None:
        old = self.pages.pop(rank, None)
        if old is not None:
            old.close()
        self._page(rank).unlink(missing_ok=True)
        self.pages[rank] = ControlPage(self._page(rank), create=True)

    def _refuse_second_run(self, rank: int, launch: str) -> None:
        known: dict[str, Any] | None = self._attached.get(rank)
        if known is not None and known["launch"] != launch and is_alive(known["pid"]):
            raise ConfigError(
                f"another run named {self._job!r} is alive (its rank {rank} is pid {known['pid']}); give this one another name "
                "with protect(name=…), or end the other"
            )
