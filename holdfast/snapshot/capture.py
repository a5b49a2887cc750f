"""Capture: one rank's state copied into a slot while the next step runs, or not shipped at all.

Between two steps, `step_done` copies at once what forward may change (buffers, scalars, objects, random generators) and
hands the rest to a thread, which copies parameters and optimizer state while forward and backward run. `fence`, called before
the optimizer changes them, waits for what is not copied yet. A capture during which something changed all the same is dropped.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.arrays import ITEMSIZE, Box, Fragment, FragmentTable, owned_boxes
from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.events import crash_point, emit
from holdfast.objects import encode_object
from holdfast.snapshot.client import Link
from holdfast.snapshot.slots import aligned
from holdfast.snapshot.state import RNG, Held, TrackedState, local_part, rng_states

logger = logging.getLogger(__name__)

SAMPLES = 64
"""Elements of each tensor compared after the copy. `_foreach` and fused kernels change DTensors without counting up their
version (torch 2.13), so versions alone would miss a mutation of sharded parameters."""


@dataclass(slots=True)
class Stats:
    """What this rank's snapshots have cost and become. `stall_s` is time the training thread spent in holdfast."""

    captured: int = 0
    skipped: int = 0
    dropped: int = 0
    failed: int = 0
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """One fragment to copy: which array, which box of it, and where in the slot it goes."""

    held: Held
    box: Box
    offset: int
    nbytes: int


@dataclass(frozen=True)
class CapturePlan:
    """Where every byte of a snapshot goes; the same as long as the state's structure is."""

    parts: tuple[Part, ...]
    table: FragmentTable
    nbytes: int
    room_nbytes: int
    """What the slot needs: the payload, and twice the table, which grows when CRCs are filled in."""

    layout: str
    signature: tuple[int, ...]

    def is_current(self, signature: tuple[int, ...]) -> bool:
        return self.signature == signature and all(part.held.is_current() for part in self.parts)


def plan_capture(held: list[Held], rank: int, signature: tuple[int, ...] = ()) -> CapturePlan:
    """Lay this rank's fragments out in a slot, each 64-byte aligned, replicated ones only where this replica owns them."""
    parts: list[Part] = []
    offset = 0
    for item in held:
        for box in owned_boxes(item.placement):
            nbytes = box.size * ITEMSIZE[item.placement.spec.dtype]
            parts.append(Part(item, box, offset, nbytes))
            offset += aligned(nbytes)
    table = FragmentTable.from_rows(_row(part, rank) for part in parts)
    encoded = table.to_bytes()
    layout = hashlib.blake2b(encoded, digest_size=16).hexdigest()
    return CapturePlan(tuple(parts), table, offset, offset + 2 * len(encoded), layout, signature)


def _row(part: Part, rank: int) -> Fragment:
    spec = part.held.placement.spec
    return Fragment(spec.name, spec.dtype, spec.shape, part.box.offset, part.box.shape, rank, part.offset, part.nbytes)


def source_of(part: Part) -> torch.Tensor:
    """The live elements of a part, as a view of the local tensor."""
    return view_of(part.held.local, part.held.placement.boxes[0], part.box)


def view_of(local: torch.Tensor, holds: Box, box: Box) -> torch.Tensor:
    return local if box == holds else local[box.slices(holds)]


@dataclass
class _Shot:
    """A capture under way."""

    step: int
    index: int
    plan: CapturePlan
    eager: list[tuple[Part, torch.Tensor]]
    versions: list[int]
    objects: dict[str, str]
    rng: dict[str, Any]
    ready: torch.cuda.Event | None
    started: float = field(default_factory=time.perf_counter)


class Capturer:
    """Takes this rank's snapshots, one at a time. `close` ends its thread."""

    def __init__(self, state: TrackedState, link: Link, rank: int) -> None:
        self.state, self.link, self.rank = state, link, rank
        self.stats = Stats()
        self._plan: CapturePlan | None = None
        self._queue: queue.SimpleQueue[_Shot | tuple[int, str] | None] = queue.SimpleQueue()
        self._copied = threading.Event()
        self._copied.set()
        self._idle = threading.Event()
        self._idle.set()
        self._handled = (0, 0)
        self._stream: torch.cuda.Stream | None = None
        self._pinned: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name="holdfast-capture", daemon=True)
        self._thread.start()

    # -- on the training thread --

    def step_done(self, step: int, *, ripe: bool = True) -> None:
        """Note that `step` is complete, and begin a capture where the keepers have asked for this one; not of an unripe step."""
        page = self.link.page
        page["completed"] = step
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
            self._begin(step, index)

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

    def _shoot(self, step: int, index: int) -> _Shot:
        rng = rng_states()  # first: nothing may draw random numbers before their state is read
        plan = self.plan()
        objects = self.state.texts()
        if self.state.others_have_arrays:
            plan = self._new_plan(self.state.signature())
        eager = [(part, source_of(part).to("cpu", copy=True)) for part in plan.parts if not part.held.lazy]
        ready = None
        if torch.cuda.is_available() and any(part.held.tensor.is_cuda for part in plan.parts):
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._copied.clear()
        self._idle.clear()
        return _Shot(step, index, plan, eager, _versions(plan), objects, rng, ready)

    def plan(self) -> CapturePlan:
        """The plan for the state as it is now; computed anew only when something has changed."""
        signature = self.state.signature()
        if self._plan is None or not self._plan.is_current(signature):
            return self._new_plan(signature)
        return self._plan

    def _new_plan(self, signature: tuple[int, ...]) -> CapturePlan:
        self._plan = plan_capture(self.state.held(), self.rank, signature)
        return self._plan

    def fence(self) -> None:
        """Return once nothing that the optimizer is about to change still has to be copied."""
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self.stats.stall_s += time.perf_counter() - started

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
                if isinstance(item, _Shot):
                    self._copied.set()
                    self._idle.set()

    def _take(self, shot: _Shot) -> None:
        crash_point("capture.begun")
        body = self.link.body(shot.index, shot.plan.room_nbytes)
        self._copy(shot, body)
        changed = _changed(shot, body)
        self._copied.set()
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

    def _copy(self, shot: _Shot, body: memoryview) -> None:
        if shot.ready is None:
            for part in shot.plan.parts:
                if part.held.lazy:
                    _copy_bytes(source_of(part), body, part)
        else:
            self._copy_from_gpu(shot, body)
        for part, copy in shot.eager:
            _copy_bytes(copy, body, part)

    def _copy_from_gpu(self, shot: _Shot, body: memoryview) -> None:
        """Device memory straight into the slot, which is registered as pinned, on a stream beside the training's."""
        assert shot.ready is not None
        self._pin(body)
        stream = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_event(shot.ready)
        with torch.cuda.stream(stream), torch.no_grad():
            for part in shot.plan.parts:
                if part.held.lazy:
                    source = source_of(part)
                    slot_view(body, part.offset, part.nbytes, source.dtype, part.box.shape).copy_(source, non_blocking=True)
        stream.synchronize()

    def _pin(self, body: memoryview) -> None:
        address = np.frombuffer(body, np.uint8).ctypes.data
        if self._pinned.get(address) == len(body):
            return
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(body), 0))  # type: ignore[no-untyped-call]
        if code != 0:
            logger.warning("slot memory could not be pinned (CUDA error %d); copies from the GPU will be slower", code)
        self._pinned[address] = len(body)


def slot_view(body: memoryview, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes of one fragment in a slot as a tensor, without a copy."""
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body, dtype=torch.uint8, count=nbytes, offset=offset).view(dtype).view(shape)


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


def _versions(plan: CapturePlan) -> list[int]:
    return [part.held.tensor._version for part in plan.parts]


def _changed(shot: _Shot, body: memoryview) -> str | None:
    """The first array that is no longer what was copied, by version and by a sample of its elements."""
    for part, version in zip(shot.plan.parts, shot.versions, strict=True):
        if not part.held.lazy:
            continue
        if part.held.tensor._version != version:
            return part.held.name
        live = source_of(part)
        copy = slot_view(body, part.offset, part.nbytes, live.dtype, part.box.shape)
        if not _samples(live).equal(_samples(copy)):
            return part.held.name
    return None


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    local = local_part(tensor)
    every = max(1, local.numel() // SAMPLES)
    if local.is_contiguous():
        picked = local.reshape(-1)[::every]
    else:  # the same elements in row-major order, without a copy of the whole
        places = torch.arange(0, local.numel(), every, device=local.device)
        picked = local[torch.unravel_index(places, local.shape)]
    return picked.cpu().contiguous().view(torch.uint8)  # compared as bytes: NaN equals itself, and 0.0 is not -0.0
