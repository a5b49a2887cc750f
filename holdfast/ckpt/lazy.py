"""Lazy capture: tensors are copied behind the training loop, and the loop waits only if it would overwrite them.

`start` returns at once. A thread copies into buffers that are kept for the next capture, so host memory is bounded by one copy of
the state. Before any optimizer of the process steps, a hook waits for what is not copied yet. Tensors that changed all the same
(by their version, or by a sample of their elements) make the capture fail: what was torn is never stored.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.arrays import SMALL_ARRAY_NBYTES
from holdfast.errors import StateError
from holdfast.events import emit

HEAD_START_S = 0.002

SAMPLES = 64
"""Elements of a tensor that are looked at again after it was copied: some 20 µs, and an optimizer changes nearly all."""

TRACE_NBYTES = 64

Key = tuple[int, torch.dtype, tuple[int, ...]]
"""Where a tensor's bytes live and how they are read: equal for all views of the same part of one storage."""


def key_of(tensor: torch.Tensor) -> Key:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()
        return local


@dataclass(frozen=True, slots=True)
class _Later:
    """A tensor to copy, and how it looked when the save was called."""

    name: str
    tensor: torch.Tensor
    version: int
    trace: bytes


class LazyCapture:
    """Copies of tensors, taken in the background. One capture at a time; the copies are valid until the next `start`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "holdfast-capture")
        self._buffers: dict[Key, torch.Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._copies: dict[Key, torch.Tensor] = {}

    def start(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Future[None]:
        """Capture these tensors as they are now; the future is done when all are copied, and raises StateError if one changed.

        Small tensors are copied before this returns: forward passes change buffers such as BatchNorm's. Larger ones must not
        change before the next optimizer step, which waits by itself.
        """
        self._copied.wait()
        started_s = time.perf_counter()
        self._copies = {}
        later: list[_Later] = []
        for name, tensor in tensors:
            local = tensor.detach()
            if local.nbytes < SMALL_ARRAY_NBYTES:
                self._copy(local)
            else:
                later.append(_Later(name, local, tensor._version, _trace(local)))
        self._let_go_except({*self._copies, *(key_of(item.tensor) for item in later)})
        self._copied.clear()
        hook = register_optimizer_step_pre_hook(lambda *_: self.fence())
        return self._pool.submit(self._run, later, hook, _streams(later), started_s)

    def fence(self) -> None:
        """Nothing of the running capture is read from live tensors any more."""
        if not self._copied.is_set():
            started_s = time.perf_counter()
            self._copied.wait()
            emit("ckpt.fenced", seconds=time.perf_counter() - started_s)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The captured copy of a tensor, or the tensor itself when no capture holds it."""
        return self._copies.get(key_of(tensor), tensor)

    def close(self) -> None:
        self._copied.wait()
        self._pool.shutdown()
        self._buffers.clear()
        self._copies.clear()

    def _run(self, later: list[_Later], hook: Any, streams: dict[torch.device, Any], started_s: float) -> None:
        try:
            # Let the caller's thread go on first: it still has to return, and copying would compete with it for the interpreter.
            time.sleep(HEAD_START_S)
            for item in later:
                self._copy(item.tensor, streams.get(item.tensor.device))
            for stream in streams.values():
                stream.synchronize()
            changed = [item.name for item in later if self._has_changed(item, streams.get(item.tensor.device))]
        finally:
            hook.remove()
            self._copied.set()
        if changed:
            raise StateError(
                f"{changed[0]} and {len(changed) - 1} more changed while they were captured, without an optimizer step; this save "
                "is dropped. Call optimizer.step() to change parameters, or save without async"
            )
        emit("ckpt.captured", seconds=time.perf_counter() - started_s)

    def _has_changed(self, item: _Later, stream: Any) -> bool:
        """Since the call, by version and by a few bytes; since the copy, by a sample. Fused optimizers leave no other traces."""
        tensor = item.tensor
        if tensor._version != item.version or _trace(tensor) != item.trace:
            return True
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            return not _sample(tensor).equal(_sample(self._copies[key_of(tensor)]))

    def _let_go_except(self, wanted: set[Key]) -> None:
        """Tensors that are gone keep no buffers: host memory stays one copy of the state."""
        for key in self._buffers.keys() - wanted:
            del self._buffers[key]

    def _copy(self, tensor: torch.Tensor, stream: Any = None) -> None:
        key = key_of(tensor)
        buffer = self._buffers.get(key)
        if buffer is None:
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        if stream is None:
            buffer.copy_(tensor)
        else:
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
        self._copies[key] = buffer


def _trace(tensor: torch.Tensor) -> bytes:
    """The first, middle and last bytes of a tensor on the CPU: a microsecond, and an optimizer's step changes them."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return b""
    start, nbytes, read = tensor.data_ptr(), tensor.nbytes, ctypes.string_at
    last = nbytes - TRACE_NBYTES
    return read(start, TRACE_NBYTES) + read(start + nbytes // 2, TRACE_NBYTES) + read(start + last, TRACE_NBYTES)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements, spread over the tensor, as bytes: NaN equals itself then, and 0.0 is not -0.0."""
    places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // SAMPLES), device=tensor.device)
    picked = tensor[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor
    return picked.cpu().contiguous().view(torch.uint8)


def _streams(later: Iterable[_Later]) -> dict[torch.device, Any]:
    """A side stream for every GPU, which begins after what the training stream has been told so far."""
    streams: dict[torch.device, Any] = {}
    for tensor in (item.tensor for item in later if item.tensor.is_cuda):
        if tensor.device not in streams:
            streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            streams[tensor.device].wait_stream(torch.cuda.current_stream(tensor.device))
    return streams
