"""The keeper of one node: owns the slots, outlives the trainers, and with its peers makes every snapshot survive lost nodes.

A plain class. A Ray actor hosts it in production and a plain process can as well; it imports neither Ray nor torch. Trainers of
the node talk to it over a UNIX socket, peers over TCP with a token; both are the same verbs. This file is birth, membership, what
others may read, and the end; each other story has a file of its own:

    membership.py   which epoch, and whom to listen to          trainers.py   who speaks for a rank
    rounds.py       a snapshot's way, from announced to committed
    lead.py         the coordinator's keeper                    regroup.py    a keeper that died comes back
    preempt.py      told to end: the last snapshot is saved     rescue.py     peers that are gone
    repair.py       what a lost node held is recomputed
    reprotect.py    … and its parity after it
    watch.py        scrubs, drills, and how many losses are survivable now
    poison.py       snapshots that hold NaN
    diagnosis.py    which rank holds the others up
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from holdfast.arrays import Fragment, FragmentTable
from holdfast.ckpt.storage import place
from holdfast.coding import crc32c
from holdfast.errors import ClusterError, KeeperUnreachable, MissingData, StaleEpoch
from holdfast.events import crash_point, emit
from holdfast.snapshot import spill
from holdfast.snapshot.birth import LOCK, SOCKET, advertised, host_identity, identity, listen, only_one, write_endpoint
from holdfast.snapshot.control import COUNTS
from holdfast.snapshot.coordinator import Acknowledged, Finishing, Input
from holdfast.snapshot.diagnosis import Diagnosis
from holdfast.snapshot.exchange import SlotReader, check_holds
from holdfast.snapshot.lead import Lead
from holdfast.snapshot.membership import Membership
from holdfast.snapshot.outline import Outlines, base_of, difference
from holdfast.snapshot.poison import PoisonGuard
from holdfast.snapshot.preempt import Preempt
from holdfast.snapshot.priority import priority
from holdfast.snapshot.regroup import Regroup
from holdfast.snapshot.repair import Repair
from holdfast.snapshot.reprotect import Reprotect
from holdfast.snapshot.rescue import Rescue
from holdfast.snapshot.rounds import Rounds
from holdfast.snapshot.slots import Slot, SlotState
from holdfast.snapshot.store import NodeSlots, group_of
from holdfast.snapshot.trainers import Trainers
from holdfast.snapshot.view import Member, View
from holdfast.snapshot.watch import Watch
from holdfast.snapshot.wire import Connection, FileRange, Header, Reply, Server

logger = logging.getLogger(__name__)

UNLOCKED = frozenset({"parity", "spill", "pulses"})
"""Verbs of an epoch that move many bytes or compare many ranks; they guard themselves. All others run while nothing changes."""

URGENT = {"ping", "attach", "reattach", "survey", "tables", "join", "begin", "rebuild", "share", "decode"}
"""Trainers stand still until these are answered."""

LOOKED_EVERY_S = 1.0
"""Between two looks whether the memory is still there."""

NEED_CONNECTION = frozenset({"attach", "hello", "range", "share", "decode"})


class Keeper:
    """Serves one node of one job from the moment it is built until `close`. Raises ConfigError when one is alive already."""

    def __init__(
        self,
        job: str,
        node: int,
        memory: Path,
        *,
        bind: str = "127.0.0.1",
        mapped: bool = True,
        domain: str = "",
        watch_every_s: float = 0.0,
    ) -> None:
        self.job, self.node, self.memory = job, node, memory
        self.mapped = mapped
        self._last: dict[str, float] = {}
        self._closed = threading.Event()
        self._released = threading.Event()
        self._ending = False
        self.is_robbed = False
        """Its memory was removed while it lived."""
        self.bereft: Header | None = None
        """When this node's trainers came here because all that their last keeper held was gone, and what it had committed."""
        self._guard = only_one(memory)
        self.slots = NodeSlots(job, node, memory)
        self.lock, self.outlines = self.slots.lock, Outlines(self.slots)
        self.members = Membership(node, memory, self.lock, self._handle)
        known, self._ended = self.members.take_over()
        self.trainers = Trainers(job, memory, self.slots, known)
        self.checkpointed = 0
        self.rounds, self.lead, self.regroup = Rounds(self), Lead(self), Regroup(self)
        self.preempt, self.rescue = Preempt(self), Rescue(self)
        self.repair, self.reprotect = Repair(self), Reprotect(self)
        self.watch, self.poison, self.diagnosis = Watch(self), PoisonGuard(self), Diagnosis(self)
        stories = (self.rounds, self.lead, self.regroup, self.preempt, self.repair, self.watch, self.poison, self.diagnosis)
        parts = (self, *stories)
        self._verbs = {name[5:]: getattr(part, name) for part in parts for name in dir(part) if name.startswith("verb_")}
        former = identity(memory)
        listeners, port = listen(memory / SOCKET, bind, former.port)
        self.token = former.token
        self.member = Member(node, host_identity(memory), advertised(bind), port, self.token, str(memory), (), domain)
        write_endpoint(memory, self.member)  # before anything is answered: who hears an answer may read whose it is
        self._server = Server(listeners, self.token, self._handle, self._disconnected)
        logger.info("keeper of %s node %d serves %s (port %d), pid %d", job, node, memory, port, os.getpid())
        self.watch.start(watch_every_s)
        self._go_on()

    def _go_on(self) -> None:
        """Where a predecessor of this process stopped."""
        with self.lock:
            if self._ended is not None:
                self.begin_to_end(str(self._ended["problem"]))
            elif self.members.is_adrift:
                crash_point("keeper.returned")
                self.regroup.start()

    def _handle(self, verb: str, fields: Header, payload: memoryview) -> Reply | Header | None:
        found: Callable[..., Reply | Header | None] | None = self._verbs.get(verb)
        if self._ending and verb in ("ping", "attach", "join"):
            raise KeeperUnreachable(f"the keeper of node {self.node} is ending, its run is over")
        if found is None:
            raise ClusterError(f"this keeper does not know the verb {verb!r}; are two releases of holdfast mixed?")
        if verb in URGENT:
            priority.hurry()
        connection, epoch = fields.pop("connection"), fields.pop("epoch_of_sender", None)
        if verb in NEED_CONNECTION:
            fields["connection"] = connection
        if payload:
            fields["payload"] = payload
        if epoch is None:
            return found(**fields)
        with self.lock:
            self.members.check(verb, epoch)
            if verb not in UNLOCKED:
                return found(**fields)
        return found(epoch_of_sender=epoch, **fields)

    # -- trainers come and go --

    def verb_ping(self) -> None:
        """Answered by a keeper that is here to stay."""

    def verb_attach(self, rank: int, pid: int, launch: str, body_nbytes: int, connection: int) -> Header:
        """Make room for two snapshots of `rank`, and hear no other trainer in its place. A committed slot is left alone."""
        with self.lock:
            answer = self.trainers.attach(rank, pid, launch, body_nbytes, connection)
            self._write_down()
        return answer

    def verb_reattach(
        self, rank: int, pid: int, launch: str, attachment: str, body_nbytes: int, words: dict[str, int], view: Header
    ) -> Header:
        """A trainer of `view` lives on, and its node's memory is gone with the last keeper. It gets a new page and new slots.

        With the last one of the node this keeper returns into the run like one that was started again, and has its slots rebuilt.
        """
        former = View.from_json(view)
        with self.lock:
            if not self.trainers.knows(rank, attachment):
                self.members.learn(former)
                self.bereft = {"time_s": time.time(), "step": words.get("committed", 0)}
            answer = self.trainers.reattach(rank, pid, launch, attachment, body_nbytes, words)
            known = self.members.former
            if known is not None and self.trainers.are_all_here(ranks := known.member(self.node).ranks):
                self.trainers.belong(ranks, known.epoch)
                self.regroup.start()
            self._write_down()
            crash_point("keeper.reattached")
        return answer

    def verb_membership(self) -> Header:
        """The members of this epoch, or of the last one there was. Trainers remember them, should this keeper lose its memory."""
        view = self.members.known()
        return {"view": view.to_json() if view is not None else None}

    def verb_hello(self, rank: int, attachment: str, connection: int) -> None:
        """A trainer that is attached already speaks over a new connection."""
        with self.lock:
            self.trainers.check(rank, attachment)
            self.trainers.reconnected(rank, connection)

    def verb_finishing(self, rank: int, attachment: str) -> None:
        """The rank's loop has ended, as its page says. When all ranks here have, the coordinator hears of it."""
        with self.lock:
            self.trainers.check(rank, attachment)
            self._tell_if_finished()

    def _tell_if_finished(self) -> None:
        if self.members.view is not None:
            found = self.trainers.finished(self.members.local_ranks)
            if found is not None:
                self.tell(Finishing(self.node, *found))

    def _disconnected(self, connection: int) -> None:
        self.repair.disconnected(connection)
        with self.lock:
            gone = self.trainers.disconnected(connection)
            for rank in gone:
                self.preempt.left(rank)
        for rank in gone:
            logger.info("rank %d has left", rank)
            emit("trainer.left", job=self.job, node=self.node, rank=rank)

    # -- membership --

    def verb_join(self, view: Header, regrouped: bool = False) -> Header:
        """Enter an epoch. From here on messages of older epochs are refused."""
        fresh = View.from_json(view)
        with self.lock:
            ranks = fresh.member(self.node).ranks
            former = self.members.known()
            if regrouped and (former is None or not self.trainers.are_of(ranks, former.epoch)):
                raise StaleEpoch(f"node {self.node} has other trainers by now; a new start of the run will regroup it")
            self.members.join(fresh)
            self._ended = None
            self.trainers.belong(ranks, fresh.epoch)
            self.rounds.reset()
            self.lead.reset(fresh)
            self.preempt.reset()
            self.rescue.reset()
            self.diagnosis.reset()
            self.checkpointed = fresh.spilled
            if not fresh.in_memory:
                for slot in self.slots.values():
                    slot.update(state=SlotState.EMPTY, step=0, payload_nbytes=0, meta_nbytes=0)
            self.reprotect.joined(fresh)
            self.trainers.say(ranks, epoch=fresh.epoch, committed=fresh.committed, checkpoint=fresh.spilled)
            self._write_down()
            crash_point("keeper.joined")
            self._tell_if_finished()
        return {"epoch": fresh.epoch}

    def leave_epoch(self) -> None:
        """Fenced off: nothing of this epoch's rounds is sealed any more. Called with the lock held."""
        self.rounds.reset()
        self.lead.coordinator = None
        self._write_down()

    def _write_down(self) -> None:
        self.members.write_down(self.trainers.to_json(), self._ended)

    def tell(self, event: Input) -> None:
        self.lead.tell(event)

    def progress(self) -> int:
        return self.trainers.progress(self.members.local_ranks)

    # -- commit --

    def verb_commit(self, step: int, index: int) -> None:
        """The step is protected on every node: from now on it is what recovery returns to."""
        crash_point("keeper.committing")
        with self.lock:
            ranks = self.members.local_ranks
            for slot in self.slots.of_step(step, index):
                slot.update(state=SlotState.COMMITTED)
            self.trainers.say(ranks, committed=step)
            self.slots.keep_only(ranks)
            crash_point("keeper.committed")
            self._last["committed"] = time.time()
            self.members.touch()
            self.tell(Acknowledged(self.node, step, self.progress()))
            self.lead.committed(step, index)
        emit("snapshot.committed", job=self.job, node=self.node, step=step)

    def verb_checkpointed(self, step: int) -> None:
        self.checkpointed = max(self.checkpointed, step)
        self.trainers.say(self.members.local_ranks, checkpoint=step)

    # -- what others may read --

    def verb_survey(self) -> Header:
        return self.survey()

    def survey(self) -> Header:
        """What this node holds, from the slots' own headers."""
        with self.lock:
            slots = [asdict(slot.header) for slot in self.slots.values() if slot.header.rank >= 0]
            groups = [group.to_json() for slot in self.slots.values() if (group := group_of(slot)) is not None]
            epoch = max(self.members.epoch, self.members.promised)
        return {"node": self.node, "epoch": epoch, "slots": slots, "groups": groups, "member": self.member.to_json()}

    def verb_tables(self, step: int, index: int, ranks: list[int] | None = None) -> Reply:
        """Fragment tables (with CRCs) and objects of these ranks, or of all that this node holds, for a checkpoint or a restore."""
        held = [slot for slot in self.slots.of_step(step, index) if slot.header.rank >= 0]
        metas = {slot.header.rank: slot.meta() for slot in held if ranks is None or slot.header.rank in ranks}
        table = FragmentTable.concat(meta.table for meta in metas.values())
        return {"objects": {str(rank): meta.objects for rank, meta in metas.items()}}, table.to_bytes()

    def verb_spill(
        self,
        directory: str,
        step: int,
        index: int,
        layout: Header,
        holders: Mapping[str, int],
        payload: memoryview,
        epoch_of_sender: int = -1,
    ) -> Header:
        """Write this node's part of a checkpoint into `directory`; `payload` is the table of all distinct fragments.

        `holders` says which node writes a rank's fragments. Every byte is summed as it is written, so a slot that were refilled
        meanwhile would be refused, not stored.
        """
        slots = {
            slot.header.rank: slot
            for slot in self.slots.of_step(step, index)
            if holders.get(str(slot.header.rank)) == self.node
        }

        def read(row: Fragment) -> memoryview:
            return slots[row.rank].body[row.slot_offset : row.slot_offset + row.nbytes]

        table = FragmentTable.from_bytes(payload)
        written = spill.write_part(place(directory), table, step, layout, self.node, frozenset(slots), read)
        return {"nbytes": written}

    def verb_range(
        self, name: str, epoch: int, step: int, offset: int, nbytes: int, connection: int, check: bool = True
    ) -> Reply:
        """Bytes of a slot's body; with `check` also their CRC as they were read here."""
        slot = self._slot_of(name, epoch, step)
        if not 0 <= offset <= offset + nbytes <= len(slot.body):
            raise MissingData(f"{name} of node {self.node} has {len(slot.body)} bytes; {nbytes} at {offset} were asked for")
        crc = {"crc32c": crc32c(slot.body[offset : offset + nbytes])} if check else {}
        with self.lock:  # a slot that is replaced meanwhile would hand its descriptor's number to another file
            return crc, FileRange(*slot.file_range(offset, nbytes))

    def verb_outline(self, name: str, epoch: int, step: int, offset: int, nbytes: int, base: list[int] | None) -> Header:
        """The CRC of a range as it was captured, or which parts of it have changed since the committed snapshot `base`."""
        slot = self._slot_of(name, epoch, step)
        return self.outlines.answer(slot, offset, nbytes, (base[0], base[1]) if base else None)

    def verb_difference(self, name: str, epoch: int, step: int, offset: int, nbytes: int, base: list[int]) -> Reply:
        """A range of a slot XORed with the same range of the committed snapshot beside it."""
        slot = self._slot_of(name, epoch, step)
        return {}, difference(base_of(self.slots, name, (base[0], base[1])), slot, offset, nbytes).data

    def _slot_of(self, name: str, epoch: int, step: int) -> Slot:
        slot = self.slots.get(name)
        if slot is None:
            raise MissingData(f"node {self.node} has no slot {name}")
        check_holds(slot, epoch, step)
        return slot

    def reader(self, member: Member) -> SlotReader:
        return SlotReader(member, mapped=member.node == self.node or self._is_near(member))

    def connection(self, member: Member) -> Connection:
        """To a peer's keeper, past the network where it is on this host: a UNIX socket costs less than half of TCP."""
        near = self._is_near(member)
        return Connection(str(Path(member.memory) / SOCKET) if near else (member.address, member.port), member.token)

    def _is_near(self, member: Member) -> bool:
        return self.mapped and member.host == self.member.host

    def verb_status(self) -> Header:
        with self.lock:
            committed = [slot.header.step for slot in self.slots.values() if slot.header.state is SlotState.COMMITTED]
            pages = self.trainers.pages.values()
            coordinator = self.lead.coordinator
            return {
                "job": self.job,
                "node": self.node,
                "pid": os.getpid(),
                "epoch": self.members.epoch,
                "memory": str(self.memory),
                "nbytes": sum(slot.capacity for slot in self.slots.values()),
                "committed_step": max(committed, default=0),
                "committed_age_s": time.time() - self._last["committed"] if "committed" in self._last else None,
                "checkpoint_step": max((page["checkpoint"] for page in pages), default=0),
                "ranks": {str(rank): pid for rank, pid in self.trainers.pids().items()},
                "given_up": coordinator.given_up if coordinator else None,
                "world": self.members.view.world if self.members.view else 0,
                "counts": {str(rank): {word: page[word] for word in COUNTS} for rank, page in self.trainers.pages.items()},
                "refused": self.poison.refused,
                "bereft": self.bereft,
                "verdicts": self.diagnosis.verdicts,
                "intervals": asdict(self.lead.intervals) if self.lead.intervals else None,
                **self.watch.status(),
            }

    # -- the end --

    def begin_to_end(self, problem: str) -> None:
        """The run is over, which a successor of this keeper has to know; then everybody is told. Called with the lock held."""
        view = self.members.known()
        self._ended = {"problem": problem}
        self._write_down()
        crash_point("keeper.stopping")
        if view is not None and view.coordinator == self.node:
            threading.Thread(target=self.lead.end, args=(view, problem), name="holdfast-end", daemon=True).start()
        else:
            self.release_trainers(problem)
            self.give_back(problem)

    def verb_ended(self, epoch: int, problem: str) -> None:
        """The coordinator's keeper says that the run is over."""
        with self.lock:
            if epoch < self.members.promised:
                raise StaleEpoch(f"node {self.node} is in epoch {self.members.promised} already")
            if self._ended is None:
                self.begin_to_end(problem)

    def release_trainers(self, problem: str) -> None:
        """Trainers may go; new ones find no keeper here, unless what it holds has to be kept."""
        with self.lock:
            view = self.members.known()
            ranks = view.member(self.node).ranks if view else ()
            self._ending = not problem
            self.trainers.say(ranks, unsaved=int(bool(problem)))
            self.trainers.say(ranks, stopped=self.members.epoch)

    def give_back(self, problem: str) -> None:
        """Free the memory, unless what it holds was to be a checkpoint and is none."""
        if problem:
            logger.error("run %s has ended and is not saved, node %d keeps its snapshots: %s", self.job, self.node, problem)
        else:
            logger.info("run %s has ended; node %d gives its memory back", self.job, self.node)
            threading.Thread(target=self.close, name="holdfast-close", daemon=True).start()

    def verb_ending(self) -> Header:
        """Why the run could not be saved, or nothing."""
        return {"problem": self._ended["problem"] if self._ended else ""}

    def verb_shutdown(self) -> None:
        threading.Thread(target=self.close, name="holdfast-close", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """The run of this keeper is over, saved or not."""
        return self._ended is not None

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def wait_closed(self, seconds: float) -> bool:
        """True once the keeper is closing; waits that long for it."""
        return self._closed.wait(seconds)

    def close(self, *, free: bool = True) -> None:
        """Stop serving and give the node's memory back; with `free` false a successor finds it."""
        with self.lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if free:
                self.trainers.say(self.trainers.pages, gone=1)  # they would have it started again
        self.rounds.close()
        self.members.close()
        self._server.close()
        if free:
            shutil.rmtree(self.memory, ignore_errors=True)
            for parent in (self.memory.parent, self.memory.parent.parent):
                try:
                    parent.rmdir()  # only when no other node or job is left in it
                except OSError:
                    break
        os.close(self._guard)
        self._released.set()

    def wait(self) -> None:
        """Block until the keeper has been closed and everything it had to say is said.

        One whose memory is removed under it closes itself: nobody on this host would find it any more, and its trainers have
        another one started in its place.
        """
        while not self._released.wait(LOOKED_EVERY_S):
            if not self.is_closed and not self._has_memory():
                logger.error("node %d: the memory in %s was removed; this keeper ends", self.node, self.memory)
                self.is_robbed = True
                self.close(free=False)

    def _has_memory(self) -> bool:
        try:
            return os.stat(self.memory / LOCK).st_ino == os.fstat(self._guard).st_ino
        except FileNotFoundError:
            return False
