"""What a trainer hears from other ranks before it enters protect(), and the spare that hears the same while it is alone.

A script may ask others for things before protect(): a seed that rank 0 has drawn, the size of everybody's data, a list of objects.
A spare runs the same lines later, with nobody to ask. So a trainer notes the result of each of its collectives, for every group in
order, and leaves the notes with its launcher, who outlives it. A spare's collectives are answered from them, bit for bit.

Results above KEPT_EACH, and the largest of those that come to more than KEPT_IN_ALL, are noted by their shape only. Floating-point
ones are taken for weights, which the restore overwrites, and answered as if all ranks held the same; others end the spare, for
nothing would put them right. So does a script that asks for something else than it did the first time.

The notes are a line of JSON and raw bytes; nothing in them is executed or unpickled here.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch

from holdfast.elastic.post import RestartNeeded

KEPT_EACH = 1 << 20
KEPT_IN_ALL = 16 << 20
CALLS_LIMIT = 100_000
"""A script that asks more often than this before protect() is not followed any further."""

HEARD = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "allgather_coalesced",
    "_allgather_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "broadcast",
    "gather",
    "scatter",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
)
"""The collectives that fill tensors, which are the first argument of each."""


@dataclass(slots=True)
class Call:
    """One collective: what was asked, dtype and shape of each tensor it filled, and their bytes one after the other."""

    op: str
    tensors: list[list[Any]]
    values: bytes | None
    """None: too large to be kept."""

    def __str__(self) -> str:
        shown = [f"{dtype.removeprefix('torch.')}{list(shape)}" for dtype, shape in self.tensors[:3]]
        more = [f"{len(self.tensors) - 3} more"] if len(self.tensors) > 3 else []
        return f"{self.op} into {', '.join([*shown, *more]) or 'nothing'}"


class Transcript:
    """The calls of one rank, for every group in order."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Call]] = {}
        self._count, self._kept = 0, 0
        self._largest: list[tuple[int, int, Call]] = []
        self._problem = ""

    # -- the trainer's side --

    @property
    def is_full(self) -> bool:
        return self._count > CALLS_LIMIT

    def note(self, group: str, op: str, outputs: Any) -> None:
        """Keep what a collective that has completed brought."""
        self._count += 1
        if self.is_full:
            self._calls.clear()
            self._largest.clear()
            return
        call = _call(op, list(_flat(outputs)), keep=True)
        self._calls.setdefault(group, []).append(call)
        if call.values:
            heapq.heappush(self._largest, (-len(call.values), self._count, call))
            self._kept += len(call.values)
        while self._kept > KEPT_IN_ALL:
            nbytes, _, dropped = heapq.heappop(self._largest)
            dropped.values = None
            self._kept += nbytes

    def to_bytes(self) -> bytes:
        groups = {
            group: [[call.op, call.tensors, None if call.values is None else len(call.values)] for call in calls]
            for group, calls in self._calls.items()
        }
        head = json.dumps({"count": self._count, "groups": groups}, separators=(",", ":")).encode()
        return b"\n".join([head, b"".join(call.values or b"" for calls in self._calls.values() for call in calls)])

    # -- the spare's side --

    @classmethod
    def of(cls, data: bytes) -> Self:
        """What `to_bytes` has written. Raises RestartNeeded where a trainer has left nothing that can be followed."""
        transcript = cls()
        if not data:
            raise RestartNeeded("the trainer has left no notes of what it heard before protect()")
        end = data.index(b"\n")
        head, place = json.loads(data[:end]), end + 1
        if head["count"] > CALLS_LIMIT:
            raise RestartNeeded(f"the script asks other ranks more than {CALLS_LIMIT} times before protect()")
        for group, calls in head["groups"].items():
            noted = transcript._calls[group] = []
            for op, tensors, nbytes in calls:
                noted.append(Call(op, tensors, None if nbytes is None else data[place : place + nbytes]))
                place += nbytes or 0
            noted.reverse()  # the next one is the last
        return transcript

    def next(self, group: str, op: str, outputs: Any) -> Call:
        """What the trainer heard when it asked for the same thing. Raises RestartNeeded where it asked for another."""
        asked = _call(op, list(_flat(outputs)), keep=False)
        left = self._calls.get(group)
        heard = left.pop() if left else None
        if heard is None or (heard.op, heard.tensors) != (asked.op, asked.tensors):
            self._fail(
                f"before protect() the script asks for {asked} in group {group!r} where its first start asked for "
                f"{heard or 'nothing more'}; a spare can follow only a script that does the same every time"
            )
            raise AssertionError
        if heard.values is None and not all(_is_floating(dtype) for dtype, _ in heard.tensors):
            self._fail(
                f"before protect() the script asks for {heard}, which is more than spares are told (1 MiB each, 16 MiB in all) "
                "and no weight that a restore overwrites; let every rank read it from storage, or ask inside protect()"
            )
        return heard

    def check_through(self) -> None:
        """Raise RestartNeeded where the script has left something out, or has swallowed the error of something else."""
        if self._problem:
            raise RestartNeeded(self._problem)
        for group, left in self._calls.items():
            if left:
                self._fail(
                    f"the script reaches protect() without asking for {left[-1]} in group {group!r}, as its first start did; a "
                    "spare can follow only a script that does the same every time"
                )

    def _fail(self, problem: str) -> None:
        self._problem = self._problem or problem
        raise RestartNeeded(problem)


class Listening:
    """Passes everything on to the transport beneath, and notes what its collectives brought once they have completed."""

    def __init__(self, group: str, inner: Any, transcript: Transcript) -> None:
        self._group, self.inner, self._transcript = group, inner, transcript

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self.inner, name)
        if name not in HEARD:
            return asked

        def collective(*args: Any, **kwargs: Any) -> Any:
            work = asked(*args, **kwargs)
            if work is not None and not self._transcript.is_full:
                work.wait()
                self._transcript.note(self._group, name, _outputs(args, kwargs))
            return work

        return collective


class Repeating:
    """Answers collectives with what the trainer heard; where that was not kept, or is no collective, `alone` answers."""

    def __init__(self, group: str, alone: Any, transcript: Transcript, done: Callable[[Any], Any]) -> None:
        self._group, self._alone, self._transcript, self._done = group, alone, transcript, done

    def __getattr__(self, name: str) -> Any:
        if name not in HEARD:
            return getattr(self._alone, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            outputs = _outputs(args, kwargs)
            heard = self._transcript.next(self._group, name, outputs)
            if heard.values is None:
                return getattr(self._alone, name)(*args, **kwargs)
            _fill(list(_flat(outputs)), heard.values)
            return self._done(outputs)

        return collective


# -- tensors and bytes ---------------------------------------------------------------------------------------------------


def _outputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _flat(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for item in outputs:
            yield from _flat(item)


def _call(op: str, tensors: list[torch.Tensor], *, keep: bool) -> Call:
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    keep = keep and nbytes <= KEPT_EACH and all(tensor.layout == torch.strided for tensor in tensors)
    values = b"".join(_bytes(tensor) for tensor in tensors) if keep else None
    return Call(op, [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors], values)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensors: list[torch.Tensor], values: bytes) -> None:
    place = 0
    with torch.no_grad():
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes:
                raw = torch.frombuffer(bytearray(values[place : place + nbytes]), dtype=torch.uint8)
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
            place += nbytes


def _is_floating(dtype: str) -> bool:
    return dtype.removeprefix("torch.").startswith(("float", "bfloat", "complex"))
