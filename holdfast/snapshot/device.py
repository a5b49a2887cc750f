"""Copies from a GPU into slots: on a stream of their own, into pinned memory, and the training thread never waits for the host.

The training stream marks the moment of the capture with an event. The copy stream waits for it, copies, reads a sample of what it
copied from, and records an event of its own for each batch. An optimizer's step makes its stream wait for that event, so the CPU
runs ahead as it does without snapshots. Only the copy thread waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from holdfast.snapshot.capture_plan import Part, samples, slot_view, source_of

if TYPE_CHECKING:
    from holdfast.snapshot.capture import Shot

logger = logging.getLogger(__name__)

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


class DeviceCopies:
    """The copy stream of one rank and what it has pinned. `mark` is for the training thread, all else for the copy thread."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned: dict[int, int] = {}

    def mark(self, tensors: Iterable[torch.Tensor]) -> torch.cuda.Event | None:
        """An event after all work that was given to the current stream so far; None when no tensor is on a GPU."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is None:
            return None
        if self._stream is None:
            # Made here, on the rank's device: the copy thread's own current device is the first one.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def copy(self, shot: Shot, body: memoryview) -> str | None:
        """Fill the slot; returns the first array that was changed meanwhile."""
        assert self._stream is not None
        assert shot.ready is not None
        self._pin(body)
        self._stream.wait_event(shot.ready)
        taken: list[tuple[Part, torch.Tensor]] = []
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream), torch.no_grad():
            for batch in shot.plan.batches:
                taken += [(part, _issue(part, source_of(part), body)) for part in batch.parts]
                changed = _version_changed(batch.parts, shot)
                if changed is not None:
                    self._stream.synchronize()  # before the slot is given up, and before anything that is read is let go
                    return changed
                gate = shot.gates[batch.owner]
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
                gate.event, gate.device = event, self._stream.device
                gate.open.set()
            for part, clone in shot.copies():
                _issue(part, clone, body)
        self._stream.synchronize()
        for part, sample in taken:
            copied = slot_view(body, part.offset, part.nbytes, part.held.local.dtype, part.box.shape)
            if not sample.cpu().equal(samples(copied)):
                return part.held.name
        return None

    def _pin(self, body: memoryview) -> None:
        address = np.frombuffer(body, np.uint8).ctypes.data
        if address in self._pinned:
            return
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(body), PORTABLE))  # type: ignore[no-untyped-call]
        if code != 0:
            logger.warning("slot memory could not be pinned (CUDA error %d); copies from the GPU will be slower", code)
            return
        self._pinned[address] = len(body)

    def unpin(self, body: memoryview) -> None:
        """Before the mapping goes: a range that is still registered cannot be registered again when its address is reused."""
        if self._pinned and len(body):
            address = np.frombuffer(body, np.uint8).ctypes.data
            if self._pinned.pop(address, None) is not None:
                torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _issue(part: Part, source: torch.Tensor, body: memoryview) -> torch.Tensor:
    """Start the copy of a part; returns a sample of the source, read on the same stream right after it."""
    if part.nbytes:
        slot_view(body, part.offset, part.nbytes, source.dtype, part.box.shape).copy_(source, non_blocking=True)
    return samples(source)


def _version_changed(parts: Iterable[Part], shot: Shot) -> str | None:
    for part in parts:
        if part.held.tensor._version != shot.versions[id(part.held.tensor)]:
            return part.held.name
    return None
