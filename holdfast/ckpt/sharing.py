"""Each byte of a load is read once, however many ranks want it: who reads what is decided once, and the others are sent it.

A box that several ranks want is cut by rows into as many shares; every one of them reads its share, and sends it to the others
over the process group. The storage is asked once, and all ranks read. Deciding is pure; `exchange` is the only thing that sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from holdfast.arrays import SMALL_ARRAY_NBYTES, Box

MOST_READERS = 8
"""One box is read by so many at most, however many want it: a message for each of a thousand ranks would be too short."""

IN_FLIGHT = 32
"""Messages that a rank has under way at once."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A box of an array that a rank wants, by the name it is stored under, and its bytes."""

    array: str
    box: Box
    nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes [start, stop) of a wish, read by rank `reader`."""

    reader: int
    rows: Box
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shared:
    """A wish that several ranks have, and who reads which part of it."""

    wish: Wish
    ranks: tuple[int, ...]
    shares: tuple[Share, ...]


def share_out(wishes: Sequence[Iterable[Wish]]) -> list[Shared]:
    """The wishes that more than one rank has, `wishes[rank]` being those of a rank; in an order that all ranks can follow.

    Large boxes are read by several of those who want them, a part each; small ones by one, in turn.
    """
    wanted: dict[Wish, list[int]] = {}
    for rank, mine in enumerate(wishes):
        for wish in mine:
            holders = wanted.setdefault(wish, [])
            if rank not in holders:
                holders.append(rank)
    load = [0] * len(wishes)
    found = []
    for wish, ranks in wanted.items():
        if len(ranks) > 1 and wish.nbytes:
            shares = _shares(wish, ranks, load)
            for share in shares:
                load[share.reader] += share.stop - share.start
            found.append(Shared(wish, tuple(ranks), shares))
    return found


def _shares(wish: Wish, ranks: Sequence[int], load: Sequence[int]) -> tuple[Share, ...]:
    rows = wish.box.shape[0] if wish.box.shape else 1
    count = max(1, min(len(ranks), MOST_READERS, rows, wish.nbytes // SMALL_ARRAY_NBYTES))
    readers = sorted(ranks, key=lambda rank: (load[rank], rank))[:count]
    if count == 1:
        return (Share(readers[0], wish.box, 0, wish.nbytes),)
    row_nbytes = wish.nbytes // rows
    bounds = [rows * place // count for place in range(count + 1)]
    return tuple(
        Share(rank, wish.box.rows(low, high), low * row_nbytes, high * row_nbytes)
        for rank, (low, high) in zip(readers, pairwise(bounds), strict=True)
    )


# -- the edge ----------------------------------------------------------------------------------------------------------


def can_share(group: Any = None) -> bool:
    """Whether there is a process group of several ranks that carries tensors in host memory."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return False
    return any(part in ("cpu:gloo", "cpu:mpi") for part in str(dist.get_backend_config(group)).split(","))


def agree(failed: bool, group: Any = None) -> int | None:
    """The highest rank that has failed, the same on every rank; None when none has."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor([dist.get_rank(group) + 1 if failed else 0])
    dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return int(flag.item()) - 1 if flag.item() else None


def exchange(shared: Sequence[Shared], buffer_of: Callable[[Wish], Any], group: Any = None) -> int:
    """Every rank's buffers hold the shares that others have read; returns the bytes this rank was sent.

    `buffer_of(wish)` is a flat uint8 tensor with this rank's own share in place. Every rank passes the same list.
    """
    import torch.distributed as dist

    me, world = dist.get_rank(group), dist.get_world_size(group)
    received = 0
    pending: list[Any] = []
    for one in shared:
        if me not in one.ranks:
            continue
        buffer = buffer_of(one.wish)
        for share in one.shares:
            part = buffer[share.start : share.stop]
            received += 0 if share.reader == me else len(part)
            pending += _pass_on(part, share.reader, one.ranks, me, world, group)
        if len(pending) > IN_FLIGHT:
            _wait(pending)
    _wait(pending)
    return received


def _pass_on(part: Any, reader: int, ranks: Sequence[int], me: int, world: int, group: Any) -> list[Any]:
    import torch.distributed as dist

    def name(rank: int) -> int:
        return rank if group is None else dist.get_global_rank(group, rank)

    if len(ranks) == world:
        return [dist.broadcast(part, name(reader), group=group, async_op=True)]
    if me == reader:
        return [dist.isend(part, name(rank), group=group) for rank in ranks if rank != me]
    return [dist.irecv(part, name(reader), group=group)]


def _wait(pending: list[Any]) -> None:
    for work in pending:
        work.wait()
    pending.clear()
