"""Whether ranks that hold the same bytes still do: a small portion of them is summed with a capture, another one each time.

A snapshot holds each replicated byte once, so its own sums would not tell. All ranks capture the same step, so the sums of one
portion can be compared without a collective; while a portion is summed, the fence keeps optimizers from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from holdfast.coding import crc32c
from holdfast.snapshot.capture_plan import Owners
from holdfast.snapshot.state import Held

PORTION_NBYTES, PIECES = 2 << 20, 32
"""Most that one portion holds: a fraction of a millisecond to sum, and a few hundred bytes to tell."""

Portion = tuple["Piece", ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of one array as this rank holds it, under a name that all its replicas give to it; and who changes it."""

    name: str
    held: Held
    start: int
    stop: int
    owner: tuple[int, int] | None = None


def portions(held: Iterable[Held], owners: Owners) -> list[Portion]:
    """Everything that other ranks hold as well and only an optimizer changes, on the CPU; in the same order on every replica."""
    found: list[list[Piece]] = []
    room = 0
    for item in sorted(held, key=lambda item: item.name):
        local = item.local
        if not item.lazy or item.placement.replicas < 2 or local.device.type != "cpu" or not local.is_contiguous():
            continue
        nbytes = local.numel() * local.element_size()
        for start in range(0, nbytes, PORTION_NBYTES):
            stop = min(nbytes, start + PORTION_NBYTES)
            if not found or room < stop - start or len(found[-1]) == PIECES:
                found.append([])
                room = PORTION_NBYTES
            found[-1].append(Piece(_name_of(item, start), item, start, stop, owners.get(id(item.tensor))))
            room -= stop - start
    return [tuple(pieces) for pieces in found]


def _name_of(item: Held, start: int) -> str:
    offset = item.placement.boxes[0].offset
    shard = f" at {list(offset)}" if any(offset) else ""
    return item.name + shard + (f" from byte {start} on" if start else "")


def versions(portion: Portion) -> Mapping[str, int]:
    return {piece.name: piece.held.tensor._version for piece in portion}


def sums(portion: Portion, before: Mapping[str, int]) -> dict[str, int]:
    """CRC32C of each piece, left out where it is no longer what it was at `before`."""
    found = {piece.name: _sum(piece) for piece in portion if piece.held.is_current()}
    after = versions(portion)
    return {name: crc for name, crc in found.items() if after[name] == before[name]}


def _sum(piece: Piece) -> int:
    local = piece.held.local.reshape(-1).view(torch.uint8)
    return crc32c(local[piece.start : piece.stop].numpy().data)
