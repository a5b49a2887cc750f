"""Recovery from memory, carried out: the fragments of a planned step, read from wherever their slots are, checked, copied in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from holdfast.arrays import Box, Fragment, FragmentTable, rank_name, specs_of
from holdfast.coding import crc32c
from holdfast.errors import CorruptData, LayoutMismatch
from holdfast.snapshot.capture_plan import slot_view, view_of
from holdfast.snapshot.exchange import SlotReader, slot_name
from holdfast.snapshot.plan import RestorePlan
from holdfast.snapshot.state import Held
from holdfast.snapshot.view import Member

logger = logging.getLogger(__name__)


class SlotSource:
    """The fragments of one committed step, wherever their slots are. Every fragment is checked before any of it is used."""

    def __init__(self, plan: RestorePlan, members: Iterable[Member], table: FragmentTable, *, host: str) -> None:
        self._plan = plan
        self._readers = {member.node: SlotReader(member, mapped=member.host == host) for member in members}
        self._scratch = memoryview(b"")
        rows = list(table)
        self._by_array: dict[str, list[Fragment]] = {}
        for row in rows:
            self._by_array.setdefault(row.array, []).append(row)
        self.specs = specs_of(rows)

    def load(self, item: Held, rank: int) -> int:
        """Fill the local part of an array; returns the bytes read. Raises CorruptData or LayoutMismatch."""
        local, nbytes = item.local, 0
        for box in item.placement.boxes:
            if box.size:
                nbytes += self._fill(item.name, local, box, rank)
        return nbytes

    def _fill(self, name: str, local: torch.Tensor, box: Box, rank: int) -> int:
        rows = self._by_array.get(name, [])
        own = [row for row in rows if row.rank == rank and row.box == box]
        nbytes, filled = 0, 0
        for row in own or _distinct(rows):
            common = row.box.intersect(box) if box.shape else box
            if common is None:
                continue
            nbytes += self._copy(row, common, view_of(local, box, common))
            filled += common.size
        if filled != box.size:
            raise LayoutMismatch(f"{name}: the snapshot has {filled} of the {box.size} elements that this rank needs")
        return nbytes

    def _copy(self, row: Fragment, common: Box, out: torch.Tensor) -> int:
        node = self._plan.holders[row.rank]
        reader, name = self._readers[node], slot_name(row.rank, self._plan.index)
        if not reader.mapped and len(self._scratch) < row.nbytes:
            self._scratch = memoryview(bytearray(row.nbytes))
        data = reader.read(name, self._plan.epoch, self._plan.step, row.slot_offset, row.nbytes, self._scratch)
        found = crc32c(data)
        if found != row.crc32c:
            raise DamagedSlot(
                node,
                f"{row.array}, rank {row.rank}, step {self._plan.step} in {name} of node {node}+{row.slot_offset}: crc32c "
                f"{found:08x} ≠ {row.crc32c:08x}",
            )
        if common == row.box and out.is_contiguous() and out.device.type == "cpu":
            np.copyto(out.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(data, np.uint8))
            return row.nbytes
        source = slot_view(memoryview(bytearray(data)), 0, row.nbytes, out.dtype, row.shape)
        with torch.no_grad():
            out.copy_(view_of(source, row.box, common))
        return row.nbytes

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


class DamagedSlot(CorruptData):
    """The bytes of a node's slot are not the ones that were captured; `node` says whose to distrust."""

    def __init__(self, node: int, message: str) -> None:
        super().__init__(message)
        self.node = node


def _distinct(rows: Sequence[Fragment]) -> list[Fragment]:
    """One row for each box: several ranks may hold the same."""
    return list({(row.offset, row.shape): row for row in sorted(rows, key=lambda row: -row.rank)}.values())


def stored_name(name: str, rank: int, specs: Mapping[str, Any]) -> str:
    """Where a checkpoint keeps this rank's bytes of an array: its own if it has some, else everybody's."""
    own = rank_name(name, rank)
    return own if own in specs else name
