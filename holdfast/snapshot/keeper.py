"""The keeper of one node: owns the slots, outlives the trainers, and with its peers makes every snapshot survive lost nodes.

A plain class. A Ray actor hosts it in production and a plain process can as well; it imports neither Ray nor torch. Trainers of
the node talk to it over a UNIX socket, peers over TCP with a token; both are the same verbs.

A snapshot's way through here: announced (slot FILLING) → filled by the trainers → checksummed (VERIFIED) → peers told → parity
exchanged (ENCODED) → committed on the coordinator's word (COMMITTED). Every arrow has a crash point; whatever dies at one, the
older slot is still COMMITTED on every node.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.arrays import Fragment, FragmentTable
from holdfast.coding import crc32c
from holdfast.errors import (
    ClusterError,
    ConfigError,
    CorruptData,
    HoldfastError,
    KeeperUnreachable,
    LayoutMismatch,
    MissingData,
    StaleEpoch,
)
from holdfast.events import crash_point, emit
from holdfast.snapshot import spill
from holdfast.snapshot.birth import SOCKET, advertised, host_identity, is_alive, listen, only_one, write_endpoint
from holdfast.snapshot.control import COUNTS, ControlPage
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
    Input,
    Protect,
    Spill,
    SpillEnded,
    Stop,
)
from holdfast.snapshot.exchange import (
    RowsInFlight,
    SlotReader,
    check_holds,
    encode_stripe,
    parity_name,
    slot_name,
)
from holdfast.snapshot.outbox import Outbox
from holdfast.snapshot.poison import PoisonGuard
from holdfast.snapshot.slots import Meta, SlotState, aligned
from holdfast.snapshot.store import META_ROOM, NodeSlots, group_of, rank_record
from holdfast.snapshot.view import GroupRecord, Member, NodeRecord, View, effective_parity
from holdfast.snapshot.watch import Watch
from holdfast.snapshot.wire import Connection, Header, Reply, Server

logger = logging.getLogger(__name__)


class Keeper:
    """Serves one node of one job from the moment it is built until `close`. Raises ConfigError when one is alive already."""

    def __init__(
        self, job: str, node: int, memory: Path, *, bind: str = "127.0.0.1", mapped: bool = True, watch_every_s: float = 0.0
    ) -> None:
        self.job, self.node, self.memory = job, node, memory
        self.epoch = 0
        self.view: View | None = None
        self.controls: dict[int, ControlPage] = {}
        self._mapped = mapped
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outboxes: dict[int, Outbox] = {}
        self._trainers: dict[int, Header] = {}
        self._tables: dict[int, tuple[str, FragmentTable]] = {}
        self._announced: tuple[int, int] | None = None
        self._round = 0
        self._groups: dict[int, dict[int, NodeRecord]] = {}
        self._rows: RowsInFlight | None = None
        self._finished: dict[int, Header] = {}
        self._coordinator: Coordinator | None = None
        self._guests: tuple[Member, ...] = ()
        self._checked_layouts: tuple[tuple[int, str], ...] = ()
        self._last: dict[str, float] = {}
        self._closed = threading.Event()
        self._released = threading.Event()
        self._ending = False
        self._guard = only_one(memory)
        self.slots = NodeSlots(job, node, memory)
        self._lock = self.slots.lock
        self.poison = PoisonGuard(job)
        self.token = secrets.token_hex(16)
        listeners, port = listen(memory / SOCKET, bind)
        self.member = Member(node, host_identity(), advertised(bind), port, self.token, str(memory), ())
        self.watch = Watch(self, watch_every_s)
        self._server = Server(listeners, self.token, self._handle, self._disconnected)
        threading.Thread(target=self._work, name="holdfast-worker", daemon=True).start()
        write_endpoint(memory, self.member)
        logger.info("keeper of %s node %d serves %s (port %d), pid %d", job, node, memory, port, os.getpid())

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def _handle(self, verb: str, fields: Header, payload: memoryview) -> Reply | Header | None:
        found: Callable[..., Reply | Header | None] | None = getattr(self, f"verb_{verb}", None)
        if self._ending and verb in ("ping", "attach", "join"):
            raise KeeperUnreachable(f"the keeper of node {self.node} is ending, its run is over")
        if found is None:
            raise ClusterError(f"this keeper does not know the verb {verb!r}; are two releases of holdfast mixed?")
        connection, epoch = fields.pop("connection"), fields.pop("epoch_of_sender", None)
        if epoch is not None and epoch != self.epoch:
            raise StaleEpoch(
                f"node {self.node} is in epoch {self.epoch}, {verb!r} came from epoch {epoch}: its sender was replaced"
            )
        if verb in ("attach", "range"):
            fields["connection"] = connection
        if payload:
            fields["payload"] = payload
        return found(**fields)

    def verb_ping(self) -> None:
        """Answered by a keeper that is here to stay."""

    def verb_survey(self) -> Header:
        """What this node holds, from the slots' own headers."""
        with self._lock:
            slots = [asdict(slot.header) for slot in self.slots.values() if slot.header.rank >= 0]
            groups = [group.to_json() for slot in self.slots.values() if (group := group_of(slot)) is not None]
        return {"node": self.node, "epoch": self.epoch, "slots": slots, "groups": groups, "member": self.member.to_json()}

    def verb_health(self) -> Header:
        """How this node is, asked by its peers."""
        return asdict(self.watch.health())

    def verb_guard(self, rank: int, policy: str, payload: memoryview) -> Header:
        """Look at these parameters of `rank` for NaN and infinity from now on, and do what the policy says."""
        self.poison.watch(rank, policy, json.loads(bytes(payload)))
        self.controls[rank]["poisoned"] = 0
        return {}

    def verb_attach(self, rank: int, pid: int, launch: str, body_nbytes: int, connection: int) -> Header:
        """Make room for two snapshots of `rank`, and remember its trainer. A committed slot is left alone."""
        with self._lock:
            self._refuse_second_run(rank, launch)
            for index in (0, 1):
                self.slots.room(slot_name(rank, index), rank, index, body_nbytes + META_ROOM)
            page = self.controls.get(rank) or ControlPage(self.memory / f"control-{rank}", create=True)
            self.controls[rank] = page
            for word in ("completed", "finishing", "target", "committed", "checkpoint", "stopped"):
                page[word] = 0
            self._trainers[rank] = {"pid": pid, "launch": launch, "connection": connection}
        return {"control": str(self.memory / f"control-{rank}")}

    def verb_reserve(self, rank: int, index: int, body_nbytes: int) -> Header:
        """Room for a snapshot that has outgrown its slot; the trainer maps the slot anew."""
        with self._lock:
            self.slots.room(slot_name(rank, index), rank, index, body_nbytes + META_ROOM)
            self.slots.void(slot_name(rank, index), self.epoch)
        return {}

    def verb_join(self, view: Header) -> Header:
        """Enter an epoch. From here on messages of older epochs are refused."""
        with self._lock:
            fresh = View.from_json(view)
            if fresh.epoch <= self.epoch:
                raise StaleEpoch(f"node {self.node} is already in epoch {self.epoch}; epoch {fresh.epoch} comes too late")
            self.view, self.epoch, self._guests = fresh, fresh.epoch, fresh.guests
            self._announced, self._round, self._rows = None, 0, None
            self._groups.clear()
            self._finished.clear()
            self._tables.clear()
            for outbox in self._outboxes.values():
                outbox.close()
            self._outboxes = {member.node: Outbox(member, self.node, self.epoch, self._handle) for member in fresh.members}
            if not fresh.in_memory:
                for slot in self.slots.values():
                    slot.update(state=SlotState.EMPTY, step=0, payload_nbytes=0, meta_nbytes=0)
            self._coordinator = None
            if fresh.coordinator == self.node:
                self._coordinator = Coordinator(
                    (member.node for member in fresh.members),
                    every=fresh.every,
                    checkpoint_every=fresh.checkpoint_every if fresh.checkpoints else 0,
                    committed=fresh.committed,
                    index=fresh.index,
                    protected=fresh.protected,
                )
            for rank in self._local_ranks():
                self.controls[rank]["epoch"] = self.epoch
                self.controls[rank]["committed"] = fresh.committed
        crash_point("keeper.joined")
        return {"epoch": self.epoch}

    def verb_begin(self) -> None:
        """Told to the coordinator's keeper once every keeper has joined."""
        self._tell_coordinator(Begin())

    def verb_filled(self, rank: int, step: int, index: int, payload_nbytes: int, layout: str, payload: memoryview) -> Header:
        """A trainer has captured `step`; its fragment table comes along when it changed, its objects always."""
        table_nbytes = int.from_bytes(payload[:8], "little")
        table, objects = payload[8 : 8 + table_nbytes], json.loads(bytes(payload[8 + table_nbytes :]))
        with self._lock:
            if table_nbytes:
                self._tables[rank] = (layout, FragmentTable.from_bytes(table))
            if self._announced != (step, index):
                return {"taken": False}
            if self._tables.get(rank, ("", None))[0] != layout:
                return {"taken": False, "table": True}
            number = self._round
        self._jobs.put(lambda: self._verify(rank, step, index, number, payload_nbytes, objects))
        return {"taken": True}

    def verb_give_up(self, rank: int, step: int, reason: str) -> None:
        with self._lock:
            number = self._round if self._announced is not None and self._announced[0] == step else 0
        self._tell_coordinator(GivenUp(self.node, step, self._progress(), reason, number))

    def verb_finishing(self, rank: int, step: int, keep: bool) -> None:
        """The rank's loop has ended at `step`. When all ranks here have, the coordinator hears of it."""
        with self._lock:
            self._finished[rank] = {"step": step, "keep": keep}
            done = len(self._finished) == len(self._local_ranks())
        if done:
            steps, keeps = (
                [item["step"] for item in self._finished.values()],
                [item["keep"] for item in self._finished.values()],
            )
            self._tell_coordinator(Finishing(self.node, max(steps), any(keeps)))

    def verb_announce(self, step: int, index: int, round: int) -> None:
        """Empty slot `index` everywhere on this node and let the ranks capture `step` into it."""
        with self._lock:
            self._enter_round(step, index, round)
            for name in (*(slot_name(rank, index) for rank in self._local_ranks()), parity_name(index)):
                self.slots.void(name, self.epoch)
            crash_point("keeper.announced")
            for rank in self._local_ranks():
                self.controls[rank].set_target(step, index)

    def verb_protect(self, step: int, index: int, round: int) -> None:
        """Compute the parity of a restored step that is whole here but was never committed."""
        with self._lock:
            self._enter_round(step, index, round)
        self._jobs.put(lambda: self._publish(step, index, round))

    def _enter_round(self, step: int, index: int, number: int) -> None:
        self._announced, self._round, self._rows = (step, index), number, None
        self._groups = {other: group for other, group in self._groups.items() if other >= number}

    def verb_verified(self, round: int, record: Header) -> None:
        """A node of the group has checked all its ranks' slots; with the last one, parity can be computed.

        A peer that heard of the round before we did may already be done with it; its record is kept until we hear of it too.
        """
        found = NodeRecord.from_json(record)
        with self._lock:
            if round < self._round:
                return
            group = self._groups.setdefault(round, {})
            group[found.node] = found
            complete = len(group) == len(self._group_nodes())
        if complete:
            self._jobs.put(lambda: self._encode(round))

    def verb_parity(
        self, step: int, index: int, round: int, row: int, offset: int, block_nbytes: int, crc: int, payload: memoryview
    ) -> None:
        """A piece of a parity row that a first owner computed for this node."""
        if crc32c(payload) != crc:
            raise CorruptData(f"parity row {row} of step {step} at {offset}: the piece arrived damaged")
        rows = self._prepare_parity(step, index, round, block_nbytes)
        if rows is None:
            return
        start = row * block_nbytes + offset
        self.slots[parity_name(index)].body[start : start + len(payload)] = payload
        if rows.add(row, len(payload)):
            self._jobs.put(lambda: self._protected(round))

    def verb_coordinate(self, event: str, fields: Header) -> None:
        kinds: dict[str, type[Input]] = {
            kind.__name__: kind for kind in (Encoded, GivenUp, Acknowledged, SpillEnded, Finishing)
        }
        self._tell_coordinator(kinds[event](**fields))

    def verb_commit(self, step: int, index: int) -> None:
        """The step is protected on every node: from now on it is what recovery returns to."""
        crash_point("keeper.committing")
        with self._lock:
            for slot in self.slots.of_step(step, index):
                slot.update(state=SlotState.COMMITTED)
            for rank in self._local_ranks():
                self.controls[rank]["committed"] = step
            self.slots.keep_only(self._local_ranks())
        crash_point("keeper.committed")
        self._last["committed"] = time.time()
        emit("snapshot.committed", job=self.job, node=self.node, step=step)
        self._tell_coordinator(Acknowledged(self.node, step, self._progress()))
        if self._coordinator is not None:
            self._release_guests()
            self._check_layout(step, index)

    def verb_tables(self, step: int, index: int) -> Reply:
        """Fragment tables (with CRCs) and objects of this node's committed ranks, for a checkpoint or a restore."""
        metas = {slot.header.rank: slot.meta() for slot in self.slots.of_step(step, index) if slot.header.rank >= 0}
        table = FragmentTable.concat(meta.table for meta in metas.values())
        return {"objects": {str(rank): meta.objects for rank, meta in metas.items()}}, table.to_bytes()

    def verb_spill(self, directory: str, step: int, index: int, layout: Header, payload: memoryview) -> Header:
        """Write this node's part of a checkpoint into `directory`; `payload` is the table of all distinct fragments."""
        slots = {slot.header.rank: slot for slot in self.slots.of_step(step, index) if slot.header.rank >= 0}

        def read(row: Fragment) -> memoryview:
            return slots[row.rank].body[row.slot_offset : row.slot_offset + row.nbytes]

        table = FragmentTable.from_bytes(payload)
        written = spill.write_part(Path(directory), table, step, layout, self.node, frozenset(slots), read)
        return {"nbytes": written}

    def verb_checkpointed(self, step: int) -> None:
        for rank in self._local_ranks():
            self.controls[rank]["checkpoint"] = step

    def verb_stop(self) -> None:
        """The run ended well on every node: trainers may go, and the memory is given back."""
        with self._lock:
            self._ending = True
            for rank in self._local_ranks():
                self.controls[rank]["stopped"] = self.epoch
        logger.info("run %s has ended; node %d gives its memory back", self.job, self.node)
        self._jobs.put(self.close)

    def verb_range(self, name: str, epoch: int, step: int, offset: int, nbytes: int, connection: int) -> Reply:
        """Bytes of a slot's body, with their CRC as they were read here."""
        slot = self.slots.get(name)
        if slot is None:
            raise MissingData(f"node {self.node} has no slot {name}")
        check_holds(slot, epoch, step)
        if not 0 <= offset <= offset + nbytes <= len(slot.body):
            raise MissingData(f"{name} of node {self.node} has {len(slot.body)} bytes; {nbytes} at {offset} were asked for")
        data = slot.body[offset : offset + nbytes]
        return {"crc32c": crc32c(data)}, data

    def verb_rebuild(
        self, group: Header, lost: int, survivors: list[Header], with_data: list[int], with_parity: list[int]
    ) -> Header:
        """Recompute what node `lost` held, into slots of this keeper, and check every byte. Blocks until it is done."""
        record = GroupRecord.from_json(group)
        members = [Member.from_json(member) for member in survivors]
        started = time.perf_counter()
        readers = {member.node: self.reader(member) for member in members}
        nbytes = self.slots.rebuild(record, lost, readers, frozenset(with_data), frozenset(with_parity))
        seconds = time.perf_counter() - started
        logger.info("rebuilt node %d of step %d: %.1f MiB in %.2f s", lost, record.step, nbytes / 2**20, seconds)
        return {"nbytes": nbytes, "seconds": seconds}

    def verb_status(self) -> Header:
        committed = [slot.header.step for slot in self.slots.values() if slot.header.state is SlotState.COMMITTED]
        return {
            "job": self.job,
            "node": self.node,
            "pid": os.getpid(),
            "epoch": self.epoch,
            "memory": str(self.memory),
            "nbytes": sum(slot.capacity for slot in self.slots.values()),
            "committed_step": max(committed, default=0),
            "committed_age_s": time.time() - self._last["committed"] if "committed" in self._last else None,
            "checkpoint_step": max((page["checkpoint"] for page in self.controls.values()), default=0),
            "ranks": {str(rank): trainer["pid"] for rank, trainer in self._trainers.items()},
            "given_up": self._coordinator.given_up if self._coordinator else None,
            "world": self.view.world if self.view else 0,
            "counts": {str(rank): {word: page[word] for word in COUNTS} for rank, page in self.controls.items()},
            "refused": self.poison.refused,
            **self.watch.status(),
        }

    def verb_shutdown(self) -> None:
        threading.Thread(target=self.close, name="holdfast-close", daemon=True).start()

    # -- the worker: everything that takes time -------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed.is_set():
            job = self._jobs.get()
            try:
                job()
            # A snapshot that fails, for whatever reason, is given up and counted; training goes on and the next one is tried.
            except (HoldfastError, OSError) as error:
                logger.error("snapshot given up on node %d: %s: %s", self.node, type(error).__name__, error)
                self._give_up_round()
            except Exception:
                logger.exception("snapshot given up on node %d", self.node)
                self._give_up_round()

    def _give_up_round(self) -> None:
        if self._announced is not None:
            self._tell_coordinator(GivenUp(self.node, self._announced[0], self._progress(), "failed", self._round))

    def _verify(self, rank: int, step: int, index: int, number: int, payload_nbytes: int, objects: dict[str, str]) -> None:
        """Checksum a filled slot and seal it with its table, objects and header."""
        if self._round != number:
            return
        slot, table = self.slots[slot_name(rank, index)], self._tables[rank][1]
        crash_point("snapshot.filled")
        body = slot.body
        if not self.poison.allows(rank, step, table, body):
            self._refuse_poison(rank, step, number)
            return
        meta = Meta(table.with_crcs([crc32c(body[row.slot_offset : row.slot_offset + row.nbytes]) for row in table]), objects)
        data = meta.to_bytes()
        start = aligned(payload_nbytes)
        if start + len(data) > slot.capacity:
            raise ClusterError(f"rank {rank}: table and objects of {len(data)} bytes do not fit behind the snapshot")
        body[payload_nbytes:start] = bytes(start - payload_nbytes)
        body[start : start + len(data)] = data
        slot.update(
            state=SlotState.VERIFIED,
            epoch=self.epoch,
            step=step,
            world=self._view().world,
            payload_nbytes=payload_nbytes,
            meta_nbytes=len(data),
            meta_crc32c=crc32c(data),
        )
        crash_point("snapshot.verified")
        self._publish(step, index, number)

    def _refuse_poison(self, rank: int, step: int, number: int) -> None:
        """Keep the last clean snapshot instead of this one, and have the trainers of the node step back where the user wants it."""
        if self.poison.policy == "step_back":
            for local in self._local_ranks():
                self.controls[local]["poisoned"] = step
        self._tell_coordinator(GivenUp(self.node, step, self._progress(), "poisoned", number))

    def _publish(self, step: int, index: int, number: int) -> None:
        """Tell the group, once all ranks here are verified."""
        record = self._node_record(step, index)
        if record is not None:
            for node in self._group_nodes():
                self._post(node, "verified", round=number, record=record.to_json())

    def _encode(self, number: int) -> None:
        """Compute the parities of the stripe this node owns first; the other rows arrive from their first owners."""
        if self._announced is None or self._round != number:
            return
        step, index = self._announced
        group = self._group(step, index, number)
        if group.parity == 0:
            self._protected(number)
            return
        rows = self._prepare_parity(step, index, number, group.block_nbytes)
        if rows is None:
            return
        readers = {member.node: self.reader(member) for member in self._view().members if member.node in self._group_nodes()}
        own = self.slots[parity_name(index)].body[: group.block_nbytes]
        peers: dict[int, Connection] = {}
        try:
            encode_stripe(group, self.node, readers, own, self._forward(step, index, number, group.block_nbytes, peers))
        finally:
            for reader in readers.values():
                reader.close()
            for peer in peers.values():
                peer.close()
        crash_point("snapshot.exchanged")
        if rows.add(0, group.block_nbytes):
            self._protected(number)

    def _protected(self, number: int) -> None:
        """All parity this node has to hold is there: seal it and tell the coordinator."""
        if self._announced is None or self._round != number:
            return
        step, index = self._announced
        group = self._group(step, index, number)
        with self._lock:
            if group.parity:
                self.slots.seal_parity(group, SlotState.ENCODED)
            for slot in self.slots.of_step(step, index):
                slot.update(state=SlotState.ENCODED)
        crash_point("snapshot.encoded")
        self._tell_coordinator(Encoded(self.node, step, self._progress(), number))

    def _forward(
        self, step: int, index: int, number: int, block_nbytes: int, connections: dict[int, Connection]
    ) -> Callable[[int, int, int, memoryview], None]:
        where: dict[str, Any] = {
            "step": step,
            "index": index,
            "round": number,
            "block_nbytes": block_nbytes,
            "epoch_of_sender": self.epoch,
        }

        def forward(node: int, row: int, offset: int, data: memoryview) -> None:
            connection = connections.get(node)
            if connection is None:
                member = self._view().member(node)
                connection = connections[node] = Connection((member.address, member.port), member.token)
            connection.ask("parity", data, row=row, offset=offset, crc=crc32c(data), **where)

        return forward

    def _prepare_parity(self, step: int, index: int, number: int, block_nbytes: int) -> RowsInFlight | None:
        """The counter of parity rows of this round, with room for them; None when the round is over."""
        with self._lock:
            if self._announced is None or self._round != number:
                return None
            if self._rows is None:
                parity = effective_parity(self._view().parity, len(self._group_nodes()))
                self.slots.room(parity_name(index), -1, index, parity * block_nbytes + META_ROOM)
                self.slots.void(parity_name(index), self.epoch)
                self._rows = RowsInFlight(parity, block_nbytes)
            return self._rows

    # -- the coordinator's side -----------------------------------------------------------------------------------------

    def _tell_coordinator(self, event: Input) -> None:
        view = self._view()
        if view.coordinator != self.node:
            self._post(view.coordinator, "coordinate", event=type(event).__name__, fields=asdict(event))
            return
        with self._lock:
            if self._coordinator is None:
                return
            actions = self._coordinator.feed(event)
            for action in actions:
                self._act(action, view)

    def _act(self, action: Action, view: View) -> None:
        match action:
            case Announce(step, index, number):
                self._broadcast("announce", step=step, index=index, round=number)
            case Protect(step, index, number):
                self._broadcast("protect", step=step, index=index, round=number)
            case Commit(step, index):
                self._broadcast("commit", step=step, index=index)
            case Stop():
                self._broadcast("stop")
            case Spill(step, index):
                threading.Thread(target=self._spill, args=(view, step, index), name="holdfast-spill", daemon=True).start()

    def _spill(self, view: View, step: int, index: int) -> None:
        """Write the committed step as a universal checkpoint, all nodes in parallel. A failure is logged and counted."""
        try:
            started = time.perf_counter()
            path, nbytes = spill.write_checkpoint(view, step, index)
            seconds = time.perf_counter() - started
            logger.info("checkpoint of step %d: %s, %.1f MiB in %.2f s", step, path, nbytes / 2**20, seconds)
            emit("checkpoint.committed", job=self.job, step=step, path=str(path), nbytes=nbytes, seconds=seconds)
            self._broadcast("checkpointed", step=step)
        except (HoldfastError, OSError) as error:
            logger.error("checkpoint of step %d failed, training goes on: %s: %s", step, type(error).__name__, error)
            emit("checkpoint.failed", job=self.job, step=step, error=str(error))
        except Exception:
            logger.exception("checkpoint of step %d failed, training goes on", step)
        self._tell_coordinator(SpillEnded(index))

    def _release_guests(self) -> None:
        """Keepers of an earlier membership are no longer needed once this one has committed a step."""
        guests, self._guests = self._guests, ()
        for guest in guests:
            try:
                connection = Connection((guest.address, guest.port), guest.token)
                connection.ask("shutdown")
                connection.close()
            except KeeperUnreachable as error:
                logger.info("node %d, no longer a member, is gone already: %s", guest.node, error)

    def _check_layout(self, step: int, index: int) -> None:
        """When the layout has changed: every array is whole over all ranks, or the snapshots are worth nothing and we say so."""
        layouts = tuple(sorted((rank, layout) for rank, (layout, _) in self._tables.items()))
        if layouts == self._checked_layouts:
            return
        self._checked_layouts = layouts

        def check() -> None:
            try:
                spill.check_table(spill.gather(self._view(), step, index)[0])
            except LayoutMismatch as error:
                logger.error("snapshots of %s cannot be restored as they are: %s", self.job, error)
                emit("snapshot.incomplete", job=self.job, step=step, error=str(error))
            except HoldfastError as error:
                logger.warning("the layout of step %d could not be checked: %s", step, error)
                self._checked_layouts = ()

        threading.Thread(target=check, name="holdfast-check", daemon=True).start()

    # -- small helpers ----------------------------------------------------------------------------------------------------

    def _view(self) -> View:
        if self.view is None:
            raise StaleEpoch(f"the keeper of node {self.node} has joined no epoch yet")
        return self.view

    def _local_ranks(self) -> tuple[int, ...]:
        return self._view().member(self.node).ranks

    def _group_nodes(self) -> tuple[int, ...]:
        return self._view().group_of(self.node)

    def _progress(self) -> int:
        return max((self.controls[rank]["completed"] for rank in self._local_ranks()), default=0)

    def _post(self, node: int, verb: str, **fields: Any) -> None:
        self._outboxes[node].put({"verb": verb, **fields})

    def _broadcast(self, verb: str, **fields: Any) -> None:
        for member in self._view().members:
            self._post(member.node, verb, **fields)

    def reader(self, member: Member) -> SlotReader:
        return SlotReader(member, mapped=self._mapped and member.host == self.member.host)

    def _node_record(self, step: int, index: int) -> NodeRecord | None:
        """The record of this node once all its ranks are verified at `step`."""
        headers = {slot.header.rank: slot.header for slot in self.slots.of_step(step, index)}
        ranks = self._local_ranks()
        if any(rank not in headers for rank in ranks):
            return None
        return NodeRecord(self.node, tuple(rank_record(headers[rank]) for rank in ranks))

    def _group(self, step: int, index: int, number: int) -> GroupRecord:
        nodes, view = self._group_nodes(), self._view()
        records = tuple(self._groups[number][node] for node in nodes)
        epoch = max(slot.header.epoch for slot in self.slots.of_step(step, index) if slot.header.rank >= 0)
        return GroupRecord(epoch, step, index, view.world, effective_parity(view.parity, len(nodes)), records)

    def _refuse_second_run(self, rank: int, launch: str) -> None:
        known = self._trainers.get(rank)
        if known is not None and known["launch"] != launch and is_alive(known["pid"]):
            raise ConfigError(
                f"another run named {self.job!r} is alive (its rank {rank} is pid {known['pid']}); give this one another name "
                "with protect(name=…), or end the other"
            )

    def _disconnected(self, connection: int) -> None:
        gone = [rank for rank, trainer in self._trainers.items() if trainer["connection"] == connection]
        for rank in gone:
            logger.info("rank %d (pid %d) has left", rank, self._trainers[rank]["pid"])
            emit("trainer.left", job=self.job, node=self.node, rank=rank)

    def close(self) -> None:
        """Stop serving and give the node's memory back."""
        if self._closed.is_set():
            return
        self._closed.set()
        self.watch.close()
        self._jobs.put(lambda: None)
        for outbox in self._outboxes.values():
            outbox.close(drain=True)
        self._server.close()
        shutil.rmtree(self.memory, ignore_errors=True)
        for parent in (self.memory.parent, self.memory.parent.parent):
            try:
                parent.rmdir()  # only when no other node or job is left in it
            except OSError:
                break
        self._released.set()

    def wait(self) -> None:
        """Block until the keeper has been closed and everything it had to say is said."""
        self._released.wait()
