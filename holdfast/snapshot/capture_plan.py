"""Where every byte of a snapshot goes, and in what order it is copied. Pure, but for the views of live tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from holdfast.arrays import ITEMSIZE, Box, Fragment, FragmentTable, owned_boxes
from holdfast.snapshot.slots import aligned
from holdfast.snapshot.state import Held, local_part

SAMPLES = 64
"""Elements of each tensor compared after the copy. `_foreach` and fused kernels change DTensors without counting up their
version (torch 2.13), so versions alone would miss a mutation of sharded parameters."""


@dataclass(frozen=True, slots=True)
class Part:
    """One fragment to copy: which array, which box of it, and where in the slot it goes."""

    held: Held
    box: Box
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Parts that change together: those of one parameter group. `owner` is (optimizer, group), None for what nobody changes."""

    owner: tuple[int, int] | None
    parts: tuple[Part, ...]


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
    batches: tuple[Batch, ...]
    """What the copy thread copies, in the order in which it is going to be changed."""

    def is_current(self, signature: tuple[int, ...]) -> bool:
        return self.signature == signature and all(home.get(key) is tensor for home, key, tensor in self._homes)

    @cached_property
    def _homes(self) -> tuple[tuple[dict[Any, Any], Any, torch.Tensor], ...]:
        return tuple((*part.held.home, part.held.tensor) for part in self.parts if part.held.home is not None)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that are copied."""
        return tuple(part.held.tensor for part in self.parts)

    @cached_property
    def lazy(self) -> tuple[torch.Tensor, ...]:
        """Those that are copied while training goes on."""
        return tuple(part.held.tensor for part in self.parts if part.held.lazy)

    @cached_property
    def eager(self) -> tuple[tuple[Part, ...], ...]:
        """What is copied at once. Lone numbers of one type go together: an optimizer counts its steps for each parameter."""
        found: dict[Any, list[Part]] = {}
        for place, part in enumerate(self.parts):
            if not part.held.lazy:
                tensor = part.held.tensor
                alone = type(tensor) is not torch.Tensor or tensor.dim() > 0 or tensor.device.type != "cpu"
                found.setdefault(place if alone else tensor.dtype, []).append(part)
        return tuple(map(tuple, found.values()))


Owners = Mapping[int, tuple[int, int]]
"""Which optimizer and group changes a tensor, by the tensor's identity."""


def plan_capture(
    held: list[Held], rank: int, signature: tuple[int, ...] = (), owners: Owners = MappingProxyType({})
) -> CapturePlan:
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
    return CapturePlan(tuple(parts), table, offset, offset + 2 * len(encoded), layout, signature, batches_of(parts, owners))


def batches_of(parts: Iterable[Part], owners: Owners) -> tuple[Batch, ...]:
    """What may wait for the copy thread, by who changes it first: groups in the optimizers' order, what nobody changes last."""
    found: dict[tuple[int, int] | None, list[Part]] = {}
    for part in parts:
        if part.held.lazy:
            found.setdefault(owners.get(id(part.held.tensor)), []).append(part)
    order = sorted(found, key=lambda owner: (owner is None, owner or ()))
    return tuple(Batch(owner, tuple(found[owner])) for owner in order)


def _row(part: Part, rank: int) -> Fragment:
    spec = part.held.placement.spec
    return Fragment(spec.name, spec.dtype, spec.shape, part.box.offset, part.box.shape, rank, part.offset, part.nbytes)


def source_of(part: Part) -> torch.Tensor:
    """The live elements of a part, as a view of the local tensor."""
    return view_of(part.held.local, part.held.placement.boxes[0], part.box)


def view_of(local: torch.Tensor, holds: Box, box: Box) -> torch.Tensor:
    return local if box == holds else local[box.slices(holds)]


def slot_view(body: memoryview, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes of one fragment in a slot as a tensor, without a copy."""
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body, dtype=torch.uint8, count=nbytes, offset=offset).view(dtype).view(shape)


def samples(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements of the tensor as bytes, on its own device: NaN equals itself then, and 0.0 is not -0.0."""
    local = local_part(tensor)
    every = max(1, local.numel() // SAMPLES)
    if local.is_contiguous():
        picked = local.reshape(-1)[::every]
    else:  # the same elements in row-major order, without a copy of the whole
        places = torch.arange(0, local.numel(), every, device=local.device)
        picked = local[torch.unravel_index(places, local.shape)]
    return picked.clone(memory_format=torch.contiguous_format).view(torch.uint8)
