"""Packed activations in host memory: sent on a side stream in forward, fetched one ahead of their use in backward."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from holdfast.kernels.quant import Packed


@dataclass(frozen=True, slots=True)
class Raw:
    """A tensor that goes to the host as it is."""

    values: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.values,)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    def with_parts(self, parts: tuple[torch.Tensor, ...]) -> Raw:
        return Raw(parts[0])


Movable = Packed | Raw


class HostTier:
    """Moves packed tensors to the host and back, in the reverse order of their going.

    On a CUDA device the copies run on a stream of their own, into pinned memory; the current stream waits for a fetch by
    event, never the host. On the CPU a packed tensor already is in host memory and stays as it is.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._order: WeakValueDictionary[int, HostPacked] = WeakValueDictionary()
        self._next = 0
        self._lock = threading.Lock()

    def put(self, packed: Movable) -> HostPacked:
        with self._lock:
            item = HostPacked(self, self._next, packed.device, packed)
            self._order[self._next] = item
            self._next += 1
        if packed.device.type == "cuda":
            item.send(self._side_stream(packed.device))
        return item

    def fetch(self, item: HostPacked) -> Movable:
        """The packed tensor on its device; starts fetching the one that went before it."""
        if item.home.type != "cuda":
            return item.packed
        stream = self._side_stream(item.home)
        with self._lock:
            ahead = self._order.get(item.index - 1)
        item.receive(stream)
        if ahead is not None:
            ahead.receive(stream)
        return item.take()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self._stream


class HostPacked:
    """One packed tensor in host memory, perhaps on its way back."""

    def __init__(self, tier: HostTier, index: int, home: torch.device, packed: Movable) -> None:
        self.tier, self.index, self.home, self.packed = tier, index, home, packed
        self._back: Movable | None = None
        self._arrived: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def send(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(self.home))  # the codes may still be being written
        source = self.packed
        with torch.cuda.stream(stream):
            self.packed = _copy(source, pinned=True, device=torch.device("cpu"))
        for part in source.parts:
            part.record_stream(stream)  # else the allocator hands the memory out while the copy reads it

    def receive(self, stream: torch.cuda.Stream) -> None:
        if self._back is not None:
            return
        with torch.cuda.stream(stream):
            self._back = _copy(self.packed, pinned=False, device=self.home)
            self._arrived = stream.record_event()

    def take(self) -> Movable:
        packed, arrived = self._back, self._arrived
        assert packed is not None
        assert arrived is not None
        current = torch.cuda.current_stream(self.home)
        current.wait_event(arrived)
        for part in packed.parts:
            part.record_stream(current)
        self._back = self._arrived = None  # a second unpack fetches again
        return packed


def _copy(value: Movable, *, pinned: bool, device: torch.device) -> Movable:
    def copy(part: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(part, device=device, pin_memory=pinned).copy_(part, non_blocking=True)

    return value.with_parts(tuple(copy(part) for part in value.parts))
