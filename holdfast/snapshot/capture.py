"""Capture: one rank's state copied into a slot while the next step runs, or not shipped at all.

Between two steps, `step_done` copies at once what forward may change (buffers, scalars, objects, random generators) and
hands the rest to a thread, which copies parameters and optimizer state while forward and backward run. `fence`, called before
the optimizer changes them, waits for what is not copied yet. A capture during which something changed all the same is dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.events import crash_point, emit
from holdfast.objects import encode_object
from holdfast.snapshot import replicas
from holdfast.snapshot.capture_plan import CapturePlan, Owners, Part, plan_capture, samples, slot_view, source_of
from holdfast.snapshot.client import Link
from holdfast.snapshot.device import DeviceCopies
from holdfast.snapshot.replicas import Portion
from holdfast.snapshot.state import RNG, Held, TrackedState, rng_states

logger = logging.getLogger(__name__)

HEAD_START_S = 0.001
"""Left to the training thread to return from `step_done`: the copy would compete with it for the interpreter."""


@dataclass(slots=True)
class Stats:
    """What this rank's snapshots have cost and become. `stall_s` is time the training thread spent in holdfast."""

    captured: int = 0
    skipped: int = 0
    dropped: int = 0
    failed: int = 0
    stall_s: float = 0.0


class _Gate:
    """Whether one batch may be changed: copied, or for a GPU at least on its way, with an event for its stream to wait for."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.event: torch.cuda.Event | None = None
        self.device: torch.device | None = None

    def wait(self) -> None:
        self.open.wait()
        event = self.event
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


@dataclass
class Shot:
    """A capture under way."""

    step: int
    index: int
    plan: CapturePlan
    eager: list[tuple[tuple[Part, ...], torch.Tensor]]
    """Copies of what may change before the next step; of several numbers in one tensor."""
    versions: dict[int, int]
    objects: dict[str, str]
    rng: dict[str, Any]
    ready: torch.cuda.Event | None
    gates: dict[tuple[int, int] | None, _Gate]
    portion: Portion = ()
    """What is to be compared with the other replicas, and its versions when the capture began."""
    portion_versions: Mapping[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def copies(self) -> Iterator[tuple[Part, torch.Tensor]]:
        """What was copied at once, part by part."""
        for parts, copy in self.eager:
            yield from zip(parts, copy.unbind() if len(parts) > 1 else [copy], strict=True)


class Capturer:
    """Takes this rank's snapshots, one at a time. `close` ends its thread."""

    def __init__(self, state: TrackedState, link: Link, rank: int) -> None:
        self.state, self.link, self.rank = state, link, rank
        self.stats = Stats()
        self._plan: CapturePlan | None = None
        self._queue: queue.SimpleQueue[Shot | tuple[int, str] | None] = queue.SimpleQueue()
        self._gates: dict[tuple[int, int] | None, _Gate] = {}
        self._idle = threading.Event()
        self._idle.set()
        self._handled = (0, 0)
        self._done, self._stall_s = time.perf_counter(), 0.0
        self._device = DeviceCopies()
        self._planned: tuple[list[Held], Owners] = ([], {})
        self._portions: list[Portion] | None = None
        self._looked = 0
        self._sums: deque[tuple[int, dict[str, int]]] = deque(maxlen=8)
        link.before_unmap = self._device.unpin
        self._thread = threading.Thread(target=self._run, name="holdfast-capture", daemon=True)
        self._thread.start()

    # -- on the training thread --

    def step_done(self, step: int, *, ripe: bool = True) -> None:
        """Note that `step` is complete, and begin a capture where the keepers have asked for this one; not of an unripe step."""
        page = self.link.page
        page["completed"] = step
        self._tell_pace()
        target, index, order = page.target
        if (target, order) == self._handled or target > step or target == 0:
            return
        self._handled = target, order
        if target < step:
            self._queue.put((target, "passed"))
        elif not ripe or not self._idle.is_set():
            self.stats.skipped += 1
            self._queue.put((target, "busy"))
        else:
            started = time.perf_counter()
            self._begin(step, index)
            self._stall_s = time.perf_counter() - started

    def _tell_pace(self) -> None:
        """What a step takes here, and what the last snapshot took of it: the keeper chooses the interval by these."""
        now = time.perf_counter()
        self.link.page["step_us"] = int(1e6 * (now - self._done))
        self.link.page["capture_us"] = int(1e6 * self._stall_s)
        self._done = now

    def _begin(self, step: int, index: int) -> None:
        try:
            self._queue.put(self._shoot(step, index))
        except HoldfastError as error:
            logger.error("rank %d: snapshot of step %d could not begin: %s", self.rank, step, error)
            self.stats.failed += 1
            self._queue.put((step, "failed"))
        except Exception:  # a `state_dict` of the user's that raises costs a snapshot, and never the training
            logger.exception("rank %d: snapshot of step %d could not begin", self.rank, step)
            self.stats.failed += 1
            self._queue.put((step, "failed"))

    def _shoot(self, step: int, index: int) -> Shot:
        rng = rng_states()  # first: nothing may draw random numbers before their state is read
        plan = self.plan()
        objects = self.state.texts()
        if self.state.others_have_arrays:
            plan = self._new_plan(self.state.signature())
        # Copied where they are: a copy to the host would wait for everything that the GPU has still to do.
        eager = [(parts, copy_of(parts)) for parts in plan.eager]
        ready = self._device.mark(plan.tensors)
        portion = () if ready is not None else self._next_portion()
        changed_by = [*(batch.owner for batch in plan.batches), *(piece.owner for piece in portion)]
        self._gates = {owner: _Gate() for owner in changed_by}
        self._idle.clear()
        versions = _versions(plan)
        return Shot(step, index, plan, eager, versions, objects, rng, ready, self._gates, portion, replicas.versions(portion))

    def _next_portion(self) -> Portion:
        """What the keepers want to have compared with this capture; nothing most of the time."""
        look, before = self.link.page["look"], self._looked
        self._looked = look
        if look == before:
            return ()
        if self._portions is None:
            self._portions = replicas.portions(*self._planned)
        return self._portions[look % len(self._portions)] if self._portions else ()

    def take_sums(self) -> list[tuple[int, dict[str, int]]]:
        """The steps and sums of portions that were not taken yet. On any thread."""
        found = []
        while self._sums:
            found.append(self._sums.popleft())
        return found

    def plan(self) -> CapturePlan:
        """The plan for the state as it is now; computed anew only when something has changed."""
        signature = self.state.signature()
        if self._plan is None or not self._plan.is_current(signature):
            return self._new_plan(signature)
        return self._plan

    def _new_plan(self, signature: tuple[int, ...]) -> CapturePlan:
        held = self.state.held()
        self._planned, self._portions = (held, self.state.owners()), None
        self._plan = plan_capture(held, self.rank, signature, self._planned[1])
        return self._plan

    def fence(self, optimizer: Optimizer | None = None, group: int | None = None) -> None:
        """Return once this group of this optimizer may be changed; without them, once everything may."""
        gates = self._gates_of(optimizer, group)
        if not gates:
            return
        started = time.perf_counter()
        for gate in gates:
            gate.wait()
        waited = time.perf_counter() - started
        self.stats.stall_s += waited
        self._stall_s += waited

    def _gates_of(self, optimizer: Optimizer | None, group: int | None) -> list[_Gate]:
        """Those that are not yet known to be open. A batch that nobody is known to change waits for nobody but `fence()`."""
        if optimizer is None:
            return list(self._gates.values())
        number = next((n for n, ours in enumerate(self.state.optimizers.values()) if ours is optimizer), None)
        return [
            gate
            for owner, gate in self._gates.items()
            if owner is not None and owner[0] == number and group in (None, owner[1])
        ]

    @property
    def is_copying(self) -> bool:
        """Something may have to be waited for."""
        return any(gate.event is not None or not gate.open.is_set() for gate in self._gates.values())

    def settle(self) -> None:
        """Return once the thread has nothing left to do."""
        self._idle.wait()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=30)

    # -- on the capture thread --

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, tuple):
                    self.link.give_up(*item)
                else:
                    self._take(item)
            except KeeperUnreachable as error:
                self.stats.failed += 1
                logger.error("rank %d: no snapshot, its keeper is gone: %s", self.rank, error)
            except Exception:
                self.stats.failed += 1
                logger.exception("rank %d: a snapshot failed; training goes on", self.rank)
            finally:
                # Not after a refusal: a capture begun meanwhile waits in the queue, and its fence has to stay down.
                if isinstance(item, Shot):
                    for gate in item.gates.values():
                        gate.open.set()
                        gate.event = None  # the copy stream has been waited for
                    self._idle.set()

    def _take(self, shot: Shot) -> None:
        crash_point("capture.begun")
        time.sleep(HEAD_START_S)
        body = self.link.body(shot.index, shot.plan.room_nbytes)
        changed = self._copy(shot, body)
        crash_point("capture.copied")
        if changed is not None:
            self.stats.dropped += 1
            logger.warning(
                "rank %d: %s changed while step %d was captured; the snapshot is dropped", self.rank, changed, shot.step
            )
            emit("snapshot.dropped", rank=self.rank, step=shot.step, array=changed)
            self.link.give_up(shot.step, "mutated")
            return
        shot.objects[RNG] = encode_object(shot.rng, RNG)
        taken = self.link.filled(shot.step, shot.index, shot.plan.nbytes, shot.plan.layout, shot.plan.table, shot.objects)
        crash_point("capture.filled")
        self.stats.captured += taken
        self.stats.skipped += not taken
        seconds = time.perf_counter() - shot.started
        emit("snapshot.captured", rank=self.rank, step=shot.step, nbytes=shot.plan.nbytes, seconds=seconds, taken=taken)

    def _copy(self, shot: Shot, body: memoryview) -> str | None:
        """Fill the slot, batch by batch; returns the first array that was changed before its batch was done."""
        if shot.ready is not None:
            return self._device.copy(shot, body)
        self._sum(shot)
        for batch in shot.plan.batches:
            for part in batch.parts:
                _copy_bytes(source_of(part), body, part)
            changed = _changed(batch.parts, shot, body)
            if changed is not None:
                return changed
            shot.gates[batch.owner].open.set()
        for part, copy in shot.copies():
            _copy_bytes(copy, body, part)
        return None

    def _sum(self, shot: Shot) -> None:
        """First of all, while every gate is down."""
        if shot.portion:
            self._sums.append((shot.step, replicas.sums(shot.portion, shot.portion_versions)))
        for owner in shot.gates.keys() - {batch.owner for batch in shot.plan.batches}:
            shot.gates[owner].open.set()


def copy_of(parts: tuple[Part, ...]) -> torch.Tensor:
    """One part by itself, or several numbers of one type side by side, in one call."""
    if len(parts) == 1:
        return source_of(parts[0]).clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return torch.stack([part.held.tensor for part in parts])


def _copy_bytes(source: torch.Tensor, body: memoryview, part: Part) -> None:
    if part.nbytes == 0:
        return
    if source.is_contiguous() and source.device.type == "cpu":
        # One memcpy with the GIL released; torch's own copy would wake a second pool of threads beside the training's.
        out = np.frombuffer(body, np.uint8, part.nbytes, part.offset)
        np.copyto(out, source.reshape(-1).view(torch.uint8).numpy())
        return
    with torch.no_grad():
        slot_view(body, part.offset, part.nbytes, source.dtype, part.box.shape).copy_(source)


def _versions(plan: CapturePlan) -> dict[int, int]:
    return {id(tensor): tensor._version for tensor in plan.lazy}


def _changed(parts: Iterable[Part], shot: Shot, body: memoryview) -> str | None:
    """The first array that is no longer what was copied, by version and by a sample of its elements."""
    for part in parts:
        if part.held.tensor._version != shot.versions[id(part.held.tensor)]:
            return part.held.name
        live = source_of(part)
        copy = slot_view(body, part.offset, part.nbytes, live.dtype, part.box.shape)
        if not samples(live).equal(samples(copy)):
            return part.held.name
    return None
